"""Ways to train on values that are no longer the weight's: each is compared with a model that quantizes afresh."""

import copy
import pickle
import sys
import threading
from functools import partial

import models
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from qkit_torchao.cache import values  # noqa: E402
from qkit_torchao.kernels import graphs  # noqa: E402
from qkit_torchao.torch_private import GRAPH_TREES  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

import qkit  # noqa: E402
from qkit import Grid, Recipe, Rule  # noqa: E402

inputs = partial(models.inputs, "torchao")
mlp = partial(models.mlp, "torchao", bias=False)
GRID = Grid("int4", 32)
RECIPE = Recipe("test", (Rule(("*",), weight=GRID),))
CHANGED = "modified (by an inplace operation|inplace)"  # torch's words for what is saved, and for what views it
MASKED = Recipe("test", (Rule(("*",), weight=GRID, ste="masked"),))


class Fresh(nn.Linear):
    """The reference: quantizes its weight in every forward."""

    def forward(self, x):
        return F.linear(x, qkit.fake_quantize(self.weight, GRID), self.bias)


def pair():
    """A prepared model and its reference, with equal weights of their own."""
    return qkit.prepare(mlp(), RECIPE), mlp(linear=Fresh)


def assert_same(model, fresh, x=None):
    """Outputs and gradients of both are equal."""
    x = inputs().to(next(fresh.parameters()).dtype) if x is None else x
    for one in (model, fresh):
        one.zero_grad()
        one(x).square().sum().backward()
    assert torch.equal(model(x), fresh(x))
    for mine, theirs in zip(model.parameters(), fresh.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None)
        assert mine.grad is None or torch.equal(mine.grad, theirs.grad)


def under_no_grad(model):
    with torch.no_grad():
        model[0].weight[3:5] *= -2
        model[2].weight.view(-1)[7] = 9


def load(model):
    model.load_state_dict({name: one * -2 for name, one in model.state_dict().items()})


def assign(model):
    model.load_state_dict({name: one.clone() * -2 for name, one in model.state_dict().items()}, assign=True)


def swap(model):
    """As EMA packages do: averages in, evaluate, weights back; by copy_."""
    kept = [one.detach().clone() for one in model.parameters()]
    with torch.no_grad():
        for one in model.parameters():
            one.copy_(one * 0.5)
    model(inputs())
    with torch.no_grad():
        for one, old in zip(model.parameters(), kept, strict=True):
            one.copy_(old)


def swap_data(model):
    """The same by exchanging storages."""
    for one in model.parameters():
        one.data = one.data * 0.5
    model(inputs())
    for one in model.parameters():
        one.data = one.data * 2


def exchange(model):
    """Two parameters change places, and so do their storages."""
    other = mlp()
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        mine.data, theirs.data = -theirs.data, mine.data


def replace(model):
    model[0].weight = nn.Parameter(model[0].weight.detach() * -3)


def grow(model):
    """Longer than what is kept."""
    model[0].weight = nn.Parameter(model[0].weight.detach().repeat(2, 1)[:96].contiguous() * 2)


def cast(model):
    model.to(torch.bfloat16)


def cast_and_back(model):
    model.half().float()


def move(model):
    model.to("cpu").share_memory()


def initialize(model):
    torch.manual_seed(5)
    nn.init.kaiming_uniform_(model[0].weight)


def clip(model):
    """As weight clipping and renormalisation do."""
    with torch.no_grad():
        model[0].weight.clamp_(-0.05, 0.05)


def flat(model):
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(model.parameters()) * -2, model.parameters())


def in_inference(model):
    with torch.inference_mode():
        model(inputs())
        model[0].weight.mul_(-2)


EDITS = [
    under_no_grad, load, assign, swap, swap_data, exchange, replace, grow, cast, cast_and_back, move, initialize, clip, flat,
    in_inference,
]  # fmt: skip


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_an_edit_is_seen(edit):
    model, fresh = pair()
    assert_same(model, fresh)
    for one in (model, fresh):
        edit(one)
    assert_same(model, fresh)
    for one in (model, fresh):
        edit(one)
    assert_same(model, fresh)


