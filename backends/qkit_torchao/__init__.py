"""The torch engine of qkit, deploying to torchao's tensors. Only the hook is here; nothing heavy is imported."""

from collections.abc import Iterable

from qkit.engines.hookspecs import hookimpl
from qkit.engines.protocol import BackendSpec
from qkit.installation import how_to_install


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
