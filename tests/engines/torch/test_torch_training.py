"""Training on torch beside the plain law: fake-quantize weights and inputs at every call, and let gradients pass through."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.nn.utils import prune  # noqa: E402

import qkit  # noqa: E402
from qkit import reference  # noqa: E402
from qkit.engines.trainer import AdamWOptions  # noqa: E402

BE = qkit.backend("torchao")
DYNAMIC = [
    name
    for name in qkit.recipes()
    if all(rule.range == "dynamic" and rule.scales == "rule" for rule in qkit.recipe(name).rules)
]
STEPS = 50


class Slow(nn.Module):
    """A linear layer that rounds anew at every call."""

    def __init__(self, layer, rule):
        super().__init__()
        self.weight, self.bias, self.rule = layer.weight, layer.bias, rule

    def forward(self, x):
        x = BE.fake_quantize(x, self.rule.activation) if self.rule.activation else x
        return F.linear(x, BE.fake_quantize(self.weight, self.rule.weight), self.bias)


def on_grid(x, grid):
    return torch.from_numpy(reference.fake_quantize(x.detach().numpy(), grid)) if grid else x.detach()


def rule_of(recipe):
    return qkit.recipe(recipe).rules[-1]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("recipe", DYNAMIC)
def test_gradients_are_those_of_the_reference(recipe, compiled):
    rule = rule_of(recipe)
    torch.manual_seed(0)
    model = qkit.prepare(nn.Sequential(nn.Linear(256, 48, bias=False)), qkit.Recipe("one", (rule,)))
    run = torch.compile(model, fullgraph=True) if compiled else model
    x, gradient = torch.randn(24, 256, requires_grad=True), torch.randn(24, 48)
    run(x).backward(gradient)
    weight, given = model[0].weight, on_grid(x, rule.activation).double()
    wants = (gradient.double().T @ given, gradient.double() @ on_grid(weight, rule.weight).double())
    for got, want in zip((weight.grad, x.grad), wants, strict=True):
        assert (got.double() - want).norm() < 1e-6 * want.norm()  # the bar is 1e-2, for bfloat16


@pytest.mark.parametrize("optimizer", ["qkit.adamw", "AdamW"])
@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("recipe", ["int4-g32", "mxfp4", "nvfp4", "int8-dynamic-act-int4-weight", "int8-row"])
def test_fifty_losses_are_those_of_rounding_at_every_call(recipe, parts, optimizer):
    rule = rule_of(recipe)
    floats = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32))
    state = {name: tensor.clone() for name, tensor in floats.state_dict().items()}
    ends = []
    for slow in (False, True):
        floats.load_state_dict(state)
        layers = [nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32)]
        model = nn.Sequential(*layers)
        model.load_state_dict(state)
        if slow:
            model[0], model[2] = Slow(layers[0], rule), Slow(layers[2], rule)
        else:
            model = qkit.prepare(model, qkit.Recipe("one", (rule,)))
        ends.append(losses(model, parts, optimizer))
    assert np.array_equal(*ends)
    assert ends[0][-1].mean() < 0.7 * ends[0][0].mean()


def losses(model, parts, name):
    """Of every part of every step."""
    if name == "qkit.adamw" and isinstance(model[0], Slow):
        optimizer = BE.adamw(model, AdamWOptions(learning_rate=1e-2))
    else:
        optimizer = (
            qkit.adamw(model, lr=1e-2) if name == "qkit.adamw" else torch.optim.AdamW(model.parameters(), lr=1e-2)
        )
    random = torch.Generator().manual_seed(0)
    teacher = torch.randn(32, 64, generator=random) / 8
    found = []
    for _ in range(STEPS):
        for x in torch.randn(parts, 8, 64, generator=random):
            loss = (model(x) - x @ teacher.T).square().mean()
            loss.backward()
            found.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return np.array(found).reshape(STEPS, parts)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("recipe", ["int4-g32", "mxfp4", "int8-dynamic-act-int4-weight"])
@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 3, 64), (2, 1, 3, 64), (0, 64)], ids=str)
def test_inputs_of_any_rank_and_outputs_that_are_edited_have_their_gradients(shape, recipe, bias):
    rule = rule_of(recipe)
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 24, bias=bias), torch.randn(shape)
    ends = []
    for model in (qkit.prepare(nn.Sequential(layer), qkit.Recipe("one", (rule,))), nn.Sequential(Slow(layer, rule))):
        for _ in range(2):  # the second time, the values stand
            given = x.clone().requires_grad_()
            layer.zero_grad()
            y = model(given * 2)
            assert y.shape == (*shape[:-1], 24)
            y.mul_(3).add_(1)
            y.square().sum().backward()
        ends.append((y.detach(), given.grad, *(parameter.grad.clone() for parameter in layer.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize("recipe", ["int4-g32", "mxfp4", "int8-dynamic-act-int4-weight"])
@pytest.mark.parametrize(
    "turn", [lambda x: x.transpose(0, 1), lambda x: x[:, ::2], lambda x: x[:, :1].expand(-1, 4, -1)]
)
def test_inputs_that_do_not_lie_in_one_piece_have_their_gradients(turn, recipe):
    rule = rule_of(recipe)
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 24, bias=False), torch.randn(3, 4, 64)
    ends = []
    for model in (qkit.prepare(nn.Sequential(layer), qkit.Recipe("one", (rule,))), nn.Sequential(Slow(layer, rule))):
        for _ in range(2):
            given = x.clone().requires_grad_()
            layer.zero_grad()
            y = model(turn(given * 2))
            y.square().sum().backward()
        ends.append((y.detach(), given.grad, layer.weight.grad.clone()))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_a_layer_that_is_pruned_after_it_was_prepared_trains_what_is_left(bias):
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 24, bias=bias), torch.randn(5, 64)
    rule = rule_of("int4-g32")
    model = qkit.prepare(nn.Sequential(layer), qkit.Recipe("one", (rule,)))
    for _ in range(2):
        model(x)
    for name in ("weight", "bias") if bias else ("weight",):
        prune.l1_unstructured(model[0], name, amount=0.5)
    for _ in range(2):
        y = model(x)
    want = F.linear(x, BE.fake_quantize(model[0].weight, rule.weight), model[0].bias)
    assert torch.equal(y, want)
    y.sum().backward()
    assert ((model[0].weight_orig.grad == 0) == (model[0].weight_mask == 0)).all()
