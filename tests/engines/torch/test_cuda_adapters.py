"""Adapted layers on a GPU: the kernel that merges has the bits of the law, and gradients are those of a CPU."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("torchao")

import qkit  # noqa: E402
from qkit import reference  # noqa: E402
from qkit.adapters.surgery import base_weights  # noqa: E402
from qkit.reference import merged as arithmetic  # noqa: E402

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
RECIPES = ["int4-g32", "int4-g128-minmax", "int3-g32", "int2-g32", "int8-row", "mxfp4-a16", "nvfp4-a16"]


def adapted(device, recipe, kind, *, base, dtype=torch.float32):
    """A layer with an adapter whose B is not zero."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(256, 96, bias=False)).to(dtype)
    model = qkit.prepare(model, recipe) if base == "prepared" else qkit.convert(model, recipe)
    model = qkit.adapt(model, qkit.Adapter(rank=5, kind=kind)).to(device)
    with torch.no_grad():
        model[0].lora_B.copy_(torch.randn(96, 5, generator=torch.Generator().manual_seed(1)) * 0.05)
    return model


@pytest.mark.parametrize("base", ["prepared", "converted"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_gpu_computes_with_the_values_of_the_law(recipe, kind, base):
    model = adapted("cuda", recipe, kind, base=base)
    engine = qkit.backend("torchao")
    (layer,) = engine.layers(model)
    merged = arithmetic.merged(
        next(base_weights(engine, layer, "weight", spread=base == "converted")), engine.adapter_update(layer.module)
    )
    values = reference.fake_quantize(merged, layer.rule.weight)
    assert np.array_equal(model(torch.eye(256, device="cuda")).detach().cpu().numpy().T, values)  # a sum of one number
    deployed = qkit.merge(model) if base == "converted" else qkit.convert(qkit.merge(model))
    codes = engine.to_numpy(engine.unpack(next(iter(engine.layers(deployed))).module).codes)
    assert np.array_equal(codes, reference.quantize(merged, layer.rule.weight).codes)


@pytest.mark.parametrize("mode", ["on", "off"])
@pytest.mark.parametrize("base", ["prepared", "converted"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("recipe", [*RECIPES, "int8-g64", "mxfp8-a16"])
def test_values_in_16_bits_are_those_of_a_cpu(recipe, dtype, base, mode):
    found = []
    for device in ("cpu", "cuda"):
        model = adapted(device, recipe, "lora", base=base, dtype=dtype)
        model[0].switch_mode(mode)
        found.append(model(torch.eye(256, device=device, dtype=dtype)).detach().cpu())  # a sum of one number
    assert torch.equal(*found)


@pytest.mark.parametrize("base", ["prepared", "converted"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_gradients_on_a_gpu_are_those_of_a_cpu(kind, base):
    found = []
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(2))
    for device in ("cpu", "cuda"):
        model = adapted(device, "int4-g32", kind, base=base)
        model(x.to(device)).square().sum().backward()
        found.append({name: one.grad.cpu() for name, one in model.named_parameters() if one.requires_grad})
    for name, want in found[0].items():  # TF32 is off by default; sums in another order
        torch.testing.assert_close(found[1][name], want, rtol=0, atol=1e-4 * want.abs().max().item())
