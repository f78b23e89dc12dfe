"""FSDP2 on every GPU of a host (or, without one, on processes of the CPU) against one process: losses, codes and time, as JSON.

torchrun --nproc-per-node 2 benchmarks/fsdp.py --out fsdp.json
"""

import argparse
import os
import sys
import time
from pathlib import Path

import torch
from measure import Report
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

import qkit


def block(width):
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


def build(width, depth, device, recipe):
    torch.manual_seed(0)
    model = nn.Sequential(*(block(width) for _ in range(depth))).to(device)
    return qkit.prepare(model, recipe) if recipe else model


def train(model, device, *, steps, batch, width, rank, ranks):
    """Losses of the whole batch, the median seconds of a step, and the most bytes of GPU memory."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=True)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    losses, times = [], []
    for step in range(steps):
        drawn = torch.Generator().manual_seed(step)
        x, y = (torch.randn(batch, width, generator=drawn).chunk(ranks)[rank].to(device) for _ in range(2))
        began = time.perf_counter()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        if ranks > 1:
            distributed.all_reduce(total)
        losses.append(float(total) / ranks)  # waits for the device
        times.append(time.perf_counter() - began)
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    return losses, sorted(times)[len(times) // 2], memory


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="int4-g64")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", type=Path, required=True)
    wishes = parser.parse_args()
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    on_gpus = torch.cuda.is_available() and torch.cuda.device_count() >= ranks
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if on_gpus else "gloo")
    mesh = init_device_mesh(device.type, (ranks,))
    shape = {"width": wishes.width, "steps": wishes.steps, "batch": wishes.batch}
    found = {}
    for name, recipe in (("plain", None), ("prepared", wishes.recipe)):
        model = build(wishes.width, wishes.depth, device, recipe)
        for part in model:
            fully_shard(part, mesh=mesh)
        fully_shard(model, mesh=mesh)
        losses, seconds, memory = train(model, device, rank=rank, ranks=ranks, **shape)
        found[name] = {"losses": losses, "seconds": seconds, "bytes": memory}
    whole = qkit.gather(model)
    if whole is not None:
        alone = build(wishes.width, wishes.depth, device, wishes.recipe)
        losses, _, _ = train(alone, device, rank=0, ranks=1, **shape)
        engine = qkit.backend("torchao")
        mine, theirs = (
            [engine.unpack(one.module).codes.cpu() for one in engine.layers(model)]
            for model in map(qkit.convert, (whole, alone.cpu()))
        )
        pairs = list(zip(mine, theirs, strict=True))
        found["one process"] = {"losses": losses}
        found["prepared"]["codes that differ"] = sum(int((a != b).sum()) for a, b in pairs)
        found["prepared"]["codes"] = sum(a.numel() for a, _ in pairs)
        found["prepared"]["time, prepared to plain"] = found["prepared"]["seconds"] / found["plain"]["seconds"]
        about = {"ranks": ranks, "recipe": wishes.recipe, "depth": wishes.depth, **shape}
        report = Report(wishes.out, device=device.type, about=about)
        report.command = report.command.replace("python", f"torchrun --nproc-per-node {ranks}", 1)
        for name, figures in found.items():
            report.add({"model": name, **figures})
    distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads now and then abort a process that takes them down, torch 2.13


if __name__ == "__main__":
    main()
