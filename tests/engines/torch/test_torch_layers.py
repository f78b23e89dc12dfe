"""The torch layers: what stays, what is remembered, and that nobody trains on stale weights."""

import copy
import io
import pickle
from functools import partial

import models
import pytest
from models import CONFIG

torch = pytest.importorskip("torch", reason="torch is not installed")

from qkit_torchao.cache import values  # noqa: E402
from torch import nn  # noqa: E402

import qkit  # noqa: E402
from qkit import Grid, Recipe, Rule  # noqa: E402

inputs = partial(models.inputs, "torchao")
mlp = partial(models.mlp, "torchao", out=32, bias=False)
GRID = Grid("int4", 32)
RECIPE = Recipe("test", (Rule(("*",), weight=GRID),))


def fresh(model, x):
    """What the prepared `model` must compute: its own master weights, quantized now."""
    weights = [qkit.fake_quantize(layer.weight.detach(), GRID) for layer in (model[0], model[2])]
    hidden = torch.relu(nn.functional.linear(x, weights[0], model[0].bias))
    return nn.functional.linear(hidden, weights[1], model[2].bias)


def test_prepare_keeps_parameters_under_their_names():
    model = mlp()
    before = dict(model.named_parameters())
    after = dict(qkit.prepare(model, RECIPE).named_parameters())
    assert list(before) == list(after)
    assert all(before[name] is after[name] for name in before)


def test_prepare_keeps_hooks_and_mode():
    model = mlp().eval()
    seen = []
    model[0].register_forward_hook(lambda *_: seen.append(1))
    qkit.prepare(model, RECIPE)
    model(inputs())
    assert seen == [1]
    assert not model[0].training


def edit_in_place(model):
    with torch.no_grad():
        model[0].weight.mul_(-1.5)


def edit_by_optimizer(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(inputs()).square().sum().backward()
    optimizer.step()


def edit_by_state_dict(model):
    model.load_state_dict({name: tensor * -2 for name, tensor in model.state_dict().items()})


def edit_by_replacement(model):
    model[0].weight = nn.Parameter(-model[0].weight.detach())


def edit_by_data(model):
    model[0].weight.data = model[0].weight.data * -1


def edit_by_average(model):
    """As averaging packages swap weights for evaluation: through .data, then eval()."""
    model[0].weight.data.copy_(-model[0].weight.data)
    model.eval()


class OldOptimizer(torch.optim.Optimizer):
    """One of those that write through .data, which torch's version counters do not see."""

    def __init__(self, params):
        super().__init__(params, {})

    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            parameter.data.mul_(-1.5)


def edit_by_old_optimizer(model):
    OldOptimizer(model.parameters()).step()


EDITS = [
    edit_in_place,
    edit_by_optimizer,
    edit_by_state_dict,
    edit_by_replacement,
    edit_by_data,
    edit_by_average,
    edit_by_old_optimizer,
]


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_no_edit_leaves_stale_values(edit):
    model, x = qkit.prepare(mlp(), RECIPE), inputs()
    before = model(x)
    edit(model)
    after = model(x)
    assert torch.equal(after, fresh(model, x))
    assert not torch.equal(after, before)


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_a_copy_is_not_stale_either(edit):
    model, x = qkit.prepare(mlp(), RECIPE), inputs()
    model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        edit(twin)
        assert torch.equal(twin(x), fresh(twin, x))


def times_made(weight):
    """How often the values that are kept of `weight` were made: each time is one more version of them."""
    return values.cached([weight])[id(weight)].value._version  # noqa: SLF001  torch's count of writes has no public name


def test_values_are_made_once_for_many_forwards():
    model, x = qkit.prepare(mlp(), RECIPE), inputs()
    model(x)
    made = times_made(model[0].weight)
    for _ in range(8):
        model(x).sum().backward()
    assert times_made(model[0].weight) == made == 1


def test_gradients_are_those_of_the_quantized_weights():
    model, x = qkit.prepare(mlp(), RECIPE), inputs()
    plain = mlp()
    with torch.no_grad():
        for ours, theirs in zip((model[0], model[2]), (plain[0], plain[2]), strict=True):
            theirs.weight.copy_(qkit.fake_quantize(ours.weight.detach(), GRID))
    for network in (model, plain):
        network(x).square().sum().backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert ours.grad is not None
        assert torch.equal(ours.grad, theirs.grad)


def test_autocast_trains_the_fp32_master_with_bfloat16_values():
    model, x = qkit.prepare(mlp(), RECIPE), inputs()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    out.float().square().sum().backward()
    assert out.dtype == torch.bfloat16
    assert model[0].weight.grad.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(qkit.convert(model)(x), out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "recipe", ["int4-g32", "int3-g32", "int4-g32-minmax", "int8-row", "mxfp4", "mxfp8-a16", "nvfp4", "fp8"]
)
def test_prepared_equals_converted(recipe, dtype):
    model, x = qkit.prepare(mlp().to(dtype), recipe), inputs().to(dtype)
    prepared = model(x)
    assert torch.equal(qkit.convert(model)(x), prepared)


def test_converted_layers_hold_torchao_tensors_where_the_kernels_were_not_built(monkeypatch):
    from qkit_torchao.kernels import cpu
    from qkit_torchao.layers.execution import choose_execution
    from torchao.quantization import IntxUnpackedToInt8Tensor

    choose_execution.cache_clear()
    monkeypatch.setattr(cpu, "available", lambda: False)
    model = qkit.convert(mlp(), RECIPE)
    assert isinstance(model[0].weight, IntxUnpackedToInt8Tensor)
    assert model[0].weight.qdata.dtype == torch.int8
    choose_execution.cache_clear()


def test_a_converted_model_survives_copies_and_state_dicts():
    model, x = qkit.convert(mlp(), RECIPE), inputs()
    want = model(x)
    assert torch.equal(copy.deepcopy(model)(x), want)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    twin = qkit.convert(nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32, bias=False)), RECIPE)
    twin.load_state_dict(torch.load(buffer, weights_only=False))
    assert torch.equal(twin(x), want)


