"""Quantizing and fake-quantizing a weight on every grid, on the CPU: qkit on each engine beside `mx.quantize` and torchao.

Nanoseconds for a number; all columns of a row in one run, in turn, so that their ratios hold on a noisy machine; medians, and
the spread of qkit's repeats. `quantize` goes to codes and scales: packed words in the columns `qkit`, `mlx` and `qkit on mlx,
packed`, which is what a converted layer holds, a byte for a code in the others. `fake` goes to values in the type of the weight.

Usage: python benchmarks/speed.py [--rows N] [--columns N] [--repeats N] [--dtypes bfloat16 float32] [--out FILE.json]
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

import qkit
from qkit import Grid, native
from qkit.element import INTEGERS
from qkit.formats.mlx_lm import containers_for
from qkit.formats.packed import pack
from qkit.streaming import fast_reference

INTEGERS = {element.name: Grid(element, 64) for element in INTEGERS}
GRIDS = {
    **{f"{name}-g64": grid for name, grid in INTEGERS.items()},
    "int4-g64-minmax": Grid("int4", 64, "minmax"),
    "int4-g32": Grid("int4", 32),
    "int4-g128": Grid("int4", 128),
    "int8-row": Grid("int8", "row"),
    "mxfp4": Grid("e2m1", 32),
    "mxfp8": Grid("e4m3", 32),
    "mxfp8-e5m2": Grid("e5m2", 32),
    "nvfp4": Grid("e2m1", 16, "nvfp4"),
    "fp8-row": Grid("e4m3", "row"),
    "fp8-tensor": Grid("e4m3", "tensor"),
}
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float32": np.float32, "float16": np.float16}
PEERS = ("mlx", "torchao")  #: columns that are not qkit's
Job = Callable[[], object]
Row = tuple[str, str]  #: the name of a grid, and what is done: `quantize` or `fake`
Jobs = Iterator[tuple[Row, str, Job]]  #: with the column


def numpy_jobs(w: np.ndarray) -> Jobs:
    """qkit on NumPy arrays, with its kernels where it was built with them."""
    out = np.empty_like(w)
    for name, grid in GRIDS.items():
        if native.available():
            yield (name, "quantize"), "qkit", lambda grid=grid: native.quantize_packed(w, grid)
            yield (name, "fake"), "qkit", lambda grid=grid: native.fake_quantize(w, grid, out=out)
        yield (name, "quantize"), "qkit, NumPy", lambda grid=grid: pack(fast_reference.quantize(w, grid))


def torch_jobs(w: np.ndarray) -> Jobs:
    """qkit on torch, and torchao's own tensors."""
    import torch

    x = (
        torch.from_numpy(w.view(np.int16)).view(torch.bfloat16)
        if w.dtype == ml_dtypes.bfloat16
        else torch.from_numpy(w)
    )
    engine = qkit.backend("torchao")
    for name, grid in GRIDS.items():
        yield (name, "quantize"), "qkit on torch", lambda grid=grid: engine.quantize(x, grid)
        yield (name, "fake"), "qkit on torch", lambda grid=grid: engine.fake_quantize(x, grid)
        if (make := torchao_tensor(x, grid)) is not None:
            yield (name, "quantize"), "torchao", make
            yield (name, "fake"), "torchao", lambda make=make: make().dequantize()


