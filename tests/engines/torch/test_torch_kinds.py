"""Layers of all kinds in torch: tied ones, those that read weights themselves, static ranges, switches under compilation."""

import copy
import io
import weakref
from functools import partial

import models
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from qkit_torchao.cache.inputs import inputs as cached_inputs  # noqa: E402
from qkit_torchao.kernels import choose  # noqa: E402
from torch import nn  # noqa: E402
from torch._dynamo import config  # noqa: E402
from torch._dynamo.backends.common import aot_autograd  # noqa: E402
from torch._functorch.partitioners import min_cut_rematerialization_partition  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

import qkit  # noqa: E402
from qkit.grid import Grid  # noqa: E402
from qkit.rules import Recipe, Rule  # noqa: E402

inputs = partial(models.inputs, "torchao")
mlp = partial(models.mlp, "torchao", out=32)
INT4 = Grid("int4", 32)
STATIC = Rule(("*",), weight=INT4, activation=Grid("int8", "tensor"), range="calibrated")
AVERAGE = Rule(("*",), weight=INT4, activation=Grid("int8", "tensor", "minmax"), range="average", ste="masked")


def recipe(*rules):
    return Recipe("test", rules or (Rule(("*",), weight=INT4),))


# modules that read weights themselves


def encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, 2).eval()


@pytest.mark.parametrize("step", [qkit.prepare, qkit.convert])
def test_an_encoder_computes_with_quantized_weights_in_evaluation_too(step):
    """torch's fused path would read `linear1.weight` itself: the master, or codes."""
    model, x = encoder(), inputs(3 * 7).reshape(3, 7, 64)
    want = encoder()
    with torch.no_grad():
        for layer in want.layers:
            for linear in (layer.linear1, layer.linear2):
                linear.weight.copy_(qkit.fake_quantize(linear.weight, INT4))
    want = want.train()(x).detach()  # in training mode every layer is called
    step(model, recipe())
    for mode in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(model(x), want, rtol=0, atol=2e-6)
            mask = torch.zeros(3, 7, dtype=torch.bool)
            torch.testing.assert_close(model(x, src_key_padding_mask=mask), want, rtol=0, atol=2e-6)


def test_attention_that_reads_its_weights_is_listed_as_left_alone():
    model = qkit.convert(encoder(), recipe())
    rows = {row.path: row for row in qkit.coverage(model).rows}
    for name in ("in_proj_weight", "out_proj.weight"):
        assert rows[f"layers.0.self_attn.{name}"].state == "left alone: nn.MultiheadAttention reads its weights itself"
        assert rows[f"layers.0.self_attn.{name}"].bits == 32
    assert rows["layers.0.linear1"].state.startswith(("native: C kernels", "decoded first: "))
    assert len(rows) == 8


def test_weights_without_a_rule_are_listed():
    model = nn.ModuleDict({"conv": nn.Conv2d(3, 8, 3), "linear": nn.Linear(64, 32)})
    model.stack = nn.Parameter(torch.zeros(4, 64, 32))
    rows = {row.path: row for row in qkit.coverage(qkit.prepare(model, recipe())).rows}
    assert rows["conv.weight"].state == "left alone: Conv2d is no linear layer"
    assert rows["conv.weight"].shape == (8, 3, 3, 3)
    assert rows["stack"].state == "left alone: ModuleDict is no linear layer"
    with pytest.raises(qkit.RecipeError, match="is first for no layer"):
        qkit.prepare(nn.Sequential(nn.Conv2d(3, 8, 3)), recipe())


# ties


def tied():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(64, 64), nn.LayerNorm(64), nn.Linear(64, 64, bias=False))
    model[2].weight = model[0].weight
    return model


WHOLE = (Rule(("*",), kind="embedding", weight=INT4), Rule(("*",), weight=INT4))


def test_a_tied_weight_trains_from_both_sides():
    model, tokens = qkit.prepare(tied(), recipe(*WHOLE)), torch.arange(20)
    assert model[2].weight is model[0].weight
    assert model[2].weight is model[0].weight  # whose values are made once for both
    model(tokens).square().sum().backward()
    both = model[0].weight.grad.clone()
    values = qkit.fake_quantize(model[0].weight.detach(), INT4)
    one, two = (values.clone().requires_grad_() for _ in range(2))
    nn.functional.linear(model[1](one[tokens]), two).square().sum().backward()
    torch.testing.assert_close(both, one.grad + two.grad)


