"""Runs `products.cu` and `few.cu` on a CPU, compiled as C++: a stand-in for `nvrtc.Kernel`, with its signature."""

import atexit
import ctypes
import shutil
import subprocess
import tempfile
from pathlib import Path

from qkit_torchao.kernels import nvrtc

COMPILER = shutil.which("g++")


class HostKernel:
    """Launches the kernel on threads of the CPU; each choice of constants is compiled once."""

    def __init__(self, kernel: nvrtc.Kernel) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="qkit-products-"))
        atexit.register(shutil.rmtree, self._folder, True)
        self._kernel = kernel
        self._compiled: dict = {}

    def __call__(self, constants, programs, threads, arguments, *, memory=0) -> None:
        """As `nvrtc.Kernel.__call__`."""
        known = dict(constants)
        assert threads == 32 * known["WARPS"]
        if constants not in self._compiled:
            self._compiled[constants] = self.compile(known)
        given = (kind(one) for kind, one in zip(self._kernel.kinds, arguments, strict=True))
        self._compiled[constants](*programs, *given)

    def compile(self, constants):
        """The function, compiled with `constants`."""
        library = self._folder / f"{len(self._compiled)}.so"
        flags = [f"-D{name}={int(value)}" for name, value in constants.items()]
        if self._kernel.name == "arrange":
            flags.append("-DARRANGES")
        command = [
            COMPILER, "-std=c++17", "-O0", "-ffp-contract=off", "-shared", "-fPIC", "-pthread", "-w", *flags,
            f'-DKERNELS="{self._kernel.path}"', "-x", "c++", Path(__file__).with_name("products_host.h"), "-o", library,
        ]  # fmt: skip
        subprocess.run(command, check=True)
        return ctypes.CDLL(str(library)).launch
