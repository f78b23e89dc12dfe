"""Quantizing and fake-quantizing a weight on every grid, on the CPU: qkit on each engine beside `mx.quantize` and torchao.

Nanoseconds for a number; all columns of a row in one run, in turn, so that their ratios hold on a noisy machine; medians, and
the spread of qkit's repeats. `quantize` goes to codes and scales: packed words in the columns `qkit`, `mlx` and `qkit on mlx,
packed`, which is what a converted layer holds, a byte for a code in the others. `fake` goes to values in the type of the weight.

Usage: python benchmarks/speed.py [--rows N] [--columns N] [--repeats N] [--dtypes bfloat16 float32] [--out FILE.json]
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from measure import Report, in_turn, relative

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


def seconds(job: Job) -> float:
    """How long `job` takes once."""
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def rows(w: np.ndarray, repeats: int) -> Iterator[dict[str, Any]]:
    """One row for each grid and for each of `quantize` and `fake`."""
    ready = {status.name for status in qkit.backends() if status.ready}
    table: dict[Row, dict[str, Job]] = {}
    for engine, jobs in ENGINES.items():
        for row, column, job in jobs(w) if engine in ready else ():
            table.setdefault(row, {"copy": w.copy})[column] = job
    for (name, what), jobs in table.items():
        for job in jobs.values():
            job()
        times = in_turn({column: partial(seconds, job) for column, job in jobs.items()}, repeats)
        ns = {column: [one / w.size * 1e9 for one in found] for column, found in times.items()}
        each = {column: statistics.median(found) for column, found in ns.items()}
        peers = [each[peer] for peer in PEERS if peer in each]
        on_mlx = "qkit on mlx, packed" if what == "quantize" else "qkit on mlx"
        yield {
            "grid": name,
            "what": what,
            "dtype": w.dtype.name,
            "ns": {column: relative(found, 3) for column, found in ns.items()},
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
    report = Report(given.out, about={"kernels": native.available()})
    for dtype in given.dtypes:
        w = (
            np.random.default_rng(0)
            .standard_normal((given.rows, given.columns))
            .astype(np.float32)
            .astype(DTYPES[dtype])
        )
        for row in rows(w, given.repeats):
            report.add(row)
    report.finish()


if __name__ == "__main__":
    main()
