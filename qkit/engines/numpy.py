"""The NumPy engine, from which any other one can start: arrays only, no modules.

It runs the C kernels where qkit was built with a compiler, else the reference itself; the bits are the same.
"""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from qkit import native, reference
from qkit.engines.hookspecs import hookimpl
from qkit.engines.protocol import Arrays, BackendSpec
from qkit.errors import BackendError
from qkit.grid import Grid
from qkit.qtensor import QTensor
from qkit.rules import Ste


@hookimpl
def qkit_backends() -> Iterable[BackendSpec]:
    """The NumPy backend, through the same hook as any other."""
    return [BackendSpec("numpy", "qkit.engines.numpy:NumpyBackend", framework="numpy", install="pip install numpy")]


class NumpyBackend:
    """`Arrays`, by the reference.

    A new engine begins as a subclass that overrides `from_numpy` and `to_numpy`. The reference then carries out every
    operation. The engine adds `Modules`, and replaces one operation after another with its own.
    """

    name = "numpy"
    framework = "numpy"

    def on(self, device: str) -> Self:
        """Itself, on the CPU.

        Raises:
            BackendError: any other device.
        """
        if device != "cpu":
            raise BackendError(
                f"backend {self.name!r} has no device {device!r}, only the cpu: leave the device out, or choose another backend"
            )
        return self

    def quantize(self, w: Any, grid: Grid, *, peak: float | None = None) -> QTensor[Any]:
        """See `Arrays.quantize`."""
        quantize = native.quantize if native.available() else reference.quantize
        return quantize(self.to_numpy(w), grid, peak=peak).map(self.from_numpy)

    def dequantize(self, q: QTensor[Any]) -> Any:
        """See `Arrays.dequantize`."""
        return self.from_numpy(reference.dequantize(q.map(self.to_numpy)))

    def fake_quantize(self, w: Any, grid: Grid, *, ste: Ste = "identity", scales: Any = None, zeros: Any = None) -> Any:
        """See `Arrays.fake_quantize`. NumPy has no gradients, so that `ste` changes nothing."""
        if scales is None and native.available():
            return self.from_numpy(native.fake_quantize(self.to_numpy(w), grid))
        scales, zeros = self._given(scales), self._given(zeros)
        return self.from_numpy(reference.fake_quantize(self.to_numpy(w), grid, scales=scales, zeros=zeros))

    def unclipped(self, w: Any, grid: Grid, *, scales: Any = None, zeros: Any = None) -> Any:
        """See `Arrays.unclipped`."""
        scales, zeros = self._given(scales), self._given(zeros)
        return self.from_numpy(reference.unclipped(self.to_numpy(w), grid, scales=scales, zeros=zeros))

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` itself: NumPy has no compiler."""
        return function

    def from_numpy(self, x: NDArray[Any]) -> Any:
        """`x` itself."""
        return x

    def to_numpy(self, x: Any) -> NDArray[Any]:
        """`x` itself."""
        return np.asarray(x)

    def _given(self, x: Any) -> NDArray[Any] | None:
        return None if x is None else self.to_numpy(x)

    def magnitude(self, x: Any) -> float:
        """Largest magnitude in `x`; NaN if there is a NaN."""
        return float(np.abs(self.to_numpy(x).astype(np.float32)).max(initial=0.0))


if TYPE_CHECKING:
    _offered: Arrays = NumpyBackend()  # mypy compares every verb with the protocol