def test_subclasses_and_tied_layers_are_refused_by_name():
    class Mine(nn.Linear):
        pass

    with pytest.raises(qkit.RecipeError, match="0: Mine is a subclass of linear"):
        qkit.prepare(nn.Sequential(Mine(64, 32)), RECIPE)
    model = nn.Sequential(nn.Embedding(32, 64), nn.Linear(64, 32, bias=False))
    model[1].weight = model[0].weight
    with pytest.raises(qkit.RecipeError, match="1: its weight is tied to that of 0"):
        qkit.prepare(model, RECIPE)


def test_a_prepared_model_compiles_in_one_graph_to_the_same_numbers():
    model, x = qkit.prepare(mlp(), RECIPE), inputs()
    compiled = torch.compile(model, fullgraph=True)
    out = compiled(x)
    torch.testing.assert_close(out, model(x), rtol=0, atol=1e-5)  # inductor orders the matrix product otherwise
    edit_in_place(model)
    torch.testing.assert_close(compiled(x), fresh(model, x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("recipe", ["int4-g32", "int4-g32-minmax", "mxfp4-a16", "mxfp8", "nvfp4", "fp8"])
def test_a_converted_model_compiles_in_one_graph_to_the_same_numbers(recipe):
    model, x = qkit.convert(mlp(), recipe), inputs()
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), rtol=0, atol=1e-5)  # as above


def test_one_function_compiles_for_many_grids():
    w = inputs()

    def compiled(grid):
        return torch.compile(lambda w: qkit.fake_quantize(w, grid), fullgraph=True)(w)

    for grid in (Grid("int4", 64), Grid("int8", 32), Grid("int3", 32, "minmax"), Grid("e2m1", 32), Grid("e4m3", "row")):
        assert torch.equal(qkit.fake_quantize(w, grid), compiled(grid))


def test_inference_mode_leaves_nothing_behind_that_cannot_train():
    model, x = qkit.prepare(mlp(), RECIPE), inputs()
    with torch.inference_mode():
        model(x)
    model(x).sum().backward()
    with torch.inference_mode():
        born = qkit.prepare(mlp(), RECIPE)
        assert torch.equal(born(x), model(x))


def test_functional_transforms_see_the_straight_through_gradient():
    model, x = qkit.prepare(mlp(), RECIPE), inputs()
    model(x).square().sum().backward()
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    gradients = torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).square().sum())(parameters)
    for name, value in model.named_parameters():
        torch.testing.assert_close(gradients[name], value.grad)