def test_converted_tied_layers_share_their_codes_also_after_a_cast():
    model = qkit.convert(tied(), recipe(*WHOLE))
    for _ in range(2):
        assert model[2].codes.data_ptr() == model[0].codes.data_ptr()
        model = model.to(torch.bfloat16)
    twin = copy.deepcopy(model)
    assert twin[2].owner[0] is twin[0]
    assert torch.equal(twin(torch.arange(4)), model(torch.arange(4)))


def test_an_activation_on_a_tied_head_is_refused():
    rules = (WHOLE[0], Rule(("*",), weight=INT4, activation=Grid("int8", "row")))
    with pytest.raises(qkit.RecipeError, match="2: its weight is tied to that of 0, so that it takes no activation"):
        qkit.prepare(tied(), recipe(*rules))


def test_skip_leaves_a_tied_head_alone():
    model = nn.ModuleList([tied(), nn.Linear(64, 64)])
    model = qkit.prepare(model, recipe(Rule(("*",), weight=INT4, indivisible="skip")))
    states = [row.state for row in qkit.coverage(model).rows]
    assert states[1] == "left alone: skipped: its weight is tied to that of 0.0, which is left alone"
    assert states[2] == "prepared"


# static ranges


def calibrated(rule=STATIC):
    model = qkit.prepare(mlp(), recipe(rule)).eval()
    with qkit.calibrating(model):
        model(inputs())
    return model


def test_ranges_are_checkpointed_and_stay_in_float32():
    model, x = calibrated(), inputs()
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    twin = qkit.prepare(mlp(), recipe(STATIC)).eval()
    twin.load_state_dict(torch.load(buffer))
    assert torch.equal(twin(x), model(x))
    assert sorted(name for name in model.state_dict() if "gate" in name) == []
    low = model[0].input_range.clone()
    model = model.bfloat16()
    assert torch.equal(model[0].input_range, low)
    converted = qkit.convert(model)
    scale = converted[0].input_scale.clone()
    assert torch.equal(converted.half()[0].input_scale, scale)
    assert scale.dtype == torch.float32


def test_ranges_look_at_finite_numbers_only():
    model = qkit.prepare(mlp(), recipe(STATIC))
    x = inputs()
    with qkit.calibrating(model):
        model(x)
        model(x * torch.inf)
        model(x * torch.nan)
    assert model[0].input_range.tolist() == [x.min(), x.max()]


def test_a_running_average_under_compilation_is_that_of_eager():
    x, models = inputs(), [qkit.prepare(mlp(), recipe(AVERAGE)) for _ in range(2)]
    for i, model in enumerate(models):
        run = torch.compile(model, fullgraph=True) if i else model
        for factor in (1.0, 3.0, 2.0):
            run(factor * x).sum().backward()
    for one, other in zip(*(model.buffers() for model in models), strict=True):
        torch.testing.assert_close(
            one, other, rtol=1e-6, atol=0
        )  # inductor may fuse the multiplication and the addition
    torch.testing.assert_close(models[0][0].weight.grad, models[1][0].weight.grad, rtol=1e-4, atol=1e-4)  # matmul order


# switches


@pytest.mark.parametrize(
    "rule", [Rule(("*",), weight=INT4, activation=Grid("int8", "row")), STATIC, AVERAGE], ids=lambda r: r.range
)
def test_a_switch_does_not_compile_anew(rule):
    model = calibrated(rule) if rule.range != "dynamic" else qkit.prepare(mlp(), recipe(rule))
    x, float_model = inputs(), mlp()
    compiled = torch.compile(model, fullgraph=True)
    on, off = model(x), float_model(x)
    torch.testing.assert_close(compiled(x), on, rtol=0, atol=1e-5)  # matmul order
    with config.patch(error_on_recompile=True):
        with qkit.disabled(model):
            torch.testing.assert_close(compiled(x), off, rtol=0, atol=1e-5)  # matmul order
        torch.testing.assert_close(compiled(x), on, rtol=0, atol=1e-5)  # matmul order
    qkit.disable(model, "0")  # layers in different modes are compiled once more
    assert (compiled(x) - on).abs().max() > 1e-3
    qkit.enable(model)
    torch.testing.assert_close(compiled(x), on, rtol=0, atol=1e-5)  # matmul order


