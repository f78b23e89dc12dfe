"""Losses and divergences of whole models: the same numbers on every engine, from the same tokens, or a refusal."""

import json
import math
import os
import re
import shutil
import subprocess
import sys

import models
import numpy as np
import pytest
from safetensors.numpy import save_file
from tables import BUILDERS
from typer.testing import CliRunner

import qkit
from qkit.cli import progress
from qkit.cli.application import application, main
from qkit.engines.numpy import NumpyBackend
from qkit.evaluation import consecutive, evaluate, measure, open_model, read_alike
from qkit.exchange.export_model import export_mlx
from qkit.exchange.import_model import read_model
from qkit.training.text import read_text

TEXT = bytes(np.random.default_rng(1).integers(0, 256, 400).astype(np.uint8))
ROWS = consecutive(np.frombuffer(TEXT, np.uint8).astype(np.int32), length=20)


class Table(NumpyBackend):
    """An engine whose models are tables of logits [vocabulary, vocabulary]: by a token, those of the next."""

    def logits(self, model, tokens):
        return np.asarray(model, np.float32)[tokens]


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """A small Llama as a float directory, an artifact and a directory for mlx-lm; and a text."""
    place = tmp_path_factory.mktemp("models")
    name = BUILDERS[0]
    qkit.save(models.build(name), place / "float")
    qkit.save(qkit.convert(models.build(name), "int4-g64"), place / "int4")
    export_mlx(read_model(place / "int4"), place / "mlx")
    (place / "text").write_bytes(TEXT)
    return place


