"""Tokenizers from strangers: a panic is a line that names the file, and a pattern that never ends is stopped."""

import json
import os

import pytest

import qkit
from qkit.training import tokenizer

pytest.importorskip("tokenizers")
WORDS = {"type": "WordLevel", "vocab": {"[UNK]": 0, "a": 1}, "unk_token": "[UNK]"}


def split(pattern):
    return {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}}


@pytest.fixture
def write(tmp_path):
    def write(**keys):
        file = tmp_path / "tokenizer.json"
        whole = {"version": "1.0", "added_tokens": [], "pre_tokenizer": None, "model": WORDS}
        file.write_text(json.dumps({**whole, **keys}))
        return file

    return write


MERGES = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"], "continuing_subword_prefix": "éé"}


@pytest.mark.parametrize(
    "keys",
    [{"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, {"model": MERGES}, split("(x+x+)+y")],
    ids=["characters", "merges", "pattern"],
)
def test_a_panic_is_a_line_that_names_the_file(write, keys, capfd):
    file = write(**keys)
    with pytest.raises(
        qkit.RunError, match=r"tokenizer\.json: not a tokenizer that tokenizers opens \(.*PanicException"
    ):
        tokenizer.encode(["x" * 5000], file)
    assert capfd.readouterr() == ("", "")


def test_a_pattern_that_never_ends_is_stopped(write, monkeypatch):
    """Each of its matches stays below the library's own limit of retries; there are a hundred thousand."""
    monkeypatch.setattr(tokenizer, "SECONDS", 1.0)
    monkeypatch.setattr(tokenizer, "RATE", 1e9)
    file = write(**split("(x+x+)+y"))
    with pytest.raises(qkit.RunError, match=r"tokenizer\.json did not end within 1 seconds"):
        tokenizer.encode([("x" * 18 + " ") * 5000], file)


def test_a_pipe_is_no_tokenizer(tmp_path):
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(qkit.ArtifactError, match="is a named pipe"):
        tokenizer.encode(["a"], tmp_path / "tokenizer.json")


def test_no_module_of_the_current_folder_is_run(write, tmp_path, monkeypatch):
    for name in ("tokenizers", "array", "json"):
        (tmp_path / f"{name}.py").write_text("import pathlib; pathlib.Path('ran').touch()")
    monkeypatch.chdir(tmp_path)
    (tokens,) = tokenizer.encode(["a"], write())
    assert tokens.tolist() == [1]
    assert not (tmp_path / "ran").exists()


def test_every_text_has_its_own_tokens_and_none_is_cut(write):
    whitespace = {"pre_tokenizer": {"type": "Whitespace"}}
    cut = {"truncation": {"max_length": 1, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}}
    found = tokenizer.encode(["a a a", "", "b a"], write(**whitespace, **cut))
    assert [tokens.tolist() for tokens in found] == [[1, 1, 1], [], [0, 1]]
