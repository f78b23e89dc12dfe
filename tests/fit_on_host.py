"""Runs `fit.cu` and `factor.cu` on a CPU, compiled as C++: a stand-in for `nvrtc.Kernel`, with its signature."""

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

from qkit_torchao.kernels import nvrtc

COMPILER = shutil.which("g++")
WAITS = (
    "sift",
    "feed",
    "descend",
    "eliminate",
    "eliminate_below",
    "take_products",
)  #: kernels whose threads wait for each other


class HostKernel:
    """Launches the kernel, one thread after the other; each choice of constants is compiled once, into `folder`."""

    def __init__(self, kernel: nvrtc.Kernel, folder: Path) -> None:
        self._kernel, self._folder = kernel, folder

    def __call__(
        self,
        constants: tuple[tuple[str, int], ...],
        programs: tuple[int, int],
        threads: int,
        arguments: tuple[int, ...],
    ) -> None:
        """As `nvrtc.Kernel.__call__`."""
        given = [kind(one) for kind, one in zip(self._kernel.kinds, arguments, strict=True)]
        places = (ctypes.c_void_p * len(given))(*(ctypes.addressof(one) for one in given))
        self._compile(constants).launch(*programs, threads, places)

    def _compile(self, constants: tuple[tuple[str, int], ...]) -> Any:
        name = "-".join([self._kernel.name, *(str(value) for _, value in constants)])
        library = self._folder / f"{name}.so"
        if not library.exists():
            flags = [f"-D{name}={value}" for name, value in constants]
            kernel = [f'-DKERNELS="{self._kernel.path}"', f"-DKERNEL={self._kernel.name}"]
            flags += ["-DWAITS"] * (self._kernel.name in WAITS)
            options = ["-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-w", *flags, *kernel]
            header = Path(__file__).with_name("doubles_host.h")
            assert COMPILER
            subprocess.run([COMPILER, *options, "-x", "c++", header, "-o", library], check=True)
        return ctypes.CDLL(str(library))
