"""Cases of test_torch_sharded.py about tensor parallelism, transformers' Trainer and bad input; of two processes."""

from importlib.util import find_spec

import torch
from processes import batch, shard
from shards import BF16, GRID, Even, build, recipe
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import qkit
from qkit import Grid, Recipe, Rule

ACTIVE = ("int4-g32", "int8-dynamic-act-int8-weight", "nvfp4")
PLAN = {"first.0": ColwiseParallel(), "second.0": RowwiseParallel()}
SETTINGS = {
    "RAM": {"cpu_ram_efficient_loading": True},
    "checkpoints": {"activation_checkpointing": True},
    "plain": {},
}


#: arguments of transformers' `DistributedConfig`
CONFIGURED = {
    "shards": {"fsdp_size": 2},
    "mixed": {"fsdp_size": 2, "fsdp_mixed_precision": True},
    "replicas": {"fsdp_size": 1, "dp_replicate_size": 2},
    "tensors": {"tp_size": 2},
}


def steps(model, loss_of):
    """Losses of three steps and of an evaluation."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
    losses = []
    for step in range(3):
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    model.eval()
    with torch.no_grad():
        losses.append(float(loss_of(model, 3)))
    return losses


def of_tokens(model, step):
    ids, after = batch(step)
    return F.cross_entropy(model(ids).flatten(0, 1), after.flatten())


def of_language(model, step):
    ids, _ = batch(step)
    return model(input_ids=ids, labels=ids).loss


def codes(model):
    """Of a whole model, by path."""
    engine, model = qkit.backend("torchao"), qkit.convert(model)
    return {
        layer.path: engine.unpack(layer.module).codes for layer in engine.layers(model) if layer.stage == "converted"
    }


def llama(folder):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=1, **shape))
    model.save_pretrained(folder)
    return model


def of_plan(name, mesh, *, late):
    """A run of a model with a plan of torch's, prepared before or after it was spread."""
    torch.manual_seed(0)
    model = Even()
    rules = name if isinstance(name, str) else recipe(name)
    if not late:
        qkit.prepare(model, rules)
    parallelize_module(model, mesh, PLAN)
    if late:
        qkit.prepare(model, rules)
    losses = steps(model, of_tokens)
    whole = qkit.gather(model)
    return {"losses": losses, "codes": codes(whole) if whole is not None else None}


def configured(folder, name, rank):
    """Runs of a model that transformers' `distributed_config` spreads as it loads: by the size that the config names."""
    import qkit_torchao
    from transformers import LlamaForCausalLM
    from transformers.distributed import DistributedConfig

    found = {}
    for kind, sizes in CONFIGURED.items():
        model = LlamaForCausalLM.from_pretrained(f"{folder}/llama", distributed_config=DistributedConfig(**sizes))
        model = qkit.prepare(model, name)
        found[kind] = {"losses": steps(model, of_language)}
        if "fsdp_size" in sizes:
            model.train()
            found[kind]["wrong"] = wrong_in(model.model.layers[0])
            qkit_torchao.save_sharded(model, f"{folder}/configured-{kind}-parts")
        whole = qkit.gather(model)
        if whole is not None:
            qkit.save(qkit.convert(whole), f"{folder}/configured-{kind}-whole")
    return found


def wrong_in(block):
    """How many gathered weights of a sharded `block` are not the values of their masters, in the type that is gathered."""
    block.reshard()
    names = [f"{path}.weight" for path, layer in block.named_modules() if hasattr(layer, "weight_grid")]
    whole = {name: block.get_parameter(name).full_tensor().detach() for name in names}
    block.unshard()
    pairs = [(block.get_parameter(name), qkit.fake_quantize(one, GRID)) for name, one in whole.items()]
    assert len(pairs) == 7
    wrong = sum(int((gathered != values.to(gathered.dtype)).sum()) for gathered, values in pairs)
    block.reshard()
    return wrong


def refused(act):
    try:
        act()
    except (qkit.QkitError, RuntimeError) as refusal:
        return f"{type(refusal).__name__}: {refusal}"
    return None


def by_trainer(folder, name, rank):
    """Losses of transformers' Trainer with FSDP2 and bf16, which accelerate offers on GPUs only, so that its state is set."""
    import qkit_torchao
    from accelerate import DistributedType, FullyShardedDataParallelPlugin
    from transformers import LlamaForCausalLM, Trainer, TrainingArguments

    wishes = {"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], **SETTINGS[name]}
    more = {
        "max_steps": 3,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "max_grad_norm": 0.0,
    }
    quiet = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "lr_scheduler_type": "constant"}
    arguments = TrainingArguments(
        f"{folder}/trainer", use_cpu=True, bf16=True, fsdp=True, fsdp_config=wishes, **more, **quiet
    )
    data = [{"input_ids": ids, "labels": ids} for step in range(3) for ids in batch(step)[0]]
    model = LlamaForCausalLM.from_pretrained(f"{folder}/llama")
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[qkit_torchao.QatCallback("int4-g32")])
    plugin = FullyShardedDataParallelPlugin(**arguments.fsdp_plugin_args)
    plugin.set_mixed_precision("bf16")
    state = trainer.accelerator.state
    state.fsdp_plugin, state.distributed_type, trainer.is_fsdp_enabled = plugin, DistributedType.FSDP, True
    trainer.train()
    qkit_torchao.save_sharded(trainer.model, f"{folder}/trained-{name}-parts")
    whole = qkit.gather(trainer.model)
    if whole is not None:
        qkit.save(qkit.convert(whole), f"{folder}/trained-{name}")
    return [one["loss"] for one in trainer.state.log_history if "loss" in one]


