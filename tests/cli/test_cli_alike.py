"""The commands are alike: names of what they take, words for what they share, and how each of them fails."""

import sys
from pathlib import Path

import pytest
import typer

from qkit.cli.application import application, main

COMMANDS = typer.main.get_command(application).commands
SHARED = {
    "--recipe": "A recipe, an alias or a TOML file",
    "--data": "A text file, or a shell pattern in quotes. Repeat for more.",
    "--json": "Print JSON for machines",
    "--length": "Tokens ",
    "--weights-only": "Drop the quantization of inputs and outputs",
    "--backend": "The engine. ",
}
NOWHERE = "nowhere/at/all"

#: Arguments with which a command comes as far as what is not there; `demo` and `backends` read nothing that could be missing.
MISSING = {
    "recipes": ("no-such-recipe",),
    "plan": (NOWHERE, "-r", "int4-g64"),
    "quantize": (NOWHERE, "out", "-r", "int4-g64"),
    "inspect": (NOWHERE,),
    "verify": (NOWHERE,),
    "warmup": (NOWHERE,),
    "parity": ("no-such-recipe",),
    "train": (NOWHERE, "out", "-r", "int4-g64", "--data", "text.txt"),
    "teach": (NOWHERE, "out", "--data", "text.txt"),
    "demo": ("-r", "no-such-recipe"),
    "backends": ("--probe", "--device", "abacus"),
    "export": (NOWHERE, "out", "--to", "dense"),
    "import": (NOWHERE, "out"),
    "diff": (NOWHERE, NOWHERE),
    "merge": (NOWHERE, NOWHERE, "out"),
    "eval": (NOWHERE, "--data", "text.txt"),
    "compare": (NOWHERE, "-r", "int4-g64", "--data", "text.txt", "--out", "out"),
    "mlx-lora": (NOWHERE, "out", "-r", "int4-g64"),
    "calibrate": (NOWHERE, "out", "--data", "text.txt"),
    "smooth": (NOWHERE, "out", "--stats", NOWHERE),
}


def fails(monkeypatch, capsys, *arguments):
    """Exit code, standard output and standard error of `qkit ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["qkit", *arguments])
    monkeypatch.delenv("QKIT_DEBUG", raising=False)
    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code or 0, *capsys.readouterr()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_argument_has_a_name_in_capitals_and_everything_has_its_help(name):
    command = COMMANDS[name]
    assert command.help.strip().endswith(".")
    for one in command.params:
        assert one.help, one.name
        if one.param_type_name == "argument":
            assert one.metavar, one.name
            assert one.metavar.isupper(), one.metavar
        else:
            assert one.opts[0].startswith("--"), one.opts


@pytest.mark.parametrize("option", SHARED)
def test_an_option_that_commands_share_is_the_same_to_all(option):
    found = {
        (name, one.help, tuple(one.opts))
        for name, command in COMMANDS.items()
        for one in command.params
        if option in one.opts
    }
    assert len(found) > 1
    for name, words, names in found:
        if (name, option) not in {("parity", "--backend"), ("train", "--data")}:  # which take more than the others
            assert words.startswith(SHARED[option]), name
        assert names == (("--recipe", "-r") if option == "--recipe" else (option,)), name


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_printed_and_is_a_success(monkeypatch, capsys, name):
    code, out, err = fails(monkeypatch, capsys, name, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"Usage: qkit {name} ")


@pytest.mark.parametrize("name", COMMANDS)
def test_wrong_usage_is_2_with_the_way_out(monkeypatch, capsys, name):
    code, out, err = fails(monkeypatch, capsys, name, "--no-such-option")
    assert (code, out) == (2, "")
    assert f"Usage: qkit {name} " in err
    unknown = (
        "Missing argument 'OUT'" if name == "mlx-lora" else "No such option: --no-such-option"
    )  # it passes options on
    assert f"Error: {unknown}" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("name", [name for name in COMMANDS if any(one.required for one in COMMANDS[name].params)])
def test_nothing_given_is_wrong_usage_too(monkeypatch, capsys, name):
    code, out, err = fails(monkeypatch, capsys, name)
    assert (code, out) == (2, "")
    assert "Error: Missing " in err


def test_every_command_is_tried():
    assert COMMANDS.keys() == MISSING.keys()


@pytest.mark.parametrize("name", MISSING)
def test_what_is_not_there_is_one_sentence_that_names_it(monkeypatch, capsys, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("a text")
    code, out, err = fails(monkeypatch, capsys, name, *MISSING[name])
    assert (code, out) == (5 if name in ("plan", "quantize") else 3, ""), (
        err
    )  # their own code for a part that is missing
    assert err.startswith("qkit: ")
    assert err.count("\n") == 1
    assert any(word in err for word in (NOWHERE, "no-such-recipe", "abacus"))
    assert [entry.name for entry in tmp_path.iterdir()] == ["text.txt"]
