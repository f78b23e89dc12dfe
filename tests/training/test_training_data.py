"""The data of a step: text, tokens, sequences and their order; and learning rates."""

import json

import numpy as np
import pytest

import qkit
from qkit.training.data import read_bytes, sequences, split
from qkit.training.rates import rate, warmup_steps
from qkit.training.text import read_text

BYTES = {"vocab_size": 256}


def test_sequences_predict_every_token_once():
    data = sequences(np.arange(11, dtype=np.int32), length=5, name="text")
    assert data.all.tolist() == [[0, 1, 2, 3, 4, 5], [5, 6, 7, 8, 9, 10]]


def test_a_text_shorter_than_one_sequence_is_refused_by_name():
    with pytest.raises(qkit.RunError, match=r"a\.txt has 5 tokens, less than one sequence of 6"):
        sequences(np.arange(5, dtype=np.int32), length=5, name="a.txt")


def test_the_order_is_a_function_of_seed_and_step_and_sees_everything_once_an_epoch():
    data = sequences(np.arange(71, dtype=np.int32), length=5, name="text")
    steps = [data.numbers(step, size=4, seed=3) for step in range(1, 15)]
    assert sorted(np.concatenate(steps[:7])[:14]) == sorted(np.concatenate(steps)[14:28]) == list(range(14))
    assert np.concatenate(steps)[:14].tolist() != np.concatenate(steps)[14:28].tolist()
    assert [step.tolist() for step in steps[::-1]] == [
        data.numbers(step, size=4, seed=3).tolist() for step in range(14, 0, -1)
    ]
    assert steps[0].tolist() != data.numbers(1, size=4, seed=4).tolist()


def test_what_is_held_out_is_not_trained_on():
    data, unseen = split(sequences(np.arange(501, dtype=np.int32), length=5, name="text"))
    assert (len(data), len(unseen)) == (95, 5)
    assert not set(data.chosen) & set(unseen.chosen)
    few, none = split(sequences(np.arange(96, dtype=np.int32), length=5, name="text"))
    assert (len(few), len(none)) == (19, 0)


def test_rates():
    shapes = {
        shape: [rate(s, peak=1.0, steps=4, warmup=2, shape=shape) for s in range(1, 5)]
        for shape in ("linear", "constant")
    }
    assert shapes == {"linear": [0.5, 1.0, 1 - 1 / 3, 1 - 2 / 3], "constant": [0.5, 1.0, 1.0, 1.0]}
    assert rate(3, peak=1.0, steps=5, warmup=1, shape="cosine") == pytest.approx(0.5 * (1 + np.cos(np.pi * 2 / 5)))
    assert rate(1, peak=1.0, steps=5, warmup=0, shape="linear") == pytest.approx(1 - 1 / 6)
    assert [warmup_steps(warmup, 1000) for warmup in (0.03, 0.0, 20, 2000)] == [30, 0, 20, 1000]


def test_bytes_are_tokens_where_the_vocabulary_is_of_bytes(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\x00\xff")
    (tmp_path / "b.txt").write_bytes(b"A")
    text = read_text([str(tmp_path / "*.txt"), str(tmp_path / "a.txt")], folder=tmp_path, config=BYTES)
    assert (text.tokens.tolist(), text.kind) == ([0, 255, 65], "bytes")


def tokenizer(folder, size):
    words = {f"w{i}": i for i in range(size - 1)}
    model = {"type": "WordLevel", "vocab": {**words, "?": size - 1}, "unk_token": "?"}
    whole = {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"}, "model": model}
    whole |= dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder"))
    (folder / "tokenizer.json").write_text(json.dumps(whole))


def test_a_tokenizer_of_the_directory_makes_the_tokens(tmp_path):
    pytest.importorskip("tokenizers")
    tokenizer(tmp_path, 5)
    (tmp_path / "a.txt").write_text("w3 w0 other w2")
    text = read_text([str(tmp_path / "a.txt")], folder=tmp_path, config={"vocab_size": 5})
    assert (text.tokens.tolist(), text.kind) == ([3, 0, 4, 2], "tokenizer.json")


def test_a_tokenizer_sees_the_ends_of_lines_that_the_file_has(tmp_path):
    pytest.importorskip("tokenizers")
    tokenizer(tmp_path, 5)
    whole = json.loads((tmp_path / "tokenizer.json").read_text())
    whole["model"]["vocab"] = {"a\r\n": 0, "a\n": 1, "?": 2}
    (tmp_path / "tokenizer.json").write_text(json.dumps({**whole, "pre_tokenizer": None}))
    (tmp_path / "a.txt").write_bytes(b"a\r\n")
    assert read_text([str(tmp_path / "a.txt")], folder=tmp_path, config={"vocab_size": 5}).tokens.tolist() == [0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"size": 9, "text": b"w1 w7"},
            r"the text has token 7, and the model a vocabulary of 5: put the tokenizer",
        ),
        ({"size": 5, "text": b" \n"}, r"there are no tokens in .*a\.txt"),
        ({"broken": "{}"}, r"tokenizer\.json: not a tokenizer that tokenizers opens"),
        ({"other": "tokenizer.model"}, r"tokenizer\.model is no tokenizer that qkit opens"),
        ({}, r"no tokenizer\.json, and a vocabulary of 5 is not one of bytes"),
        ({"size": 5, "text": b"\xff\xfe"}, r"a\.txt is not UTF-8"),
        ({"size": 5, "text": b""}, r"a\.txt is empty"),
        ({"size": 5, "data": "none*.txt"}, r"none\*\.txt' stands for no file"),
    ],
)
def test_text_that_does_not_fit_is_refused_by_name(tmp_path, given, message):
    pytest.importorskip("tokenizers")
    (tmp_path / "a.txt").write_bytes(given.get("text", b"w1 w2"))
    if "size" in given:
        tokenizer(tmp_path, given["size"])
    if "broken" in given:
        (tmp_path / "tokenizer.json").write_text(given["broken"])
    if "other" in given:
        (tmp_path / given["other"]).write_bytes(b"x")
    with pytest.raises(qkit.RunError, match=message):
        read_text([str(tmp_path / given.get("data", "a.txt"))], folder=tmp_path, config={"vocab_size": 5})


def test_nothing_to_read_is_refused():
    with pytest.raises(qkit.QkitError, match="no text to train on"):
        read_bytes([], limit=9)
