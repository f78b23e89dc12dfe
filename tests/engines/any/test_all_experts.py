"""Tokens of all experts: the option is refused by name where no experts have static ranges."""

import pytest
from models import make
from tables import MODULES

import qkit

pytest.importorskip("transformers")

ENGINES = [name for name in ("torchao", "mlx") if name in MODULES]
WEIGHT = qkit.Grid("int8", "row")
INPUT = qkit.Grid("int8", "tensor")


@pytest.mark.parametrize("backend", ENGINES)
def test_all_experts_is_refused_where_no_experts_have_ranges(backend, tmp_path):
    rules = (
        qkit.Rule(("lm_head",)),
        qkit.Rule(("*",), weight=WEIGHT, activation=INPUT, range="calibrated"),
        qkit.Rule(("*",), "experts", WEIGHT),
    )
    model = qkit.load(make(tmp_path / "model", "mixtral"), backend=backend)
    model = qkit.prepare(model, qkit.Recipe("static", rules))
    with (
        pytest.raises(
            qkit.StageError, match=rf"all_experts=True is for experts with static ranges.* none on {backend}"
        ),
        qkit.calibrating(model, all_experts=True),
    ):
        pass
    with qkit.calibrating(model):
        pass
