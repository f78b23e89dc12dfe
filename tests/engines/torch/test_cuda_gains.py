"""Scales of rows that train, on a GPU: the codes, scales and values of the law, and the gradients of a CPU."""

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("torchao")

import qkit  # noqa: E402
from qkit import reference  # noqa: E402
from qkit.adapters.surgery import base_weights  # noqa: E402
from qkit.qtensor import QTensor  # noqa: E402
from qkit.reference import gains as law  # noqa: E402
from qkit.reference import merged as arithmetic  # noqa: E402
from qkit.reference import stored  # noqa: E402

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
RECIPES = ["int4-g32", "int4-g128-minmax", "int3-g32", "int2-g32", "int8-row", "affine"]
ENGINE = qkit.backend("torchao")


def adapted(device, recipe, *, mode="on"):
    """A layer of codes with an adapter whose B and gains are not zero."""
    torch.manual_seed(0)
    model = qkit.convert(
        torch.nn.Sequential(torch.nn.Linear(256, 96, bias=False)), recipe.replace("affine", "int4-g32")
    )
    if recipe == "affine":
        model = torch.nn.Sequential(affine())
    model = qkit.adapt(model, qkit.Adapter(rank=5, scales="learned")).to(device)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        model[0].lora_B.copy_(torch.randn(96, 5, generator=random) * 0.05)
        model[0].lora_gains.copy_(torch.randn(model[0].lora_gains.shape, generator=random) * 0.05)
    model[0].switch_mode(mode)
    return model


def affine():
    """The same layer with the scales and biases of a file of mlx-lm's."""
    layer = torch.nn.Linear(256, 96, bias=False)
    q = reference.quantize(layer.weight.detach().numpy(), qkit.Grid("int4", 64, "minmax"))
    biases = (0.3 - q.zeros.astype(np.float32)) * q.scales
    scales, biases = (array.astype(reference.rounding.DTYPE["bfloat16"]) for array in (q.scales, biases))
    read = QTensor(q.codes, scales, qkit.Grid("int4", 64, "affine"), q.dtype, biases=biases)
    rule = replace(qkit.recipe("int4-g64").rules[-1], weight=read.grid)
    return ENGINE.pack(layer, read.map(ENGINE.from_numpy), rule)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_gpu_computes_with_the_values_of_the_law_and_merges_into_them(recipe):
    model = adapted("cuda", recipe)
    (layer,) = ENGINE.layers(model)
    update, first = ENGINE.adapter_update(layer.module), ENGINE.unpack(layer.module).map(ENGINE.to_numpy)
    merged = arithmetic.merged(next(base_weights(ENGINE, layer, "weight", spread=True)), update)
    on = stored.requantize(merged, first) if first.grid.read else reference.quantize(merged, first.grid)
    want = law.gained(on, update.gains)
    found = model(torch.eye(256, device="cuda")).detach().cpu().numpy().T  # a sum of one number
    assert np.array_equal(found, reference.dequantize(replace(want, dtype="float32")))
    made = ENGINE.unpack(next(iter(ENGINE.layers(qkit.merge(model)))).module).map(ENGINE.to_numpy)
    for part, array in want.parts().items():
        assert np.array_equal(made.parts()[part], array), part


@pytest.mark.parametrize("mode", ["on", "off"])
@pytest.mark.parametrize("recipe", ["int4-g32", "affine"])
def test_gradients_on_a_gpu_are_those_of_a_cpu(recipe, mode):
    found = []
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(2))
    for device in ("cpu", "cuda"):
        model = adapted(device, recipe, mode=mode)
        model(x.to(device)).square().sum().backward()
        found.append({name: one.grad.cpu() for name, one in model.named_parameters() if one.requires_grad})
    assert found[0].keys() == {"0.lora_A", "0.lora_B", "0.lora_gains"}
    for name, want in found[0].items():  # TF32 is off by default; sums in another order
        torch.testing.assert_close(found[1][name], want, rtol=0, atol=1e-4 * want.abs().max().item())
