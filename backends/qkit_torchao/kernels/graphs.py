"""Which CUDA graph is being captured, if any: torch says whether, the driver says which. And memory that belongs to no graph."""

import ctypes
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qkit_torchao.torch_private import GRAPH_TREES


def number(device: torch.device) -> int:
    """0, or the driver's number of the capture that the current stream of `device` is in; no two captures share one."""
    if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        return 0
    status, found = ctypes.c_int(), ctypes.c_uint64()
    stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
    _driver().cuStreamGetCaptureInfo(stream, ctypes.byref(status), ctypes.byref(found))
    return found.value or 1


def lasting(allocate: Callable[[], Tensor]) -> Tensor:
    """The tensor that `allocate` returns, in memory that outlives a call of compiled code.

    Before Inductor's graph trees capture, they count all that their thread allocates as part of a graph. They refuse to go on
    if such memory lives longer. Memory that another thread allocates is not counted.
    """
    return _other_thread().submit(allocate).result() if GRAPH_TREES in sys.modules else allocate()


@cache
def _other_thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="qkit-memory")


@cache
def _driver() -> Any:
    """The CUDA driver, which torch has loaded. Its `cuStreamGetCaptureInfo` is that of CUDA 10.1 in every version."""
    return ctypes.CDLL("libcuda.so.1")
