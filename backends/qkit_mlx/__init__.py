"""qkit on MLX. Only the hook is here; MLX is imported when the backend is first used."""

from collections.abc import Iterable

from qkit.engines.hookspecs import hookimpl
from qkit.engines.protocol import BackendSpec
from qkit.installation import how_to_install


@hookimpl
def qkit_backends() -> Iterable[BackendSpec]:
    """The one backend that works on `mlx.core.array` and `mlx.nn.Module`."""
    return [BackendSpec("mlx", "qkit_mlx.backend:MlxBackend", framework="mlx", install=how_to_install("mac"))]
