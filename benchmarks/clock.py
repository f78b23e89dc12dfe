"""Steps as CUDA graphs, and their time by the clock: for the benchmarks in torch."""

import time
from collections.abc import Callable
from typing import Any

import torch


def captured(step: Callable[[], Any]) -> Callable[[], None]:
    """Replays of `step` as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(4):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def replay(_: Any = step) -> None:  # `step` holds the tensors that the graph reads
        graph.replay()

    return replay


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of a run by the clock, until the device has ended it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began
