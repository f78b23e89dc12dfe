"""Tokenizers that are rebuilt from the keys of GGUF files: the ids of the model's own tokenizer, in transformers too."""

import json
import shutil

import numpy as np
import pytest
from models import make
from small_tokenizers import SPLITS, by_bytes, by_pieces, saved
from tokenizers import Tokenizer, decoders
from typer.testing import CliRunner

import qkit
from qkit.cli.application import application
from qkit.exchange.export_gguf import export_gguf
from qkit.exchange.import_model import read_model, to_artifact
from qkit.formats.gguf_tokenizer import read_vocabulary
from qkit.formats.gguf_tokenizer_files import tokenizer_files

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")
TEXTS = [
    *("the cat and the hat", "Thin 1234 things, I'VE 2 éàü 北京\n\n  a\tb ", " leading", "", "a", "▁ ▁", "caab  cab"),
    *("<|im_start|>user\nthe hat<|im_end|>\n", "x<s>y</s>z", "\n\n\n 12345678 🚀 it's we'Re"),
]
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>{% endfor %}"


def through_gguf(folder, tmp_path, made, **settings):
    """The GGUF file of a small model with this tokenizer, alone in its directory."""
    size = made.get_vocab_size() + 3  # rows of the embedding without a token
    make(folder, "llama", dtype="float32", vocab_size=size)
    source = read_model(saved(folder, made, **settings))
    (tmp_path / "alone").mkdir()
    export_gguf(source, tmp_path / "alone" / "m.gguf", vocabulary=read_vocabulary(folder, source.config))
    return tmp_path / "alone" / "m.gguf"


def imported(file, out):
    """The directory that `qkit import` makes of a file."""
    done = CliRunner().invoke(application, ["import", str(file), str(out)])
    assert done.exit_code == 0, done.output
    return out


def same_ids(made, out):
    """Whether the tokenizer in `out` has the ids of `made`, and its texts, by tokenizers and by transformers."""
    again = Tokenizer.from_file(str(out / "tokenizer.json"))
    auto = transformers.AutoTokenizer.from_pretrained(out)
    for text in TEXTS:
        want = made.encode(text)
        assert again.encode(text).ids == want.ids, text
        assert auto(text)["input_ids"] == want.ids, text
        assert again.decode(want.ids) == made.decode(want.ids), text
    return auto


@pytest.mark.parametrize("name", SPLITS)
def test_merges_of_bytes_come_back(name, tmp_path):
    splits, options = SPLITS[name]
    made = by_bytes(splits, size=300, **options)
    file = through_gguf(tmp_path / "m", tmp_path, made, eos_token="<|im_end|>", chat_template=TEMPLATE)
    auto = same_ids(made, imported(file, tmp_path / "out"))
    assert auto.eos_token == "<|im_end|>"
    assert auto.apply_chat_template([{"content": "hi"}], tokenize=False) == "<|im_start|>hi<|im_end|>"


PIECES = [("a", "b"), ("▁", "a"), ("b", "c"), ("▁a", "b"), ("▁", "ab"), ("ab", "c"), ("a", "bc")]


@pytest.mark.parametrize(
    ("merges", "prefix", "kind"),
    [(PIECES, True, "llama"), (PIECES, False, "llama"), ([("b", "c"), ("a", "b"), ("ab", "c")], False, "gpt2")],
)
def test_pieces_of_sentencepiece_come_back(merges, prefix, kind, tmp_path):
    made = by_pieces(merges, prefix=prefix)
    read = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*read, decoders.Strip(" ", 1, 0)] if prefix else read)
    file = through_gguf(tmp_path / "m", tmp_path, made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    assert fields_of(file)["tokenizer.ggml.model"] == kind
    auto = same_ids(made, imported(file, tmp_path / "out"))
    assert (auto.bos_token, auto.eos_token, auto.unk_token) == ("<s>", "</s>", "<unk>")


def test_a_tokenizer_beside_the_file_is_taken(tmp_path):
    made = by_bytes(SPLITS["qwen2"][0])
    file = through_gguf(tmp_path / "m", tmp_path, made, eos_token="<|im_end|>")
    (file.parent / "tokenizer.json").write_text('{"mine": 1}')
    source = read_model(file)
    assert any("lies beside the file" in note for note in source.notes)
    to_artifact(source, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "tokenizer.json").read_text()) == {"mine": 1}


def fields_of(file):
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tokenizer.ggml.pre": "nobody-s"}, "splits text as 'nobody-s', and qkit knows the splits .*llama-bpe"),
        ({"tokenizer.ggml.model": "t5"}, "is a 't5', and qkit rebuilds those named 'llama' and 'gpt2'"),
        ({"tokenizer.ggml.token_type": [1]}, r"not sound \(ValueError"),
        ({"tokenizer.ggml.merges": None}, r"not sound \(TypeError"),
        ({"tokenizer.ggml.eos_token_id": 10**6}, r"not sound \(IndexError"),
    ],
)
def test_keys_that_describe_no_such_tokenizer_are_refused_by_name(change, said, tmp_path):
    fields = fields_of(through_gguf(tmp_path / "m", tmp_path, by_bytes(SPLITS["qwen2"][0]), eos_token="<|im_end|>"))
    assert tokenizer_files(fields)
    with pytest.raises(qkit.ArtifactError, match=said):
        tokenizer_files({**fields, **change})


def test_a_file_without_a_tokenizer_says_so(tmp_path):
    source = read_model(make(tmp_path / "m", "llama", dtype="float32"))
    export_gguf(source, tmp_path / "m.gguf")
    assert any("has no tokenizer" in note for note in read_model(tmp_path / "m.gguf").notes)


def test_transformers_opens_the_directory_and_computes_the_logits_of_the_original(tmp_path):
    made = by_bytes(SPLITS["llama-bpe"][0], ignore_merges=True)
    file = through_gguf(tmp_path / "m", tmp_path, made, eos_token="<|im_end|>")
    out = imported(file, tmp_path / "out")
    shutil.rmtree(file.parent)
    first, second = (transformers.AutoModelForCausalLM.from_pretrained(one) for one in (tmp_path / "m", out))
    ids = transformers.AutoTokenizer.from_pretrained(out)("the hat", return_tensors="pt")
    assert np.array_equal(first(**ids).logits.detach(), second(**ids).logits.detach())
