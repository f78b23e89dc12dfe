"""The loss that is deployed after training adapters: on a base of codes, on a prepared base, and as peft trains them.

A small Llama (benchmarks/small_llama.py) is trained in float on the code of Python's standard library. All ways then train on
English prose, Python's own topics of help, with the same batches, rank, optimizer and rates. Losses are nats per byte of held-out
prose, of:

- `float, quantized`: peft's LoRA on the float model, merged, and quantized
- `kept`: QLoRA, peft's LoRA on the decoded base; deployed as codes with the adapter beside them, in float
- `quantized again`: the same, merged and quantized again
- `kept, same rates`, `quantized again, same rates`: the same, each step at the rate of `packed`, whose last part has a factor
- `packed`: `qkit.adapt` on codes, merged, by the parts and the factor of `qkit train` (`qkit.training.beside`)
- `scales`: the same with `Adapter(scales="learned")`
- `prepared`: `qkit.adapt` on the prepared model, merged and converted
- `full`: all weights of the prepared model, converted

Usage: python benchmarks/adapters.py [--recipe NAME ...] [--rate R ...] [--seed N ...] [--way NAME ...] [--steps N]
       [--float-steps N] [--factor F] [--out FILE.json]
"""

import argparse
import copy
import math
import sysconfig
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import small_llama
import torch
from measure import Report
from torch import Tensor, nn
from torch.nn import functional as F

import qkit
from qkit.training.beside import factor_at, steps_beside, switching_parts

SIZE = small_llama.Size(hidden=96, layers=3, intermediate=256, heads=4)
LENGTH, BATCH, WARMUP = 64, 8, 20
RANK, ALPHA = 16, 32.0
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTER = qkit.Adapter(rank=RANK, alpha=ALPHA, match=("*_proj",))
ENGINE = qkit.backend("torchao")
WAYS = ("float", "qlora", "same rates", "packed", "scales", "prepared", "full")


def code() -> Tensor:
    """The bytes of the standard library's modules."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8)


def prose() -> tuple[Tensor, Tensor]:
    """The bytes of Python's topics of help to train on, and the last tenth, held out."""
    from pydoc_data.topics import topics

    text = torch.frombuffer(bytearray("\n".join(topics[name] for name in sorted(topics)).encode()), dtype=torch.uint8)
    cut = len(text) * 9 // 10
    return text[:cut], text[cut:]


def base(steps: int) -> nn.Module:
    """The float model."""
    model = small_llama.Llama(SIZE, seed=0, longest=LENGTH)
    run = small_llama.Run(steps=steps, batch=BATCH, length=LENGTH, rate=4e-3, weight_decay=0.1, seed=0, half=False)
    small_llama.train(model, code(), run)
    return model


def fit(model: nn.Module, text: Tensor, *, rate: float, steps: int, seed: int, before: Callable[[int], float]) -> None:
    """Trains the free parameters by AdamW: a warm-up, then a cosine to a tenth. `before` returns the factor of a step's rate."""
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.0)
    starts = torch.from_numpy(np.random.default_rng(seed).integers(0, len(text) - LENGTH - 1, (steps, BATCH)))
    window = torch.arange(LENGTH + 1)
    model.train()
    for step in range(1, steps + 1):
        done = max(0, step - WARMUP) / max(1, steps - WARMUP)
        share = min(1.0, step / WARMUP) * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))
        optimizer.param_groups[0]["lr"] = rate * share * before(step)
        rows = text[starts[step - 1][:, None] + window].long()
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()


@torch.no_grad()
def measure(model: nn.Module, text: Tensor) -> float:
    """Nats per byte."""
    model.eval()
    count = (len(text) - 1) // LENGTH
    rows, aims = (text[i : i + count * LENGTH].long().view(count, LENGTH) for i in (0, 1))
    parts = [
        F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum")
        for x, y in zip(rows.split(128), aims.split(128), strict=True)
    ]
    return float(torch.stack(parts).double().sum()) / aims.numel()


def in_peft(model: nn.Module, seed: int) -> Any:
    """`model` with peft's LoRA."""
    import peft

    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers deprecates what peft asks of it
        return peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=PROJECTIONS))


def decoded(model: nn.Module, recipe: str) -> nn.Module:
    """`model` in float, with the values of its codes."""
    made = copy.deepcopy(model)
    for layer in ENGINE.layers(qkit.prepare(copy.deepcopy(model), recipe)):
        if layer.stage == "prepared":
            weight = made.get_submodule(layer.path).weight
            weight.data = qkit.fake_quantize(weight.detach(), layer.rule.weight)
    return made


def losses(model: nn.Module, way: str, recipe: str, texts: tuple[Tensor, Tensor], **how: Any) -> dict[str, float]:
    """Trains a copy of `model` in one way; the losses of the models that result."""
    text, unseen = texts
    factor, how = how["factor"], {name: how[name] for name in ("rate", "steps", "seed")}
    adapter = replace(ADAPTER, seed=how["seed"], factor=factor, scales="learned" if way == "scales" else "stored")
    last = int(adapter.beside * how["steps"])
    if way in ("float", "qlora", "same rates"):
        made = in_peft(copy.deepcopy(model) if way == "float" else decoded(model, recipe), how["seed"])
        fit(made, text, before=lambda step: factor if way == "same rates" and step > last else 1.0, **how)
        kept = measure(made, unseen)
        again = measure(qkit.convert(made.merge_and_unload(), recipe), unseen)
        own = ", same rates" * (way == "same rates")
        return {"float, quantized": again} if way == "float" else {f"kept{own}": kept, f"quantized again{own}": again}
    if way in ("packed", "scales"):
        made = qkit.adapt(qkit.convert(copy.deepcopy(model), recipe), adapter)
        layers = list(ENGINE.layers(made))
        assert steps_beside(adapter, layers, how["steps"]) == last
        switch = switching_parts(ENGINE, layers, last)

        def before(step: int) -> float:
            switch(step)
            return factor_at(adapter, layers, last, step)

        fit(made, text, before=before, **how)
        return {f"{way} before merging": measure(made, unseen), way: measure(qkit.merge(made), unseen)}
    made = qkit.prepare(copy.deepcopy(model), recipe)
    made = qkit.adapt(made, adapter) if way == "prepared" else made
    fit(made, text, before=lambda step: 1.0, **how)
    return {way: measure(qkit.convert(qkit.merge(made) if way == "prepared" else made), unseen)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--recipe", action="append", default=[])
    parser.add_argument("--rate", type=float, action="append", default=[])
    parser.add_argument("--seed", type=int, action="append", default=[])
    parser.add_argument("--way", action="append", choices=WAYS, default=[])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--float-steps", type=int, default=1200)
    parser.add_argument("--factor", type=float, default=ADAPTER.factor)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    about = {"rank": RANK, "alpha": ALPHA, "steps": given.steps, "beside": ADAPTER.beside, "factor": given.factor}
    report = Report(given.out, packages=("peft",), about={**about, "float steps": given.float_steps})
    model, texts = base(given.float_steps), prose()
    for recipe in given.recipe or ["int4-g32"]:
        for rate in given.rate or [2e-4, 1e-3, 4e-3]:
            for seed in given.seed or [1, 2, 3]:
                row: dict[str, Any] = {"recipe": recipe, "rate": rate, "seed": seed}
                for way in given.way or WAYS:
                    how = {"rate": rate, "steps": given.steps, "seed": seed, "factor": given.factor}
                    row |= losses(model, way, recipe, texts, **how)
                report.add(row)
    report.finish()


if __name__ == "__main__":
    main()
