"""QLoRA on a model that mlx-lm quantized: qkit's adapters beside mlx-lm's own, on the same base, batches, rank and optimizer.

A small Llama is trained in float on Python's own source and quantized by `mlx_lm.convert -q`. Both adapters then train on other
text (the standard library's tests) by mlx-lm's own `train`, with the same warm-up and cosine. mlx-lm trains Q(W) + BA, and its
`fuse` quantizes the sum by `mx.quantize`, with new scales and biases. qkit trains as `qkit train` does: a quarter of the steps
beside the base, the others with codes of the sum on the stored scales, and gains of scales and biases throughout. Its merge
changes all three. The merged model is exported, opened in mlx-lm, and measured there too. Losses are nats per byte of
held-out text.

With `--prepared DIR` the text and the models are those in DIR, where they are made if it is empty: for runs on another machine.

Usage: python benchmarks/qlora_affine.py [--bits N ...] [--seed N ...] [--steps N] [--rate R ...] [--float-steps N] [--dtype NAME]
       [--prepared DIR] [--out FILE.json]
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count, product
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx_lm
import numpy as np
from measure import Report
from merge_gap import MATCH, RANK, SMALL, base, other_text
from mlx.utils import tree_unflatten
from mlx_lm.tuner.lora import LoRALinear
from mlx_lm.tuner.trainer import TrainingArgs, train
from mlx_lm.utils import load_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import qkit
from qkit.exchange.export_model import export_mlx
from qkit.exchange.import_model import read_model, to_artifact
from qkit.training import Sequences, sequences
from qkit.training.beside import factor_at, steps_beside, switching_parts
from qkit.training.data import Tokens
from qkit.training.rates import rate

WARMUP = 10
Loss = Callable[[Any], float]
Before = Callable[[int], None]
Factor = Callable[[int], float]
Fit = Callable[[Any, Factor], None]


def batches(text: Sequences, before: Before, *, seed: int) -> Callable[..., Iterator[tuple[mx.array, mx.array]]]:
    """A function in the place of mlx-lm's `iterate_batches`: the same batches for every model. Calls `before` for each step."""

    def iterate(**_: Any) -> Iterator[tuple[mx.array, mx.array]]:
        random = np.random.default_rng(seed)
        for step in count(1):
            rows = text.rows(random.integers(0, len(text), SMALL.batch))
            before(step)
            yield mx.array(rows), mx.array([[0, rows.shape[1]]] * len(rows))

    return iterate


def fit(model: Any, factor: Factor, text: Sequences, place: Path, *, seed: int, steps: int, peak: float) -> None:
    """mlx-lm's own training of the adapters of `model`: a warm-up, then a cosine to zero, each step times its `factor`."""

    def before(step: int) -> None:
        optimizer.learning_rate = rate(step, peak=peak, steps=steps, warmup=WARMUP, shape="cosine") * factor(step)

    optimizer = optim.Adam(learning_rate=peak)
    arguments = TrainingArgs(
        batch_size=SMALL.batch,
        iters=steps,
        steps_per_save=steps,
        steps_per_report=steps,
        adapter_file=str(place / "a.safetensors"),
    )
    train(model, optimizer, None, args=arguments, iterate_batches=batches(text, before, seed=seed))


def measure(unseen: Tokens) -> Loss:
    """A function that returns the loss of a model, in evaluation mode."""

    def loss(model: Any) -> float:
        model.eval()
        total = mx.array(0.0)
        for rows in np.split(unseen, 4):
            logits = model(mx.array(rows[:, :-1])).astype(mx.float32)
            total = total + nn.losses.cross_entropy(logits, mx.array(rows[:, 1:]), reduction="mean")
            mx.eval(total)
        return float(total) / 4

    return loss


def theirs(
    folder: Path, first: dict[str, mx.array], loss: Loss, fit_to: Callable[[Any], None], scale: float
) -> tuple[float, float]:
    """mlx-lm's adapters: the loss before and after they are merged as its `fuse` command does."""
    model = load(folder)
    model.freeze()
    made = []
    for path, module in model.named_modules():
        if path in first:
            layer = LoRALinear.from_base(module, r=RANK, scale=scale)
            layer.lora_a = first[path]
            made.append((path, layer))
    model.update_modules(tree_unflatten(made))
    fit_to(model)
    before = loss(model)
    model.update_modules(tree_unflatten([(path, layer.fuse()) for path, layer in made]))
    return before, loss(model)


def load(folder: Path) -> Any:
    """The model in `folder`, opened by mlx-lm."""
    return load_model(folder)[0]


