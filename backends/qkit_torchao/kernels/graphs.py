"""Which CUDA graph is being captured, if one is: torch says whether, the driver says which. And memory that is no graph's."""

import ctypes
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
from torch import Tensor

TREES = "torch._inductor.cudagraph_trees"


def number(device: torch.device) -> int:
    """0, or the driver's number of the capture that the current stream of `device` is in; no two captures share one."""
    if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        return 0
    status, found = ctypes.c_int(), ctypes.c_uint64()
    stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
    _driver().cuStreamGetCaptureInfo(stream, ctypes.byref(status), ctypes.byref(found))
    return found.value or 1


def lasting(make: Callable[[], Tensor]) -> Tensor:
    """What `make` allocates, for longer than one call of compiled code.

    Inductor's graph trees count whatever their thread allocates, before they capture, as part of a graph, and refuse to go on
    if it lives longer. Another thread's memory is its own.
    """
    return _elsewhere().submit(make).result() if TREES in sys.modules else make()


@cache
def _elsewhere() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="qkit-memory")


@cache
def _driver() -> Any:
    """The CUDA driver, which torch has loaded; `cuStreamGetCaptureInfo` is as in CUDA 10.1 there, whatever the version."""
    return ctypes.CDLL("libcuda.so.1")
