"""Compares the kernels on packed codes, run on a CPU, with decoded weights. For test_kernels.py.

Triton's interpreter runs those of Triton; those of CUDA C++ are compiled as C++, see products_on_host.py.
"""

import copy
import os
import sys
from dataclasses import replace

os.environ["TRITON_INTERPRET"] = "1"  # before anybody imports Triton

import numpy as np
import torch
from products_on_host import HostKernel
from qkit_torchao.arithmetic import packing, rounding
from qkit_torchao.kernels import choose, cuda_rows, cuda_words, nvrtc
from torch import nn

import qkit
from qkit import reference
from qkit.testing.read_tensors import read_tensor

BE = qkit.backend("torchao")
INPUTS, OUTPUTS = 192, 4
GRIDS = [
    *(qkit.Grid(f"int{bits}", 32) for bits in (2, 3, 4, 5, 6, 8)),
    *(qkit.Grid(f"int{bits}", 64, "minmax") for bits in (3, 4)),
    *(qkit.Grid(name, 32) for name in ("e2m1", "e4m3", "e5m2")),
    qkit.Grid("e2m1", 16, "nvfp4"),
    *(qkit.Grid("int3", group) for group in ("row", "tensor")),
    qkit.Grid("int4", 96),  # groups of several units
    qkit.Grid("int4", 24),  # whose words have two scales: decoded
]
#: Every way in which kernels read scales, zero points and biases, and every width of codes.
READ = [
    *(qkit.Grid(f"int{bits}", 32, "affine") for bits in (2, 3, 4, 5, 6, 8)),
    *(qkit.Grid(f"int{bits}", 64, "stored-zeros") for bits in (2, 4, 8)),
    *(qkit.Grid(name, 32, "stored") for name in ("int4", "int8")),
    *(qkit.Grid(name, group, "stored") for name, group in (("int4", "row"), ("e4m3", "row"), ("e4m3", "tensor"))),
    *(qkit.Grid(name, 32, "stored-e8m0") for name in ("e2m1", "e4m3")),
    *(qkit.Grid("e2m1", 16, name) for name in ("stored-nvfp4", "stored-nvfp4-inverse")),
]


def weight(grid, dtype):
    """A row of zeros, one of tiny values, and others."""
    torch.manual_seed(0)
    w = torch.randn(OUTPUTS, INPUTS).to(dtype)
    w[1], w[2] = 0, w[2] * 2.0**-20
    return w


def layer(grid, dtype, bias):
    """A float layer."""
    linear = nn.Linear(INPUTS, OUTPUTS, bias=bias).to(dtype)
    linear.weight.data = weight(grid, dtype)
    return nn.Sequential(linear)


def recipe(grid, kind="linear"):
    """One rule for every layer."""
    return qkit.Recipe("one", (qkit.Rule(match=("*",), weight=grid, kind=kind),))


def rule(grid):
    """A rule for every linear layer."""
    return qkit.Rule(match=("*",), weight=grid)


def products(grid, dtype):
    """The largest error over abs(x) @ abs(w) of rows of every count; the codes and values are exact, wherever the layer goes."""
    model = layer(grid, dtype, bias=grid.element.bits == 4)
    want = rounding.quantize(model[0].weight.detach(), grid)
    bias = None if model[0].bias is None else model[0].bias.detach().double()
    model = qkit.convert(model, recipe(grid))
    assert model[0].execution.layout == "words", model[0].execution
    assert model[0].codes.numel() * 32 <= OUTPUTS * INPUTS * grid.element.bits * 1.03
    for one in (model, copy.deepcopy(model)):
        held = BE.unpack(one[0])
        assert all(torch.equal(part, want.parts()[name]) for name, part in held.parts().items())
    assert torch.equal(model[0].weight, rounding.dequantize(want))
    values, worst = rounding.dequantize(want).double(), 0.0
    for rows in (1, 2, 3, 19, 67):
        x = torch.randn(rows, INPUTS).to(dtype)
        exact = nn.functional.linear(x.double(), values, bias).detach()
        y = model(x[None])[0].detach()
        assert y.dtype == dtype
        bound = x.detach().double().abs() @ values.abs().T + (0 if bias is None else bias.abs())
        worst = max(worst, float(((y - exact).abs() / bound.clamp_min(1e-30)).max().detach()))
    x = torch.randn(2, INPUTS, dtype=dtype, requires_grad=True)
    model(x).sum().backward()
    torch.testing.assert_close(x.grad, rounding.dequantize(want).sum(0).expand(2, -1), rtol=2**-6, atol=2**-4)
    half = model.to(torch.float16)
    assert torch.equal(BE.unpack(half[0]).codes, want.codes)
    assert half[0].weight.dtype == torch.float16
    return worst


