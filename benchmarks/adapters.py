"""The loss that is deployed after training adapters: on a base of codes, on a prepared base, and as peft trains them.

A small Llama (benchmarks/small_llama.py) is trained in float on the code of Python's standard library. All ways then train on
English prose, Python's own topics of help, with the same batches, rank, optimizer and rates. Losses are nats per byte of held-out
prose, of:

- `float, quantized`: peft's LoRA on the float model, merged, and quantized
- `kept`: QLoRA, peft's LoRA on the decoded base; deployed as codes with the adapter beside them, in float
- `quantized again`: the same, merged and quantized again
- `kept with norms`: `kept`, whose norms train, too
- `packed`: `qkit.adapt` on codes, merged, by the parts of `qkit train` (`qkit.training.beside`)
- `factors`: the same with `Adapter(scales="stored", norms="stored")`: the factors alone train
- `scales`: the same with `Adapter(scales="learned", norms="stored")`
- `prepared`: `qkit.adapt` on the prepared model, merged and converted
- `full`: all weights of the prepared model, converted

Usage: python benchmarks/adapters.py [--size small|4m] [--device cuda] [--recipe NAME ...] [--rate R ...] [--seed N ...]
       [--way NAME ...] [--steps N] [--float-steps N] [--base FILE.pt] [--out FILE.json]
       python benchmarks/adapters.py --table FILE.json ...

`--base` names a file for the float model: written where it is missing, so that several processes train from one model.
"""

import argparse
import copy
import json
import math
import sysconfig
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import small_llama
import torch
from measure import Report
from torch import Tensor, nn
from torch.nn import functional as F

import qkit
from qkit.training.beside import steps_beside, switching_parts

WARMUP = 20
RANK, ALPHA = 16, 32.0
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTER = qkit.Adapter(rank=RANK, alpha=ALPHA, match=("*_proj",))
ENGINE = qkit.backend("torchao")
WAYS = ("float", "qlora", "norms", "packed", "factors", "scales", "prepared", "full")
#: Of ways on packed codes, the choices that are not qkit's own.
CHOICES: dict[str, dict[str, Any]] = {
    "packed": {},
    "factors": {"scales": "stored", "norms": "stored"},
    "scales": {"scales": "learned", "norms": "stored"},
}


@dataclass(frozen=True, slots=True)
class Setting:
    """A model and its batches: tokens in a sequence, sequences in a batch, and the peak rate of the float model."""

    size: small_llama.Size
    length: int
    batch: int
    rate: float


SETTINGS = {
    "small": Setting(small_llama.Size(hidden=96, layers=3, intermediate=256, heads=4), 64, 8, 4e-3),
    "4m": Setting(small_llama.SIZES["4m"], 128, 16, 2e-3),
}


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


def base(setting: Setting, steps: int, device: str, file: Path | None) -> nn.Module:
    """The float model; that in `file`, where there is one."""
    model = small_llama.Llama(setting.size, seed=0, longest=setting.length).to(device)
    if file and file.exists():
        model.load_state_dict(torch.load(file, map_location=device))
        return model
    batches = {"steps": steps, "batch": setting.batch, "length": setting.length}
    run = small_llama.Run(**batches, rate=setting.rate, weight_decay=0.1, seed=0, half=False)
    small_llama.train(model, code().to(device), run)
    if file:
        torch.save(model.state_dict(), file)
    return model


def fit(
    model: nn.Module,
    text: Tensor,
    *,
    setting: Setting,
    rate: float,
    steps: int,
    seed: int,
    before: Callable[[int], None] = lambda step: None,
) -> None:
    """Trains the free parameters by AdamW: a warm-up, then a cosine to a tenth. Calls `before` with the number of each step."""
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.0)
    random, last = np.random.default_rng(seed), len(text) - setting.length - 1
    starts = torch.from_numpy(random.integers(0, last, (steps, setting.batch))).to(text.device)
    window = torch.arange(setting.length + 1, device=text.device)
    model.train()
    for step in range(1, steps + 1):
        done = max(0, step - WARMUP) / max(1, steps - WARMUP)
        share = min(1.0, step / WARMUP) * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))
        optimizer.param_groups[0]["lr"] = rate * share
        before(step)
        rows = text[starts[step - 1][:, None] + window].long()
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()


