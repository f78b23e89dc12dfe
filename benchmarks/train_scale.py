"""Training at scale beside standard practice and torchao, by the clock: one GPU, or FSDP2 on all GPUs of a host, as JSON.

python benchmarks/train_scale.py --out benchmarks/results/h200/train_scale.json
torchrun --nproc-per-node 2 benchmarks/train_scale.py --out benchmarks/results/2xh200/train_scale.json
torchrun --nproc-per-node 2 benchmarks/train_scale.py --device cpu --tiny

Every row is a step of a Llama of transformers, in turns with the standard step of the same row; medians of at least 20 steps. The
device is waited for after each step. `in a row` it is waited for after five steps, as a loop of training that reads no loss does:
there the host may run ahead.
"""

import argparse
import gc
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import qkit_torchao
import torch
from clock import captured, seconds
from measure import Report, spread
from torch import distributed, nn
from train_scale_rows import REAL, TINY, WIDE, Row, Variant, rows
from transformers import LlamaConfig, LlamaForCausalLM

import qkit

IN_A_ROW, TURNS = 5, 3


class Lora(nn.Module):
    """LoRA as it is usually written, on a frozen layer."""

    def __init__(self, layer: nn.Linear, rank: int = 16) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        like = {"device": layer.weight.device, "dtype": layer.weight.dtype}
        self.a = nn.Parameter(torch.randn(rank, layer.in_features, **like) / layer.in_features**0.5)
        self.b = nn.Parameter(torch.zeros(layer.out_features, rank, **like))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + nn.functional.linear(nn.functional.linear(x, self.a), self.b)


def put_lora(model: nn.Module) -> None:
    """Puts LoRA on every linear layer but the head; all else is frozen."""
    model.requires_grad_(False)
    for parent in list(model.model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, Lora(child))


def put_peft(model: nn.Module) -> nn.Module:
    """peft's LoRA with peft's defaults, on every linear layer but the head."""
    import peft

    projections = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    return peft.get_peft_model(model, peft.LoraConfig(r=16, lora_alpha=16, target_modules=projections))


def put_peer(model: nn.Module, peer: str) -> None:
    """torchao's own way: QAT with its defaults, or float8 training."""
    if peer == "float8":
        from torchao.float8 import convert_to_float8_training

        convert_to_float8_training(model, module_filter_fn=lambda layer, name: "lm_head" not in name)
        return
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    weights = IntxFakeQuantizeConfig(torch.int4, group_size=32)
    inputs = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False) if peer == "int8-int4" else None
    keep = lambda layer, name: isinstance(layer, nn.Linear) and "lm_head" not in name  # noqa: E731
    quantize_(model, QATConfig(activation_config=inputs, weight_config=weights, step="prepare"), filter_fn=keep)


