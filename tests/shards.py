"""Cases of test_torch_sharded.py about values that FSDP2 gathers in the place of weights; of two processes, see `processes`."""

import io

import torch
from processes import Net, batch, shard, train
from qkit_torchao.torch_private import copied, fsdp_parameters, local_part, users
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

import qkit
from qkit import Grid, Recipe, Rule

GRID = Grid("int4", 32)
BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
UNCAST = MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=False, output_dtype=torch.float32)
GRIDS = (Grid("int4", "row"), Grid("int8", "tensor"), Grid("e2m1", 16, "nvfp4"), Grid("int4", 16, "minmax"))


class Even(nn.Module):
    """An embedding and two layers, whose rows and inputs divide by two."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(52, 64)
        self.first = nn.Sequential(nn.Linear(64, 128), nn.ReLU())
        self.second = nn.Sequential(nn.Linear(128, 52, bias=False))

    def forward(self, ids):
        return self.second(self.first(self.tokens(ids)))


class Block(nn.Module):
    """Layers that share the tensor scale of an nvfp4 grid, as servers have it."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(64, 33) for _ in range(3))

    def forward(self, x):
        return self.q_proj(x) + self.k_proj(x) + self.v_proj(x)


class Fused(nn.Module):
    """An embedding, a block of fused layers, and a layer of its own."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(51, 64)
        self.first = Block()
        self.second = nn.Sequential(nn.Linear(33, 51, bias=False))
        with torch.no_grad():
            self.first.k_proj.weight.mul_(37)

    def forward(self, ids):
        return self.second(self.first(self.tokens(ids)))


def recipe(grid, **more):
    rules = (
        Rule(("second.*",)),
        Rule(("*",), weight=grid, **more),
        Rule(("*",), kind="embedding", weight=grid, **more),
    )
    return Recipe("test", rules if grid.scale == "nvfp4" else rules[1:])


def adam(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def build(kind, grid, **more):
    torch.manual_seed(0)
    return qkit.prepare(kind(), recipe(grid, **more), skip_indivisible=kind is Fused)


def each_fsdp(model, verb):
    for module in model.modules():
        if hasattr(module, verb):
            getattr(module, verb)()


def wrong_values(model, grid, dtype):
    """How many gathered weights are not `dtype` of the values of the master weights, and how many were compared."""
    each_fsdp(model, "reshard")
    whole = {name: one.full_tensor().detach().clone() for name, one in model.named_parameters()}
    on_grid = [layer.path for layer in qkit.backend("torchao").layers(model) if layer.stage == "prepared"]
    names = {path: f"{path}.weight" for path in on_grid}
    peak = None
    if grid.scale == "nvfp4" and "first.q_proj" in names:
        peak = max(float(whole[f"first.{name}.weight"].abs().max()) for name in ("q_proj", "k_proj", "v_proj"))
    each_fsdp(model, "unshard")
    bad = count = 0
    for path, name in names.items():
        shared = peak if path.startswith("first.") and peak else None
        q = qkit.backend("torchao").quantize(whole[name], grid, peak=shared)
        want = qkit.dequantize(q).to(dtype)
        bad += int((model.get_parameter(name).detach() != want).sum())
        count += want.numel()
    each_fsdp(model, "reshard")
    return bad, count


def seen_of(kind, grid, rank, *, late="", more=None, **options):
    """Losses and wrong values of a run; `late`: whether the model is prepared after it was sharded, or has computed, too."""
    if late:
        torch.manual_seed(0)
        model = shard(kind(), **options)
        if late == "computed":
            model(batch(0)[0])
        assert qkit.prepare(model, recipe(grid, **(more or {}))) is model
    else:
        model = shard(build(kind, grid, **(more or {})), **options)
    losses = train(model, adam(model), rank)
    model.train()
    bad, count = wrong_values(model, grid, torch.bfloat16 if "mp_policy" in options else torch.float32)
    return {"losses": losses, "wrong": bad, "count": count}


def along(dim):
    """Options of FSDP2 by which weights are split along `dim`."""
    return {"shard_placement_fn": lambda one: Shard(dim) if one.dim() > 1 else None}


def observe(rank):
    """All of it, in process `rank`: by case."""
    pairs = {name: init_device_mesh("cpu", shape, mesh_dim_names=("a", "b")) for name, shape in MESHES.items()}
    seen = {
        "policy": seen_of(Net, GRID, rank, mp_policy=BF16),
        "no policy": seen_of(Net, GRID, rank),
        "inputs not cast": seen_of(Net, GRID, rank, mp_policy=UNCAST),
        "sharded before": seen_of(Net, GRID, rank, late="sharded", mp_policy=BF16),
        "computed before": seen_of(Net, GRID, rank, late="computed", mp_policy=BF16),
        "left whole": seen_of(Net, GRID, rank, late="computed", mp_policy=BF16, reshard_after_forward=False),
        "resharded to one": seen_of(Net, GRID, rank, mp_policy=BF16, reshard_after_forward=1),
        "offloaded": seen_of(Net, GRID, rank, mp_policy=BF16, offload_policy=CPUOffloadPolicy(pin_memory=False)),
        "masked": seen_of(Net, GRID, rank, mp_policy=BF16, more={"ste": "masked"}),
        "fused": seen_of(Fused, Grid("e2m1", 16, "nvfp4"), rank, mp_policy=BF16),
        "block": seen_of(Fused, GRID, rank, mp_policy=BF16),
        "along inputs": seen_of(Even, GRID, rank, mp_policy=BF16, **along(1)),
    }
    seen |= {name: seen_of(Net, GRID, rank, mp_policy=BF16, mesh=mesh) for name, mesh in pairs.items()}
    for grid in GRIDS:
        seen[f"{grid}, along outputs"] = seen_of(Net, grid, rank, mp_policy=BF16)
        seen[f"{grid}, along inputs"] = seen_of(Even, grid, rank, mp_policy=BF16, **along(1))
    return seen | changed(rank) | {"together": together(rank), "codes": gathered_codes(rank)}


PACKED = (GRID, Grid("int3", 32), Grid("int4", 16, "minmax"), Grid("e2m1", 32, "even"), Grid("e4m3", "row"))


def gathered_codes(rank):
    """By grid, runs that gather values and codes: losses, wrong values, and bytes that a process gives for one gather."""
    import qkit_torchao

    seen = {}
    for grid in PACKED:
        for packed in (False, True):
            model = shard(build(Even, grid), mp_policy=BF16)
            if packed:
                assert qkit_torchao.gather_codes(model) is model
            losses = train(model, adam(model), rank)
            model.train()
            bad, count = wrong_values(model, grid, torch.bfloat16)
            with qkit.disabled(model):
                off = model(batch(0)[0]).detach()
            each_fsdp(model, "reshard")
            given = [
                one.numel() * one.element_size()
                for _, record in fsdp_parameters()
                if record.sharded_param.dim() > 1 and any(record is own for own in records(model))
                for one in record.all_gather_inputs
            ]
            seen[f"{grid}, {packed}"] = {
                "losses": losses,
                "wrong": bad,
                "count": count,
                "off": off,
                "bytes": sum(given),
            }
    seen["refused"] = refused_codes()
    return seen


def records(model):
    mine = {id(module) for module in model.modules()}
    return [record for _, record in fsdp_parameters() if any(id(user) in mine for user in users(record))]


def refused_codes():
    """The messages about models whose codes cannot be gathered."""
    import qkit_torchao

    found = {}
    for name, model in {
        "float": shard(Even(), mp_policy=BF16),
        "whole": build(Even, GRID),
        "uneven": fully_shard(qkit.prepare(nn.Sequential(nn.Linear(64, 33)), "int4-g32"), mp_policy=BF16),
        "of tensors": shard(build(Even, Grid("int8", "tensor")), mp_policy=BF16),
    }.items():
        try:
            found[name] = f"gathers {type(qkit_torchao.gather_codes(model)).__name__}"
        except qkit.StageError as refusal:
            found[name] = str(refusal)
    return found


SAVED = (
    (Net, GRID, {}),
    (Net, Grid("int4", 16, "minmax"), {}),
    (Net, Grid("int8", "tensor"), {}),
    (Fused, Grid("e2m1", 16, "nvfp4"), {}),
    (Even, GRID, along(1)),
    (Even, Grid("e4m3", "row"), along(1)),
)
MESHES = {"replicated": (2, 1), "sharded in a mesh of two axes": (1, 2)}


def saved(rank, folder):
    """Artifacts of shards beside those of the gathered model; and the message about a weight that is not finite."""
    import qkit_torchao

    for number, (kind, grid, options) in enumerate(SAVED):
        model = shard(build(kind, grid), mp_policy=BF16, **options)
        model(batch(0)[0])
        qkit_torchao.save_sharded(model, f"{folder}/parts-{number}")
        whole = qkit.gather(model)
        if whole is not None:
            qkit.save(qkit.convert(whole), f"{folder}/whole-{number}")
    if rank == 1:
        with torch.no_grad():
            model.first[0].weight.to_local()[-1, 0] = torch.inf
    try:
        qkit_torchao.save_sharded(model, f"{folder}/never")
    except qkit.RangeError as refusal:
        return str(refusal)
    return None


def changed(rank):
    """What follows changes of the weights that no optimizer makes, and losses of the marks of parts."""
    model = shard(build(Net, GRID), mp_policy=BF16)
    first = wrong_values(model, GRID, torch.bfloat16)
    with torch.no_grad():
        for one in model.parameters():
            one.mul_(-2)
    edited = wrong_values(model, GRID, torch.bfloat16)
    state = {name: one.detach().clone() for name, one in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    assigned = wrong_values(model, GRID, torch.bfloat16)
    stream = io.BytesIO()
    torch.save({name: one.to_local() for name, one in model.state_dict().items()}, stream)
    stream.seek(0)
    plain = {type(one).__name__ for one in torch.load(stream, weights_only=True).values()}
    model(batch(0)[0])
    with qkit.disabled(model):
        off = model(batch(0)[0]).detach()
    distributed.barrier()
    return {"edits": {"first": first, "edited": edited, "assigned": assigned, "plain": plain, "off": off}}


def together(rank):
    """Of a block whose weights are gathered together: how many FSDP asks for, and wrong values, after each kind of change."""
    model = shard(build(Fused, GRID), mp_policy=BF16)
    layers = [model.first.q_proj, model.first.k_proj, model.first.v_proj]
    seen = {}

    def look(name, grid=GRID):
        losses = train(model, adam(model), rank)  # a weight whose values are not renewed does not follow its master
        asked = sum(hasattr(local_part(layer.weight), "fsdp_pre_all_gather") for layer in layers)
        seen[name] = losses, asked, *wrong_values(model, grid, torch.bfloat16)

    look("trained")
    for name in ("q_proj", "k_proj"):
        each_fsdp(model, "reshard")
        state = {f"first.{name}.weight": model.first.get_parameter(f"{name}.weight").detach().clone().mul_(-2)}
        model.load_state_dict(state, assign=True, strict=False)
        look(f"{name} assigned")
    each_fsdp(model, "reshard")
    qkit.regrid(model, Recipe("test", (Rule(("second.*",)), *recipe(Grid("int4", 16)).rules)))
    look("another grid", Grid("int4", 16))
    record = next(one for _, one in fsdp_parameters() if layers[1] in users(one))
    before = copied(record).data_ptr() == local_part(layers[1].weight).data_ptr()
    layers[1].switch_mode("off")  # another class of layer may follow: FSDP must not go on copying values
    return seen | {"masters": (before, copied(record).data_ptr() == local_part(layers[1].weight).data_ptr())}