@pytest.mark.parametrize("how", ["before", "after"])
@pytest.mark.parametrize("edit", [under_no_grad, load, swap_data, clip], ids=lambda edit: edit.__name__)
def test_an_edit_is_seen_by_compiled_code(edit, how):
    model, fresh = mlp(), mlp(linear=Fresh)
    compiled = torch.compile(model, backend="aot_eager") if how == "before" else None
    qkit.prepare(model, RECIPE)
    compiled = compiled or torch.compile(model, backend="aot_eager")
    assert_same(compiled, fresh)
    for one in (model, fresh):
        edit(one)
    assert_same(compiled, fresh)


def steps(model, fresh, make, count=3):
    made = [make(one) for one in (model, fresh)]
    for _ in range(count):
        assert_same(model, fresh)
        for optimizer in made:
            optimizer.step()
    assert_same(model, fresh)


OPTIMIZERS = {
    "AdamW": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2),
    "fused": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2, fused=True),
    "foreach": lambda m: torch.optim.SGD(m.parameters(), lr=1e-2, foreach=True),
    "single": lambda m: torch.optim.SGD(m.parameters(), lr=1e-2, foreach=False),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_seen(name):
    steps(*pair(), OPTIMIZERS[name])


def test_two_optimizers_step_in_turn():
    model, fresh = pair()
    made = [[torch.optim.SGD([one[k].weight], lr=0.1) for k in (0, 2)] for one in (model, fresh)]
    for turn in (0, 1, 0):
        assert_same(model, fresh)
        for optimizers in made:
            optimizers[turn].step()
    assert_same(model, fresh)


