"""Time and memory of a step of adapters on a Llama of transformers: LoRA in bfloat16, and qkit's on prepared and on packed codes.

`lora` is the reference: peft's own LoRA where peft is installed, else a layer with peft's arithmetic (each row says which).
`lora-chunks` is the same with logits in chunks, `qkit_torchao.chunk_loss`, as qkit's ways have them and `qkit train` has them.
`bitsandbytes` is that LoRA on NF4, where it is installed; `torchao` is the same on torchao's int4 weights, if it has a kernel.
Each way is built alone, and takes turns with the others: all ways, then all again backwards. Times are medians by the clock of
whole steps (forward, backward, AdamW of the factors), the device waited for. Memory is the peak of the allocator in a step, and
`model` the bytes allocated before it: those of the projections, of the other weights, and of the factors with AdamW's moments.

Usage: python benchmarks/adapters_speed.py [--size 1b|8b|tiny] [--layers N] [--batch N] [--length N] [--rank N] [--recipe NAME]
       [--steps N] [--turns N] [--checkpointing] [--device cuda] [--way NAME ...] [--out FILE.json]
"""

import argparse
import gc
import statistics
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any

import qkit_torchao
import torch
from measure import Report
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import qkit

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
}
KEYS = {"tiny": 2, "1b": 8, "8b": 8}  #: heads of keys and values
VOCABULARY = {"tiny": 512, "1b": 128256, "8b": 128256}
MATCH = ("*_proj",)
PROJECTIONS = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]


