"""Adapters in torch: gradients, and what people train with: accumulation, checkpointing, compiling, autocast, and peft."""

import copy

import numpy as np
import pytest
from models import build

torch = pytest.importorskip("torch")
pytest.importorskip("torchao")

from torch.nn import functional as F  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

import qkit  # noqa: E402
from qkit.adapters import Adapter  # noqa: E402
from qkit.engines.trainer import TrainerOptions  # noqa: E402

BASES = ["prepared", "converted"]
TOKENS = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (4, 17)))


def adapted(*, base, kind="lora", recipe="int4-g32", dtype=torch.float32):
    """Two layers with adapters whose B is not zero."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.ReLU(), torch.nn.Linear(96, 32)).to(dtype)
    model = qkit.prepare(model, recipe) if base == "prepared" else qkit.convert(model, recipe)
    model = qkit.adapt(model, Adapter(rank=4, kind=kind))
    with torch.no_grad():
        for layer in model[::2]:
            layer.lora_B.normal_(std=0.1)
    return model


@pytest.mark.parametrize("recipe", ["int4-g32", "int2-g32", "mxfp4-a16"])
def test_codes_of_bfloat16_take_inputs_of_float32(recipe):
    """As from a file in bfloat16 whose configuration says float32."""
    layer = qkit.convert(torch.nn.Sequential(torch.nn.Linear(64, 96, bias=False)).to(torch.bfloat16), recipe)
    layer = qkit.adapt(layer, Adapter(rank=4))
    with torch.no_grad():
        layer[0].lora_B.normal_(std=0.1)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    y = layer(x)
    assert y.dtype == torch.float32
    assert all(one.any() for one in gradients(layer, y.sum()).values())
    torch.testing.assert_close(qkit.merge(copy.deepcopy(layer)).eval()(x), y, rtol=1e-6, atol=1e-6)


def gradients(model, loss):
    """The gradient of every adapter parameter by name."""
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    return dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))


def plain(layer, x):
    """The layer's output with the rounding of its values as a constant; torch itself differentiates it."""
    engine = qkit.backend("torchao")
    (known,) = engine.layers(layer)
    w = next(qkit.adapters.surgery.base_weights(engine, known, "weight", spread=known.stage == "converted"))
    v = torch.from_numpy(w) + layer.lora_scale * layer.lora_B @ layer.lora_A
    if layer.lora_magnitude is not None:
        v = layer.lora_magnitude[:, None] * v / v.detach().norm(dim=1, keepdim=True)
    values = qkit.fake_quantize(layer.merged().detach(), layer.rule.weight)
    return F.linear(x, v + (values - v).detach(), layer.bias)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_gradients_pass_straight_through_to_the_adapter(kind, base):
    layer, x = adapted(base=base, kind=kind)[0], torch.randn(8, 64)
    slope = torch.randn(8, 96)
    ours, theirs = (gradients(layer, (function(x) * slope).sum()) for function in (layer, lambda x: plain(layer, x)))
    assert set(ours) == {"lora_A", "lora_B"} | ({"lora_magnitude"} if kind == "dora" else set())
    for name in ours:  # factors have 12 bits
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=2**-11 * theirs[name].abs().max().item())


@pytest.mark.parametrize(("base", "dtype"), [("prepared", torch.float32), ("converted", torch.bfloat16)])
def test_compiling_breaks_no_graph_and_changes_no_value(base, dtype):
    layer, x = adapted(base=base, kind="dora", dtype=dtype)[0], torch.randn(8, 64, dtype=dtype)
    compiled = torch.compile(layer, fullgraph=True)
    want, got = (gradients(layer, run(x).float().square().sum()) for run in (layer, compiled))
    near = (
        1e-5 if dtype == torch.float32 else 2e-2
    )  # sums in another order; in bfloat16 also rounded in between, or not
    for name in want:
        assert got[name].abs().max() > 0
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=near * want[name].abs().max().item())
    torch.testing.assert_close(compiled(x), layer(x), rtol=0, atol=near)


@pytest.mark.parametrize("base", BASES)
def test_autocast_does_not_reach_the_merged_weight(base):
    model, x = adapted(base=base, kind="dora"), torch.randn(8, 64)
    layer, slope = model[0], torch.randn(96, 64)
    want, slopes = layer.merged(), gradients(layer, (layer.merged() * slope).sum())
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        got = layer.merged()
        inside = gradients(layer, (got * slope).sum())  # backward within autocast, as some loops do
    assert torch.equal(got, want)
    assert all(torch.equal(inside[name], slopes[name]) for name in slopes)


