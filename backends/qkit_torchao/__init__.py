"""The torch engine of qkit, which deploys to torchao's tensors: its hook and its callback. No framework is imported."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from qkit.engines.hookspecs import hookimpl
from qkit.engines.protocol import BackendSpec
from qkit.installation import how_to_install

if TYPE_CHECKING:
    from qkit_torchao.training.transformers import QatCallback

__all__ = ["QatCallback", "qkit_backends"]


@hookimpl
def qkit_backends() -> Iterable[BackendSpec]:
    """One backend, for CPU and CUDA alike."""
    return [
        BackendSpec(
            "torchao",
            "qkit_torchao.backend:TorchaoBackend",
            framework="torch",
            install=how_to_install("torch"),
            requires=("torchao",),
        )
    ]


def __getattr__(name: str) -> Any:
    """`QatCallback`, which needs transformers, at its first use. Not in `dir()`: pluggy reads all names that stand there."""
    if name != "QatCallback":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from qkit_torchao.training.transformers import QatCallback

    return QatCallback