def test_compiled_layers_that_share_an_input_quantize_it_once():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.branches = nn.ModuleList(nn.Linear(64, 32) for _ in range(3))

        def forward(self, x):
            return torch.stack([branch(x) for branch in self.branches])

    model = qkit.prepare(Branches(), recipe(Rule(("*",), weight=Grid("int4", 32), activation=Grid("int8", "row"))))
    graphs = []  # as inductor sees them

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch.compile(
        model,
        fullgraph=True,
        backend=aot_autograd(fw_compiler=backend, partition_fn=min_cut_rematerialization_partition),
    )(inputs())
    called = [node.target for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert called.count(torch.ops.qkit.on_grid.default) == 1
    assert called.count(torch.ops.aten.addmm.default) == 3  # which a compiler can add to


def test_gradients_of_a_switched_off_layer_are_those_of_the_float_layer():
    x, model, want = inputs(), qkit.prepare(mlp(), recipe(AVERAGE)), mlp()
    want(x).square().sum().backward()
    qkit.disable(model)
    for run in (model, torch.compile(model, fullgraph=True)):
        model.zero_grad()
        run(x).square().sum().backward()
        for one, other in zip(model.parameters(), want.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad)
        assert model[0].input_range.tolist() == [np.inf, -np.inf]  # nothing was looked at


def test_a_switch_survives_copies_pickles_and_empty_memory():
    model = qkit.prepare(mlp(), recipe())
    qkit.disable(model, "0")
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert [row.state for row in qkit.coverage(twin).rows] == ["prepared, switched off", "prepared"]
        assert torch.equal(twin(inputs()), model(inputs()))
    empty = model.to("meta").to_empty(device="cpu")
    assert [bool(layer.gate) for layer in (empty[0], empty[2])] == [False, True]


# biases and masks


@pytest.mark.parametrize("rule", [Rule(("*",), weight=INT4), STATIC, AVERAGE], ids=lambda r: r.range)
def test_biases_are_trained_and_kept(rule):
    model, x = calibrated(rule) if rule.slots else qkit.prepare(mlp(), recipe(rule)), inputs()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [model[i].bias.detach().clone() for i in (0, 2)]
    y = model(x)
    y.square().sum().backward()
    torch.testing.assert_close(model[2].bias.grad, 2 * y.detach().sum(0))
    optimizer.step()
    assert all((model[i].bias != old).any() for i, old in zip((0, 2), before, strict=True))
    trained = [model[i].bias.detach().clone() for i in (0, 2)]
    converted = qkit.convert(model)
    assert all(torch.equal(converted[i].bias, bias) for i, bias in zip((0, 2), trained, strict=True))


def test_the_masked_weight_gradient_is_that_of_the_mask_eager_and_compiled():
    rule = Rule(("*",), weight=Grid("int3", 32, "midmax"), ste="masked")
    x = inputs()
    for compiled in (False, True):
        model = qkit.prepare(mlp(), recipe(rule))
        plain = qkit.prepare(mlp(), recipe(Rule(("*",), weight=rule.weight)))
        for one in (model, plain):
            (torch.compile(one, fullgraph=True) if compiled else one)(x).sum().backward()
        inside = qkit.backend("torchao").unclipped(model[2].weight, rule.weight)
        assert not inside.all()
        want = torch.where(inside, plain[2].weight.grad, 0.0)
        torch.testing.assert_close(model[2].weight.grad, want)


@pytest.mark.parametrize(
    "name", ["int8-dynamic-act-int8-weight", "int8-static-act-int8-weight", "float8-static-act-float8-weight"]
)
def test_converted_models_with_activations_compile_to_the_same_numbers(name):
    model, x = qkit.prepare(mlp(), name).eval(), inputs()
    if "static" in name:
        with qkit.calibrating(model):
            model(x)
    model = qkit.convert(model)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), rtol=0, atol=1e-5)  # matmul order


# products of codes, whose kernels run on the CPU too, though layers take them on CUDA only


