"""Layers whose forward another library replaced on the object: qkit's forward is called in its place, or the layer is refused."""

from functools import partial

import pytest

torch = pytest.importorskip("torch", reason="the torch extra is not installed")

from torch import nn  # noqa: E402

import qkit  # noqa: E402


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 64, bias=False))


def by_closure(module, calls):
    """As transformers' tensor parallelism replaces it."""
    original = module.forward

    def forward(x):
        calls.append(module)
        return original(x)

    module.forward = forward


def by_partial(module, calls):
    """As accelerate's hooks replace it."""
    module._old_forward = module.forward  # noqa: SLF001  # accelerate's own name

    def forward(module, x):
        calls.append(module)
        return module._old_forward(x)  # noqa: SLF001

    module.forward = partial(forward, module)


@pytest.mark.parametrize("patch", [by_closure, by_partial])
@pytest.mark.parametrize("verb", [qkit.prepare, qkit.convert])
def test_a_replaced_forward_calls_the_layer_of_the_grid(patch, verb):
    x, calls, patched = torch.randn(3, 64), [], net()
    patch(patched[0], calls)
    want, found = verb(net(), "int4-g32"), verb(patched, "int4-g32")
    assert torch.equal(found(x), want(x))
    assert calls == [found[0]]
    if verb is qkit.prepare:
        want, found = qkit.convert(want), qkit.convert(found)
        assert torch.equal(found(x), want(x))
        assert calls == [calls[0], found[0]]


def test_accelerates_hooks_are_called():
    hooks = pytest.importorskip("accelerate.hooks", reason="accelerate is not installed")
    x, hooked = torch.randn(3, 64), net()
    hooks.add_hook_to_module(hooked[0], hooks.ModelHook())
    assert torch.equal(qkit.prepare(hooked, "int4-g32")(x), qkit.prepare(net(), "int4-g32")(x))


def test_a_forward_that_does_not_call_the_layer_is_refused():
    model = net()
    model[0].forward = lambda x: x[:, :32]
    with pytest.raises(
        qkit.RecipeError, match=r"0: its forward was replaced by .*lambda.*, which qkit cannot see into"
    ):
        qkit.prepare(model, "int4-g32")
