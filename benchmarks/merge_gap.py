"""The loss before and after an adapter is merged: for qkit's adapters and for those of peft and mlx-lm on the same layers.

A small Llama is trained in float on Python's own source, prepared for a recipe, and trained on with adapters on other text (the
standard library's tests). `qkit` trains FQ(W + BA), which is what a merge leaves. `float adapter`, as peft (torch) and mlx-lm
(MLX) have it on prepared layers, trains FQ(W) + BA; merged and put on the grid, that is FQ(W + BA), another number.

Usage: python benchmarks/merge_gap.py [--backend NAME ...] [--recipe NAME ...] [--steps N] [--out FILE.json]
"""

import argparse
import json
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from measure import Report

import qkit
from qkit.adapters import Adapter
from qkit.adapters.surgery import base_weights
from qkit.demo.preset import PRESET, standard_library
from qkit.engines.trainer import TrainerOptions
from qkit.reference.merged import merged
from qkit.training import Order, Sequences, Step, read_bytes, sequences, train
from qkit.training.data import Tokens
from qkit.training.rates import rate

SMALL = replace(PRESET, layers=2, batch=8, length=64)
MATCH = ("*_proj",)
RANK, ALPHA = 8, 16.0


def cut(files: Iterable[Path]) -> Sequences:
    """The bytes of `files` in sequences of the length that is trained on."""
    return sequences(read_bytes(files, limit=1 << 24), length=SMALL.length, name="the standard library")


def other_text() -> tuple[Sequences, Tokens]:
    """Text of another kind to train on, and 64 sequences of it held out."""
    files = sorted((Path(sysconfig.get_paths()["stdlib"]) / "test").glob("*.py"))
    if not files:
        raise SystemExit("this Python has no tests beside its library: there is no text to adapt to")
    unseen = cut(files[::10])
    picked = np.linspace(0, len(unseen) - 1, 64).astype(np.int64)
    return cut(f for i, f in enumerate(files) if i % 10), unseen.rows(picked)


def steps_of(
    engine: Any, model: Any, data: Sequences, *, seed: int, steps: int, peak: float, warmup: int, weight_decay: float
) -> Iterator[Step]:
    """Trains `model` for `steps` steps, one each time the iterator is advanced."""
    order = Order(data, SMALL.batch, accumulation=1, seed=seed)
    return train(
        engine.trainer(model, TrainerOptions(weight_decay=weight_decay)),
        order,
        first=1,
        last=steps,
        rate=lambda step: rate(step, peak=peak, steps=steps, warmup=warmup, shape="cosine"),
        before=lambda step: None,
    )


def base(folder: Path, steps: int) -> None:
    """A float Llama, trained on torch, for both engines."""
    engine = qkit.backend("torchao")
    model = engine.build(SMALL.config)
    files, _ = standard_library(SMALL)
    text = cut(map(Path, files))
    for step in steps_of(engine, model, text, seed=0, steps=steps, peak=1.5e-3, warmup=20, weight_decay=0.1):
        if step.number % 100 == 0:
            print(f"float, step {step.number}: {step.loss:.3f}", file=sys.stderr, flush=True)
    qkit.save(model, folder)
    (folder / "config.json").write_text(json.dumps(SMALL.config))


def with_peft(model: Any) -> tuple[Any, Callable[[Any], Any]]:
    """peft's adapters on prepared layers, and their merge."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers deprecates what peft asks of it
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        made = peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets))
    return made, lambda model: model.merge_and_unload()


def with_mlx_lm(model: Any) -> tuple[Any, Callable[[Any], Any]]:
    """mlx-lm's adapters on prepared layers; merged as its `fuse` does, but into the prepared layer."""
    from mlx.utils import tree_unflatten
    from mlx_lm.tuner.lora import LoRALinear

    layers = [(layer.path, layer.module) for layer in qkit.backend("mlx").layers(model) if layer.stage == "prepared"]
    model.freeze()
    made = [(path, LoRALinear.from_base(module, r=RANK, scale=ALPHA / RANK)) for path, module in layers]
    model.update_modules(tree_unflatten(made))

    def merge(model: Any) -> Any:
        for _, one in made:
            one.linear.weight = one.linear.weight + (one.scale * one.lora_b.T) @ one.lora_a.T
        model.update_modules(tree_unflatten([(path, one.linear) for path, one in made]))
        return model

    return model, merge


def ours(kind: str) -> Callable[[Any], tuple[Any, Callable[[Any], Any]]]:
    """qkit's adapters."""
    wish = Adapter(rank=RANK, alpha=ALPHA, kind=kind, match=MATCH)
    return lambda model: (qkit.adapt(model, wish), qkit.merge)


def trained_codes(engine: Any, model: Any) -> dict[str, np.ndarray]:
    """The codes of the merged weights that qkit's adapted layers compute with, by the reference; none for other adapters."""
    adapted = [layer for layer in engine.layers(model) if layer.adapter]
    updated = {}
    for layer in adapted:
        update = engine.adapter_update(layer.module)
        updated[layer.path] = merged(next(base_weights(engine, layer, "weight", spread=update.dithered)), update)
    return {layer.path: qkit.quantize(updated[layer.path], layer.rule.weight).codes for layer in adapted}


def gap(name: str, folder: Path, recipe: str, kind: str, start: Callable[[Any], Any], steps: int) -> dict[str, Any]:
    """Trains, merges, converts; losses in nats per byte of held-out text."""
    engine, (text, unseen) = qkit.backend(name), other_text()
    model, merge = start(qkit.prepare(qkit.load(folder, backend=name), recipe))
    first = engine.loss(model, unseen)
    for _ in steps_of(engine, model, text, seed=1, steps=steps, peak=2e-3, warmup=5, weight_decay=0.0):
        pass
    before, codes = engine.loss(model, unseen), trained_codes(engine, model)
    model = qkit.convert(merge(model))
    after = engine.loss(model, unseen)
    row = {"backend": name, "recipe": recipe, "adapter": kind, "untrained": first, "before": before, "after": after}
    row["gap"] = after - before
    if codes:
        held = {layer.path: layer.module for layer in engine.layers(model)}
        pairs = [(engine.to_numpy(engine.unpack(held[path]).codes), one) for path, one in codes.items()]
        row["codes flipped"] = int(sum((a != b).sum() for a, b in pairs))
        row["codes"] = sum(one.size for one in codes.values())
    return row


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", action="append", choices=("torchao", "mlx"), default=[])
    parser.add_argument("--recipe", action="append", default=[])
    parser.add_argument("--float-steps", type=int, default=600)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    theirs = {"torchao": ("float adapter (peft)", with_peft), "mlx": ("float adapter (mlx-lm)", with_mlx_lm)}
    report = Report(given.out, packages=("peft", "mlx-lm", "transformers"))
    with tempfile.TemporaryDirectory() as home:
        base(Path(home) / "float", given.float_steps)
        for recipe in given.recipe or ["int4-g64", "int2-g64", "mxfp4-a16"]:
            for name in given.backend or list(theirs):
                for kind, start in (("qkit lora", ours("lora")), ("qkit dora", ours("dora")), theirs[name]):
                    report.add(gap(name, Path(home) / "float", recipe, kind, start, given.steps))
    report.finish()


if __name__ == "__main__":
    main()
