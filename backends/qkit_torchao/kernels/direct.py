"""Launching a Triton kernel once more with less ado. CUDA only."""

from collections.abc import Hashable
from typing import Any


class Kernel:
    """A kernel whose compiled forms are remembered by what their callers say they depend on.

    At every launch Triton binds arguments, looks at types and alignments, and finds what it compiled for such, in Python: the
    host is longer about it than the device is about a small tensor. A compiled kernel can be launched by itself.
    """

    def __init__(self, function: Any) -> None:
        self._function = function
        self._compiled: dict[Hashable, Any] = {}

    def __call__(self, key: Hashable, programs: int, arguments: tuple[Any, ...], *, warps: int) -> None:
        """Launches `programs` on the current device.

        Args:
            key: what the compiled form depends on: the device, types, constants, and alignments unless the kernel ignores them.
            arguments: all of them, constants as well, in the order of the kernel's signature.
        """
        compiled = self._compiled.get(key)
        if compiled is None:
            self._compiled[key] = self._function[(programs,)](*arguments, num_warps=warps)
        else:
            compiled[(programs, 1, 1)](*arguments)