def observe(rank, folder):
    """All of it, in process `rank`."""
    mesh = init_device_mesh("cpu", (2,))
    seen = {}
    for grid in (GRID, Grid("int8", "row"), Grid("int8", "tensor"), Grid("e2m1", 16, "nvfp4")):
        for late in (False, True):
            seen[f"plan, {grid}, {late}"] = of_plan(grid, mesh, late=late)
    for name in ACTIVE:
        seen[f"plan, {name}, True"] = of_plan(name, mesh, late=True)
    if rank == 0:
        llama(f"{folder}/llama")
    distributed.barrier()
    from transformers import LlamaForCausalLM

    for name in ACTIVE:
        model = LlamaForCausalLM.from_pretrained(f"{folder}/llama", tp_plan="auto", device_mesh=mesh)
        seen[f"auto, {name}"] = steps(qkit.prepare(model, name), of_language)
    if find_spec("transformers.distributed.configuration_utils"):
        seen["configured"] = configured(folder, "int4-g32", rank)
    seen["trainer"] = {name: by_trainer(folder, name, rank) for name in SETTINGS}
    return seen | {"refused": refusals(rank, mesh), "right": right(rank)}


def refusals(rank, mesh):
    """The messages of that which cannot be right."""
    half = Recipe("half", (Rule(("second.*",), weight=Grid("int4", 128)), Rule(("*",))))
    split = parallelize_module(qkit.prepare(Even(), half), mesh, {"second.0": RowwiseParallel()})
    other = shard(build(Even, Grid("int4", 32 if rank else 64)), mp_policy=BF16)
    learned = shard(build(Even, GRID, scales="learned"), mp_policy=BF16)
    on_codes = shard(qkit.adapt(qkit.convert(Even(), recipe(GRID)), qkit.Adapter(rank=2)), mp_policy=BF16)
    zero = build(Even, GRID)
    zero.first[0].weight.ds_id, zero.first[0].weight.ds_shape = 7, (128, 64)  # as deepspeed marks what it partitions
    partitioned = Even()
    partitioned.first[0].weight = nn.Parameter(torch.empty(0))
    partitioned.first[0].weight.ds_id, partitioned.first[0].weight.ds_shape = 7, (128, 64)
    tuned = [qkit.adapt(build(Even, GRID), qkit.Adapter(rank=2, alpha=2.0 + rank)) for _ in range(2)]
    replicas = DistributedDataParallel(tuned[0])
    copies = DistributedDataParallel(build(Even, GRID, ste=("masked", "identity")[rank]))
    shards = shard(tuned[1])
    factors = qkit.adapt(qkit.convert(Even(), recipe(GRID)), qkit.Adapter(rank=2))
    factors.first[0].lora_A.ds_id = 7
    return {
        "split groups": refused(lambda: split(batch(0)[0])),
        "other recipes": refused(lambda: other(batch(0)[0])),
        "other recipes of replicas": refused(lambda: copies(batch(0)[0])),
        "other adapters of replicas": refused(lambda: replicas(batch(0)[0])),
        "other adapters": refused(lambda: shards(batch(0)[0])),
        "spread codes": refused(lambda: parallelize_module(qkit.convert(Even(), recipe(GRID)), mesh, PLAN)),
        "partitioned factors": refused(lambda: factors(batch(0)[0])),
        "learned": refused(lambda: learned(batch(0)[0])),
        "rounded factors": refused(lambda: on_codes(batch(0)[0])),
        "partitioned": refused(lambda: zero(batch(0)[0])),
        "prepare partitioned": refused(lambda: qkit.prepare(partitioned, recipe(GRID))),
        "learned late": refused(lambda: qkit.prepare(shard(Even()), recipe(GRID, scales="learned"))),
    } | of_fsdp1()


def of_fsdp1():
    from torch.distributed.fsdp import FullyShardedDataParallel

    found = {}
    for original in (True, False):
        options = {"device_id": torch.device("cpu"), "use_orig_params": original}
        before = FullyShardedDataParallel(build(Even, GRID), **options)
        after = FullyShardedDataParallel(Even(), **options)
        found[f"FSDP1, {original}"] = refused(lambda before=before: before(batch(0)[0]))
        found[f"FSDP1 first, {original}"] = refused(lambda after=after: qkit.prepare(after, recipe(GRID)))
    return found


def right(rank):
    """That which is right: converted models in FSDP2, ranges of all processes, policies that cast inputs or leave them."""
    torch.manual_seed(0)
    converted = qkit.convert(Even(), recipe(GRID))
    with torch.no_grad():
        want = converted(batch(0)[0])
        found = shard(converted)(batch(0)[0])
    static = Rule(("*",), weight=GRID, activation=Grid("int8", "tensor"), range="average")
    rules = Recipe("static", (static, Rule(("*",), kind="embedding")))
    torch.manual_seed(0)
    ddp = DistributedDataParallel(qkit.prepare(Even(), rules), broadcast_buffers=False)
    torch.manual_seed(0)
    fsdp = shard(qkit.prepare(Even(), rules), mp_policy=BF16)
    part = torch.arange(8).chunk(2)[rank]
    for step in range(3):
        for model in (ddp, fsdp):
            model(batch(step, part)[0])
    ranges = {name: one.clone() for name, one in ddp.module.named_buffers() if name.endswith("_range")}
    under_fsdp = {name: one.clone() for name, one in fsdp.named_buffers() if name.endswith("_range")}
    return {"converted": torch.equal(want, found), "ranges": ranges, "ranges of FSDP2": under_fsdp}