def bounded(q):
    """`q` with scales and biases whose sums are finite, and of bfloat16 none that is subnormal, as Triton's interpreter wants."""
    if q.grid.stored_scales == "e8m0":
        return replace(q, scales=np.clip(q.scales, 100, 140))
    return q.map(lambda array: array if array.dtype.kind in "iu" or not array.ndim else ordinary(array))


def ordinary(numbers):
    """Of moderate size, or 0."""
    clipped = np.clip(numbers.astype(np.float32), -9, 9)
    return np.where(np.abs(clipped) < 1e-30, 0, clipped).astype(numbers.dtype)


def sizes_of(q):
    """What errors of products are in proportion to: the sizes of values, and of biases, which may cancel the rest of a value."""
    sizes = rounding.dequantize(q).double().abs()
    if q.biases is not None:
        sizes += 2 * q.biases.double().abs().repeat_interleave(q.shape[1] // q.biases.shape[1], dim=1)
    return sizes


def read_products(grid, dtype):
    """As `products`, on a grid of files, whose scales have the type of x; nothing decodes with torch's operations."""
    kind = str(dtype).rpartition(".")[2]
    laws = [read_tensor(grid, "float32", "float32"), read_tensor(grid, "float16", "float16")]
    given, worst = bounded(read_tensor(grid, kind, kind)), 0.0
    for law in (*laws, given):
        linear = BE.pack(nn.Linear(law.shape[1], law.shape[0], bias=False), law.map(BE.from_numpy), rule(grid))
        assert linear.execution.native, linear.execution
        want = torch.from_numpy(reference.dequantize(replace(law, dtype="float32"))).to(rounding.DTYPE[law.dtype])
        assert torch.equal(linear.weight.isnan(), want.isnan())
        assert torch.equal(linear.weight.nan_to_num(), want.nan_to_num()), (grid, law.dtype)
        assert torch.equal(BE.unpack(linear).codes, torch.from_numpy(law.codes))
    values, sizes = want.double(), sizes_of(given.map(BE.from_numpy))
    for rows in (1, 2, 3, 19, 67):
        x = torch.randn(rows, values.shape[1]).to(dtype)
        error = (linear(x).double() - x.double() @ values.T).abs() / (x.double().abs() @ sizes.T).clamp_min(1e-30)
        worst = max(worst, float(error.max()))
    return worst


def packed_by_kernel(grid):
    """Whether the kernel packs codes as torch's operations do."""
    q = rounding.quantize(weight(grid, torch.bfloat16), grid)
    made, want = cuda_words.laid(packing.lay(q, "bytes")), packing.lay(q, "words")
    return torch.equal(made.codes, want.codes) and torch.equal(made.scales, want.scales)


def experts(grid):
    """The largest error of a product whose rows have experts of their own, over abs(x) @ abs(w)."""
    if grid.read:
        qs = [bounded(read_tensor(grid, "bfloat16", "float16")).map(BE.from_numpy) for _ in range(3)]
        qs[1] = replace(qs[1], codes=qs[1].codes.flip(0), scales=qs[1].scales.flip(1))
    else:
        qs = [rounding.quantize(weight(grid, torch.bfloat16) * (1 + i), grid) for i in range(3)]
    laid = [packing.lay(q, "words") for q in qs]
    parts = [
        None if getattr(laid[0], name) is None else torch.stack([getattr(one, name) for one in laid])
        for name in ("codes", "scales", "zeros", "tensor_scale", "biases")
    ]
    x, chosen = torch.randn(5, qs[0].shape[1]).bfloat16(), torch.tensor([2, 0, 1, 1, 2])
    y = cuda_words.multiply(x, *parts, None, grid, experts=chosen)
    values = torch.stack([rounding.dequantize(q).double() for q in qs])[chosen]
    sizes = torch.stack([sizes_of(q) for q in qs])[chosen]
    exact, bound = (torch.einsum("rk,rnk->rn", a, b) for a, b in ((x.double(), values), (x.double().abs(), sizes)))
    return float(((y - exact).abs() / bound.clamp_min(1e-30)).max())


class Block(nn.Module):
    """Experts as transformers stacks them."""

    def __init__(self, count, inputs, outputs, dtype):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(count, 2 * outputs, inputs, dtype=dtype) * 0.1)
        self.down_proj = nn.Parameter(torch.randn(count, inputs, outputs, dtype=dtype) * 0.1)

    def forward(self, x, chosen, ends):
        """The products of three implementations: one expert, chosen ones, sorted rows."""
        one = nn.functional.linear(x[:2], self.gate_up_proj[chosen[0]])
        each = torch.bmm(self.gate_up_proj[chosen], x.unsqueeze(-1)).squeeze(-1)
        grouped = nn.functional.grouped_mm(x, self.gate_up_proj.transpose(-2, -1), offs=ends)
        return one, each, grouped