def fails(monkeypatch, capsys, *arguments):
    """Exit code and standard error of `qkit ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["qkit", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code, capsys.readouterr().err


@pytest.mark.parametrize("name", BUILDERS)
def test_the_loss_is_that_of_the_engine(name):
    engine, model = qkit.backend(name), models.build(name)
    found = evaluate(engine, model, ROWS)
    assert found.tokens == ROWS[:, 1:].size
    assert found.loss == pytest.approx(engine.loss(model, ROWS), abs=1e-6)  # the engine sums in float32
    assert found.perplexity == math.exp(found.loss)


def test_engines_agree_window_by_window():
    found = [evaluate(qkit.backend(name), models.build(name), ROWS).losses for name in BUILDERS]
    for other in found[1:]:
        assert np.abs(other - found[0]).max() < 1e-5  # two libraries, two orders of summation


def test_divergence_and_agreement_by_hand():
    rows = np.array([[0, 1], [1, 1]], np.int32)
    teacher = np.log([[0.5, 0.5], [0.25, 0.75]])
    model = np.log([[0.5, 0.5], [0.75, 0.25]])
    found = evaluate(Table(), model, rows, teacher=teacher)
    assert found.losses == pytest.approx([math.log(2), math.log(4)], rel=1e-6)  # logits are float32
    assert found.kl == pytest.approx([0, 0.25 * math.log(1 / 3) + 0.75 * math.log(3)], abs=1e-6)
    assert found.agreement.tolist() == [1.0, 0.0]
    assert found.bits_per_byte(2.0) == pytest.approx(2 * 1.5, rel=1e-6)


def test_a_model_is_its_own_teacher_without_divergence():
    model = np.random.default_rng(0).standard_normal((256, 256))
    found = evaluate(Table(), model, ROWS, teacher=model)
    assert found.kl.tolist() == [0.0] * len(ROWS)
    assert found.agreement.tolist() == [1.0] * len(ROWS)


def test_how_much_is_looked_at_together_changes_nothing(monkeypatch):
    table = np.random.default_rng(0).standard_normal((2, 256, 256))
    whole = evaluate(Table(), table[0], ROWS, teacher=table[1])
    monkeypatch.setattr(measure, "LOGITS", 256 * 20 * 3)
    monkeypatch.setattr(measure, "BLOCK", 256 * 7)
    parts = evaluate(Table(), table[0], ROWS, teacher=table[1])
    assert (whole.losses == parts.losses).all()
    assert (whole.kl == parts.kl).all()


def test_every_token_after_the_first_is_predicted_once():
    tokens = np.arange(50, dtype=np.int32)
    rows = consecutive(tokens, length=7)
    assert rows[:, 1:].reshape(-1).tolist() == list(range(1, 50))
    assert consecutive(tokens[:-1], length=7).shape == (6, 8)


def test_fewer_windows_are_taken_over_the_whole_text():
    rows = consecutive(np.arange(1001, dtype=np.int32), length=10, windows=4)
    assert rows[:, 0].tolist() == [0, 250, 500, 750]
    assert len(consecutive(np.arange(1001, dtype=np.int32), length=10, windows=400)) == 100


@pytest.mark.parametrize("name", BUILDERS)
def test_every_layout_that_holds_the_model_has_its_loss(name, directories):
    engine = qkit.backend(name)
    found = {kind: evaluate(engine, open_model(engine, directories / kind), ROWS).loss for kind in ("int4", "mlx")}
    assert found["int4"] == found["mlx"]
    floats = evaluate(engine, open_model(engine, directories / "float"), ROWS)
    assert floats.loss == pytest.approx(evaluate(engine, models.build(name), ROWS).loss, abs=1e-12)  # sums, reordered
    assert floats.loss != found["int4"]


def test_what_another_tool_quantized_in_its_own_way_is_refused(directories, tmp_path):
    shutil.copytree(directories / "float", tmp_path / "foreign")
    file = tmp_path / "foreign" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(qkit.ArtifactError, match="foreign: quantized by gptq"):
        open_model(qkit.backend(BUILDERS[0]), tmp_path / "foreign")


def test_the_command_prints_the_numbers(directories):
    where = [str(directories / name) for name in ("float", "int4", "text")]
    arguments = ["eval", where[0], where[1], "--data", where[2], "--teacher", where[0], "--length", "20"]
    done = CliRunner().invoke(application, [*arguments, "--json"])
    first, second = json.loads(done.stdout)["models"]
    assert (first["kl"], first["agreement"], first["tokens"]) == (0.0, 1.0, 380)
    assert second["kl"] > 0
    assert second["bits_per_byte"] == pytest.approx(second["loss"] / math.log(2))
    table = CliRunner().invoke(application, arguments).stdout
    assert f"{second['loss']:.4f}" in table


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "text is empty"),
        (b"short", "the text has 5 tokens, less than one window of 21"),
        (None, "stands for no file"),
    ],
)
def test_data_that_holds_no_window_is_refused_by_name(directories, tmp_path, monkeypatch, capsys, content, message):
    if content is not None:
        (tmp_path / "text").write_bytes(content)
    arguments = ("eval", directories / "float", "--data", tmp_path / "text", "--length", "20")
    code, error = fails(monkeypatch, capsys, *arguments)
    assert code == 3
    assert message in error


def word_level(folder, words):
    """A directory with a tokenizer of these words, and a vocabulary of as many."""
    tokenizers = pytest.importorskip("tokenizers")
    known = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=words[0]))
    known.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    folder.mkdir()
    known.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"vocab_size": len(words)}))
    return folder


def tokens_of(folder, files):
    config = json.loads((folder / "config.json").read_text())
    return read_text([str(file) for file in files], folder=folder, config=config).tokens


def test_a_tokenizer_of_the_directory_is_used(tmp_path):
    folder = word_level(tmp_path / "model", ["?", "one", "two"])
    (tmp_path / "a").write_text("one two")
    (tmp_path / "b").write_text("two three")
    assert tokens_of(folder, [tmp_path / "a", tmp_path / "b"]).tolist() == [1, 2, 2, 0]


def test_tokens_that_the_model_has_not_are_refused(tmp_path):
    folder = word_level(tmp_path / "model", ["?", "one", "two"])
    (folder / "config.json").write_text(json.dumps({"vocab_size": 2}))
    (tmp_path / "a").write_text("one two")
    with pytest.raises(qkit.QkitError, match="the text has token 2, and the model a vocabulary of 2"):
        tokens_of(folder, [tmp_path / "a"])


def test_an_unknown_tokenizer_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 32000}))
    (tmp_path / "a").write_text("one two")
    with pytest.raises(qkit.QkitError, match=r"has no tokenizer.json, and a vocabulary of 32000"):
        tokens_of(tmp_path, [tmp_path / "a"])
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(qkit.QkitError, match=r"tokenizer\.json: not a tokenizer"):
        tokens_of(tmp_path, [tmp_path / "a"])


def test_text_that_is_no_utf8_is_refused_where_a_tokenizer_wants_letters(tmp_path):
    folder = word_level(tmp_path / "model", ["?", "one"])
    (tmp_path / "a").write_bytes(b"one \xff")
    with pytest.raises(qkit.QkitError, match=r"a is not UTF-8 \(.* at byte 4\)"):
        tokens_of(folder, [tmp_path / "a"])


def test_models_that_read_other_tokens_are_not_compared(tmp_path):
    folders = [word_level(tmp_path / str(n), words) for n, words in enumerate((["?", "a", "b"], ["?", "b", "a"]))]
    for folder in folders:
        save_file({"weight": np.zeros((1, 1), np.float32)}, folder / "model.safetensors")
    (tmp_path / "text").write_text("a b")
    with pytest.raises(qkit.QkitError, match="reads the text as other tokens than"):
        read_alike(folders, [str(tmp_path / "text")])


def test_a_teacher_of_another_vocabulary_is_refused():
    with pytest.raises(qkit.QkitError, match="a vocabulary of 2 and the teacher one of 3"):
        evaluate(Table(), np.zeros((2, 2)), np.zeros((1, 2), np.int32), teacher=np.zeros((3, 3)))


def test_a_loss_that_is_no_number_is_refused():
    with pytest.raises(qkit.QkitError, match="not a number in 1 of 2 windows"):
        evaluate(Table(), [[0, 0], [np.nan, 0]], np.array([[0, 0], [1, 0]], np.int32))


def test_an_engine_of_arrays_alone_is_refused(directories):
    with pytest.raises(qkit.BackendError, match=r"'numpy' cannot .*: it works on arrays only"):
        open_model(qkit.backend("numpy"), directories / "float")


def steps_of(lines, total):
    """The counts in lines such as `4 of 18 windows, 8 windows/s`, which end with the total."""
    found = [re.match(r"([\d,]+) of ([\d,]+) windows, ", line) for line in lines]
    counts = [int(one[1].replace(",", "")) for one in found if one]
    assert {one[2] for one in found if one} == {str(total)}
    return counts


@pytest.mark.parametrize("command", ["eval", "compare"])
def test_progress_counts_every_window_of_every_model(directories, monkeypatch, tmp_path, command):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    monkeypatch.setattr(measure, "LOGITS", 256 * 20 * 4)  # four windows a block
    models = [directories / "float", directories / "int4"]
    shared = ["--data", str(directories / "text"), "--length", "20", "--backend", BUILDERS[0]]
    if command == "eval":
        line, total = ["eval", *map(str, models), "--teacher", str(models[0]), *shared], 2 * len(ROWS)
    else:
        out = [
            "-r",
            "int4-g64",
            "--qat",
            str(models[1]),
            "--out",
            str(tmp_path / "page"),
            "--deploy-recipe",
            "int4-g32",
        ]
        line, total = ["compare", str(models[0]), *shared, *out], 5 * len(ROWS)
    done = CliRunner().invoke(application, line)
    assert done.exit_code == 0, done.output
    counts = steps_of(done.stderr.splitlines(), total)
    assert counts == sorted(counts)
    assert counts[-1] == total
    assert len(counts) > total // 4


def test_progress_is_a_bar_on_a_terminal(directories):
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    line = [
        sys.executable,
        "-m",
        "qkit",
        "eval",
        directories / "int4",
        "--data",
        directories / "text",
        "--length",
        "20",
    ]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    done = subprocess.run([*line, "--backend", BUILDERS[0]], stdout=subprocess.PIPE, stderr=theirs, env=environment)
    os.close(theirs)
    shown = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert done.returncode == 0, shown
    assert f"{len(ROWS)}/{len(ROWS)}" in shown
    assert "int4" in shown
    assert b"\x1b" not in done.stdout
