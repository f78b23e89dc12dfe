"""Read grids on a CUDA device: values and new codes are those of the reference, eager and compiled, and layers run there."""

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from qkit_torchao.arithmetic import rounding, stored  # noqa: E402

import qkit  # noqa: E402
from qkit import reference  # noqa: E402
from qkit.reference import stored as law  # noqa: E402
from qkit.rules import Rule  # noqa: E402
from qkit.testing.hard_tensors import random  # noqa: E402
from qkit.testing.read_tensors import read_grids, read_tensor, read_tensors  # noqa: E402

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
ENGINE = qkit.backend("torchao")
each_grid = pytest.mark.parametrize("grid", read_grids(), ids=str)


def on_cuda(q):
    return q.map(lambda array: ENGINE.from_numpy(array).cuda())


@each_grid
@pytest.mark.parametrize("compiled", [False, True])
def test_values_and_new_codes_equal_the_reference(grid, compiled):
    """Triton joins products with sums, and approximates `/`, unless it cannot see both."""
    for q in read_tensors(grid) if not compiled else [read_tensor(grid, "float32")]:
        there, w = on_cuda(q), random(q.shape, 3)

        def both(x, *arrays, there=there):
            like = replace(there, **dict(zip(there.parts(), arrays, strict=True)))
            return rounding.dequantize(like), stored.fake_requantize(x, like)

        run = torch.compile(both) if compiled else both
        values, new = (ENGINE.to_numpy(one.cpu()) for one in run(torch.from_numpy(w).cuda(), *there.parts().values()))
        assert np.array_equal(values, reference.dequantize(q), equal_nan=True)
        assert np.array_equal(new, law.fake_requantize(w, q), equal_nan=True)


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