def block(grid):
    """The largest error of a converted block's products over abs(x) @ abs(w), by codes and decoded; and its exact values."""
    made = Block(3, INPUTS, 32, torch.bfloat16)
    model = qkit.convert(nn.ModuleDict({"experts": made}), recipe(grid, "experts"))
    layer = model["experts"]
    assert layer.execution.layout == "words", layer.execution
    stack = layer.stacks[0]
    values = torch.stack([layer.decoded(stack, e) for e in range(3)]).double()
    held = BE.unpack_experts(layer)
    law = torch.cat([torch.stack([rounding.dequantize(q) for q in held[n]]) for n in ("gate_proj", "up_proj")], dim=1)
    assert torch.equal(law.double(), values)
    worst = 0.0
    for rows in (3, 14):  # by codes, and decoded
        chosen = torch.arange(rows) % 3
        chosen = chosen.sort().values
        ends = torch.bincount(chosen, minlength=3).cumsum(0).to(torch.int32)
        x = torch.randn(rows, INPUTS).bfloat16()
        assert layer.multiplies(x, stack) == (rows == 3)
        exact = torch.einsum("rk,rnk->rn", x.double(), values[chosen])
        bound = torch.einsum("rk,rnk->rn", x.double().abs(), values[chosen].abs())
        one, each, grouped = (y.double() for y in layer(x, chosen, ends))
        firsts = x[:2].double() @ values[int(chosen[0])].T
        errors = [(one - firsts).abs() / bound[:2], (each - exact).abs() / bound, (grouped - exact).abs() / bound]
        worst = max(worst, *(float(error.max()) for error in errors))
    return worst


def both_sides():
    """Whether products of int8 codes are exact, and those of e4m3 near."""
    codes = torch.randint(-128, 128, (OUTPUTS, INPUTS), dtype=torch.int8)
    x = torch.randint(-128, 128, (3, INPUTS), dtype=torch.int8)
    zeros = torch.tensor([3, -128, 127], dtype=torch.int8)
    want = (x.long() - zeros.long()[:, None]) @ codes.long().T
    exact = torch.equal(cuda_words.codes_product(x, codes, zeros).long(), want)
    exact = exact and torch.equal(cuda_words.codes_product(x, codes, None).long(), x.long() @ codes.long().T)
    a, b = (torch.randn(n, INPUTS).to(torch.float8_e4m3fn) for n in (8, OUTPUTS))
    made = cuda_words.codes_product(a.view(torch.uint8), b.view(torch.uint8), None)
    torch.testing.assert_close(made.double(), a.double() @ b.double().T, rtol=1e-5, atol=1e-4)  # order of sums
    return exact


def scaled_once():
    """Whether products are scaled in float32, in order, and rounded once."""
    product = torch.randint(-(2**24), 2**24, (3, 1500), dtype=torch.int32)
    steps, bias = torch.rand(3, 1), torch.randn(1500)
    found = []
    for scales in (torch.rand(1500, 1), torch.rand(1, 1)):
        for one in (None, bias, bias.bfloat16()):
            want = product.float() * steps * scales.reshape(1, -1) + (0 if one is None else one)
            made = cuda_words.scaled(product, steps, scales, one, torch.bfloat16)
            found.append(torch.equal(made, want.bfloat16()))
    return all(found)


