"""Probes tell what happens: native, decoded or missing, and whether codes and outputs are right."""

import json

import pytest
from tables import MODULES as ENGINES
from typer.testing import CliRunner

import qkit
from qkit.cli.application import application
from qkit.testing.probe import probe, worst

RECIPES = ["int4-g64", "int4-g64-all", "int8-static-act-int8-weight", "nvfp4"]
runner = CliRunner()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", ENGINES)
def test_every_engine_does_what_a_recipe_says(name, recipe, dtype):
    probes = list(probe(qkit.backend(name), qkit.recipe(recipe), dtype=dtype, device="here"))
    assert [one.kind for one in probes] == (["embedding", "linear"] if recipe.endswith("-all") else ["linear"])
    for one in probes:
        assert one.exact, one
        assert one.compared > 256 * 512
        assert one.detail
        assert (one.recipe, one.backend, one.device, one.dtype) == (recipe, name, "here", dtype)


def engine(**methods):
    """The torch engine with other methods."""
    pytest.importorskip("torch")
    base = type(qkit.backend("torchao"))
    return type("Other", (base,), methods)()


def test_what_does_not_run_is_missing_and_says_why():
    def prepare_layer(self, module, rule):
        raise NotImplementedError("no such kernel")

    (one,) = probe(engine(prepare_layer=prepare_layer), qkit.recipe("int4-g64"), dtype="float32")
    assert (one.outcome, one.detail, one.exact) == ("missing", "NotImplementedError: no such kernel", False)


def test_wrong_codes_are_counted():
    def quantize(self, w, grid):
        q = qkit.backend("torchao").quantize(w, grid)
        q.codes[3, 5:9] += 1
        return q

    (one,) = probe(engine(quantize=quantize), qkit.recipe("int4-g64"), dtype="float32")
    assert (one.codes, one.exact) == (4, False)


def test_outputs_that_differ_are_found():
    def run_layer(self, module, x):
        y = qkit.backend("torchao").run_layer(module, x)
        return y * 1.001 if type(module).__name__ == "PackedLinear" else y

    (one,) = probe(engine(run_layer=run_layer), qkit.recipe("int4-g64"), dtype="float32")
    assert (one.codes, one.within, one.exact) == (0, False, False)
    assert one.difference > 1e-5


def test_the_worst_of_a_recipe_counts():
    (first, second) = probe(engine(), qkit.recipe("int4-g64-all"), dtype="float32")
    assert worst([first, second]) == "decoded"


@pytest.mark.skipif(not {"torchao", "mlx"} <= set(ENGINES), reason="both engines")
def test_the_command_shows_a_row_for_each_recipe_and_what_the_cells_mean():
    done = runner.invoke(application, ["backends", "--probe"])
    assert done.exit_code == 0
    for name in qkit.recipes():
        assert f" {name} " in done.stdout
    assert "mlx native: QuantizedLinear, affine 4-bit g64" in done.stdout
    assert "torchao native: C kernels on packed codes: products of one token" in done.stdout
    assert "0 mismatches in" in done.stdout


@pytest.mark.skipif("torchao" not in ENGINES, reason="torch")
def test_parity_of_everything_probes_layers_too():
    arguments = ["parity", "mxfp4", "--all", "--no-compiled", "--backend", "torchao", "--size", "10", "--json"]
    rows = json.loads(runner.invoke(application, arguments).stdout)
    probes = [row for row in rows if "recipe" in row]
    assert [(row["recipe"], row["dtype"]) for row in probes] == [
        ("mxfp4", t) for t in ("float32", "bfloat16", "float16")
    ]
    assert all(row["exact"] for row in rows)


@pytest.mark.skipif("torchao" not in ENGINES, reason="torch")
@pytest.mark.parametrize("command", [["backends", "--probe"], ["parity", "int4-g64", "--size", "10"]])
def test_engines_that_do_not_work_on_the_device_are_left_out_by_name(command, monkeypatch):
    """A GPU machine with MLX for CPUs, too: each engine has devices of its own."""

    def elsewhere(self, device):
        raise qkit.BackendError(f"no {device} here")

    monkeypatch.setattr(qkit, "recipes", lambda: ["int4-g64"])
    for name in (*ENGINES, "numpy"):
        if name != "torchao":
            monkeypatch.setattr(type(qkit.backend(name)), "on", elsewhere)
    done = runner.invoke(application, [*command, "--device", "cpu"])
    assert done.exit_code == 0
    assert ("left out: numpy: no cpu here" in done.output) == (command[0] == "parity")
    assert "torchao" in done.stdout
    monkeypatch.setattr(type(qkit.backend("torchao")), "on", elsewhere)
    refused = runner.invoke(application, [*command, "--device", "cpu"])
    assert isinstance(refused.exception, qkit.BackendError)
    assert "no engine works on 'cpu'" in str(refused.exception)
