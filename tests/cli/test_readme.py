"""The README keeps its word: its blocks run, its commands exist, its tables are those that were measured."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from runs import folder
from safetensors.numpy import load_file
from tables import READY
from typer.testing import CliRunner

import qkit
from qkit.cli.application import application

README = Path(__file__).parents[2] / "README.md"
TEXT = README.read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
RESULTS = README.parent / "benchmarks" / "results"
ENGINES = set(READY)


@pytest.mark.skipif(not {"torchao", "mlx"} <= ENGINES, reason="the tour visits both engines")
def test_the_tour_runs_from_the_first_block_to_the_last(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(BLOCKS) >= 6
    namespace = {}
    for block in BLOCKS:
        exec(compile(block, str(README), "exec"), namespace)


@pytest.mark.parametrize("command", sorted(set(re.findall(r"^\$ qkit (\w+)", TEXT, flags=re.MULTILINE))))
def test_the_commands_exist(command):
    assert CliRunner().invoke(application, [command, "--help"]).exit_code == 0


TRAINING = [line for line in TEXT.splitlines() if line.startswith("$ qkit") and re.search(r"model/|adapted", line)]


@pytest.mark.skipif(not {"torchao", "mlx"} & ENGINES, reason="needs an engine that trains")
def test_the_commands_that_train_and_measure_run_in_their_order(tmp_path, monkeypatch):
    """As they stand, on a small model, and with few steps."""
    monkeypatch.chdir(folder(tmp_path, intermediate_size=64, hidden_size=64))
    (tmp_path / "text").mkdir()
    (tmp_path / "text.txt").rename(tmp_path / "text" / "a.txt")
    (tmp_path / "other.txt").write_text((tmp_path / "text" / "a.txt").read_text()[:2000])
    few = {
        "train": ["--steps", "2", "--batch", "2", "--length", "16"],
        "compare": ["--length", "16"],
        "eval": ["--length", "16"],
    }
    ran = [shlex.split(line[2:], comments=True)[1:] for line in TRAINING]
    assert {command for command, *_ in ran} == {"plan", "quantize", "train", "eval", "compare", "merge"}
    for command in sorted(ran, key=lambda words: words[0] not in ("plan", "quantize")):
        done = CliRunner().invoke(application, [*command, *few.get(command[0], [])])
        assert done.exit_code == 0, (command, done.output, done.exception)
    assert (tmp_path / "report" / "report.html").exists()
    pair = [load_file(tmp_path / one / "model.safetensors") for one in ("adapted", "merged")]
    assert all(np.array_equal(pair[0][name], pair[1][name]) for name in pair[0])


def parity_table():
    """The README's table, made from the result files."""
    rows = []
    for file in sorted(RESULTS.glob("*/parity*.json")):
        report = json.loads(file.read_text(encoding="utf-8"))
        where = report["machine"]["gpu"].split()[1] if "gpu" in report["machine"] else "CPU"  # as in NVIDIA H200
        for row in report["rows"]:
            wrong = sum(row[key] for key in ("codes", "scales", "values", "not run"))
            rows.append(f"| {row['backend']} | {where} | {row['mode']} | {row['compared']:,} | {wrong} |")
    return rows


def test_the_table_of_comparisons_is_that_of_the_result_files():
    rows = parity_table()
    assert len(rows) >= 9
    assert "\n".join(rows) in TEXT
    assert all(row.endswith("| 0 |") for row in rows)


def probe_table():
    """The README's table of recipes and engines, made from the result files: recipes with the same cells share a row."""
    cells = {}
    for file in ("cpu/probe", "h200/probe-torch", "h200/probe-mlx"):
        report = json.loads((RESULTS / f"{file}.json").read_text(encoding="utf-8"))
        where = "H200" if "gpu" in report["machine"] else "CPU"
        for one in report["rows"]:
            assert one["exact"], one
            column = cells.setdefault((one["backend"], where), {})
            column.setdefault(one["recipe"], {}).setdefault(one["dtype"], []).append(one["outcome"])
    columns = [cells[key] for key in (("torchao", "CPU"), ("torchao", "H200"), ("mlx", "CPU"), ("mlx", "H200"))]
    rows = {}
    for recipe in qkit.recipes():
        if any(rule.scales == "learned" for rule in qkit.recipe(recipe).rules):
            continue  # deployed as the recipe with the grid's own scales, which is in the table
        rows.setdefault(tuple(map(probe_cell, (column[recipe] for column in columns))), []).append(recipe)
    return [f"| {', '.join(names)} | {' | '.join(row)} |" for row, names in rows.items()]


def probe_cell(by_dtype):
    """`native`, `decoded`, or in which types which; of several rules, the least."""
    least = {dtype: "decoded" if "decoded" in outcomes else "native" for dtype, outcomes in by_dtype.items()}
    assert not any("missing" in outcomes for outcomes in by_dtype.values())
    natives = [dtype for dtype in least if least[dtype] == "native"]
    if len(natives) in (0, len(least)):
        return "native" if natives else "decoded"
    return f"native in {', '.join(natives)}; else decoded"


def test_the_table_of_recipes_and_engines_is_that_of_the_probes():
    rows = probe_table()
    assert len(rows) >= 3
    assert "\n".join(rows) in TEXT


def test_the_conformance_figures_are_those_of_the_result_files():
    for machine, suite in (("h100", "TestTorchaoOnCuda"), ("h200", "TestMlx")):
        report = json.loads((RESULTS / machine / "conformance.json").read_text(encoding="utf-8"))
        (row,) = report["rows"]
        assert (row["suite"], row["failures"]) == (suite, [])
        assert f"{row['passed']:,} laws" in TEXT


def test_the_decode_figures_are_those_of_the_result_file():
    report = json.loads((RESULTS / "h200" / "decode.json").read_text(encoding="utf-8"))
    _, ours, theirs = report["rows"]
    assert (
        f"{ours['time / bfloat16']:.3f}x the time of bfloat16, {ours['bytes / bfloat16']:.4f}x its weight bytes" in TEXT
    )
    assert (
        f"{ours['ms']['median'] / theirs['ms']['median']:.3f}x the time of torchao's own Int4WeightOnlyConfig" in TEXT
    )


def test_the_figures_of_mlx_steps_are_those_of_the_result_file():
    report = json.loads((RESULTS / "cpu" / "mlx_decode.json").read_text(encoding="utf-8"))
    ratios = [row["qkit / mlx.nn.quantize"]["median"] for row in report["rows"]]
    assert f"from {min(ratios):.3f}x to {max(ratios):.3f}x" in TEXT


@pytest.mark.parametrize("target", sorted(set(re.findall(r"(?:`|^)make ([a-z-]+)", TEXT, re.MULTILINE))))
def test_the_make_targets_exist(target):
    makefile = (README.parent / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)
