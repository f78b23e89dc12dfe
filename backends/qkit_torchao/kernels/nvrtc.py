"""Kernels in CUDA C++, compiled for the device at hand by NVRTC, which comes with torch, and cached on disk. Needs no compiler.

`cuda.bindings` is NVIDIA's own package for NVRTC and the driver; torch's builds for CUDA bring it from 2.11 on.
"""

import ctypes
import logging
import os
import re
from collections.abc import Mapping
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from qkit.errors import BackendError

INCLUDED = re.compile(r'^#include "(.*)"$', re.MULTILINE)
POINTER, NUMBER = ctypes.c_void_p, ctypes.c_int  #: kinds of arguments
OPTIONS = ("--std=c++17", "--diag-suppress=177")  #: a constant that one variant does not need is no fault


log = logging.getLogger("qkit")


@cache
def why_not(device: torch.device) -> str:
    """Why nothing can be compiled for the GPU `device`, and the way out; empty where it can."""
    try:
        from cuda import bindings
        from cuda.bindings import nvrtc
    except ImportError:
        return "cuda-bindings is not installed: pip install 'qkit-quant[cuda]'"
    has, wants = (
        str(text).partition(".")[0] for text in (bindings.__version__, torch.version.cuda or bindings.__version__)
    )
    package = "nvidia-cuda-nvrtc" + ("-cu12" if has == "12" else "")
    try:
        version = _done(nvrtc.nvrtcVersion())
        (known,) = _done(nvrtc.nvrtcGetSupportedArchs())
    except Exception as error:  # the package has several classes for a library that is not there
        missing = package if has == wants else f"'cuda-bindings=={wants}.*'"  # torch brings NVRTC of its own CUDA
        return f"NVRTC does not load ({str(error).partition(chr(10))[0]}): pip install {missing}"
    major, minor = torch.cuda.get_device_capability(device)
    if 10 * major + minor not in known:
        return (
            f"NVRTC {'.'.join(map(str, version))} has no {torch.cuda.get_device_name(device)}, of compute capability "
            f"{major}.{minor}: pip install --upgrade {package}"
        )
    return ""


class Kernel:
    """The function `name` of a file of CUDA C++ in this folder, which may include others of them.

    Args:
        kinds: of its arguments, `POINTER` or `NUMBER`.
        early: whether it may begin while its predecessor in the stream still runs; it waits for that by itself ("programmatic
            dependent launch" in the CUDA programming guide). Devices before compute capability 9.0 ignore it.
        options: of the compiler, beside `OPTIONS`.

    Attributes:
        path: of the file.
        name, kinds, early, options: as given.
    """

    def __init__(
        self, file: str, name: str, kinds: tuple[type, ...], *, early: bool = False, options: tuple[str, ...] = ()
    ) -> None:
        self.name, self.kinds, self.path = name, kinds, Path(__file__).with_name(file)
        self.early, self.options = early, options
        self._compiled: dict[Any, Any] = {}

    def __call__(
        self,
        constants: tuple[tuple[str, int], ...],
        programs: tuple[int, int],
        threads: int,
        arguments: tuple[int, ...],
        *,
        memory: int = 0,
    ) -> None:
        """Launches `programs` of `threads` on torch's current device and stream.

        Args:
            constants: macros; the function is compiled once for each choice of them, and for each kind of device.
            arguments: addresses, 0 for none, and numbers.
            memory: bytes of dynamic shared memory; with the static ones at most 48 KiB.

        Raises:
            BackendError: NVRTC or the driver refuse.
        """
        from cuda.bindings import driver

        device = torch.cuda.current_device()
        function = self._compiled.get((device, constants))
        if function is None:
            function = self._compiled[device, constants] = self._load(dict(constants), device)
        # The driver takes addresses. A number's four bytes begin its slot of eight, since hosts of CUDA store low bytes first.
        count = len(arguments)
        slots = (ctypes.c_uint64 * count)(*arguments)
        first = ctypes.addressof(slots)
        places = (ctypes.c_uint64 * count)(*range(first, first + 8 * count, 8))
        given, stream = ctypes.addressof(places), torch.cuda.current_stream(device).cuda_stream
        if not (self.early and capability(device) >= (9, 0)):
            _done(driver.cuLaunchKernel(function, *programs, 1, threads, 1, 1, memory, stream, given, 0))
            return
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = *programs, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes, config.hStream = memory, stream
        config.attrs, config.numAttrs = [_early()], 1
        _done(driver.cuLaunchKernelEx(config, function, given, 0))

    def _load(self, constants: Mapping[str, int], device: int) -> Any:
        from cuda.bindings import driver

        major, minor = capability(device)
        options = *self.options, *(f"-D{name}={int(value)}" for name, value in sorted(constants.items()))
        code = _code(source_of(self.path), f"sm_{major}{minor}", options)
        (module,) = _done(driver.cuModuleLoadData(code))
        (function,) = _done(driver.cuModuleGetFunction(module, self.name.encode()))
        return function


@cache
def capability(device: int) -> tuple[int, int]:
    """The compute capability of a GPU."""
    return torch.cuda.get_device_capability(device)


@cache
def _early() -> Any:
    """The attribute of a launch that may begin early."""
    from cuda.bindings import driver

    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    return attribute


def source_of(path: Path) -> str:
    """The text of a file, with those that it includes by name."""
    return INCLUDED.sub(lambda found: source_of(path.with_name(found[1])), path.read_text())


def _code(source: str, target: str, more: tuple[str, ...]) -> bytes:
    """Machine code, from the cache if it is there."""
    from cuda.bindings import nvrtc

    version = _done(nvrtc.nvrtcVersion())
    options = [f"--gpu-architecture={target}", *OPTIONS, *more]
    kept = cache_folder() / f"{sha256(repr((source, options, version)).encode()).hexdigest()}.cubin"
    try:
        return kept.read_bytes()
    except OSError:
        _tell()
        code = _compile(source, options)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        new = kept.with_suffix(f".{os.getpid()}")
        new.write_bytes(code)
        new.replace(kept)
    except OSError:
        pass  # a home that cannot be written: the next process compiles again
    return code


@cache
def _tell() -> None:
    """Says once that kernels are compiled, since that takes a second each."""
    log.warning(
        "qkit compiles its kernels for this GPU, once for each kind of layer: they are cached in %s", cache_folder()
    )


@cache
def cache_folder() -> Path:
    """Where machine code is kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qkit" / "kernels"


def _compile(source: str, options: list[str]) -> bytes:
    from cuda.bindings import nvrtc

    (program,) = _done(nvrtc.nvrtcCreateProgram(source.encode(), b"kernels.cu", 0, [], []))
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [one.encode() for one in options])
        if int(status):
            (size,) = _done(nvrtc.nvrtcGetProgramLogSize(program))
            log = bytes(size)
            _done(nvrtc.nvrtcGetProgramLog(program, log))
            raise BackendError(
                f"NVRTC does not compile a kernel of qkit: {log.decode(errors='replace').strip(chr(0)).strip()}"
            )
        (size,) = _done(nvrtc.nvrtcGetCUBINSize(program))
        code = bytes(size)
        _done(nvrtc.nvrtcGetCUBIN(program, code))
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return code


def _done(result: tuple[Any, ...]) -> tuple[Any, ...]:
    """The values of a call of NVIDIA's, without its status."""
    status, *values = result
    if int(status):
        raise BackendError(f"CUDA answers {status.name}")
    return tuple(values)
