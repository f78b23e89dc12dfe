"""Cases of test_torch_sharded.py about torch.distributed.checkpoint: a run that stops and goes on; see `processes`."""

import torch
from processes import loss, ours, shard
from shards import BF16, GRID, Net, adam, build, recipe
from torch import distributed
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import qkit

MADE = {"adam": adam, "ours": ours}
WAYS = {"no policy": {}, "policy": {"mp_policy": BF16}}


def steps(model, optimizer, numbers, rank):
    """Losses of steps `numbers`, of both halves of their batches."""
    part, seen = torch.arange(8).chunk(2)[rank], []
    for step in numbers:
        one = loss(model, step, part)
        one.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = one.detach().clone()
        distributed.all_reduce(total)
        seen.append(float(total) / 2)
    return seen


def codes(model):
    """Of the whole model, by path; None in other processes than the first."""
    whole = qkit.gather(model)
    if whole is None:
        return None
    engine = qkit.backend("torchao")
    return {layer.path: engine.unpack(layer.module).codes for layer in engine.layers(qkit.convert(whole))}


def observe(rank, folder):
    """Losses and codes of four steps in one piece, and of two, a checkpoint, a new model, and two more."""
    seen = {}
    for way, options in WAYS.items():
        for name, make in MADE.items():
            model = shard(build(Net, GRID), **options)
            optimizer = make(model)
            whole = {"losses": steps(model, optimizer, range(4), rank), "codes": codes(model)}

            model = shard(build(Net, GRID), **options)
            optimizer = make(model)
            first = steps(model, optimizer, range(2), rank)
            states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
            checkpoint.save(states, checkpoint_id=f"{folder}/dcp-{way}-{name}")

            torch.manual_seed(rank + 7)
            model = qkit.prepare(shard(Net(), **options), recipe(GRID))  # other weights, and prepared late
            optimizer = make(model)
            states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
            checkpoint.load(states, checkpoint_id=f"{folder}/dcp-{way}-{name}")
            set_state_dict(model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
            resumed = {"losses": first + steps(model, optimizer, range(2, 4), rank), "codes": codes(model)}
            seen[f"{way}, {name}"] = whole, resumed
    return seen
