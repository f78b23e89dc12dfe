"""`qkit recipes`: at 80 columns, and for a machine; and where recipes run, held to the readers that were run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import qkit
from qkit.cli.application import application
from qkit.runs_on import runs_on
from qkit.suggestions import read_machine, suggest

RESULTS = Path(__file__).parents[1] / "readers" / "results.json"
READERS = {"vLLM's loader": "vLLM", "mlx-lm": "mlx-lm", "llama.cpp": "llama.cpp"}
RUNNER = CliRunner()


def test_at_80_columns_every_recipe_has_its_name_bits_and_programs():
    command = [sys.executable, "-m", "qkit", "recipes"]
    done = subprocess.run(command, env={**os.environ, "COLUMNS": "80"}, capture_output=True, text=True, check=True)
    lines = [line.split() for line in done.stdout.partition("Bits are")[0].splitlines()]
    assert max(map(len, done.stdout.splitlines())) <= 80
    for name in qkit.recipes():
        programs = ", ".join(runs_on(qkit.recipe(name)))
        (row,) = (line for line in lines if line[:1] == [name])
        assert float(row[1]) > 2
        assert " ".join(row[2:]) == programs


def test_where_a_recipe_runs_is_where_it_ran():
    tried = 0
    for row in json.loads(RESULTS.read_text()):
        program = READERS.get(row["reader"])
        if program and row["model"] == "llama" and row["recipe"] in qkit.recipes():
            assert (program in runs_on(qkit.recipe(row["recipe"]))) == ("far" in row), row
            tried += 1
    assert tried > 40


@pytest.mark.parametrize("text", ["cuda, 24 GB, 8B", "8b,CUDA,24gb", " 24GB ,8 B, cuda"])
def test_the_machine_is_read_in_any_order(text):
    found = read_machine(text)
    assert (found.name, found.memory, found.parameters) == ("cuda", 24e9, 8e9)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gpu, 24 GB, 8B", "'gpu' is no machine"),
        ("cuda, 24 GB", "names no size"),
        ("cuda, 8B", "names no memory"),
        ("24 GB, 8B", "names no machine"),
        ("cuda, 24 GB, 8B, 7B", "'7B': the size is there twice"),
        ("cuda, 0 GB, 8B", "the memory is zero"),
        ("", "'' is no machine"),
    ],
)
def test_a_machine_that_is_not_one_is_named(text, said):
    with pytest.raises(qkit.QkitError, match=said):
        read_machine(text)


@pytest.mark.parametrize("text", ["cuda, 24 GB, 8B", "mac, 8 GB, 8B", "cpu, 16 GB, 13B", "llama.cpp, 1 GB, 1B"])
def test_suggestions_fit_and_run_there(text):
    machine = read_machine(text)
    found = suggest(machine)
    assert found
    assert [one.nbytes for one in found] == sorted((one.nbytes for one in found), reverse=True)
    for one in found:
        assert one.nbytes + one.left == machine.memory
        assert one.nbytes <= 0.8 * machine.memory
        assert one.nbytes >= machine.parameters * one.bits / 8
        assert {"cuda": "vLLM", "mac": "mlx-lm"}.get(machine.name, "llama.cpp") in runs_on(qkit.recipe(one.recipe))


def test_a_memory_that_holds_none_names_the_smallest():
    done = RUNNER.invoke(application, ["recipes", "--for", "cuda, 2 GB, 8B"])
    assert isinstance(done.exception, qkit.PlanError)
    assert "the smallest, int2-g128, takes about 3.9 GB" in str(done.exception)


def test_suggestions_are_printed_and_are_json():
    said = RUNNER.invoke(application, ["recipes", "--for", "cuda, 24 GB, 8B"]).stdout
    assert " int4-g32 " in said
    told = json.loads(RUNNER.invoke(application, ["recipes", "--for", "cuda, 24 GB, 8B", "--json"]).stdout)
    assert told["for"] == {"name": "cuda", "memory": 24e9, "parameters": 8e9}
    assert told["recipes"][0]["recipe"] == "int8-g32"