@pytest.mark.parametrize("recipe", ["int4-g32", "int8-row", "int4-g32-minmax", "mxfp4-a16", "nvfp4-a16", "fp8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_cast_after_conversion_keeps_codes_and_scales(recipe, dtype):
    model = qkit.convert(mlp(), recipe)
    with torch.no_grad():
        before = qkit.backend("torchao").unpack(model[0])
        after = qkit.backend("torchao").unpack(model.to(dtype)[0])
        for name, part in before.parts().items():
            assert torch.equal(after.parts()[name], part)
        values = qkit.dequantize(before).to(dtype)
        hidden = nn.functional.linear(inputs().to(dtype), values, model[0].bias)
        assert torch.equal(model[0](inputs().to(dtype)), hidden)


def embedder(**options):
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(50, 64, **options), nn.Linear(64, 32))


EVERYTHING = Recipe("all", (Rule(("*",), weight=GRID), Rule(("*",), kind="embedding", weight=GRID)))


def test_embeddings_agree_prepared_and_converted_also_under_autocast():
    tokens = torch.tensor([[1, 2, 49], [0, 7, 7]])
    for context in (torch.autocast("cpu", torch.bfloat16), torch.no_grad()):
        model = qkit.prepare(embedder(), EVERYTHING)
        with context:
            prepared = model(tokens)
            assert torch.equal(qkit.convert(model)(tokens), prepared)


def test_an_embedding_that_rescales_its_rows_is_refused_by_name():
    with pytest.raises(qkit.RecipeError, match="0: its rows are rescaled at every look-up"):
        qkit.prepare(embedder(max_norm=1.0), EVERYTHING)


def test_a_module_registered_twice_is_saved_and_loaded(tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = self.second = nn.Linear(64, 64)

        def forward(self, x):
            return self.second(self.first(x))

    model = qkit.convert(qkit.prepare(Twice(), RECIPE))
    assert model.first is model.second
    again = qkit.load(qkit.save(model, tmp_path / "out"), into=Twice())
    assert again.first is again.second
    assert torch.equal(again(inputs()), model(inputs()))


def test_a_model_that_is_one_layer_goes_the_whole_way(tmp_path):
    model = qkit.convert(qkit.prepare(nn.Linear(64, 32), RECIPE))
    again = qkit.load(qkit.save(model, tmp_path / "out"), into=nn.Linear(64, 32))
    assert torch.equal(again(inputs()), model(inputs()))


def test_biases_are_trained_and_kept():
    model = qkit.prepare(mlp(), RECIPE)
    model(inputs()).square().sum().backward()
    assert model[0].bias.grad.abs().sum() > 0
    bias = model[0].bias.detach().clone()
    assert torch.equal(qkit.convert(model)[0].bias, bias)


def test_evaluation_restores_each_modules_mode():
    model = nn.Sequential(nn.Embedding(256, 64), nn.Dropout(), nn.Linear(64, 256)).train()
    model[1].eval()
    qkit.backend("torchao").loss(model, torch.randint(0, 256, (2, 9)).numpy().astype("int32"))
    assert [module.training for module in model] == [True, False, True]


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "LlamaForSequenceClassification", "LlamaModel"])
def test_the_architecture_that_was_saved_is_built(architecture, tmp_path):
    import transformers

    config = transformers.LlamaConfig(**{key: value for key, value in CONFIG.items() if key != "architectures"})
    config.pad_token_id = 0
    model = getattr(transformers, architecture)(config).eval()
    again = qkit.load(qkit.save(qkit.convert(model, "int4-g64"), tmp_path / "out"), backend="torchao")
    assert type(again).__name__ == architecture
    ids = torch.randint(1, 256, (2, 9))
    assert torch.equal(again(ids)[0], model(ids)[0])


@pytest.mark.parametrize("made", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_compiled_code_has_values_made_in_the_memory_that_is_theirs(made, monkeypatch):
    model = made(qkit.prepare(mlp(), "int4-g32"))
    buffers = [layer.values_buffer.data_ptr() for layer in model if hasattr(layer, "values_buffer")]
    filled, fill = [], values.fill
    monkeypatch.setattr(values, "fill", lambda buffer, *rest: filled.append(buffer.data_ptr()) or fill(buffer, *rest))
    compiled = torch.compile(model, fullgraph=True)
    for _ in range(2):
        compiled(inputs()).sum().backward()
    assert len(buffers) == 2
    assert filled == 2 * buffers
