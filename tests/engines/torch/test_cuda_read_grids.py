"""Read grids on a CUDA device: values and new codes are those of the reference, eager and compiled, and layers run there."""

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from qkit_torchao.arithmetic import rounding, stored  # noqa: E402

import qkit  # noqa: E402
from qkit import reference  # noqa: E402
from qkit.element import READ_RULES  # noqa: E402
from qkit.reference import stored as law  # noqa: E402
from qkit.rules import Rule  # noqa: E402
from qkit.testing.hard_tensors import random  # noqa: E402
from qkit.testing.read_tensors import read_grids, read_tensor, read_tensors  # noqa: E402

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
ENGINE = qkit.backend("torchao")
each_grid = pytest.mark.parametrize("grid", read_grids(), ids=str)
#: One for each way to read scales, zero points and biases: a compilation takes seconds.
COMPILED = [next(grid for grid in read_grids() if grid.scale == name) for name in READ_RULES]
#: Errors of a product over abs(x) @ abs(w): values and sums are rounded to the type of x.
NEAR = {"bfloat16": 2**-8, "float16": 2**-10, "float32": 2e-6}


def on_cuda(q):
    return q.map(lambda array: ENGINE.from_numpy(array).cuda())


def values_and_new_codes(q, run=lambda function: function):
    """The values of `q` on the device, and those of a random weight on its scales; and the law's."""
    there, w = on_cuda(q), random(q.shape, 3)

    def both(x, *arrays):
        like = replace(there, **dict(zip(there.parts(), arrays, strict=True)))
        return rounding.dequantize(like), stored.fake_requantize(x, like)

    found = run(both)(torch.from_numpy(w).cuda(), *there.parts().values())
    return [ENGINE.to_numpy(one.cpu()) for one in found], [reference.dequantize(q), law.fake_requantize(w, q)]


@each_grid
def test_values_and_new_codes_equal_the_reference(grid):
    for q in read_tensors(grid):
        for made, want in zip(*values_and_new_codes(q), strict=True):
            assert np.array_equal(made, want, equal_nan=True)


@pytest.mark.parametrize("grid", COMPILED, ids=str)
def test_compiled_values_and_new_codes_equal_the_reference(grid):
    """Triton joins products with sums, and approximates `/`, unless it cannot see both."""
    for made, want in zip(*values_and_new_codes(read_tensor(grid, "float32"), torch.compile), strict=True):
        assert np.array_equal(made, want, equal_nan=True)


@each_grid
def test_kernels_decode_packed_codes_to_the_bits_of_the_law(grid):
    for q in read_tensors(grid):
        layer = packed(q)
        assert layer.execution.native, layer.execution.text
        with np.errstate(over="ignore"):
            want = torch.from_numpy(reference.dequantize(replace(q, dtype="float32"))).to(rounding.DTYPE[q.dtype])
        made = layer.weight.cpu()
        assert torch.equal(made.isnan(), want.isnan())
        assert torch.equal(made.nan_to_num(), want.nan_to_num()), (q.dtype, q.scales.dtype)


@each_grid
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_few_rows_are_multiplied_by_packed_codes(grid, dtype, monkeypatch):
    q = moderate(read_tensor(grid, dtype, "float16"))
    layer, values = packed(q), torch.from_numpy(reference.dequantize(replace(q, dtype="float32"))).double()
    sizes = values.abs()
    if q.biases is not None:  # which may cancel the rest of a value
        sizes += 2 * torch.from_numpy(np.abs(q.biases.astype(np.float64))).repeat_interleave(
            q.shape[1] // q.biases.shape[1], dim=1
        )
    monkeypatch.setattr(rounding, "dequantize", None)  # torch's operations decode nothing
    for rows in (1, 2, 16, 100):
        x = torch.randn(rows, q.shape[1]).to(rounding.DTYPE[dtype])
        y = layer(x.cuda()).cpu().double()
        error = ((y - x.double() @ values.T).abs() / (x.double().abs() @ sizes.T).clamp_min(1e-30)).max()
        assert error <= NEAR[dtype], rows


def packed(q):
    """A layer of the codes of `q`, on the device."""
    linear = torch.nn.Linear(q.shape[1], q.shape[0], bias=False, device="cuda")
    return ENGINE.pack(linear, on_cuda(q), Rule(("*",), weight=q.grid))


def moderate(q):
    """`q` with scales that keep sums inside of float16."""
    if q.grid.stored_scales == "e8m0":
        return replace(q, scales=np.clip(q.scales, 110, 121))
    if q.grid.has_tensor_scale and READ_RULES[q.grid.scale].inverse:
        return replace(q, tensor_scale=np.asarray(np.float32(81.3)))
    return q.map(
        lambda one: np.clip(one, -(2.0**-6), 2.0**-6).astype(one.dtype) if one.dtype.kind == "f" and one.ndim else one
    )


@each_grid
def test_a_layer_keeps_its_parts_wherever_it_goes(grid):
    q = read_tensor(grid, "float32", "float16")
    if grid.stored_scales == "e8m0":
        q = replace(q, scales=np.clip(q.scales, 100, 140))  # products of others are infinite
    layer = ENGINE.pack(
        torch.nn.Linear(q.shape[1], q.shape[0], bias=False), q.map(ENGINE.from_numpy), Rule(("*",), weight=grid)
    )
    there = layer.cuda().half().float()
    for name, part in ENGINE.unpack(there).map(lambda array: ENGINE.to_numpy(array.cpu())).parts().items():
        assert part.dtype == q.parts()[name].dtype
        assert np.array_equal(part, q.parts()[name]), name
    x = torch.randn(3, q.shape[1], device="cuda")
    values = torch.from_numpy(reference.dequantize(q)).cuda()
    close = (there(x) - x @ values.T).abs().max() / (x.abs() @ values.T.abs()).max()
    assert close <= 1e-6  # products in fp32
