"""Converted layers on the CPU: C kernels on packed codes multiply one token, and decode for more with the prepared bits."""

import copy
from dataclasses import replace

import numpy as np
import pytest

import qkit
from qkit import native, reference
from qkit.exactness import is_exact
from qkit.testing.read_tensors import read_grids, read_tensor, read_tensors

torch = pytest.importorskip("torch")
pytest.importorskip("qkit_torchao")

from qkit_torchao.arithmetic import packing, rounding  # noqa: E402
from qkit_torchao.kernels import cpu_words  # noqa: E402
from served import WITHIN, serve  # noqa: E402
from torch import nn  # noqa: E402

pytestmark = pytest.mark.skipif(not native.available(), reason="the kernels were not built")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GRIDS = [
    *(qkit.Grid(f"int{bits}", group, rule) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 128, "row", "tensor")
      for rule in ("signed", "minmax")),
    *(qkit.Grid(name, 32, "rceil") for name in ("e2m1", "e4m3", "e5m2")),
    *(qkit.Grid("e4m3", group, "rceil") for group in ("row", "tensor")),
    qkit.Grid("e2m1", 16, "nvfp4"),
    qkit.Grid("int4", 16, "absmax"),
]  # fmt: skip
#: Half a unit in the last place: sums are in float32, and rounded once.
NEAR = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def parts(grid, dtype, *, outputs=37, inputs=384):
    """A quantized weight, and its packed codes."""
    torch.manual_seed(0)
    q = rounding.quantize((torch.randn(outputs, inputs) * 0.02).to(dtype), grid)
    laid = packing.lay(q, "words")
    return q, (laid.codes, laid.scales, laid.zeros, laid.tensor_scale, laid.biases)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_packed_codes_multiply_as_their_values_and_decode_bit_for_bit(grid, dtype):
    q, packed = parts(grid, dtype)
    assert torch.equal(cpu_words.values(*packed, grid, inputs=384, dtype=dtype), rounding.dequantize(q))
    exact = cpu_words.values(*packed, grid, inputs=384, dtype=torch.float32).double()
    bias = torch.randn(37).to(dtype)
    for rows in (1, 2, 7):
        x = torch.randn(rows, 384).to(dtype)
        y, want = cpu_words.multiply(x, *packed, bias, grid).double(), x.double() @ exact.T + bias.double()
        bound = x.double().abs() @ exact.abs().T + bias.double().abs()
        assert ((y - want).abs() <= 1.01 * NEAR[dtype] * want.abs() + 1e-6 * bound).all()  # float32 sums


@pytest.mark.parametrize("inputs", [18, 46, 98, 200, 258])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_rows_that_fill_no_unit_multiply_too(bits, inputs):
    grid = qkit.Grid(f"int{bits}", "row")
    q, packed = parts(grid, torch.float32, outputs=5, inputs=inputs)
    values = rounding.dequantize(q)
    assert torch.equal(cpu_words.values(*packed, grid, inputs=inputs, dtype=torch.float32), values)
    x = torch.randn(1, inputs)
    y, bound = cpu_words.multiply(x, *packed, None, grid), x.double().abs() @ values.double().abs().T
    assert ((y.double() - x.double() @ values.double().T).abs() <= 1e-6 * bound).all()  # float32 sums


def test_threads_change_no_bit():
    grid, before = qkit.Grid("int4", 32), torch.get_num_threads()
    _, packed = parts(grid, torch.bfloat16, outputs=1024, inputs=384)
    x, found = torch.randn(1, 384).to(torch.bfloat16), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(cpu_words.multiply(x, *packed, None, grid))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def prepared(recipe, dtype):
    torch.manual_seed(0)
    return qkit.prepare(nn.Sequential(nn.Linear(128, 96), nn.Linear(96, 64, bias=False)).to(dtype), recipe)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "recipe", ["int2-g32", "int3-g32", "int4-g32-minmax", "mxfp4", "nvfp4-a16", "mxfp8-a16", "fp8"]
)
def test_more_than_a_token_and_exact_products_have_the_bits_of_the_prepared_model(recipe, dtype):
    model = prepared(recipe, dtype)
    one, more = torch.randn(1, 128).to(dtype), torch.randn(2, 3, 128).to(dtype)
    want = model(one), model(more)
    model = qkit.convert(model)
    assert torch.equal(model(more), want[1])
    with qkit.exact():
        assert torch.equal(model(one), want[0])
    assert not is_exact()
    assert not torch.equal(model(one), want[0]) or recipe != "int4-g32-minmax"  # another order of the sum
    scale = want[0].detach().abs().max()
    torch.testing.assert_close(
        model(one), want[0], rtol=0, atol=float(scale) * 2**-6
    )  # two layers, rounded in bfloat16


