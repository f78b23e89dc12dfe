"""Quantizing and fake-quantizing a weight, in GB/s of input, beside a copy of the same array and beside the peer.

Peers: `mx.quantize` + `mx.dequantize` (MLX), torchao's fake quantizer as its QAT applies it (torch). All in one run, in turn,
so that the ratios hold on a noisy machine; medians, with the spread of the repeats.

Usage: python benchmarks/speed.py [--rows N] [--columns N] [--repeats N]
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable

import numpy as np

import qkit

GRIDS = {
    "int4-g64": qkit.Grid("int4", 64),
    "int8-g64": qkit.Grid("int8", 64),
    "mxfp4": qkit.Grid("e2m1", 32),
    "mxfp8": qkit.Grid("e4m3", 32),
    "nvfp4": qkit.Grid("e2m1", 16, "nvfp4"),
}
Job = Callable[[], object]


def torch_jobs(w: np.ndarray) -> dict[str, Job]:
    """What is timed on torch, in bfloat16 as models are."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchao.quantization.qat import IntxFakeQuantizeConfig, IntxFakeQuantizer

    x = torch.from_numpy(w).to(torch.bfloat16)
    engine, out = qkit.backend("torchao"), torch.empty_like(x)
    jobs: dict[str, Job] = {"copy": lambda: out.copy_(x)}
    for name, grid in GRIDS.items():
        fake = torch.compile(lambda x, grid=grid: engine.fake_quantize(x, grid))
        jobs[f"{name} quantize"] = lambda grid=grid: engine.quantize(x, grid)
        jobs[f"{name} fake"] = lambda grid=grid: engine.fake_quantize(x, grid)
        jobs[f"{name} fake, compiled"] = lambda fake=fake: fake(x)
    peer = IntxFakeQuantizer(IntxFakeQuantizeConfig(torch.int4, group_size=64))
    compiled_peer = torch.compile(peer)
    jobs["torchao int4-g64 fake"] = lambda: peer(x)
    jobs["torchao int4-g64 fake, compiled"] = lambda: compiled_peer(x)
    return jobs


def mlx_jobs(w: np.ndarray) -> dict[str, Job]:
    """What is timed on MLX, in float32, which its CPU backend is built for."""
    import mlx.core as mx

    x = mx.array(w)
    engine = qkit.backend("mlx")
    jobs: dict[str, Job] = {"copy": lambda: mx.eval(mx.contiguous(x + 0))}
    for name, grid in GRIDS.items():
        fake = mx.compile(lambda x, grid=grid: engine.fake_quantize(x, grid))
        jobs[f"{name} quantize"] = lambda grid=grid: mx.eval(list(engine.quantize(x, grid).parts().values()))
        jobs[f"{name} fake"] = lambda grid=grid: mx.eval(engine.fake_quantize(x, grid))
        jobs[f"{name} fake, compiled"] = lambda fake=fake: mx.eval(fake(x))
    for name, options in {
        "int4-g64": {"group_size": 64, "bits": 4},
        "mxfp4": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
        "mxfp8": {"group_size": 32, "bits": 8, "mode": "mxfp8"},
    }.items():

        def fake(options: dict = options) -> None:
            mx.eval(mx.dequantize(*mx.quantize(x, **options), **options))

        jobs[f"mx.quantize {name}"] = lambda options=options: mx.eval(mx.quantize(x, **options))
        jobs[f"mx.quantize + mx.dequantize {name}"] = fake
    return jobs


def numpy_jobs(w: np.ndarray) -> dict[str, Job]:
    """What is timed on NumPy."""
    jobs: dict[str, Job] = {"copy": w.copy}
    for name, grid in GRIDS.items():
        jobs[f"{name} quantize"] = lambda grid=grid: qkit.quantize(w, grid)
        jobs[f"{name} fake"] = lambda grid=grid: qkit.fake_quantize(w, grid)
    return jobs


def measure(jobs: dict[str, Job], repeats: int) -> dict[str, list[float]]:
    """Seconds of each repeat of each job; the jobs take turns."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for job in jobs.values():
        job()
    for _ in range(repeats):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            times[name].append(time.perf_counter() - start)
    return times


def main() -> None:
    parser = argparse.ArgumentParser()
    for option, default in (("--rows", 2048), ("--columns", 4096), ("--repeats", 5)):
        parser.add_argument(option, type=int, default=default)
    given = parser.parse_args()
    w = np.random.default_rng(0).standard_normal((given.rows, given.columns)).astype(np.float32)
    width = {"numpy": 4, "torchao": 2, "mlx": 4}
    for name, jobs in (("numpy", numpy_jobs), ("torchao", torch_jobs), ("mlx", mlx_jobs)):
        if not any(status.name == name and status.ready for status in qkit.backends()):
            continue
        times = measure(jobs(w), given.repeats)
        copy = statistics.median(times["copy"])
        print(f"\n{name}, {given.rows} x {given.columns}, {width[name]} bytes each, {given.repeats} repeats")
        print(f"{'':44}{'GB/s':>8}{'time / copy':>13}{'spread':>16}")
        for job, seconds in times.items():
            median = statistics.median(seconds)
            spread = f"{min(seconds) / median:.2f}..{max(seconds) / median:.2f}"
            print(f"{job:44}{w.size * width[name] / median / 1e9:8.2f}{median / copy:13.1f}{spread:>16}", flush=True)


if __name__ == "__main__":
    main()
