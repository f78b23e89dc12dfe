"""Inputs that are quantized once for all layers; products of codes, which CUDA has: their kernels run on the CPU, too."""

import pytest

torch = pytest.importorskip("torch", reason="the torch extra is not installed")

import qkit  # noqa: E402
from qkit import Grid  # noqa: E402

GRIDS = [
    (Grid("int8", "row", "midmax"), Grid("int8", "row")),
    (Grid("int8", "row", "midmax"), Grid("int8", "row", "minmax")),
    (Grid("int4", "row"), Grid("int8", "tensor")),
]


def leaves(dtype=torch.float32):
    drawn = torch.Generator().manual_seed(0)
    shapes = (2, 17, 64), (32, 64), (32,)
    return [torch.randn(shape, generator=drawn).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("grids", GRIDS, ids=lambda pair: f"{pair[0]} @ {pair[1]}")
@pytest.mark.parametrize("ste", ["identity", "masked"])
def test_a_shared_product_is_that_of_the_operation(grids, ste):
    from qkit_torchao.layers.products import multiply_codes
    from qkit_torchao.layers.shared_codes import multiply_shared

    given = {}
    if grids[1].group == "tensor":
        q = qkit.quantize(torch.tensor([-1.5, 2.0]), grids[1])
        given = {"scales": q.scales, "zeros": q.zeros}
    results = []
    for shared in (True, False):
        x, weight, bias = leaves()
        if shared:
            y = multiply_shared(x, weight, bias, grids, ste, taker=object(), **given)
        else:
            y = multiply_codes(x, weight, bias, tuple(map(str, grids)), ste, **given)
        y.square().sum().backward()
        results.append([y.detach(), x.grad, weight.grad, bias.grad])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_an_input_is_quantized_once_for_all_layers_of_a_pass(monkeypatch):
    from qkit_torchao.layers import shared_codes

    x, weight, bias = leaves()
    x = x * 1  # an input that another module has computed
    counted = []
    quantized = shared_codes.quantized
    monkeypatch.setattr(shared_codes, "quantized", lambda *a, **k: counted.append(1) or quantized(*a, **k))
    takers = object(), object(), object()
    outputs = [shared_codes.multiply_shared(x, weight, bias, GRIDS[0], "identity", taker=one) for one in takers]
    assert len(counted) == 1
    assert torch.equal(outputs[0], outputs[2])
    shared_codes.multiply_shared(x, weight, bias, GRIDS[0], "identity", taker=takers[0])  # another pass
    assert len(counted) == 2
    with torch.no_grad():
        x.mul_(2)
    after = shared_codes.multiply_shared(x, weight, bias, GRIDS[0], "identity", taker=takers[1])
    assert len(counted) == 3
    assert not torch.equal(after, outputs[1])


@pytest.mark.parametrize("recipe", ["int8-dynamic-act-int4-weight", "nvfp4", "float8-dynamic-act-float8-weight"])
def test_converted_layers_quantize_an_input_once(recipe, monkeypatch):
    from qkit_torchao.kernels import choose

    model = torch.nn.ModuleList(torch.nn.Linear(64, 32, bias=False) for _ in range(3))
    with torch.no_grad():
        model = qkit.convert(model, recipe)
        counted = []
        rounded = choose.rounded
        monkeypatch.setattr(choose, "rounded", lambda *a, **k: counted.append(1) or rounded(*a, **k))
        x = torch.randn(5, 64)
        together = [layer(x) for layer in model]
        assert len(counted) == 1
        assert all(map(torch.equal, together, [layer(x.clone()) for layer in model]))
        assert len(counted) == 4
        model[0](x)  # another pass
        assert len(counted) == 5


def test_codes_of_an_input_are_those_of_each_converted_layer(monkeypatch):
    from qkit_torchao.layers import shared_codes

    x = torch.randn(5, 64)
    alone = shared_codes.quantized(x, GRIDS[0][1])
    counted = []
    quantized = shared_codes.quantized
    monkeypatch.setattr(shared_codes, "quantized", lambda *a, **k: counted.append(1) or quantized(*a, **k))
    takers = object(), object()
    for taker in takers:
        rows = shared_codes.coded_input(x, GRIDS[0][1], taker=taker)
        assert torch.equal(rows.codes, alone.codes)
        assert torch.equal(rows.steps, alone.steps)
    assert len(counted) == 1


def test_a_weight_that_was_stepped_is_quantized_anew():
    from qkit_torchao.layers.products import multiply_codes
    from qkit_torchao.layers.shared_codes import multiply_shared

    x, weight, bias = leaves()
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    for _ in range(3):
        y = multiply_shared(x, weight, bias, GRIDS[0], "identity", taker=object())
        want = multiply_codes(x, weight, bias, tuple(map(str, GRIDS[0])), "identity", cached=False)
        assert torch.equal(y, want)
        y.sum().backward()
        optimizer.step()
