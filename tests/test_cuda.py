"""What only a CUDA device can show: the kernels' own containers. Operations are compared by `benchmarks/parity.py`."""

import pytest

torch = pytest.importorskip("torch", reason="the torch extra is not installed")

import qkit  # noqa: E402

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def linear(dtype=torch.bfloat16, inputs=1536, outputs=520):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(inputs, outputs)).to("cuda", dtype)


@pytest.mark.parametrize("recipe", ["int4-g32", "int4-g64", "int4-g128", "int4-g128-absmax", "int4-g64-midmax"])
def test_int4_runs_on_tinygemm_with_our_codes(recipe):
    model = linear()
    x = torch.randn(3, 1536, device="cuda", dtype=torch.bfloat16)
    grid = qkit.recipe(recipe).rules[-1].weight
    want = qkit.quantize(model[0].weight.detach(), grid)
    values, bias = qkit.dequantize(want), model[0].bias.detach().clone()
    model = qkit.convert(model, recipe)
    assert "Int4TilePackedTo4dTensor" in model[0].execution
    held = qkit.backend("torchao").unpack(model[0])
    assert torch.equal(held.codes, want.codes)
    assert torch.equal(held.scales, want.scales)
    exact = torch.nn.functional.linear(x.double(), values.double(), bias.double())
    bound = 2 * 2**-8 * (x.double().abs() @ values.double().abs().T) / 16 + 2**-8 * exact.abs()
    assert ((model(x) - exact).abs() <= bound).all()  # bf16 output, fp32 accumulation inside the kernel


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "recipe", ["int4-g64", "int4-g64-minmax", "int3-g32", "int8-row", "mxfp4", "mxfp8-a16", "nvfp4", "fp8"]
)
def test_prepared_and_converted_agree_on_cuda(recipe, dtype):
    model = qkit.prepare(linear(dtype), recipe)
    x = torch.randn(7, 1536, device="cuda", dtype=dtype)
    with torch.no_grad():
        prepared = model(x)
        weight = model[0].weight.clone()
        converted = qkit.convert(model)(x)
        assert torch.equal(
            qkit.backend("torchao").unpack(model[0]).codes, qkit.quantize(weight, model[0].rule.weight).codes
        )
        scale = x.float().abs() @ weight.float().abs().T
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 5e-4, torch.float16: 5e-4}[dtype]  # of abs(x) @ abs(w)
    bound = tolerance * scale
    if "Tile" in model[0].execution:  # torchao rounds the product to bfloat16, adds the bias and rounds again
        bound += 2**-8 * (converted.float().abs() + model[0].bias.float().abs())
    assert ((prepared - converted).float().abs() <= bound).all()