def torchao_tensor(x: Any, grid: Grid) -> Callable[[], Any] | None:
    """A function that makes torchao's tensor of `x` nearest to `grid`; None where it has none."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchao.prototype.mx_formats.config import ScaleCalculationMode
        from torchao.prototype.mx_formats.mx_tensor import MXTensor
        from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor
        from torchao.quantization import IntxUnpackedToInt8Tensor
        from torchao.quantization.granularity import PerRow, PerTensor
        from torchao.quantization.quant_primitives import MappingType
        from torchao.quantization.quantize_.workflows.float8.float8_tensor import Float8Tensor

    element, group = grid.element.name, grid.group
    if grid.element.kind == "integer":
        block = (1, x.shape[1] if group == "row" else group)
        mapping = MappingType.SYMMETRIC if grid.symmetric else MappingType.ASYMMETRIC
        kind = getattr(torch, element)
        return lambda: IntxUnpackedToInt8Tensor.from_hp(x, block, kind, mapping_type=mapping)
    if grid.scale == "nvfp4":
        return lambda: NVFP4Tensor.to_nvfp4(x)
    if group == 32:
        mode = ScaleCalculationMode.RCEIL
        kinds = {"e2m1": torch.float4_e2m1fn_x2, "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
        return lambda: MXTensor.to_mx(x, kinds[element], 32, mode)
    granularity = PerRow() if group == "row" else PerTensor()
    return lambda: Float8Tensor.from_hp(x, torch.float8_e4m3fn, granularity)


def mlx_jobs(w: np.ndarray) -> Jobs:
    """qkit on MLX, and MLX's own functions."""
    import mlx.core as mx
    from qkit_mlx.layers.containers import Contents, contain

    def arrays(contents: Contents) -> list[mx.array]:
        named = (contents.weight, contents.scales, contents.biases, contents.tensor_scale)
        return [array for array in named if array is not None]

    x = mx.array(w.astype(np.float32)).astype(getattr(mx, w.dtype.name))
    engine = qkit.backend("mlx")
    mx.eval(x)
    for name, grid in GRIDS.items():
        yield (
            (name, "quantize"),
            "qkit on mlx",
            lambda grid=grid: mx.eval(list(engine.quantize(x, grid).parts().values())),
        )
        yield (name, "fake"), "qkit on mlx", lambda grid=grid: mx.eval(engine.fake_quantize(x, grid))
        if grid.group not in (16, 32, 64, 128) or name == "mxfp8-e5m2":
            continue
        container = containers_for(grid, w.shape[1])[0]
        yield (
            (name, "quantize"),
            "qkit on mlx, packed",
            lambda grid=grid, container=container: mx.eval(arrays(contain(engine.quantize(x, grid), container))),
        )
        mode = name if grid.element.kind == "float" else "affine"
        options = {"group_size": grid.group, "bits": grid.element.bits, "mode": mode}

        def fake(options: dict[str, Any] = options) -> None:
            mx.eval(mx.dequantize(*mx.quantize(x, **options), **options))

        yield (name, "quantize"), "mlx", lambda options=options: mx.eval(mx.quantize(x, **options))
        yield (name, "fake"), "mlx", fake


ENGINES = {"numpy": numpy_jobs, "torchao": torch_jobs, "mlx": mlx_jobs}


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


def rows(w: np.ndarray, repeats: int) -> Iterator[dict[str, Any]]:
    """One row for each grid and for each of `quantize` and `fake`."""
    ready = {status.name for status in qkit.backends() if status.ready}
    table: dict[Row, dict[str, Job]] = {}
    for engine, jobs in ENGINES.items():
        for row, column, job in jobs(w) if engine in ready else ():
            table.setdefault(row, {"copy": w.copy})[column] = job
    for (name, what), jobs in table.items():
        times = measure(jobs, repeats)
        each = {column: statistics.median(seconds) / w.size * 1e9 for column, seconds in times.items()}
        ours = times.get("qkit", times.get("qkit, NumPy", times["copy"]))
        peers = [each[peer] for peer in PEERS if peer in each]
        median = statistics.median(ours)
        on_mlx = "qkit on mlx, packed" if what == "quantize" else "qkit on mlx"
        yield {
            "grid": name,
            "what": what,
            "dtype": w.dtype.name,
            "ns": {column: round(ns, 3) for column, ns in each.items()},
            "spread": [round(min(ours) / median, 2), round(max(ours) / median, 2)],
            "qkit / faster peer": round(each["qkit"] / min(peers), 3) if peers and "qkit" in each else None,
            "qkit on mlx / mlx": round(each[on_mlx] / each["mlx"], 3) if "mlx" in each else None,
        }


def main() -> None:
    parser = argparse.ArgumentParser()
    for option, default in (("--rows", 2048), ("--columns", 4096), ("--repeats", 5)):
        parser.add_argument(option, type=int, default=default)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=DTYPES)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    made = []
    for dtype in given.dtypes:
        w = (
            np.random.default_rng(0)
            .standard_normal((given.rows, given.columns))
            .astype(np.float32)
            .astype(DTYPES[dtype])
        )
        for row in rows(w, given.repeats):
            made.append(row)
            columns = "  ".join(f"{column} {ns:.2f}" for column, ns in row["ns"].items())
            print(
                f"{dtype:9}{row['grid']:17}{row['what']:9}{row['qkit / faster peer']!s:>7}  {columns}", file=sys.stderr
            )
    machine = {"cpu": processor(), "cores": os.cpu_count()}
    machine |= {name: version(name) for name in ("numpy", "torch", "torchao", "mlx")}
    command = f"python {' '.join(sys.argv[: sys.argv.index('--out')] if given.out else sys.argv)}"
    text = json.dumps({"command": command, "machine": machine, "kernels": native.available(), "rows": made}, indent=1)
    given.out.write_text(text + "\n") if given.out else print(text)


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


if __name__ == "__main__":
    main()
