"""Which CUDA graph is being captured, if one is: torch says whether, the driver says which."""

import ctypes
from functools import cache
from typing import Any

import torch


def number(device: torch.device) -> int:
    """0, or the driver's number of the capture that the current stream of `device` is in; no two captures share one."""
    if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        return 0
    status, found = ctypes.c_int(), ctypes.c_uint64()
    stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
    _driver().cuStreamGetCaptureInfo(stream, ctypes.byref(status), ctypes.byref(found))
    return found.value or 1


@cache
def _driver() -> Any:
    """The CUDA driver, which torch has loaded; `cuStreamGetCaptureInfo` is as in CUDA 10.1 there, whatever the version."""
    return ctypes.CDLL("libcuda.so.1")
