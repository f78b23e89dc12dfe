"""Launches of the kernels in fp64 that have the bits of the law."""

from torch import Tensor

from qkit_torchao.kernels import nvrtc
from qkit_torchao.kernels.cuda import device_of

ROWS = 32  #: threads of a program that work alone
THREADS = 128  #: threads of a program that work in teams
EXACT = ("--fmad=false",)


def launch(
    kernel: nvrtc.Kernel, given: tuple[tuple[str, int], ...], programs: tuple[int, int], tensors: tuple[Tensor | None, ...],
    numbers: tuple[int, ...], *, threads: int = THREADS,
) -> None:  # fmt: skip
    """Launches `programs` on the device of the first tensor, with the addresses of all, and numbers."""
    first = tensors[0]
    assert first is not None
    with device_of(first):
        kernel(given, programs, threads, (*(0 if one is None else one.data_ptr() for one in tensors), *numbers))
