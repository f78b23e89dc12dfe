"""The torch engine of qkit, which deploys to torchao's tensors: its hook and its callback. No framework is imported."""

from collections.abc import Iterable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from qkit.engines.hookspecs import hookimpl
from qkit.engines.protocol import BackendSpec
from qkit.installation import how_to_install

if TYPE_CHECKING:
    from qkit_torchao.models.gather_codes import gather_codes
    from qkit_torchao.models.save_parts import save_sharded
    from qkit_torchao.training.head_loss import chunk_loss
    from qkit_torchao.training.schemes import QatArguments, qat_scheme
    from qkit_torchao.training.transformers import QatCallback

__all__ = ["QatArguments", "QatCallback", "chunk_loss", "gather_codes", "qat_scheme", "qkit_backends", "save_sharded"]

#: Modules of the names that are imported late.
LATE = {
    "QatCallback": "training.transformers",
    "QatArguments": "training.schemes",
    "chunk_loss": "training.head_loss",
    "gather_codes": "models.gather_codes",
    "qat_scheme": "training.schemes",
    "save_sharded": "models.save_parts",
}


@hookimpl
def qkit_backends() -> Iterable[BackendSpec]:
    """One backend, for CPU and CUDA alike."""
    return [
        BackendSpec(
            "torchao",
            "qkit_torchao.backend:TorchaoBackend",
            framework="torch",
            install=how_to_install("cuda"),
            requires=("torchao",),
        )
    ]


def __getattr__(name: str) -> Any:
    """The names that need torch or transformers, at their first use. Not in `dir()`: pluggy reads all names that stand there."""
    if name not in LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"qkit_torchao.{LATE[name]}"), name)
