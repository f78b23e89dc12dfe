"""First contact with widths that do not divide into groups: one message lists every layer, and the flag is on every path."""

import json
from itertools import pairwise

import models
import numpy as np
import pytest
from safetensors.numpy import save_file
from tables import BUILDERS
from tables import MODULES as MODULE_ENGINES
from typer.testing import CliRunner

import qkit
from qkit.cli.application import application
from qkit.planning import plan

RUNNER = CliRunner()
FLOATS = ["mxfp4", "mxfp8-a16", "nvfp4"]
#: The Llama of the tests with 172 inputs of down_proj, which divide into groups of 4 and 43 only; its other inputs are 128 wide.
ODD = {"intermediate_size": 172}
DOWN = [f"model.layers.{n}.mlp.down_proj" for n in range(2)]


def linears(name, *widths):
    """A stack of the framework's own linear layers."""
    pairs = list(pairwise(widths))
    if name == "torchao":
        from torch import nn
    else:
        import mlx.nn as nn
    return nn.Sequential(*(nn.Linear(n, out, bias=False) for n, out in pairs))


def refusal(work):
    with pytest.raises(qkit.GridError) as refused:
        work()
    return str(refused.value)


@pytest.mark.parametrize("verb", ["prepare", "convert"])
@pytest.mark.parametrize("name", MODULE_ENGINES)
def test_one_message_lists_every_layer_and_the_flag(name, verb):
    said = refusal(lambda: getattr(qkit, verb)(linears(name, 64, 172, 100, 172, 64), "int4-g64"))
    before = "layers." if name == "mlx" else ""
    assert said.startswith(
        f"{before}1, {before}3: 172 inputs do not divide into groups of 64; "
        f"{before}2: 100 inputs do not divide into groups of 64: to leave them in float, add --skip-indivisible"
    )
    assert "--skip-indivisible" in said
    assert said.count("to leave them in float") == 1


@pytest.mark.parametrize("verb", ["prepare", "convert"])
@pytest.mark.parametrize("name", MODULE_ENGINES)
def test_the_python_calls_take_the_flag_too(name, verb):
    model = getattr(qkit, verb)(linears(name, 64, 172, 64), "int4-g64", skip_indivisible=True)
    first, second = qkit.coverage(model).rows
    assert first.weight == "int4-g64-signed"
    assert second.state == "left alone: skipped: 172 inputs do not divide into groups of 64"


@pytest.mark.parametrize("recipe", FLOATS)
@pytest.mark.parametrize("name", MODULE_ENGINES)
def test_no_other_group_is_named_for_a_format_whose_group_is_fixed(name, recipe):
    said = refusal(lambda: qkit.prepare(linears(name, 64, 172, 64), recipe))
    assert "172 inputs" in said
    assert "use group" not in said
    assert '"row"' not in said
    grid = qkit.recipe(recipe).rules[-1].weight
    assert "group 4" not in refusal(lambda: qkit.quantize(np.ones((8, 172), np.float32), grid))


def test_a_smaller_group_that_is_named_suits_every_layer():
    assert 'or use group 48 or "row"' in refusal(lambda: plan(layers(96, 144), qkit.recipe("int4-g64")))
    assert said_only_rows(refusal(lambda: plan(layers(172, 64), qkit.recipe("int4-g64"))))


def said_only_rows(said):
    return said.endswith('or use "row"')


def layers(*inputs):
    from qkit.engines.layer import Layer

    return [Layer(f"layers.{n}.up_proj", "linear", (32, size), None) for n, size in enumerate(inputs)]


def test_many_layers_are_named_by_patterns():
    said = refusal(lambda: plan(layers(*[172] * 80), qkit.recipe("int4-g64")))
    assert said.startswith("layers.{0-79}.up_proj: 172 inputs do not divide into groups of 64: ")


@pytest.fixture
def folder(tmp_path):
    """A float directory of the odd Llama."""
    if not BUILDERS:
        pytest.skip("needs an engine that builds models")
    model, engine = models.build(BUILDERS[0], **ODD), qkit.backend(BUILDERS[0])
    (tmp_path / "model").mkdir()
    save_file(
        {key: engine.to_numpy(one) for key, one in engine.tensors(model).items()}, tmp_path / "model/model.safetensors"
    )
    (tmp_path / "model" / "config.json").write_text(json.dumps({**models.CONFIG, **ODD}))
    (tmp_path / "text.txt").write_text("a text of some length, " * 150)
    return tmp_path


def commands(folder):
    """Every command that puts a directory on a recipe."""
    model, text, out = (str(folder / name) for name in ("model", "text.txt", "out"))
    engine = ["--backend", BUILDERS[0]]
    short = ["--data", text, "--length", "16"]
    train = ["train", model, out, *short, *engine, "--steps", "1", "--batch", "2"]
    compare = ["compare", model, "--out", out, *short, *engine, "--windows", "2"]
    found = {"plan": ["plan", model], "quantize": ["quantize", model, out], "train": train, "compare": compare}
    return found | {"calibrate": ["calibrate", model, out, *short, *engine, "--windows", "180"]}


@pytest.mark.parametrize("recipe", ["int4-g128", "mxfp4"])
@pytest.mark.parametrize("name", ["plan", "quantize", "train", "compare", "calibrate"])
def test_every_command_says_it_in_one_message_and_takes_the_flag(folder, name, recipe):
    command = [*commands(folder)[name], "--recipe", recipe]
    refused = RUNNER.invoke(application, command)
    assert isinstance(refused.exception, qkit.QkitError), refused.output
    said = str(refused.exception)
    assert all(path in said for path in DOWN)
    assert "--skip-indivisible" in said
    assert "use group" not in said
    assert not (folder / "out").exists()
    done = RUNNER.invoke(application, [*command, "--skip-indivisible"])
    assert done.exit_code == 0, done.output + repr(done.exception)


def test_the_flag_of_mlx_lora_is_its_own():
    said = RUNNER.invoke(application, ["mlx-lora", "--help"]).output
    assert "--skip-indivisible" in said
