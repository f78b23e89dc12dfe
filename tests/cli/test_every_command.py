"""Every command of the parser: help within 80 columns, a group, an example that it takes, and `--json`."""

import json
import shlex
import shutil

import numpy as np
import pytest
import typer
from models import small
from runs import TEXT
from tables import TRAINERS
from typer.testing import CliRunner

import qkit
import qkit.cli.console  # before a call that sets COLUMNS, which it reads once
from qkit.cli.application import application
from qkit.cli.groups import GROUPS
from qkit.demo import preset

GROUP = typer.main.get_command(application)
COMMANDS = GROUP.commands
RUNNER = CliRunner()
EXAMPLES = {name: line for commands in GROUPS.values() for name, line in commands.items()}


@pytest.mark.parametrize("columns", ["80", "200"])
@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_fits_80_columns(name, columns):
    said = RUNNER.invoke(application, [*[name] * bool(name), "--help"], env={"COLUMNS": columns}).stdout
    assert max(map(len, said.splitlines())) <= 80
    assert "..." not in "".join(said.partition("Options:")[0].splitlines()[1:])  # the first line has [ARGS]...


def test_every_command_is_in_one_group_and_the_help_lists_them_so():
    assert list(GROUPS) == ["prepare", "train", "measure", "exchange", "machine"]
    assert sorted(name for commands in GROUPS.values() for name in commands) == sorted(COMMANDS)
    said = RUNNER.invoke(application, ["--help"]).stdout
    places = [said.index(f"\n{group.capitalize()}:\n") for group in GROUPS]
    assert places == sorted(places)
    for (_, commands), begin, end in zip(GROUPS.items(), places, [*places[1:], len(said)], strict=True):
        assert all(f"\n  {name} " in said[begin:end] for name in commands)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_an_example_that_it_takes(name):
    said = RUNNER.invoke(application, [name, "--help"]).stdout
    assert said.rstrip().endswith(f"Example:\n    {EXAMPLES[name]}")
    program, command, *arguments = shlex.split(EXAMPLES[name])
    assert (program, command) == ("qkit", name)
    COMMANDS[name].make_context(name, arguments)  # raises for options and arguments that it does not take


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_json(name):
    (option,) = (one for one in COMMANDS[name].params if "--json" in one.opts)
    assert option.is_flag


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A float model, quantized, trained, an adapter and a text, by the commands themselves."""
    if not TRAINERS:
        pytest.skip("needs an engine that trains")
    root, engine = tmp_path_factory.mktemp("json"), TRAINERS[-1]
    (root / "text.txt").write_text(TEXT * 4)
    qkit.save(small(engine), root / "model", backend=engine)
    run = ["--data", str(root / "text.txt"), "--steps", "2", "--batch", "2", "--length", "16", "--backend", engine]
    adapter = ["--set", "adapter={rank=2}", "-r", "int4-g32"]
    for command in (
        ["quantize", root / "model", root / "quantized", "-r", "int4-g32"],
        ["export", root / "quantized", root / "mlx", "--to", "mlx"],
        ["calibrate", root / "model", root / "stats", "--data", root / "text.txt", "--length", 16, "--backend", engine],
        ["train", root / "model", root / "trained", *adapter, *run],
    ):
        done = RUNNER.invoke(application, list(map(str, command)))
        assert done.exit_code == 0, done.output + repr(done.exception)
    return root, engine


#: By command, its arguments; text of one run takes the place of a name in capitals.
LINES = {
    "recipes": "",
    "plan": "MODEL -r int4-g32",
    "calibrate": "MODEL OUT --data TEXT --length 16 --windows 300 --backend ENGINE",
    "smooth": "MODEL OUT --stats STATS",
    "quantize": "MODEL OUT -r int4-g32",
    "teach": "MODEL OUT --data TEXT --length 16 --backend ENGINE",
    "merge": "MODEL ADAPTER OUT -r int4-g32 --backend ENGINE",
    "eval": "QUANTIZED --data TEXT --length 16 --windows 2 --backend ENGINE",
    "compare": "MODEL -r int4-g32 --data TEXT --length 16 --windows 2 --backend ENGINE --out OUT",
    "diff": "QUANTIZED QUANTIZED --picture OUT",
    "inspect": "QUANTIZED",
    "verify": "QUANTIZED",
    "export": "QUANTIZED OUT --to mlx",
    "import": "MLX OUT",
    "backends": "",
    "parity": "int4-g32 --backend numpy --size 100",
    "warmup": "QUANTIZED --backend ENGINE",
    "demo": "--backend ENGINE --out OUT",
}


@pytest.mark.parametrize("name", LINES)
def test_json_is_all_of_standard_output(place, tmp_path, monkeypatch, name):
    root, engine = place
    words = {"MODEL": root / "model", "QUANTIZED": root / "quantized", "MLX": root / "mlx", "TEXT": root / "text.txt"}
    words |= {
        "ADAPTER": root / "trained.run" / "adapter",
        "STATS": root / "stats",
        "OUT": tmp_path / "out",
        "ENGINE": engine,
    }
    tiny = preset.Preset(64, 1, 128, 2, 32, float_steps=3, float_rate=1e-3, more_steps=2, more_rate=1e-3)
    monkeypatch.setitem(preset.PRESETS, engine, tiny)
    done = RUNNER.invoke(application, [name, *(str(words.get(word, word)) for word in LINES[name].split()), "--json"])
    assert done.exit_code == 0, done.output + repr(done.exception)
    assert json.loads(done.stdout) is not None


def test_train_prints_a_line_of_json_for_each_event(place, tmp_path):
    root, engine = place
    command = ["train", root / "model", tmp_path / "out", "-r", "int4-g32", "--data", root / "text.txt", "--steps", 1]
    command += ["--batch", 1, "--length", 16, "--backend", engine, "--json"]
    done = RUNNER.invoke(application, list(map(str, command)))
    assert [json.loads(line)["event"] for line in done.stdout.splitlines()][-1] == "end"


def test_every_command_is_run_as_json():
    assert COMMANDS.keys() - LINES.keys() == {"train", "mlx-lora"}  # the line above; and tests of its own, with mlx-lm


def test_verify_says_as_json_which_bytes_differ(place, tmp_path):
    shutil.copytree(place[0] / "quantized", tmp_path / "out")
    file = next((tmp_path / "out").glob("*.safetensors"))
    data = np.frombuffer(file.read_bytes(), np.uint8).copy()
    data[-1] ^= 1
    file.write_bytes(data.tobytes())
    done = RUNNER.invoke(application, ["verify", str(tmp_path / "out"), "--json"])
    assert isinstance(done.exception, qkit.VerificationError)
    told = json.loads(done.stdout)
    assert not told["whole"]
    assert told["problems"]
