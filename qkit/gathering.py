"""gather: the whole of a model that is spread over processes."""

from typing import Any

from qkit.engines.protocol import Arrays
from qkit.pipeline import surgeon


def gather(model: Any, *, backend: str | Arrays | None = None) -> Any:
    """The whole of a model that FSDP2 has sharded, to convert and save: in process 0, on the CPU; None in the others.

    Every process has to call it. The sharded model stays as it is, and none of its tensors is shared. A model that is whole is
    given back as it is, everywhere.

    Raises:
        BackendError: no engine works on such a model.
    """
    engine = surgeon(model, backend)
    return engine.gather(model) if hasattr(engine, "gather") else model