def test_a_step_that_a_scaler_skips_is_right():
    model, fresh = pair()
    x = inputs()
    made = [(one, torch.optim.SGD(one.parameters(), lr=0.1), torch.amp.GradScaler("cpu")) for one in (model, fresh)]
    for turn in range(4):
        for one, optimizer, scaler in made:
            before = one[0].weight.detach().clone()
            optimizer.zero_grad()
            scaler.scale(one(x).square().mean() * (float("inf") if turn % 2 else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
            assert torch.equal(before, one[0].weight) == bool(turn % 2)
        assert torch.equal(model(x), fresh(x))


def test_an_optimizer_in_the_backward_steps_after_each_use():
    model, fresh = pair()
    for one in (model, fresh):
        for parameter in one.parameters():
            optimizer = torch.optim.SGD([parameter], lr=0.1)
            parameter.register_post_accumulate_grad_hook(lambda _, optimizer=optimizer: optimizer.step())
    for _ in range(3):
        for one in (model, fresh):
            one.zero_grad()
            one(inputs()).square().mean().backward()
        assert torch.equal(model(inputs()), fresh(inputs()))


def test_an_averaged_model_has_values_of_its_own():
    model, fresh = pair()
    averages = [torch.optim.swa_utils.AveragedModel(one, use_buffers=False) for one in (model, fresh)]
    made = [torch.optim.SGD(one.parameters(), lr=0.05) for one in (model, fresh)]
    for _ in range(3):
        assert_same(model, fresh)
        for one, average, optimizer in zip((model, fresh), averages, made, strict=True):
            optimizer.step()
            average.update_parameters(one)
        assert torch.equal(averages[0](inputs()), averages[1](inputs()))
    assert not torch.equal(averages[0](inputs()), model(inputs()))


def test_models_that_share_a_weight_on_two_grids_do_not_mix():
    eight = Grid("int8", 32)
    first, second = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
    second.weight = first.weight
    four = qkit.prepare(nn.Sequential(first), RECIPE)
    other = qkit.prepare(nn.Sequential(second), Recipe("eight", (Rule(("*",), weight=eight),)))
    optimizer = torch.optim.SGD(four.parameters(), lr=0.1)
    x = inputs()
    for _ in range(3):
        for model, grid in ((four, GRID), (other, eight), (four, GRID)):
            assert torch.equal(model(x), F.linear(x, qkit.fake_quantize(first.weight.detach(), grid)))
        four(x).square().mean().backward()
        optimizer.step()


def test_a_backward_with_two_grids_on_one_weight_is_right():
    """Values of the first are not overwritten by those of the second before they are needed."""
    first, second = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
    second.weight = first.weight
    one = qkit.prepare(nn.Sequential(first), RECIPE)
    two = qkit.prepare(nn.Sequential(second), Recipe("eight", (Rule(("*",), weight=Grid("int8", 32)),)))
    x = inputs().requires_grad_()
    two(one(x)).sum().backward()
    weights = [qkit.fake_quantize(first.weight.detach(), grid) for grid in (GRID, Grid("int8", 32))]
    again = inputs().requires_grad_()
    F.linear(F.linear(again, weights[0]), weights[1]).sum().backward()
    assert torch.equal(x.grad, again.grad)


def test_a_layer_that_is_used_twice_is_made_once():
    model, fresh = pair()
    twice, reference = (nn.Sequential(one, one) for one in (model, fresh))
    steps(twice, reference, OPTIMIZERS["AdamW"])
    entry = values.cached([model[0].weight])[id(model[0].weight)]
    # one for each state of the weight
    assert entry.value._version == 4  # noqa: SLF001  torch's count of writes has no public name


def test_frozen_layers_are_not_made_again():
    model, fresh = pair()
    for one in (model, fresh):
        one[0].weight.requires_grad_(False)
    steps(model, fresh, OPTIMIZERS["AdamW"])
    kept = {k: values.cached([model[k].weight])[id(model[k].weight)] for k in (0, 2)}
    made = {k: one.value._version for k, one in kept.items()}  # noqa: SLF001  torch's count of writes has no public name
    assert made == {0: 1, 2: 4}


def test_a_layer_that_thaws_is_seen():
    model, fresh = pair()
    for one in (model, fresh):
        one[0].weight.requires_grad_(False)
    steps(model, fresh, OPTIMIZERS["AdamW"], count=1)
    for one in (model, fresh):
        one[0].weight.requires_grad_(True)
    steps(model, fresh, OPTIMIZERS["AdamW"], count=2)


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copied", "pickled"])
def test_copies_step_apart(twin):
    model, fresh = pair()
    assert_same(model, fresh)
    other, reference = twin(model), copy.deepcopy(fresh)
    steps(other, reference, OPTIMIZERS["AdamW"])
    assert_same(model, fresh)
    assert not torch.equal(other(inputs()), model(inputs()))


def test_a_functional_call_uses_the_weights_it_is_given():
    model, fresh = pair()
    assert_same(model, fresh)
    given = {name: one.detach() * -2 for name, one in model.named_parameters()}
    for weights in (given, {name: one * 3 for name, one in given.items()}):
        mine, theirs = (torch.func.functional_call(one, weights, (inputs(),)) for one in (model, fresh))
        assert torch.equal(mine, theirs)
    assert_same(model, fresh)


def test_transforms_over_many_models_are_right():
    model, fresh = pair()
    stacked = {name: torch.stack([one.detach(), -2 * one.detach()]) for name, one in model.named_parameters()}

    x = inputs()

    def loss(model):
        return lambda weights: torch.func.functional_call(model, weights, (x,)).square().sum()

    mine, theirs = (torch.vmap(torch.func.grad(loss(one)))(stacked) for one in (model, fresh))
    for name, gradient in mine.items():
        assert torch.equal(gradient, theirs[name])
    assert_same(model, fresh)


def test_jacobians_pass_through():
    model, fresh = pair()
    mine, theirs = (torch.func.jacrev(one)(inputs()[0]) for one in (model, fresh))
    assert torch.equal(mine, theirs)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_makes_no_other_values(reentrant):
    model, fresh = pair()
    x = inputs().requires_grad_()
    optimizers = [torch.optim.SGD(one.parameters(), lr=0.05) for one in (model, fresh)]
    for _ in range(3):
        for one, optimizer in zip((model, fresh), optimizers, strict=True):
            optimizer.zero_grad()
            checkpoint(one, x, use_reentrant=reentrant).square().mean().backward()
            optimizer.step()
        assert torch.equal(model(inputs()), fresh(inputs()))


@pytest.mark.parametrize("between", ["nothing", "a forward"])
@pytest.mark.parametrize("recipe", [RECIPE, MASKED], ids=["identity", "masked"])
@pytest.mark.parametrize("edit", [under_no_grad, clip, OPTIMIZERS["AdamW"]], ids=["edit", "clip", "step"])
def test_a_backward_after_its_weight_has_changed_is_refused_as_torch_does(edit, recipe, between):
    model = qkit.prepare(mlp(), recipe)
    model(inputs()).sum().backward()
    out = model(inputs().requires_grad_())  # so that all weights are needed going back
    changed = edit(model)
    if changed is not None:
        changed.step()
    if between == "a forward":
        model(inputs())
    with pytest.raises(RuntimeError, match=CHANGED):
        out.sum().backward()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_backward_uses_the_values_of_its_forward_or_is_refused(backend):
    model = qkit.prepare(mlp(), RECIPE)
    compiled = torch.compile(model, backend=backend)

    def gradient(*edits):
        x = inputs().requires_grad_()
        out = compiled(x)
        for edit in edits:
            edit(model)
        try:
            out.sum().backward()
        finally:
            model.load_state_dict(qkit.prepare(mlp(), RECIPE).state_dict())
        return x.grad

    want = gradient()
    assert torch.equal(gradient(under_no_grad), want)  # the values are still those of the forward
    made_anew = under_no_grad, lambda _: compiled(inputs())
    if backend == "inductor":  # which has them made in place
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            gradient(*made_anew)
    else:
        assert torch.equal(gradient(*made_anew), want)


def test_values_made_anew_for_an_unchanged_weight_are_not_used_by_an_older_backward():
    model = qkit.prepare(mlp(), RECIPE)
    out = model(inputs().requires_grad_())
    model[2].weight.data.mul_(-2)  # which nobody sees
    model.train()  # so that it is looked at
    model(inputs())
    with pytest.raises(RuntimeError, match=CHANGED):
        out.sum().backward()


def test_values_of_other_memory_in_place_of_the_weights_own_are_not_used_by_an_older_backward():
    model = qkit.prepare(mlp(), RECIPE)
    out = model(inputs().requires_grad_())
    model[2].weight.data = model[2].weight.detach() * -2
    model(inputs())
    with pytest.raises(RuntimeError, match=CHANGED):
        out.sum().backward()


def test_another_models_step_leaves_a_backward_that_waits():
    models = [qkit.prepare(mlp(), RECIPE) for _ in range(2)]
    optimizer = torch.optim.SGD(models[1].parameters(), lr=0.1)
    grads = []
    for steps in (0, 1):
        x = inputs().requires_grad_()
        out = models[0](x)
        for _ in range(steps):
            models[1](inputs()).sum().backward()
            optimizer.step()
            models[0](inputs())  # looks at its weights anew
        out.sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("trees", [False, True])
def test_what_outlives_a_graph_is_allocated_by_a_thread_of_its_own_where_inductor_has_graphs(trees, monkeypatch):
    monkeypatch.delitem(sys.modules, GRAPH_TREES, raising=False)
    if trees:
        monkeypatch.setitem(sys.modules, GRAPH_TREES, object())
    threads = []
    graphs.lasting(lambda: threads.append(threading.get_ident()) or torch.empty(1))
    assert (threads == [threading.get_ident()]) is not trees
