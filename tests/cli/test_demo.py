"""The demo from end to end at a tiny size, on every engine that can train."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
from tables import TRAINERS as ENGINES

import qkit
from qkit.cli.demo import _table
from qkit.demo import picture, run
from qkit.demo.other_programs import READERS, loss_in
from qkit.demo.report import another
from qkit.engines import registry
from qkit.engines.hookspecs import hookimpl
from qkit.engines.numpy import NumpyBackend

READY = {status.name: status for status in qkit.backends() if status.ready}
TINY = replace(run.PRESET, hidden=64, layers=1, intermediate=128, batch=2, length=32, float_steps=12, more_steps=6)

RECIPE = """
schema = 1
[grids.w]
element = "int4"
group = 64
[[rules]]
match = "*"
weight = "w"
"""


def result(**losses: float) -> run.Result:
    """A result with these losses."""
    return run.Result(
        backend="torchao",
        recipe="[b]mine",
        parameters=1,
        **{
            "float_loss": 2.0,
            "ptq_loss": 3.0,
            "longer_float_loss": 1.0,
            "longer_ptq_loss": 2.0,
            "qat_loss": 1.25,
            **losses,
        },
        elsewhere=("int2-g64-absmax", 1.75),
        engines=("numpy",),
        codes_equal=1,
        codes_compared=1,
        forward_difference=0.0,
        other=None,
        other_loss=None,
        other_obstacle="mlx needs mlx: pip install 'qkit-quant[mac]'",
        outside={"transformers": 1.25, "mlx-lm": "mlx-lm: No module named 'mlx_lm'"},
        bits_per_weight=2.0,
        curves={},
        folder="",
    )


@pytest.mark.parametrize("name", ENGINES)
def test_the_demo_goes_the_whole_way(name, tmp_path):
    seen = []
    result = run.run(
        backend=name,
        recipe="int2-g64",
        folder=tmp_path,
        progress=lambda stage, step, steps, loss: seen.append(stage),
        preset=TINY,
    )
    assert seen == ["float"] * 12 + ["float, longer"] * 6 + ["QAT"] * 6
    assert result.codes_equal == result.codes_compared > 100_000
    assert result.forward_difference == 0.0
    assert set(result.engines) == {"numpy", *ENGINES}
    if result.other_loss is None:
        assert result.other_obstacle
    else:
        assert result.other_loss == pytest.approx(result.qat_loss, abs=1e-5)  # two libraries, two orders of summation
    left = {"float", "quantized", "mlx", "result.json", "report.html", "report.json"}
    assert {entry.name for entry in tmp_path.iterdir()} == left
    report = json.loads((tmp_path / "report.json").read_text())
    rows = {row["name"]: row for row in report["rows"]}
    assert rows.keys() == {
        *("float", "float, longer", "PTQ", "PTQ on int2-g64-absmax", "longer PTQ", "longer PTQ on int2-g64-absmax"),
        *("QAT", "QAT on int2-g64-absmax"),
    }
    assert result.elsewhere == ("int2-g64-absmax", rows["QAT on int2-g64-absmax"]["loss"]["value"])
    assert result.qat_loss == pytest.approx(qkit.backend(name).loss(reopened(tmp_path, name), unseen()), abs=1e-6)
    equal, numbers = report["masters_equal"]
    assert equal == numbers > 10_000
    assert (tmp_path / "report.html").read_text().count('role="img"') == 5
    assert result.outside == pytest.approx(dict.fromkeys(("transformers", "mlx-lm"), result.qat_loss), abs=1e-5)
    assert json.loads((tmp_path / "result.json").read_text())["backend"] == name
    pytest.importorskip("matplotlib")
    picture.draw(result, tmp_path / "losses.png")
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("group = 64", "group = 48", "do not divide into groups of 48"),
        ('match = "*"', 'match = "no.such.layer"', "is first for no layer"),
        ('element = "int4"\ngroup = 64', 'element = "e5m2"\ngroup = "row"', "no layout for e5m2"),
    ],
)
@pytest.mark.parametrize("name", ENGINES)
def test_a_recipe_that_does_not_fit_fails_before_the_training(name, tmp_path, old, new, message):
    file, folder, seen = tmp_path / "mine.toml", tmp_path / "out", []
    file.write_text(RECIPE.replace(old, new), encoding="utf-8")
    with pytest.raises(qkit.QkitError, match=message):
        run.run(backend=name, recipe=str(file), folder=folder, progress=lambda *step: seen.append(step), preset=TINY)
    assert not seen
    assert not folder.exists()


def reopened(folder, name):
    return qkit.load(folder / "quantized", backend=name)


def unseen():
    return run.standard_library(TINY)[1]


@pytest.mark.parametrize("name", ["int2-g64", "int4-g64-absmax", "int4-g64-midmax", "mxfp4", "mxfp8-a16-even"])
def test_another_grid_of_the_same_name_is_another_rule_on_the_same_layers(name):
    recipe = qkit.recipe(name)
    (other,) = another(recipe)
    assert other.name.startswith(f"{name}-")
    for one, two in zip(recipe.rules, other.rules, strict=True):
        assert (one.match, one.kind, one.activation) == (two.match, two.kind, two.activation)
        if one.weight:
            assert (one.weight.element, one.weight.group) == (two.weight.element, two.weight.group)
            assert one.weight.scale != two.weight.scale


def test_zero_points_and_nvfp4_have_no_other_rule():
    assert another(qkit.recipe("int4-g64-minmax")) == another(qkit.recipe("nvfp4")) == ()


class CannotBuild(NumpyBackend):
    """An engine of language models without the library that builds them."""

    name = "modelless"
    layers = weight = make_layer = prepare_layer = switch_mode = clear_ranges = pack = unpack = replace = run_layer = (
        len
    )
    tensors = fill = gather = config = loss = logits = len

    def build(self, config):
        raise qkit.BackendError("building a model needs a library: pip install library")


@pytest.mark.skipif("torchao" not in ENGINES, reason="needs an engine that trains")
def test_a_second_engine_that_cannot_build_the_model_is_not_available_and_says_why(tmp_path, monkeypatch):
    class Plugin:
        @hookimpl
        def qkit_backends(self):
            return [qkit.BackendSpec("modelless", f"{__name__}:CannotBuild", "numpy", "pip install modelless")]

    for name in ENGINES:
        if name != "torchao":
            monkeypatch.setitem(sys.modules, READY[name].framework, None)  # as if it were not installed
    monkeypatch.setitem(sys.modules, __name__, sys.modules[CannotBuild.__module__])
    registry.register(Plugin(), "modelless")
    try:
        result = run.run(backend="torchao", recipe="int2-g64", folder=tmp_path, progress=lambda *_: None, preset=TINY)
    finally:
        registry.unregister("modelless")
    assert (result.other, result.other_loss) == (None, None)
    assert "modelless: building a model needs a library: pip install library" in result.other_obstacle


def test_the_table_says_why_there_is_no_second_engine():
    assert "not available: mlx needs mlx: pip install 'qkit-quant[mac]'" in _table(result()).columns[1].cells


def test_the_table_says_what_other_programs_found_or_why_they_could_not():
    cells = dict(zip(*(column.cells for column in _table(result()).columns), strict=True))
    assert cells["  in transformers, without qkit"] == "1.2500 (differs by 0.0e+00)"
    assert cells["  in mlx-lm, without qkit"] == "not available: mlx-lm: No module named 'mlx_lm'"


def test_a_program_that_cannot_open_a_directory_is_an_obstacle_and_no_failure(tmp_path):
    for reader in READERS:
        with pytest.raises(qkit.BackendError, match=f"{reader}: .+"):
            loss_in(reader, tmp_path, np.zeros((1, 9), np.int32))


def test_nothing_is_recovered_where_quantizing_cost_nothing():
    assert result().recovered == 0.75
    free = result(longer_ptq_loss=1.0)
    assert free.recovered is None
    assert "nothing to recover" in _table(free).columns[1].cells


def test_numpy_cannot_train_and_says_what_can(tmp_path):
    with pytest.raises(qkit.BackendError, match=r"'numpy' cannot train: .*pip install 'qkit-quant\[cuda\]'"):
        run.run(backend="numpy", recipe="int2-g64", folder=tmp_path, progress=lambda *_: None)


def test_with_no_engine_the_demo_says_what_to_install(tmp_path, monkeypatch):
    for name in ENGINES:
        monkeypatch.setitem(sys.modules, READY[name].framework, None)  # as if it were not installed
    with pytest.raises(qkit.BackendError, match=r"'numpy' cannot train: .*pip install 'qkit-quant\[cuda\]'"):
        run.run(backend=None, recipe="int2-g64", folder=tmp_path, progress=lambda *_: None)
