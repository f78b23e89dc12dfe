"""The rooms of the torch engine: who imports kernels, where torch's private names stand, and grids that no kernel declares."""

import ast
import re
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import qkit_torchao  # noqa: E402
from qkit_torchao.kernels import cpu  # noqa: E402

import qkit  # noqa: E402
from qkit import element, reference  # noqa: E402
from qkit.element import Element, ScaleRule, reciprocal  # noqa: E402
from qkit.grid import Grid  # noqa: E402
from qkit.reference import scale_rules  # noqa: E402
from qkit.rules import Recipe, Rule  # noqa: E402

ROOT = Path(qkit_torchao.__file__).parent
PRIVATE = re.compile(r"^torch(\.\w+)*\._|\._version$")
RULES = ("signed", "absmax", "midmax", "minmax")


def modules():
    """The modules of the engine, with their paths in it."""
    return {path.relative_to(ROOT): path.read_text() for path in sorted(ROOT.rglob("*.py"))}


def imported(text):
    """The dotted names that a module imports, with those that it imports from packages."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{name.name}" for name in node.names)


def private(text):
    """The private names of torch that a module reads."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute) and PRIVATE.search(ast.unparse(node)):
            yield ast.unparse(node)


def test_kernels_are_imported_by_their_dispatcher_only():
    """`graphs` launches nothing: it says which graph is being captured. `adamw`, `fits`, `later` and `merge` dispatch, too."""
    outside = {path: text for path, text in modules().items() if path.parts[0] != "kernels"}
    names = {name for text in outside.values() for name in imported(text) if name.startswith("qkit_torchao.kernels")}
    modules_of = {".".join(name.split(".")[:3]) for name in names}
    assert modules_of == {
        f"qkit_torchao.kernels.{name}" for name in ("adamw", "choose", "fits", "graphs", "later", "merge")
    }


def test_private_names_of_torch_stand_in_one_module():
    users = {str(path) for path, text in modules().items() if [*private(text)]}
    assert users == {"torch_private.py"}


def halfmax_scale(x, kind):
    """The scale under `halfmax`: half of the largest magnitude gets the highest code, and larger ones are clipped."""
    s = scale_rules.round_to_bfloat16(scale_rules.amax(x) * np.float32(element.STEP[kind.name, "halfmax"]))
    return np.maximum(s, np.float32(element.MIN_SCALE))


@pytest.fixture
def new(monkeypatch):
    """Adds the element int7 and the scale rule `halfmax` to the tables."""
    int7 = Element("int7", "integer", 7, 63)
    steps = {"signed": 1 / int7.lowest, "absmax": reciprocal(63), "midmax": reciprocal(63.5), "minmax": reciprocal(127)}
    monkeypatch.setitem(element.ELEMENTS, "int7", int7)
    for rule, step in steps.items():
        monkeypatch.setitem(element.STEP, ("int7", rule), step)
    monkeypatch.setitem(element.SCALE_RULES, "halfmax", ScaleRule("integer"))
    monkeypatch.setitem(scale_rules.SYMMETRIC_RULES, "halfmax", halfmax_scale)
    for name in ("int4", "int7"):
        monkeypatch.setitem(element.STEP, (name, "halfmax"), reciprocal(element.ELEMENTS[name].highest / 2))


@pytest.mark.usefixtures("new")
@pytest.mark.parametrize("named", [*(("int7", rule) for rule in RULES), ("int4", "halfmax"), ("int7", "halfmax")])
def test_a_new_element_and_a_new_rule_have_the_codes_of_the_reference(named):
    on, engine = Grid(named[0], 32, named[1]), qkit.backend("torchao")
    w = np.random.default_rng(0).standard_normal((16, 64)).astype(np.float32)
    want, found = reference.quantize(w, on), engine.quantize(torch.from_numpy(w), on)
    for name, part in want.parts().items():
        assert (found.parts()[name].numpy() == part).all()
    layer = torch.nn.Linear(64, 16)
    layer.weight.data.copy_(torch.from_numpy(w))
    model = qkit.prepare(torch.nn.Sequential(layer), Recipe("new", (Rule(("*",), weight=on),)))
    x = torch.ones(2, 64)
    y = model(x)
    assert torch.equal(model[0].weight_values(torch.float32), torch.from_numpy(reference.dequantize(want)))
    assert torch.equal(qkit.convert(model)(x), y)


@pytest.mark.usefixtures("new")
def test_a_kernel_declines_a_rule_that_it_does_not_declare():
    w = torch.ones(2, 64)
    assert cpu.takes(w, Grid("int4", 32, "signed"))
    assert not cpu.takes(w, Grid("int4", 32, "halfmax"))