def build(variant: Variant, size: dict[str, int], device: torch.device, ranks: int) -> nn.Module:
    """The model of `variant`; sharded, with fp32 masters and values in bfloat16, where there are several processes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size["vocabulary"],
        hidden_size=size["hidden"],
        intermediate_size=size["inner"],
        num_hidden_layers=size["layers"],
        num_attention_heads=size["heads"],
        num_key_value_heads=size["heads"] // 4,
        max_position_embeddings=size["length"],
        use_cache=False,
    )
    with device:
        model = LlamaForCausalLM(config)
    model = model.to(torch.float32 if ranks > 1 else torch.bfloat16)
    if variant.lora == "plain":
        put_lora(model)
    if variant.lora == "peft":
        model = put_peft(model)
    if variant.recipe:
        model = (
            qkit.convert(model, variant.recipe) if variant.lora == "converted" else qkit.prepare(model, variant.recipe)
        )
    if variant.lora and variant.recipe:
        model = qkit.adapt(model, qkit.Adapter(rank=16))
    if variant.peer:
        put_peer(model, variant.peer)
    if variant.chunks:
        qkit_torchao.chunk_loss(model)
    model.train()
    if variant.checkpoints:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if variant.compiled:
        torch.compiler.reset()
    if variant.compiled == "layers":
        for layer in model.model.layers:
            layer.compile()
    if ranks > 1:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for layer in model.model.layers:
            fully_shard(layer, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
    if variant.compiled == "model":
        model.compile()
    return model


def step_of(variant: Variant, size: dict[str, int], device: torch.device, ranks: int) -> Callable[[], torch.Tensor]:
    """A function that makes one step and returns its loss; its attribute `model` is the model."""
    model = build(variant, size, device, ranks)
    trained = [one for one in model.parameters() if one.requires_grad]
    if variant.optimizer == "qkit":
        optimizer = qkit.adamw(model, lr=1e-5)
    else:
        extra = {"capturable": True} if variant.graph else {}
        optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True, **extra)
    rank = distributed.get_rank() if ranks > 1 else 0
    drawn = torch.Generator().manual_seed(rank)
    tokens = torch.randint(size["vocabulary"], (variant.micro, size["batch"], size["length"]), generator=drawn).to(
        device
    )

    def step() -> torch.Tensor:
        for part in tokens:
            loss = model(input_ids=part, labels=part).loss / len(tokens)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    step.model = model  # type: ignore[attr-defined]
    return step


def ready(variant: Variant, size: dict[str, int], device: torch.device, ranks: int) -> tuple[Callable[[], Any], int]:
    """A step that has warmed up, and the most bytes of GPU memory above those before it."""
    before = 0
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    step = step_of(variant, size, device, ranks)
    for _ in range(3):
        step()
    memory = torch.cuda.max_memory_allocated() - before if device.type == "cuda" else 0
    return captured(step) if variant.graph else step, memory


def wrong_values(model: Any) -> int:
    """How many gathered weights of the first layer are not the values of their masters on their grids, in bfloat16."""
    layer = model.model.layers[0]
    layer.reshard()
    grids = {name: one.weight_grid for name, one in layer.named_modules() if hasattr(one, "weight_grid")}
    whole = {name: layer.get_parameter(f"{name}.weight").full_tensor().detach() for name in grids}
    layer.unshard()
    pairs = [
        (layer.get_parameter(f"{name}.weight"), qkit.fake_quantize(whole[name], grid)) for name, grid in grids.items()
    ]
    wrong = sum(int((gathered != values.to(gathered.dtype)).sum()) for gathered, values in pairs)
    layer.reshard()
    return wrong


def timed(row: Row, sizes: dict[bool, dict[str, int]], device: torch.device, ranks: int, steps: int) -> dict[str, Any]:
    """The figures of one row."""
    size = sizes[row.variant.wide]
    (plain, plain_memory), (run, memory) = (ready(one, size, device, ranks) for one in (row.standard, row.variant))
    found: tuple[list[float], list[float]] = ([], [])
    for number in range(steps + 2):
        for which in (0, 1) if number % 2 else (1, 0):
            took = seconds((plain, run)[which], device)
            if number > 1:  # the first two turns warm up
                found[which].append(took)
    in_a_row: tuple[list[float], list[float]] = ([], [])
    for number in range(TURNS + 1):
        for which in (0, 1) if number % 2 else (1, 0):
            took = seconds(lambda which=which: [(plain, run)[which]() for _ in range(IN_A_ROW)], device)
            if number:  # the first turn warms up
                in_a_row[which].append(took / IN_A_ROW)
    more = {}
    if ranks > 1 and row.variant.recipe:
        more["wrong values"] = wrong_values(run.model)
    ratios = [b / a for a, b in zip(*found, strict=True)]
    return {
        "standard ms": round(1e3 * statistics.median(found[0]), 3),
        "ms": round(1e3 * statistics.median(found[1]), 3),
        "ratio of medians": round(statistics.median(found[1]) / statistics.median(found[0]), 4),
        "ratio": spread(ratios),
        "ratio in a row": spread([b / a for a, b in zip(*in_a_row, strict=True)]),
        "memory GB": [round(one / 1e9, 3) for one in (plain_memory, memory)],
        "steps": steps,
        **more,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument(
        "--only", action="append", help="the row of this name, or rows whose names have it; may be repeated"
    )
    parser.add_argument("--seconds", type=float, default=235, help="no row begins later")
    parser.add_argument("--out", type=Path)
    wishes = parser.parse_args()
    warnings.simplefilter("ignore")
    began = time.perf_counter()
    ranks, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    device = torch.device(wishes.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    if ranks > 1:
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    sizes = dict.fromkeys((False, True), TINY) if wishes.tiny else {False: REAL, True: WIDE}
    about = {"ranks": ranks, "size": sizes[False], "8 B shape": sizes[True]}
    report = Report(
        wishes.out if rank == 0 else None, device=device.type, packages=["transformers", "peft", "triton"], about=about
    )
    if ranks > 1:
        report.command = report.command.replace("python", f"torchrun --nproc-per-node {ranks}", 1)
    names = {row.name for row in rows(ranks)}
    for row in rows(ranks):
        wanted = not wishes.only or any(part == row.name if part in names else part in row.name for part in wishes.only)
        if not wanted or (row.variant.graph and device.type != "cuda"):
            continue
        late = torch.tensor(float(time.perf_counter() - began > wishes.seconds), device=device)
        if ranks > 1:
            distributed.all_reduce(late)  # all processes skip a row, or none
        if late:
            found = {"error": f"not run: {wishes.seconds:.0f} seconds have passed"}
        else:
            try:
                found = timed(row, sizes, device, ranks, wishes.steps)
            except Exception as error:  # one failure must not end the others
                found = {
                    "error": f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"
                    if str(error)
                    else repr(error)
                }
        if rank == 0:
            report.add({"row": row.name, **found})
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if rank == 0:
        report.finish()
    if ranks > 1:
        distributed.barrier()
        sys.stdout.flush()
        os._exit(0)  # gloo's threads now and then abort a process that takes them down, torch 2.13


if __name__ == "__main__":
    main()