@pytest.mark.parametrize(
    "on_x", [Grid("int8", "row"), Grid("int8", "row", "minmax"), Grid("int4", "row"), Grid("int8", "tensor")]
)
@pytest.mark.parametrize("ste", ["identity", "masked"])
@pytest.mark.parametrize("rows", [1, 17])
def test_a_product_of_codes_is_that_of_values_with_its_gradients(on_x, ste, rows):
    from qkit_torchao.layers.products import multiply_codes

    engine, grids = qkit.backend("torchao"), (Grid("int8", "row", "midmax"), on_x)
    x, layer = inputs(2 * rows).reshape(2, rows, 64), mlp()[0]
    low, high = x.min().item() / 2, x.max().item() / 2
    q = qkit.quantize(torch.tensor([low, high]), on_x) if on_x.group == "tensor" else None
    given = {} if q is None else {"scales": q.scales, "zeros": q.zeros}
    results = []
    for products in (True, False):
        leaves = [t.detach().clone().requires_grad_() for t in (x, layer.weight, layer.bias)]
        if products:
            y = multiply_codes(*leaves, (str(grids[0]), str(on_x)), ste, **given)
        else:
            values = engine.fake_quantize(leaves[0], on_x, ste=ste, **given)
            y = nn.functional.linear(values, engine.fake_quantize(leaves[1], grids[0], ste=ste), leaves[2])
        y.square().sum().backward()
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)  # one adds integers, the other fp32


def test_nan_in_a_product_of_codes_stays_in_its_row():
    from qkit_torchao.layers.products import multiply_codes

    x, layer, grids = inputs(), mlp()[0], ("int8-row-absmax", "int8-row-absmax")
    want = multiply_codes(x, layer.weight, layer.bias, grids, "identity")
    x[1, 3], x[2, 0] = torch.nan, torch.inf
    made = multiply_codes(x, layer.weight, layer.bias, grids, "identity")
    assert made[1:3].isnan().all()
    assert torch.equal(made[[0, 3, 4]], want[[0, 3, 4]])


class Borrower(nn.Module):
    """Multiplies with a weight of its own, which may be another layer's too."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, x):
        return x @ self.weight.T


def test_a_weight_that_somebody_else_reads_is_not_quantized():
    linear = nn.Linear(64, 64)
    model = nn.Sequential(linear, Borrower(linear.weight), Borrower(nn.Parameter(torch.zeros(64, 64))))
    model.append(Borrower(model[2].weight))
    with pytest.raises(
        qkit.RecipeError, match=r"1.weight: its weight is tied to that of 0.*Borrower is no linear layer"
    ):
        qkit.prepare(model, recipe())
    rows = {row.path: row for row in qkit.coverage(model).rows}
    assert {path: row.tied for path, row in rows.items()} == {
        "0": "",
        "1.weight": "0",
        "2.weight": "",
        "3.weight": "2.weight",
    }
    assert qkit.coverage(model).bits_per_weight == 32


@pytest.mark.parametrize("name", ["mxfp4-a16", "mxfp8-a16", "int4-g32", "nvfp4-a16", "fp8"])
def test_who_asks_a_converted_layer_for_its_weight_gets_values(name):
    """transformers' T5 casts its activations to the type of `wo.weight`."""
    model = nn.Sequential(nn.Linear(64, 64))
    want = qkit.fake_quantize(model[0].weight.detach(), qkit.recipe(name).rules[-1].weight)
    layer = qkit.convert(model, name)[0]
    assert layer.weight.dtype == torch.float32
    assert tuple(layer.weight.shape) == (64, 64)
    decoded = layer.weight.dequantize() if hasattr(type(layer.weight), "dequantize") else layer.weight
    assert torch.equal(decoded if decoded.dtype == torch.float32 else decoded.float(), want)


def test_tied_layers_keep_their_own_estimator():
    grid = Grid("int3", 32, "midmax")
    gradients = {}
    for embedding, head in (("identity", "masked"), ("masked", "masked"), ("identity", "identity")):
        rules = (Rule(("*",), kind="embedding", weight=grid, ste=embedding), Rule(("*",), weight=grid, ste=head))
        model = qkit.prepare(tied(), recipe(*rules))
        model[2](torch.ones(1, 64)).sum().backward()
        gradients[embedding, head] = model[0].weight.grad
    assert torch.equal(gradients["identity", "masked"], gradients["masked", "masked"])
    assert not torch.equal(gradients["identity", "masked"], gradients["identity", "identity"])