@pytest.mark.parametrize("base", BASES)
def test_checkpointing_changes_no_bit(base):
    model, x = adapted(base=base), torch.randn(8, 64)
    want = gradients(model, model(x).square().sum())
    got = gradients(model, checkpoint(model, x, use_reentrant=False).square().sum())
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("base", BASES)
def test_accumulated_gradients_are_those_of_the_whole_batch(base):
    model, x = adapted(base=base), torch.randn(8, 64)
    want = gradients(model, model(x).square().sum())
    for part in x.split(2):
        model(part).square().sum().backward()
    for name, slope in want.items():  # sums in another order
        torch.testing.assert_close(model.get_parameter(name).grad, slope, rtol=0, atol=1e-5 * slope.abs().max().item())


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_nothing_of_the_size_of_a_weight_waits_for_the_backward_pass(kind, base):
    model, x = adapted(base=base, kind=kind), torch.randn(2, 64)
    known = {one.data_ptr() for one in [*model.parameters(), *model.buffers()]}
    sizes = []

    def store(tensor):
        sizes.append(0 if tensor.data_ptr() in known else tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(store, lambda tensor: tensor):
        model(x).square().sum().backward()
    assert max(sizes) < 32 * 96  # the smaller weight


@pytest.mark.parametrize("base", BASES)
def test_a_clip_is_seen_by_the_masked_estimator(base):
    rule = qkit.Rule(("*",), weight=qkit.Grid("int4", 32, "signed"), ste="masked")
    model = adapted(base=base, recipe=qkit.Recipe("masked", (rule,)))
    layer = model[0]
    x = torch.eye(64)
    inside = qkit.backend("torchao").unclipped(layer.merged().detach(), layer.rule.weight)
    assert not inside.all()
    want = layer.lora_scale * torch.where(inside, torch.ones(96, 64), 0.0) @ layer.lora_A.T
    got = gradients(layer, layer(x).sum())["lora_B"]
    torch.testing.assert_close(got, want, rtol=0, atol=2**-10 * want.abs().max().item())  # factors have 12 bits


@pytest.mark.parametrize("base", BASES)
def test_moved_cast_and_copied_adapters_go_on(base):
    model, x = adapted(base=base), torch.randn(8, 64)
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    state = {name: tensor for name, tensor in model.state_dict().items() if "lora" in name}
    assert sorted(state) == ["0.lora_A", "0.lora_B", "2.lora_A", "2.lora_B"]
    cast = copy.deepcopy(model).to(torch.bfloat16)
    y = cast(x.bfloat16())
    assert torch.equal(qkit.merge(cast)(x.bfloat16()), y)


# peft

#: transformers 5 deprecates what peft 0.21 asks of it
peft_asks = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


def in_peft(model, **wishes):
    peft = pytest.importorskip("peft")
    made = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "down_proj"], **wishes))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, one in made.named_parameters():
            if "lora_B" in name:
                one.normal_(std=0.05)
    return made


@peft_asks
def test_peft_works_on_a_prepared_model_whose_layers_stay_on_the_grid():
    model = qkit.prepare(build("torchao"), "int4-g64")
    engine = qkit.backend("torchao")
    before = engine.logits(model, TOKENS.numpy())
    peft_model = in_peft(model)
    rows = {row.path: row for row in qkit.coverage(peft_model).rows}
    assert rows["base_model.model.model.layers.0.self_attn.q_proj.base_layer"].state == "prepared"
    with peft_model.disable_adapter():
        assert (engine.logits(peft_model, TOKENS.numpy()) == before).all()
    trainer = engine.trainer(peft_model, TrainerOptions(weight_decay=0.0))
    first, *_, last = (trainer.step([TOKENS.numpy().astype(np.int32)], learning_rate=1e-2) for _ in range(5))
    assert last < first


@peft_asks
def test_pefts_merge_moves_the_loss_and_ours_does_not():
    """peft trains FQ(W) + BA, and what is deployed after its merge is FQ(W + BA)."""
    engine, tokens, where = qkit.backend("torchao"), TOKENS.numpy().astype(np.int32), ("*.q_proj", "*.down_proj")
    theirs = in_peft(qkit.prepare(build("torchao"), "int2-g64"))
    ours = qkit.adapt(qkit.prepare(build("torchao"), "int2-g64"), Adapter(match=where))
    gaps = []
    for model, merge in ((theirs, lambda model: model.merge_and_unload()), (ours, qkit.merge)):
        trainer = engine.trainer(model, TrainerOptions(weight_decay=0.0))
        for _ in range(40):
            trainer.step([tokens], learning_rate=1e-2)
        before = engine.loss(model, tokens)
        gaps.append(engine.loss(merge(model), tokens) - before)
    assert gaps[1] == 0
    assert abs(gaps[0]) > 1e-2  # nats
