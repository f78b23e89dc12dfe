"""The peak memory of a training step of eight layers on MLX: `qkit.adapt` beside mlx-lm's LoRA or DoRA, on one converted base.

The layers are alternately [4 n, n] and [n, 4 n]. Both ways have the same codes and see the same rows.

Usage: python benchmarks/mlx_memory.py [--hidden N] [--rows N] [--recipe NAME] [--kind lora|dora] [--out FILE.json]
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from measure import Report
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRALinear

import qkit

LAYERS, RANK, STEPS = 8, 16, 3
PEER = {"lora": LoRALinear, "dora": DoRALinear}


class Blocks(nn.Module):
    """Pairs of linear layers with a residual."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        sizes = [(hidden, 4 * hidden), (4 * hidden, hidden)] * (LAYERS // 2)
        self.layers = [nn.Linear(inputs, outputs, bias=False) for inputs, outputs in sizes]

    def __call__(self, x: mx.array) -> mx.array:
        """x [rows, hidden] -> [rows, hidden]."""
        for up, down in zip(self.layers[::2], self.layers[1::2], strict=True):
            x = x + down(nn.relu(up(x)))
        return x


def build(way: str, given: argparse.Namespace) -> nn.Module:
    mx.random.seed(0)
    model: Any = qkit.convert(Blocks(given.hidden), given.recipe)
    if way == "qkit.adapt":
        model = qkit.adapt(model, qkit.Adapter(rank=RANK, kind=given.kind))
    else:
        model.freeze()
        model.layers = [PEER[given.kind].from_base(layer, r=RANK) for layer in model.layers]
    model.train()
    return model  # type: ignore[no-any-return]


def peak(model: nn.Module, given: argparse.Namespace, *, compiled: bool) -> tuple[float, float]:
    """Megabytes before the last of some steps, and at its peak."""
    optimizer = optim.AdamW(1e-4)
    optimizer.init(model.trainable_parameters())
    gradient = nn.value_and_grad(model, lambda x: model(x).square().mean())

    def update(x: mx.array) -> mx.array:
        value, slopes = gradient(x)
        optimizer.update(model, slopes)
        return value

    state = [model.state, optimizer.state]
    run: Callable[[mx.array], mx.array] = mx.compile(update, inputs=state, outputs=state) if compiled else update
    x = mx.random.normal((given.rows, given.hidden))
    mx.eval(x, state)
    before = 0
    for _ in range(STEPS):
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(run(x), state)
    return before / 1e6, mx.get_peak_memory() / 1e6


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--recipe", default="int4-g32")
    parser.add_argument("--kind", choices=tuple(PEER), default="lora")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    report = Report(
        given.out, about={"hidden": given.hidden, "rows": given.rows, "recipe": given.recipe, "kind": given.kind}
    )
    for way in (f"mlx-lm {given.kind}", "qkit.adapt"):
        for compiled in (False, True):
            before, most = peak(build(way, given), given, compiled=compiled)
            mode = "compiled" if compiled else "eager"
            report.add({"way": way, "mode": mode, "before MB": round(before, 1), "peak MB": round(most, 1)})
    report.finish()


if __name__ == "__main__":
    main()
