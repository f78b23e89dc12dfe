"""Serving a Llama of transformers on a CPU: `serve.py --device cpu`. One token, four rows, a prefill and memory of every recipe.

Times are over the float model of the same type, threads and run, in turns: of the processor, which counts all threads and no
other program's work, and by the clock. One token is a step of `generate`, with all that transformers does around the layers.
Torch's own kernels for 4 and 8 bits stand beside.
"""

import copy
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import Report, in_turn
from torch import Tensor, nn

import qkit

PROMPT, TOKENS, ROWS = 512, 8, 4
TURNS = {"one token": 5, "four rows": 3, "prefill": 3}
BAR = 1.5  #: of one token, over the float model
GROUP = 128  #: of torch's int4 kernel
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "vocab_size": 8192,
}
RECIPES = (
    *(f"int{bits}-g64" for bits in (2, 3, 4, 5, 6, 8)),
    "int4-g32",
    "int4-g64-minmax",
    "int8-row",
    "mxfp4-a16",
    "nvfp4-a16",
    "mxfp8-a16",
    "fp8",
    "mxfp4",
    "nvfp4",
    "mxfp8",
    "int8-dynamic-act-int4-weight",
    "int8-dynamic-act-int8-weight",
    "float8-dynamic-act-float8-weight",
    "int4-g64-all",
)


class TorchInt4(nn.Module):
    """A layer of torch's `_weight_int4pack_mm_for_cpu`."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        groups = layer.weight.detach().float().unflatten(1, (-1, GROUP))
        scales = groups.abs().amax(-1) / 7
        codes = ((groups / scales[..., None]).round().clamp(-8, 7) + 8).int().flatten(1)
        self.codes = torch._convert_weight_to_int4pack_for_cpu(codes, 2)  # noqa: SLF001  torch has no public name
        self.scales = torch.stack([scales, torch.zeros_like(scales)], -1).transpose(0, 1).to(layer.weight.dtype)
        self.scales = self.scales.contiguous()

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y = torch._weight_int4pack_mm_for_cpu(rows, self.codes, GROUP, self.scales)  # noqa: SLF001
        return y.reshape(*x.shape[:-1], -1)


class TorchInt8(nn.Module):
    """A layer of torch's `_weight_int8pack_mm`."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.scales = (layer.weight.detach().abs().amax(1) / 127).contiguous()
        self.codes = (layer.weight.detach() / self.scales[:, None]).round().to(torch.int8)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y = torch._weight_int8pack_mm(rows, self.codes, self.scales)  # noqa: SLF001
        return y.reshape(*x.shape[:-1], -1)


def theirs(kind: type[Any], model: nn.Module) -> nn.Module:
    """`model` with torch's kernels in the place of its layers, but for its head."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and name != "lm_head":
            place, _, last = name.rpartition(".")
            setattr(model.get_submodule(place), last, kind(layer))
    return model


def converted(recipe: str, model: nn.Module) -> nn.Module:
    """`model` by a recipe."""
    return qkit.convert(model, recipe)


def job_of(model: Any, name: str) -> Callable[[], float]:
    """A job that returns seconds by the clock, and adds those of the processor to its `used`."""
    rows = {"one token": 1, "four rows": ROWS, "prefill": 1}[name]
    ids = torch.arange(rows * (PROMPT if name == "prefill" else 1)).reshape(rows, -1)
    more = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": TOKENS, "min_new_tokens": TOKENS}

    def run() -> float:
        begin = time.process_time(), time.perf_counter()
        with torch.no_grad():
            if name == "prefill":
                model(ids, use_cache=False, logits_to_keep=1)
            else:
                model.generate(ids, attention_mask=torch.ones_like(ids), **more)
        used.append(time.process_time() - begin[0])
        return time.perf_counter() - begin[1]

    used: list[float] = []
    run.used = used  # type: ignore[attr-defined]
    return run


def ratios(plain: nn.Module, other: nn.Module) -> dict[str, Any]:
    """Medians of `other` over those of `plain`, and the least and greatest ratio of a turn."""
    found: dict[str, Any] = {}
    for name, turns in TURNS.items():
        jobs = {"a": job_of(plain, name), "b": job_of(other, name)}
        for job in jobs.values():
            job()
            job.used.clear()  # type: ignore[attr-defined]
        clock = in_turn(jobs, turns)
        used = {key: job.used for key, job in jobs.items()}  # type: ignore[attr-defined]
        each = [b / a for a, b in zip(used["a"], used["b"], strict=True)]
        medians = [statistics.median(times["b"]) / statistics.median(times["a"]) for times in (used, clock)]
        found[name] = round(medians[0], 3)
        found[f"{name}, spread"] = [round(min(each), 3), round(max(each), 3)]
        found[f"{name}, by the clock"] = round(medians[1], 3)
    return found


def stored(model: nn.Module) -> int:
    """Bytes of all tensors of `model`, shared ones once."""
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [t for part in model.modules() for t in vars(part).values() if isinstance(t, Tensor)]
    parts = {tensor.data_ptr(): tensor.nbytes for tensor in tensors}
    return sum(parts.values())


def measure(out: Path | None, *, layers: int, recipes: list[str] | None, threads: list[int]) -> None:
    """Writes the report: each number of threads, type and recipe."""
    about = {**CONFIG, "layers": layers, "prompt": PROMPT, "tokens": TOKENS, "bar": BAR}
    report = Report(out, packages=("transformers",), about=about)
    jobs = {name: partial(converted, name) for name in recipes or RECIPES}
    for count in threads:
        torch.set_num_threads(count)
        for dtype in ("bfloat16", "float32"):
            torch.manual_seed(0)
            engine = qkit.backend("torchao").on("cpu")
            plain = engine.build({**CONFIG, "num_hidden_layers": layers, "dtype": dtype}).eval()
            base, row = stored(plain), {"threads": count, "dtype": dtype}
            begin = job_of(plain, "one token")
            begin()
            seconds = round(min(begin() for _ in range(3)) / TOKENS, 5)
            report.add({**row, "recipe": "float", "bytes": base, "seconds of a token": seconds})
            peers = {f"torch int4 g{GROUP}": TorchInt4, "torch int8 row": TorchInt8}
            mine = {**jobs, **{name: partial(theirs, kind) for name, kind in peers.items()}}
            for name, convert in mine.items():
                model = convert(copy.deepcopy(plain))
                found = ratios(plain, model) | {"memory": round(stored(model) / base, 3)}
                within = {"within": found["one token"] <= BAR} if name in qkit.recipes() else {}
                report.add({**row, "recipe": name, **found, **within})
    report.finish()
