"""A training step of a Llama on MLX: qkit's prepared models beside the float model, with MLX's AdamW and with qkit's.

All have the same weights and see the same tokens, the whole batch at once or in parts whose gradients are added. `hook` is how
MLX fine-tuning tools train quantised: absmax by MLX's operations in every forward, `w + stop_gradient(q - w)`. The models take
turns, and every ratio is of two steps of one turn; medians with quartiles. On a CPU the model is tiny and in float32.

Usage: python benchmarks/mlx_train.py [--layers N] [--hidden N] ... [--repeats N] [--out FILE.json]
"""

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from measure import Report, in_turn, quartiles
from mlx.utils import tree_map

import qkit
from qkit.engines.trainer import AdamWOptions

GPU = mx.default_device().type == mx.gpu
SIZES = (
    {"layers": 12, "hidden": 1024, "intermediate": 4096, "heads": 16, "vocab": 32000, "rows": 8, "length": 1024}
    if GPU
    else {"layers": 2, "hidden": 192, "intermediate": 512, "heads": 4, "vocab": 512, "rows": 8, "length": 32}
)
RECIPES = ["int4-g64", "int3-g64", "mxfp4-a16", "int8-dynamic-act-int4-weight", "mxfp4"]
HOOKED = {"int4-g64": 4, "int3-g64": 3}
PLAIN = "plain, AdamW"
Step = Callable[[mx.array], Any]


class Hook(nn.Module):
    """A linear layer that rounds its weight anew in every forward, in groups of 64."""

    def __init__(self, weight: mx.array, bits: int) -> None:
        super().__init__()
        self.weight, self.highest = weight, 2 ** (bits - 1) - 1

    def __call__(self, x: mx.array) -> mx.array:
        w = self.weight.reshape(-1, 64)
        scale = mx.maximum(mx.abs(w).max(axis=-1, keepdims=True) / self.highest, 1e-8)
        q = (mx.clip(mx.round(w / scale), -self.highest - 1, self.highest) * scale).reshape(self.weight.shape)
        return x @ (self.weight + mx.stop_gradient(q - self.weight)).T


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    for name, value in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", default="bfloat16" if GPU else "float32")
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--modes", nargs="+", default=["eager", "compiled"], choices=["eager", "compiled"])
    parser.add_argument("--parts", nargs="+", type=int, default=[1, 8], help="of a batch, in one step")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--steps", type=int, default=3 if GPU else 1, help="timed together")
    parser.add_argument("--processor-time", action="store_true", help="not wall time, for a busy machine; CPU only")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def config(given: argparse.Namespace) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": given.vocab,
        "hidden_size": given.hidden,
        "intermediate_size": given.intermediate,
        "num_hidden_layers": given.layers,
        "num_attention_heads": given.heads,
        "num_key_value_heads": given.heads,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "dtype": given.dtype,
    }


def build(given: argparse.Namespace, recipe: str, way: str) -> nn.Module:
    engine = qkit.backend("mlx")
    mx.random.seed(0)
    model = engine.build(config(given))
    if way == "hook":
        hooks = {
            layer.path: Hook(layer.module.weight, HOOKED[recipe])
            for layer in engine.layers(model)
            if layer.kind == "linear" and layer.path != "lm_head"
        }
        model = engine.replace(model, hooks)
    elif recipe != "plain":
        model = qkit.prepare(model, recipe)
    model.train()
    mx.eval(model.state)
    return model


def variants(given: argparse.Namespace) -> Iterator[tuple[str, str, str]]:
    """Name, recipe and way: of the float model, and of every recipe."""
    for recipe in ("plain", *given.recipes):
        for way in ("AdamW", "qkit.adamw"):
            yield f"{recipe}, {way}", recipe, way
        if recipe in HOOKED:
            yield f"{recipe}, hook", recipe, "hook"


def stepper(model: nn.Module, way: str, *, parts: int, compiled: bool) -> Step:
    """One step on tokens [rows, length + 1]; what is given back is evaluated."""
    ours = way == "qkit.adamw"
    engine = qkit.backend("mlx")
    optimizer: Any = optim.AdamW(1e-4, bias_correction=True)
    if ours:
        optimizer = engine.adamw(model, AdamWOptions(learning_rate=1e-4))
    else:
        optimizer.init(model.trainable_parameters())
    mx.eval(optimizer.state)

    def loss(tokens: mx.array) -> mx.array:
        logits = model(tokens[:, :-1]).astype(mx.float32)
        mean: mx.array = nn.losses.cross_entropy(logits, tokens[:, 1:]).mean()
        return mean

    gradient = nn.value_and_grad(model, loss)

    def step(tokens: mx.array) -> mx.array:
        total, value = None, mx.array(0.0)
        for part in mx.split(tokens, parts):
            value, slopes = gradient(part)
            if not compiled and parts > 1:
                mx.eval(slopes)
            total = slopes if total is None else tree_map(mx.add, total, slopes)
        optimizer.update(model, total)
        return value

    state = [model.state, optimizer.state]
    run: Step = mx.compile(step, inputs=state, outputs=state) if compiled else step

    def evaluated(tokens: mx.array) -> mx.array:
        value = run(tokens)
        mx.eval(value, state)
        return value

    return evaluated


def timed(step: Step, tokens: mx.array, steps: int, clock: Callable[[], float]) -> float:
    """Milliseconds of one of `steps` steps."""
    start = clock()
    for _ in range(steps):
        step(tokens)
    return (clock() - start) / steps * 1e3


def compare(given: argparse.Namespace, mode: str, parts: int, recipe: str, report: Report) -> None:
    """Adds a row for each variant of `recipe`, each beside the float model in the same turns."""
    clock = time.process_time if given.processor_time else time.perf_counter
    tokens = mx.random.randint(0, given.vocab, (given.rows, given.length + 1), key=mx.random.key(1))
    chosen = [variant for variant in variants(given) if variant[1] in ("plain", recipe)]
    steps = {
        name: stepper(build(given, recipe, way), way, parts=parts, compiled=mode == "compiled")
        for name, recipe, way in chosen
    }
    for step in steps.values():
        timed(step, tokens, 2, clock)
    times = in_turn(
        {name: partial(timed, step, tokens, given.steps, clock) for name, step in steps.items()}, given.repeats
    )
    for name, found in times.items():
        beside = {
            f"/ {base}": quartiles([a / b for a, b in zip(found, times[base], strict=True)])
            for base in (PLAIN, "plain, qkit.adamw")
        }
        report.add({"mode": mode, "parts": parts, "variant": name, "ms": quartiles(found), **beside})


def main() -> None:
    given = arguments()
    about = {
        "model": config(given),
        "tokens": [given.rows, given.length],
        "clock": "processor" if given.processor_time else "wall",
    }
    report = Report(given.out, device=mx.default_device().type.name, about=about)
    for mode in given.modes:
        for parts in given.parts:
            for recipe in given.recipes:
                compare(given, mode, parts, recipe, report)
    report.finish()


if __name__ == "__main__":
    main()