def many_rows():
    """Whether many rows of int8 codes are multiplied, and scaled, to the bits of an exact product that is scaled afterwards."""
    same = []
    for count, outputs, inputs in ((65, 48, 64), (200, 130, 136), (129, 264, 72)):  # edges of tiles in each direction
        x, codes = (torch.randint(-128, 128, (n, inputs), dtype=torch.int8) for n in (count, outputs))
        steps, bias = torch.rand(count, 1), torch.randn(outputs)
        product = (x.long() @ codes.long().T).to(torch.int32)
        for scales in (torch.rand(outputs, 1), torch.rand(1, 1)):
            for one in (None, bias.bfloat16()):
                want = cuda_words.scaled(product, steps, scales, one, torch.bfloat16)
                same.append(torch.equal(cuda_rows.rows_product(x, steps, codes, scales, one, torch.bfloat16), want))
    return all(same)


def tied(grid):
    """Whether an embedding and its head share one packed copy, and compute rows and products of the same values."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(40, INPUTS), nn.Linear(INPUTS, 40, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens):
            return self.head(self.embed(tokens))

    model = Tied().bfloat16()
    values = rounding.rounded(model.embed.weight.detach(), grid)
    rules = tuple(qkit.Rule(match=("*",), weight=grid, kind=kind) for kind in ("linear", "embedding"))
    model = qkit.convert(model, qkit.Recipe("all", rules))
    for one in (model, copy.deepcopy(model).to(torch.bfloat16)):
        assert one.head.codes.data_ptr() == one.embed.codes.data_ptr()
        assert torch.equal(one.embed(torch.tensor([[3, 39], [0, 3]])), values[torch.tensor([[3, 39], [0, 3]])])
    tokens = torch.arange(4)
    torch.testing.assert_close(model(tokens), values[tokens] @ values.T, rtol=2**-6, atol=2**-3)  # bf16, order of sums
    return True


def main(name: str) -> None:
    """Prints a line for every grid."""
    np.seterr(all="ignore")
    choose.why_not_packed = lambda device: ""  # as on a GPU
    choose.word_kernels = lambda device: cuda_words
    nvrtc.why_not = lambda device: ""
    for name_of_kernel in ("PRODUCT", "FEW_ROWS", "ARRANGEMENT"):
        setattr(cuda_words, name_of_kernel, HostKernel(getattr(cuda_words, name_of_kernel)))
    cuda_words.processors_of = lambda device: 1
    dtype = getattr(torch, name)
    for grid in GRIDS if name == "bfloat16" else GRIDS[1::4]:
        worst = products(grid, dtype)
        print(
            grid,
            name,
            "near" if worst < 2**-8 and (name != "float32" or worst < 1e-6) else f"off by {worst:.1e}",
            flush=True,
        )
        print(grid, "packed", "exact" if packed_by_kernel(grid) else "otherwise", flush=True)
        if (
            grid.scale != "nvfp4"
            and grid.group != "tensor"
            and not choose.why_not_few(grid, INPUTS, torch.device("cpu"))
        ):
            worst = experts(grid)
            print(grid, "experts", "near" if worst < 2**-8 else f"off by {worst:.1e}", flush=True)
    for grid in READ if name == "bfloat16" else READ[::5]:
        worst = read_products(grid, dtype)
        near = worst < 2**-8 and (name != "float32" or worst < 1e-6)
        print(grid, name, "near" if near else f"off by {worst:.1e}", flush=True)
        if grid in READ[::4] and grid.group != "tensor":
            worst = experts(grid)
            print(grid, "experts", "near" if worst < 2**-8 else f"off by {worst:.1e}", flush=True)
    for grid in (qkit.Grid("int4", 32), qkit.Grid("e2m1", 16, "nvfp4")):
        worst = block(grid)
        print(grid, "block", "near" if worst < 2**-7 else f"off by {worst:.1e}", flush=True)
    print("scaled", "exact" if scaled_once() else "otherwise", flush=True)
    print("many rows", "exact" if many_rows() else "otherwise", flush=True)
    print("both sides", "exact" if both_sides() else "differ", flush=True)
    print(
        "tied",
        "exact"
        if all(map(tied, (qkit.Grid("int4", 32), qkit.Grid("int3", 64), qkit.Grid("e2m1", 16, "nvfp4"))))
        else "differ",
    )


if __name__ == "__main__":
    main(sys.argv[1])