@torch.no_grad()
def measure(model: nn.Module, text: Tensor, length: int) -> float:
    """Nats per byte, in windows of `length`."""
    model.eval()
    count = (len(text) - 1) // length
    rows, aims = (text[i : i + count * length].long().view(count, length) for i in (0, 1))
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
    length = how["setting"].length
    adapter = replace(ADAPTER, seed=how["seed"], **CHOICES.get(way, {}))
    if way in ("float", "qlora", "norms"):
        made = in_peft(copy.deepcopy(model) if way == "float" else decoded(model, recipe), how["seed"])
        for module in made.modules() if way == "norms" else ():
            if isinstance(module, nn.RMSNorm):
                module.weight.requires_grad_(True)
        fit(made, text, **how)
        kept = measure(made, unseen, length)
        if way == "norms":
            return {"kept with norms": kept}
        again = measure(qkit.convert(made.merge_and_unload(), recipe), unseen, length)
        return {"float, quantized": again} if way == "float" else {"kept": kept, "quantized again": again}
    if way in CHOICES:
        made = qkit.adapt(qkit.convert(copy.deepcopy(model), recipe), adapter)
        layers = list(ENGINE.layers(made))
        last = steps_beside(adapter, layers, how["steps"])
        fit(made, text, before=switching_parts(ENGINE, layers, last), **how)
        return {f"{way} before merging": measure(made, unseen, length), way: measure(qkit.merge(made), unseen, length)}
    made = qkit.prepare(copy.deepcopy(model), recipe)
    made = qkit.adapt(made, adapter) if way == "prepared" else made
    fit(made, text, **how)
    return {way: measure(qkit.convert(qkit.merge(made) if way == "prepared" else made), unseen, length)}


#: Columns of the table, and the ways that they are of.
COLUMNS = {
    "adapter kept beside codes": "kept",
    "the same, norms train, too": "kept with norms",
    "kept, merged and quantized again": "quantized again",
    "qkit, merged": "packed",
}


def table(files: list[Path]) -> str:
    """The means over seeds in `files` in Markdown; of qkit's also how far each seed is above the adapter that is kept."""
    found = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    columns = {
        title: name for title, name in COLUMNS.items() if all(name in row for one in found for row in one["rows"])
    }
    lines = [
        " | ".join(("| model, grid", "rate", *columns, "qkit above kept, by seed |")),
        "|---" * (len(columns) + 3) + "|",
    ]
    cells: dict[tuple[str, str, float], list[dict[str, float]]] = {}
    for one in found:
        for row in one["rows"]:
            cells.setdefault((one["about"]["size"], row["recipe"], row["rate"]), []).append(row)
    for (size, recipe, rate), rows in sorted(
        cells.items(), key=lambda cell: (cell[0][0] != "4m", cell[0][1], cell[0][2])
    ):
        rows.sort(key=lambda row: row["seed"])
        means = [f"{np.mean([row[name] for row in rows]):.3f}" for name in columns.values()]
        above = ", ".join(f"{row['packed'] - row['kept']:+.4f}" for row in rows)
        lines.append(" | ".join((f"| {size}, {recipe}", f"{rate:g}", *means, f"{above} |")))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--table", type=Path, nargs="+")
    parser.add_argument("--size", choices=SETTINGS, default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--recipe", action="append", default=[])
    parser.add_argument("--rate", type=float, action="append", default=[])
    parser.add_argument("--seed", type=int, action="append", default=[])
    parser.add_argument("--way", action="append", choices=WAYS, default=[])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--float-steps", type=int, default=1200)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.table:
        print(table(given.table))
        return
    torch.set_num_threads(1)
    setting = SETTINGS[given.size]
    about = {"size": given.size, "length": setting.length, "batch": setting.batch, "rank": RANK, "alpha": ALPHA}
    about |= {"steps": given.steps, "beside": ADAPTER.beside, "float steps": given.float_steps}
    report = Report(given.out, device=given.device, packages=("peft",), about=about)
    model = base(setting, given.float_steps, given.device, given.base)
    text, unseen = (one.to(given.device) for one in prose())
    for recipe in given.recipe or ["int4-g32"]:
        for rate in given.rate or [2e-4, 1e-3, 4e-3]:
            for seed in given.seed or [1, 2, 3]:
                row: dict[str, Any] = {"recipe": recipe, "rate": rate, "seed": seed}
                for way in given.way or WAYS:
                    how = {"rate": rate, "steps": given.steps, "seed": seed}
                    row |= losses(model, way, recipe, (text, unseen), setting=setting, **how)
                report.add(row)
    report.finish()


if __name__ == "__main__":
    main()
