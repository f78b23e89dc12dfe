"""The work of the two processes of test_torch_sharded.py; each writes its observations to a file."""

import os
from importlib.util import find_spec

import torch
from torch import distributed, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import qkit
from qkit import Grid, Recipe, Rule

GRID = Grid("int4", 32)
RECIPE = Recipe("test", (Rule(("*",), weight=GRID), Rule(("*",), kind="embedding", weight=GRID)))
RANKS = 2


class Net(nn.Module):
    """An embedding and two blocks, whose rows do not divide by two."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(51, 64)
        self.first = nn.Sequential(nn.Linear(64, 97), nn.ReLU())
        self.second = nn.Sequential(nn.Linear(97 - 1, 51, bias=False))
        self.checkpoints = False

    def forward(self, ids):
        x = self.tokens(ids)
        x = checkpoint(self.first, x, use_reentrant=False) if self.checkpoints else self.first(x)
        return self.second(x[..., :-1])


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return qkit.prepare(Net().to(dtype), RECIPE)


def with_adapters():
    return qkit.adapt(net(), qkit.Adapter(rank=2))


def codes(model):
    """Of what was prepared, by path."""
    model, engine = qkit.convert(model), qkit.backend("torchao")
    return {layer.path: engine.unpack(layer.module).codes for layer in engine.layers(model)}


def shard(model, **options):
    for block in (model.first, model.second):
        fully_shard(block, **options)
    return fully_shard(model, **options)


def batch(step, part=slice(None)):
    ids = torch.randint(0, 51, (8, 5), generator=torch.Generator().manual_seed(step))
    return ids[part, :-1], ids[part, 1:]


def loss(model, step, part=slice(None)):
    ids, after = batch(step, part)
    return F.cross_entropy(model(ids).float().flatten(0, 1), after.flatten())


def train(model, optimizer, rank=None, *, accumulate=1, autocast=False):
    """Losses of four steps, of all processes' halves together, or with no rank of the whole batch."""
    seen = []
    for step in range(4):
        parts = torch.arange(8).chunk(RANKS)[rank] if rank is not None else torch.arange(8)
        total = 0.0
        for part in parts.chunk(accumulate) if rank is not None else [parts]:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                one = loss(model, step, part) / (accumulate if rank is not None else 1)
            one.backward()
            total += one.detach()
        optimizer.step()
        optimizer.zero_grad()
        if rank is not None:
            distributed.all_reduce(total)
            total /= RANKS
        seen.append(float(total))
    return seen


def adam(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def ours(model):
    return qkit.adamw(model, lr=1e-2)


def ends(model, losses):
    """The results of a run: its losses, and in process 0 its master weights and their codes."""
    whole = qkit.gather(model)
    if whole is None:
        return {"losses": losses}
    masters = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    kind = type(whole).__name__
    return {"losses": losses, "masters": masters, "codes": codes(whole), "kind": kind}


def by_accelerate():
    """A model and an optimizer, made whole, that accelerate has sharded; it offers that on GPUs only, so its state is set."""
    from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin

    wishes = {"fsdp_version": 2, "transformer_cls_names_to_wrap": ["Sequential"], "reshard_after_forward": True}
    plugin = FullyShardedDataParallelPlugin(auto_wrap_policy="transformer_based_wrap", **wishes)
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
    model = net()
    return accelerator.prepare(model, ours(model))


def error(act):
    try:
        act()
    except qkit.StageError as refusal:
        return str(refusal)
    return None


def saved_sizes(model):
    """Elements of what autograd saves in a forward, but for the parameters themselves."""
    sizes = []

    def note(tensor):
        own = {one.untyped_storage().data_ptr() for one in model.parameters() if not hasattr(one, "full_tensor")}
        if tensor.untyped_storage().data_ptr() not in own:
            sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(batch(0, slice(1))[0]).sum().backward()
    return max(sizes)


def run(rank, folder):
    """All of it, in process `rank`."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}  # accelerate looks there
    os.environ |= {"WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1"}
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    seen = {}
    for make in (adam, ours):
        model = shard(net())
        seen[make.__name__] = ends(model, train(model, make(model), rank))
    whole = qkit.gather(model)
    if whole is not None:
        qkit.save(qkit.convert(whole), f"{folder}/sharded")

    model = shard(net(), reshard_after_forward=False)
    seen["accumulated"] = ends(model, train(model, adam(model), rank, accumulate=2))

    model = net()
    model.checkpoints = True
    shard(model)
    seen["checkpointed"] = ends(model, train(model, adam(model), rank))

    model = shard(net())
    seen["autocast"] = ends(model, train(model, adam(model), rank, autocast=True))

    model = shard(net(torch.bfloat16), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    seen["bfloat16"] = ends(model, train(model, adam(model), rank))

    model = net()
    model.first.compile(backend="aot_eager")
    model.second.compile(backend="aot_eager")
    shard(model)
    seen["compiled"] = ends(model, train(model, adam(model), rank))

    wrapped = DistributedDataParallel(net())
    seen["DDP"] = ends(wrapped.module, train(wrapped, adam(wrapped), rank))

    if find_spec("accelerate"):
        model, optimizer = by_accelerate()
        seen["accelerate"] = ends(model, train(model, optimizer, rank))

    seen["sizes"] = saved_sizes(shard(net()))

    model = shard(net())
    model(batch(0)[0])
    with torch.no_grad():
        for one in model.parameters():
            one.mul_(-2)
    edited = model(batch(0)[0]).detach()
    with torch.no_grad():
        for one in model.parameters():
            one.mul_(2)
    seen["edited"] = edited
    seen["edited again"] = model(batch(0)[0]).detach()

    model = shard(net())
    with qkit.disabled(model):
        seen["disabled"] = model(batch(0)[0]).detach()

    adapted, plain = shard(with_adapters()), shard(net())
    losses = train(adapted, adam(adapted), rank)
    whole = qkit.gather(adapted)
    seen["adapted"] = {"losses": losses} | ({"codes": codes(qkit.merge(whole))} if whole is not None else {})
    seen["errors"] = {
        "adapt": error(lambda: qkit.adapt(plain, qkit.Adapter(rank=2))),
        "put": error(lambda: qkit.adapters.load(plain, f"{folder}/adapter")),
        "merge": error(lambda: qkit.merge(adapted)),
        "keep": error(lambda: qkit.adapters.save(adapted, f"{folder}/never")),
        "convert": error(lambda: qkit.convert(model)),
        "save": error(lambda: qkit.save(model, f"{folder}/never")),
    }
    rounding = shard(with_adapters(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    seen["errors"]["rounded"] = error(lambda: rounding(batch(0)[0]))
    import parallel  # which imports this module
    import resumed
    import shards

    seen["shards"] = shards.observe(rank)
    seen["resumed"] = resumed.observe(rank, folder)
    seen["not finite"] = shards.saved(rank, folder)
    if find_spec("transformers") and find_spec("accelerate"):
        seen["parallel"] = parallel.observe(rank, folder)
    torch.save(seen, f"{folder}/{rank}.pt")
    distributed.barrier()
    os._exit(0)  # gloo's threads now and then abort a process that takes them down, torch 2.13
