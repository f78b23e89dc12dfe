"""The torch layers: what stays, what is remembered, and that nobody trains on stale weights."""

import copy
import io
import pickle

import pytest

torch = pytest.importorskip("torch", reason="the torch extra is not installed")

from torch import nn  # noqa: E402

import qkit  # noqa: E402
from qkit import Grid, Recipe, Rule  # noqa: E402

GRID = Grid("int4", 32)
RECIPE = Recipe("test", (Rule(("*",), weight=GRID),))


def mlp(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32, bias=False)).to(dtype)


def inputs(dtype=torch.float32):
    return torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).to(dtype)


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


def test_values_are_made_once_for_many_forwards(monkeypatch):
    from qkit_torchao import ops

    made = []
    real = ops.rounded
    monkeypatch.setattr(ops, "rounded", lambda w, grid: made.append(1) or real(w, grid))
    model, x = qkit.prepare(mlp(), RECIPE), inputs()
    for _ in range(8):
        model(x).sum().backward()
    assert len(made) == 2  # one for each layer


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
    model, x = qkit.prepare(mlp(dtype), recipe), inputs(dtype)
    prepared = model(x)
    assert torch.equal(qkit.convert(model)(x), prepared)


def test_converted_layers_hold_torchao_tensors():
    from torchao.quantization import IntxUnpackedToInt8Tensor

    model = qkit.convert(mlp(), RECIPE)
    assert isinstance(model[0].weight, IntxUnpackedToInt8Tensor)
    assert model[0].weight.qdata.dtype == torch.int8


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