class Lora(nn.Module):
    """A linear layer and LoRA beside it, with peft's arithmetic: the input in the factors' type, the sum in the output's."""

    def __init__(self, layer: nn.Module, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        device = next((one.device for one in layer.parameters()), None)
        self.base, self.scale = layer, 2.0
        self.lora_a = nn.Parameter(torch.randn(rank, inputs, device=device) * inputs**-0.5)
        self.lora_b = nn.Parameter(torch.zeros(outputs, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return y + (F.linear(F.linear(x.to(self.lora_a.dtype), self.lora_a), self.lora_b) * self.scale).to(y.dtype)


def float_model(given: argparse.Namespace, device: str) -> nn.Module:
    """A Llama in bfloat16 with random weights."""
    shape = dict(SHAPES[given.size])
    shape["num_hidden_layers"] = given.layers or shape["num_hidden_layers"]
    known = {
        "num_key_value_heads": KEYS[given.size],
        "vocab_size": VOCABULARY[given.size],
        "tie_word_embeddings": False,
    }
    config = LlamaConfig(**shape, **known, max_position_embeddings=given.length, use_cache=False)
    torch.manual_seed(0)
    with torch.device(device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            return LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(before)


def with_lora(model: nn.Module, rank: int) -> tuple[nn.Module, str]:
    """LoRA beside every projection, of peft if it is there; and its name."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if find_spec("peft"):
        import peft

        wish = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=PROJECTIONS)
        return peft.get_peft_model(model, wish), f"peft {peft.__version__}"
    for path, layer in list(model.named_modules()):
        if path.rpartition(".")[2] in PROJECTIONS:
            made = Lora(layer, layer.in_features, layer.out_features, rank)
            model.set_submodule(path, made)
    return model, "a layer with peft's arithmetic"


def build(way: str, given: argparse.Namespace) -> tuple[nn.Module, str]:
    """The model of a way, and the name of its layers."""
    model = float_model(given, given.device)
    if way in ("lora", "lora-chunks"):
        return with_lora(qkit_torchao.chunk_loss(model) if way == "lora-chunks" else model, given.rank)
    if way == "bitsandbytes":
        return with_lora(in_nf4(model), given.rank)
    if way == "torchao":
        from torchao.quantization import Int4WeightOnlyConfig, quantize_

        quantize_(
            model, Int4WeightOnlyConfig(group_size=32), lambda layer, path: path.rpartition(".")[2] in PROJECTIONS
        )
        return with_lora(model, given.rank)
    adapter = qkit.Adapter(rank=given.rank, alpha=2.0 * given.rank, match=MATCH)
    recipe = qkit.recipe(given.recipe)
    made = qkit.prepare(model, recipe) if way == "prepared" else qkit.convert(model, recipe)
    return qkit_torchao.chunk_loss(qkit.adapt(made, adapter)), "qkit"


def in_nf4(model: nn.Module) -> nn.Module:
    """`model` with the projections in NF4 of bitsandbytes, its scales quantized again."""
    import bitsandbytes as bnb

    for path, layer in list(model.named_modules()):
        if path.rpartition(".")[2] in PROJECTIONS:
            made = bnb.nn.Linear4bit(
                layer.in_features, layer.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
            )
            made.weight = bnb.nn.Params4bit(layer.weight.detach().cpu(), requires_grad=False, quant_type="nf4")
            model.set_submodule(path, made.to(layer.weight.device))
    return model


def measure(model: nn.Module, given: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of a step, and bytes."""
    cuda = given.device.startswith("cuda")
    wait: Callable[[], None] = torch.cuda.synchronize if cuda else lambda: None
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    model.train()
    tokens = torch.randint(0, VOCABULARY[given.size], (given.batch, given.length), device=given.device)
    wait()
    held = torch.cuda.memory_allocated() if cuda else 0
    times = []
    for step in range(given.steps + 3):
        if cuda and step == 3:
            torch.cuda.reset_peak_memory_stats()
        wait()
        begin = perf_counter()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        wait()
        times.append(1000 * (perf_counter() - begin))
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    return {
        "ms": statistics.median(times[3:]),
        "peak GB": peak / 1e9,
        "model GB": held / 1e9,
        **accounts(model, optimizer),
    }


def accounts(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The bytes of a model and its optimizer between two steps, by their use."""
    trained = {one.data_ptr() for one in model.parameters() if one.requires_grad}
    sizes = dict.fromkeys(("projections GB", "other weights GB", "factors and AdamW GB"), 0.0)
    for path, one in (*model.named_parameters(), *model.named_buffers()):
        projection = any(f".{name}." in path for name in PROJECTIONS)
        use = (
            "factors and AdamW GB"
            if one.data_ptr() in trained
            else f"{'projections' if projection else 'other weights'} GB"
        )
        sizes[use] += one.nbytes / 1e9
    moments = [one for state in optimizer.state.values() for one in state.values() if isinstance(one, Tensor)]
    sizes["factors and AdamW GB"] += sum(one.nbytes for one in moments) / 1e9
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=tuple(SHAPES), default="1b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--recipe", default="int4-g32")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--checkpointing", action="store_true", help="compute each layer again in the backward pass")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--way", action="append", default=[])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    beside = ["torchao"] + ["bitsandbytes"] * bool(find_spec("bitsandbytes"))
    ways = given.way or [
        "lora",
        "lora-chunks",
        "prepared",
        "packed",
        *(beside if given.device.startswith("cuda") else []),
    ]
    shape = {
        key: getattr(given, key) for key in ("size", "layers", "batch", "length", "rank", "recipe", "checkpointing")
    }
    report = Report(given.out, device=given.device, packages=("transformers", "peft", "bitsandbytes"), about=shape)
    found: dict[str, list[dict[str, float]]] = {}
    layers: dict[str, str] = {}
    for turn in range(given.turns):
        for way in ways[:: -1 if turn % 2 else 1]:
            try:
                model, layers[way] = build(way, given)
                if given.checkpointing:
                    model.gradient_checkpointing_enable({"use_reentrant": False})
                found.setdefault(way, []).append(measure(model, given))
            except (ImportError, RuntimeError, NotImplementedError, AssertionError, ValueError) as error:  # of a peer's
                if way not in ("torchao", "bitsandbytes"):
                    raise
                layers[way] = f"did not run: {str(error).splitlines()[0][:160] if str(error) else type(error).__name__}"
            model = None
            gc.collect()
            if given.device.startswith("cuda"):
                torch.cuda.empty_cache()
    middle = {way: {key: statistics.median(one[key] for one in some) for key in some[0]} for way, some in found.items()}
    for way in ways:
        row: dict[str, Any] = {"way": way, "layer": layers[way]}
        if way in middle:
            first = middle.get("lora", middle[way])
            row |= {key: round(value, 3) for key, value in middle[way].items()}
            row["over lora"] = round(middle[way]["ms"] / first["ms"], 3)
            if first["peak GB"]:
                row["memory over lora"] = round(middle[way]["peak GB"] / first["peak GB"], 3)
        report.add(row)
    report.finish()


if __name__ == "__main__":
    main()