def test_sparse_gradients_are_masked():
    grid = Grid("int3", 32, "midmax")
    gradients = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(16, 64, sparse=sparse))
        model = qkit.prepare(model, recipe(Rule(("*",), kind="embedding", weight=grid, ste="masked")))
        model(torch.tensor([3, 3, 7])).sum().backward()
        gradients.append(model[0].weight.grad.to_dense())
    assert torch.equal(*gradients)
    assert 0 < (gradients[0][3] == 0).sum() < 64


def test_a_weight_that_is_computed_is_an_obstacle():
    model = nn.Sequential(nn.Linear(64, 64))
    weight = model[0]._parameters.pop("weight")  # noqa: SLF001  as torch.nn.utils.weight_norm does
    model[0].weight = weight.detach()
    with pytest.raises(qkit.RecipeError, match="0: its weight is computed from other parameters"):
        qkit.prepare(model, recipe())


def test_a_float_checkpoint_loads_into_a_prepared_model():
    model = qkit.prepare(mlp(), recipe(STATIC))
    model.load_state_dict(mlp().state_dict())
    assert model[0].input_range.tolist() == [np.inf, -np.inf]


@pytest.mark.parametrize("leaf", [True, False])
@pytest.mark.parametrize("ste", ["identity", "masked"])
def test_an_input_that_layers_share_is_not_kept_by_what_is_kept_on_it(ste, leaf):
    model = qkit.prepare(mlp(), recipe(Rule(("*",), weight=Grid("int4", 32), activation=Grid("int8", "row"), ste=ste)))
    x = inputs().requires_grad_()
    x = x if leaf else x * 2
    seen = weakref.ref(x)
    model[0](x)
    model[0](x)
    del x
    assert seen() is None


SHARED = Rule(("*",), weight=Grid("int4", 32), activation=Grid("int8", "row"))


class Attention(nn.Module):
    """Three layers that get the same input."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(64, 64) for _ in range(3))

    def forward(self, x):
        return self.q(x) + self.k(x) + self.v(x)


def written(x):
    """The bytes of `x` in a file."""
    file = io.BytesIO()
    torch.save(x, file)
    return file.getvalue()


@pytest.mark.parametrize("grad", [True, False])
def test_a_forward_leaves_nothing_on_the_input(grad):
    model, x = qkit.prepare(mlp(), recipe(SHARED)), inputs()
    with torch.set_grad_enabled(grad):
        model(x)
        model(x)
    assert x.__dict__ == {}
    assert len(written(x)) == len(written(inputs()))
    assert torch.equal(torch.load(io.BytesIO(written(x)), weights_only=True), x)


@pytest.mark.parametrize("recomputed", [False, True])
def test_layers_quantize_a_shared_input_once_and_forget_it_with_the_input(recomputed, monkeypatch):
    model = qkit.prepare(Attention(), recipe(SHARED))
    calls, known = [], list(cached_inputs)
    rounded = choose.rounded
    monkeypatch.setattr(choose, "rounded", lambda x, grid: calls.append(grid) or rounded(x, grid))
    x = inputs().requires_grad_() * 2
    y = checkpoint(model, x, use_reentrant=False) if recomputed else model(x)
    assert calls.count(SHARED.activation) == 1
    y.square().sum().backward()
    assert calls.count(SHARED.activation) == 1 + recomputed
    del x, y
    assert list(cached_inputs) == known


@pytest.mark.parametrize("gradients", [False, True])
def test_a_buffer_that_a_loader_fills_again_is_quantized_again(gradients):
    model, buffer = qkit.prepare(nn.Sequential(nn.Linear(64, 8)), recipe(SHARED)), np.ones((3, 64), np.float32)
    x = torch.from_numpy(buffer)  # torch sees no write through NumPy
    with torch.set_grad_enabled(gradients):
        model(torch.zeros(2, 64))  # the first forward caches nothing
        model(x)
        buffer *= 3
        assert torch.equal(model(x), model(torch.from_numpy(buffer.copy())))
