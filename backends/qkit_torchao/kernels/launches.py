"""Launches of Triton kernels by their compiled forms, which are faster for the host than Triton's own."""

from collections.abc import Hashable
from typing import Any


class Kernel:
    """A Triton kernel that remembers its compiled forms by the keys that its callers give.

    At every launch Triton binds arguments, inspects types and alignments, and looks its compiled form up, in Python. For a small
    tensor the host takes longer for that than the device for the work. A compiled form can be launched by itself.
    """

    def __init__(self, function: Any) -> None:
        self._function = function
        self._compiled: dict[Hashable, Any] = {}

    def __call__(self, key: Hashable, programs: int, arguments: tuple[Any, ...], *, warps: int) -> None:
        """Launches `programs` on the current device.

        Args:
            key: all that the compiled form depends on: device, types, constants, and alignments unless the kernel ignores them.
            arguments: all of them, with constants, in the order of the kernel's signature.
        """
        compiled = self._compiled.get(key)
        if compiled is None:
            self._compiled[key] = self._function[(programs,)](*arguments, num_warps=warps)
        else:
            compiled[(programs, 1, 1)](*arguments)
