"""The types of the public calls, which `make lint` has mypy read: a model comes back as its own type. Never imported."""

from pathlib import Path
from typing import Any, assert_type

import qkit


class Mine:
    """The class of somebody's model."""


def check(model: Mine, folder: Path) -> None:
    """One call of each kind."""
    assert_type(qkit.prepare(model, "int4-g64"), Mine)
    assert_type(qkit.convert(model), Mine)
    assert_type(qkit.adapt(model, qkit.Adapter()), Mine)
    assert_type(qkit.merge(model), Mine)
    assert_type(qkit.gather(model), Mine | None)
    assert_type(qkit.load(folder, into=model), Mine)
    assert_type(qkit.load(folder, backend="torchao"), Any)
    assert_type(qkit.reference.learned.is_learned("weight_scale"), bool)
