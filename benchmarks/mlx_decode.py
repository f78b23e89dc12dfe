"""A step of a Llama on MLX: qkit's converted model beside the one that `mlx.nn.quantize` makes at the same bits and group.

Both are built from the same weights, all linear layers and the embedding quantized; a step takes one token, or a prompt. The
models take turns, first one first, then the other; medians of the repeats with their spread.

Usage: python benchmarks/mlx_decode.py [--layers N] [--hidden N] ... [--compile] [--out FILE.json]
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from measure import Report, in_turn, quartiles, relative

import qkit
from qkit import Grid, Recipe, Rule

SCHEMES = {
    "int4-g64": (Grid("int4", 64), {"group_size": 64, "bits": 4}),
    "int8-g64": (Grid("int8", 64), {"group_size": 64, "bits": 8}),
    "mxfp4": (Grid("e2m1", 32), {"group_size": 32, "bits": 4, "mode": "mxfp4"}),
}
TOKENS = (1, 128)
Step = Callable[[mx.array], Any]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    for name, value in {"layers": 4, "hidden": 512, "intermediate": 1408, "heads": 8, "vocab": 4096}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--kv-heads", type=int, help="as many as heads, if left out")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES), choices=SCHEMES)
    parser.add_argument("--compile", action="store_true", help="run both models under mx.compile")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=0.3, help="how long one repeat of one model takes")
    parser.add_argument(
        "--processor-time", action="store_true", help="instead of wall time, for a busy machine; CPU only"
    )
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def config(given: argparse.Namespace, dtype: str) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": given.vocab,
        "hidden_size": given.hidden,
        "intermediate_size": given.intermediate,
        "num_hidden_layers": given.layers,
        "num_attention_heads": given.heads,
        "num_key_value_heads": given.kv_heads or given.heads,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "dtype": dtype,
    }


def pair(given: argparse.Namespace, dtype: str, scheme: str) -> dict[str, nn.Module]:
    """Our model and theirs, with the same weights."""
    engine, (grid, theirs) = qkit.backend("mlx"), SCHEMES[scheme]
    recipe = Recipe(scheme, (Rule(("*",), weight=grid), Rule(("*",), kind="embedding", weight=grid)))
    models = {}
    for name in ("qkit", "mlx.nn.quantize"):
        mx.random.seed(0)
        model = engine.build(config(given, dtype))
        if name == "qkit":
            model = qkit.convert(model, recipe)
        else:
            nn.quantize(model, **theirs)
        mx.eval(model.state)
        models[name] = model
    return models


def timed(step: Step, tokens: mx.array, steps: int, *, clock: Callable[[], float]) -> float:
    """Milliseconds of one of `steps` steps."""
    start = clock()
    for _ in range(steps):
        mx.eval(step(tokens))
    return (clock() - start) / steps * 1e3


def compare(given: argparse.Namespace, dtype: str, scheme: str, report: Report) -> None:
    """Adds a row for each number of tokens."""
    models = pair(given, dtype, scheme)
    compiled: dict[str, Step] = {name: mx.compile(model) if given.compile else model for name, model in models.items()}
    clock = time.process_time if given.processor_time else time.perf_counter
    for count in TOKENS:
        tokens = mx.ones((1, count), mx.int32)
        for step in compiled.values():
            timed(step, tokens, 3, clock=clock)
        steps = max(1, round(given.seconds * 1e3 / timed(compiled["qkit"], tokens, 3, clock=clock)))
        jobs = {name: partial(timed, step, tokens, steps, clock=clock) for name, step in compiled.items()}
        times = in_turn(jobs, given.repeats)
        ratios = [a / b for a, b in zip(*times.values(), strict=True)]
        row: dict[str, Any] = {"scheme": scheme, "dtype": dtype, "tokens": count}
        row["ms"] = {name: relative(found) for name, found in times.items()}
        report.add(row | {"qkit / mlx.nn.quantize": quartiles(ratios)})


def main() -> None:
    given = arguments()
    about = {
        "model": config(given, ", ".join(given.dtypes)),
        "compiled": given.compile,
        "clock": "processor" if given.processor_time else "wall",
    }
    report = Report(given.out, device=mx.default_device().type.name, about=about)
    for dtype in given.dtypes:
        for scheme in given.schemes:
            compare(given, dtype, scheme, report)
    report.finish()


if __name__ == "__main__":
    main()