def ours(
    folder: Path, place: Path, loss: Loss, fitted: Fit, adapter: qkit.Adapter, steps: int
) -> tuple[dict[str, float], Any]:
    """qkit's adapters on the same base; and the first A of each layer, by its path."""
    engine, model = qkit.backend("mlx"), qkit.load(folder, backend="mlx")
    untouched = loss(model)
    model = qkit.adapt(model, adapter)
    layers = [layer for layer in engine.layers(model) if layer.adapter]
    first = {layer.path: mx.array(np.array(layer.module.lora_a)) for layer in layers}
    last = steps_beside(adapter, layers, steps)
    switch = switching_parts(engine, layers, last)

    def factor(step: int) -> float:
        switch(step)
        return factor_at(adapter, layers, last, step)

    fitted(model, factor)
    before = loss(model)
    model = qkit.merge(model)
    after = loss(model)
    qkit.save(model, place / "merged", source=folder)
    export_mlx(read_model(place / "merged"), place / "exported")
    return {
        "untrained": untouched,
        "qkit before": before,
        "qkit after": after,
        "qkit after, in mlx-lm": loss(load(place / "exported")),
    }, first


def prepared(place: Path, float_steps: int) -> tuple[Sequences, Tokens]:
    """The text to train on and the text to measure on. Makes both, and a float model, in `place` where they are missing."""
    if not (place / "text.npz").exists():
        text, unseen = other_text()
        bytes_of = {"text": text.tokens.astype(np.uint8), "unseen": unseen.astype(np.uint8)}
        np.savez_compressed(place / "text.npz", **bytes_of)
    if not (place / "float").exists():
        base(place / "float", float_steps)
        PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer()).save_pretrained(place / "float")
    with np.load(place / "text.npz") as held:
        text, unseen = (held[name].astype(np.int32) for name in ("text", "unseen"))
    return sequences(text, length=SMALL.length, name="the standard library's tests"), unseen


def quantized(place: Path, bits: int, dtype: str) -> tuple[Path, Path]:
    """mlx-lm's conversion of the float model in `place`, and qkit's artifact of it. Makes each where it is missing."""
    folder, artifact = place / f"mlx-{bits}-{dtype}", place / f"artifact-{bits}-{dtype}"
    if not folder.exists():
        mlx_lm.convert(str(place / "float"), str(folder), quantize=True, q_bits=bits, dtype=dtype)
        to_artifact(read_model(folder), artifact)
    return folder, artifact


def byte_tokenizer() -> Tokenizer:
    """A tokenizer whose tokens are bytes, since `mlx_lm.convert` wants one."""
    made = Tokenizer(
        models.BPE({letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return made


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--bits", type=int, action="append", default=[])
    parser.add_argument("--seed", type=int, action="append", default=[])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rate", type=float, action="append", default=[])
    parser.add_argument("--scale", type=float, default=20.0)  # mlx-lm's default
    parser.add_argument(
        "--factor", type=float, default=1.0
    )  # of qkit's rate on the grid: the rates of both are the same
    parser.add_argument("--float-steps", type=int, default=600)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prepared", type=Path)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    about = {
        "rank": RANK,
        "scale": given.scale,
        "factor": given.factor,
        "steps": given.steps,
        "warmup": WARMUP,
        "dtype": given.dtype,
    }
    report = Report(given.out, packages=("mlx-lm",), about={**about, "float steps": given.float_steps})
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        models = given.prepared or place / "prepared"
        models.mkdir(exist_ok=True)
        text, unseen = prepared(models, given.float_steps)
        loss = measure(unseen)
        for bits in given.bits or [4]:
            folder, artifact = quantized(models, bits, given.dtype)
            for peak, seed in product(given.rate or [1e-4, 3e-4, 1e-3], given.seed or [1, 2, 3]):
                own = place / f"run {bits} {peak} {seed}"
                own.mkdir()

                def fitted(model: Any, factor: Factor, own: Path = own, seed: int = seed, peak: float = peak) -> None:
                    fit(model, factor, text, own, seed=seed, steps=given.steps, peak=peak)

                choices = {"seed": seed, "factor": given.factor, "norms": "stored"}  # those of mlx-lm do not train
                adapter = qkit.Adapter(rank=RANK, alpha=given.scale * RANK, match=MATCH, **choices)
                mine, first = ours(artifact, own, loss, fitted, adapter, given.steps)
                before, after = theirs(folder, first, loss, partial(fitted, factor=lambda step: 1.0), given.scale)
                fused = {"mlx-lm before": before, "mlx-lm after": after}
                report.add({"bits": bits, "rate": peak, "seed": seed, **mine, **fused})
    report.finish()


if __name__ == "__main__":
    main()