@pytest.mark.parametrize(("recipe", "bits"), [("int2-g128", 2), ("int3-g64", 3), ("int6-g64", 6), ("mxfp4-a16", 4)])
def test_codes_have_no_gaps_in_memory(recipe, bits):
    model = qkit.convert(nn.Sequential(nn.Linear(256, 64, bias=False)), recipe)
    assert model[0].codes.nbytes * 8 == 256 * 64 * bits
    assert "C kernels on packed codes" in qkit.coverage(model).rows[0].state
    twin = copy.deepcopy(model)
    assert torch.equal(twin(torch.ones(1, 256)), model(torch.ones(1, 256)))


def test_gradients_of_inputs_are_those_of_the_values():
    model = qkit.convert(nn.Sequential(nn.Linear(128, 64)), "int4-g32")
    for rows in (1, 3):
        x = torch.randn(rows, 128, requires_grad=True)
        model(x).sum().backward()
        torch.testing.assert_close(
            x.grad, model[0].weight.sum(0).expand(rows, -1), rtol=1e-5, atol=1e-5
        )  # float32 sums


def test_transforms_of_torch_see_through_converted_layers():
    model, x = qkit.convert(nn.Sequential(nn.Linear(128, 64)), "int4-g32"), torch.randn(5, 128)
    torch.testing.assert_close(torch.vmap(model)(x), model(x), rtol=1e-5, atol=1e-5)  # float32 sums
    jacobian = torch.func.jacrev(model)(x[0])
    torch.testing.assert_close(jacobian, model[0].weight.clone(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recipe", qkit.recipes())
def test_every_recipe_is_served_with_its_codes_and_the_outputs_of_its_prepared_layer(recipe):
    runs, far = serve(recipe, "cpu", rows=(1, 3))
    assert runs.startswith("native: ")
    assert far <= WITHIN


def read(q):
    """A tensor on a read grid in torch, and its packed parts."""
    q = q.map(qkit.backend("torchao").from_numpy)
    laid = packing.lay(q, "words")
    return q, (laid.codes, laid.scales, laid.zeros, laid.tensor_scale, laid.biases)


@pytest.mark.parametrize("grid", read_grids(), ids=str)
def test_read_grids_decode_bit_for_bit_and_multiply_as_their_values(grid):
    for number, given in enumerate(read_tensors(grid)):
        q, packed = read(given)
        dtype = rounding.DTYPE[q.dtype]
        with np.errstate(over="ignore"):
            law = torch.from_numpy(reference.dequantize(replace(given, dtype="float32"))).to(dtype)
        made = cpu_words.values(*packed, grid, inputs=q.shape[1], dtype=dtype)
        assert torch.equal(made.isnan(), law.isnan())
        assert torch.equal(made.nan_to_num(), law.nan_to_num()), (q.dtype, q.scales.dtype)
        if number % 4 == 0:
            bounded = given if grid.stored_scales != "e8m0" else replace(given, scales=np.clip(given.scales, 80, 170))
            assert near(*read(bounded))


def near(q, packed):
    """Whether products of one and two rows are those of the values; rows with huge scales are left out."""
    grid, values = q.grid, rounding.dequantize(replace(q, dtype="float32")).double()
    used = values.abs().amax(dim=1) < 1e20
    sizes = values.abs()
    if q.biases is not None:  # a bias may cancel the rest of a value
        sizes = sizes + 2 * q.biases.double().repeat_interleave(q.shape[1] // q.biases.shape[1], dim=1).abs()
    for rows in (1, 2):
        x = torch.randn(rows, q.shape[1])
        y = cpu_words.multiply(x, *packed, None, grid).double()
        wrong = (y - x.double() @ values.T).abs() > 2e-6 * (x.double().abs() @ sizes.T)  # float32 sums
        if wrong[:, used].any():
            return False
    return bool(used.sum() > 1)


@pytest.mark.parametrize("name", ["affine", "stored", "stored-zeros", "stored-e8m0", "stored-nvfp4-inverse"])
def test_a_layer_on_a_read_grid_has_no_gaps_and_decodes_in_one_pass(name, monkeypatch):
    grid = next(grid for grid in read_grids() if grid.scale == name and isinstance(grid.group, int))
    q, _ = read(read_tensor(grid, "float32", "float16"))
    if grid.stored_scales == "e8m0":
        q = replace(q, scales=q.scales.clamp(100, 140))
    linear = nn.Linear(q.shape[1], q.shape[0], bias=False)
    layer = qkit.backend("torchao").pack(linear, q, qkit.Rule(("*",), weight=grid))
    assert layer.codes.nbytes * 8 == q.shape[0] * q.shape[1] * grid.element.bits
    assert "C kernels on packed codes" in layer.execution.text
    monkeypatch.setattr(rounding, "dequantize", None)  # nothing decodes with torch's operations
    values = torch.from_numpy(reference.dequantize(q.map(qkit.backend("torchao").to_numpy)))
    for rows in (1, 5):
        x = torch.randn(rows, q.shape[1])
        torch.testing.assert_close(layer(x), x @ values.T, rtol=1e-4, atol=float(values.abs().max()) * 1e-4)  # sums
    assert torch.equal(layer.weight, values)
    assert torch.equal(layer.half().weight, values.half())
