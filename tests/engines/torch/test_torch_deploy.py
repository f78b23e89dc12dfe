"""Converting where kernels write codes as a layer holds them: here torch's operations stand in for the kernels."""

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from qkit_torchao.arithmetic import packing, rounding  # noqa: E402
from qkit_torchao.kernels import choose  # noqa: E402
from torch import nn  # noqa: E402

import qkit  # noqa: E402

BE = qkit.backend("torchao")
RECIPES = ["int4-g32", "int4-g32-minmax", "int8-g32", "mxfp4-a16", "mxfp8", "nvfp4-a16", "fp8", "int4-g32-all"]


@pytest.fixture
def laid_out(monkeypatch):
    """The layouts that were asked for."""
    asked = []

    def lay(w, grid, layout, *, broken, number):
        asked.append(layout)
        whole = bool(torch.isfinite(w).all())
        broken[number] = not whole
        return packing.lay(rounding.quantize(w if whole else torch.zeros_like(w), grid), layout)

    monkeypatch.setattr(choose, "lays_out", lambda w, grid: True)
    monkeypatch.setattr(choose, "laid_out", lay)
    return asked


class Model(nn.Module):
    """An embedding, a tied head, and layers of which one has an odd number of rows."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(40, 64)
        self.up, self.down = nn.Linear(64, 24), nn.Linear(24, 64, bias=False)
        self.odd = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
        self.head = nn.Linear(64, 40, bias=False)
        self.head.weight = self.embed.weight


def model():
    torch.manual_seed(0)
    return Model().to(torch.bfloat16)


def recipe(name):
    """Of `name`, with layers whose rows do not divide left alone."""
    rules = [qkit.Rule(**{**fields(rule), "indivisible": "skip"}) for rule in qkit.recipe(name).rules]
    return qkit.Recipe(name, tuple(rules))


def fields(rule):
    return {name: getattr(rule, name) for name in rule.__dataclass_fields__}


def held(converted):
    return {
        layer.path: {**BE.unpack(layer.module).parts(), "as": layer.execution, "tied": layer.tied}
        for layer in BE.layers(converted)
        if layer.stage == "converted"
    }


def same(one, other):
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("prepared", [False, True], ids=["directly", "prepared"])
@pytest.mark.parametrize("name", RECIPES)
def test_what_is_laid_out_is_what_is_packed(name, prepared, laid_out, monkeypatch):
    def convert():
        rules = recipe(name)
        return qkit.convert(qkit.prepare(model(), rules)) if prepared else qkit.convert(model(), rules)

    at_once = held(convert())
    assert laid_out
    monkeypatch.undo()
    packed = held(convert())
    assert at_once.keys() == packed.keys()
    for path, parts in packed.items():
        assert at_once[path].keys() == parts.keys()
        assert same(at_once[path].values(), parts.values()), path


def test_a_weight_that_is_not_finite_is_named_and_nothing_is_converted(laid_out):
    broken = model()
    with torch.no_grad():
        broken.odd[0].weight[3, 5] = torch.nan
    with pytest.raises(qkit.errors.RangeError, match=r"odd\.0\.weight holds NaN"):
        qkit.convert(broken, recipe("int4-g32"))
    assert laid_out
    assert type(broken.up) is nn.Linear
    assert {layer.stage for layer in BE.layers(broken)} == {"float"}
