"""Tokenizers in GGUF: the kind, the tokens, the special ids and the templates, or a refusal by name. Without llama.cpp."""

import json

import numpy as np
import pytest
from checkpoints import quantized
from models import make
from safetensors.numpy import load_file, save_file
from small_tokenizers import BYTE_LEVEL, SPLITS, by_bytes, by_pieces, saved
from tokenizers import AddedToken, Regex, pre_tokenizers
from typer.testing import CliRunner

import qkit
from qkit.cli.application import application
from qkit.exchange.import_model import read_model
from qkit.formats.chat_template import unsupported
from qkit.formats.gguf import SIZES
from qkit.formats.gguf_hashes import HASHES
from qkit.formats.gguf_splits import PATTERNS
from qkit.formats.gguf_tokenizer import read_vocabulary
from qkit.formats.packed import unpack

gguf = pytest.importorskip("gguf")


@pytest.mark.parametrize("name", SPLITS)
def test_splits_are_known_by_their_steps_though_the_tokens_are_of_nobody_s_hash(name, tmp_path):
    splits, options = SPLITS[name]
    found = read_vocabulary(saved(tmp_path, by_bytes(splits, **options), eos_token="<|im_end|>"), {})
    assert (found.model, found.split) == ("gpt2", name)
    assert found.ids["eos"] == len(found.pieces) - 1
    assert [piece.text for piece in found.pieces[-2:]] == ["<|im_start|>", "<|im_end|>"]


def test_splits_of_transformers_own_tokenizers_are_known():
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    assert PATTERNS[PRETOKENIZE_REGEX, False] == "qwen2"


@pytest.mark.parametrize(
    "splits",
    [
        pre_tokenizers.Whitespace(),
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\d"), "isolated"), BYTE_LEVEL]),
    ],
    ids=str,
)
def test_splits_that_llama_cpp_lacks_are_refused_with_the_list(splits, tmp_path):
    folder = saved(tmp_path, by_bytes(splits))
    with pytest.raises(
        qkit.ArtifactError, match=r"does not know how .* splits .*llama-bpe.*qwen2.*--without-tokenizer"
    ):
        read_vocabulary(folder, {})


def test_hashes_are_sha256():
    assert all(len(digest) == 64 and set(digest) <= set("0123456789abcdef") for digest in HASHES)
    assert {"llama-bpe", "qwen2", "gpt-2", "deepseek-v3", "tekken"} <= set(HASHES.values())


def test_scores_follow_the_merges_where_all_pairs_are_merges(tmp_path):
    merges = [("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc")]
    found = read_vocabulary(saved(tmp_path, by_pieces(merges, prefix=True), bos_token="<s>", eos_token="</s>"), {})
    assert (found.model, found.split, found.merges) == ("llama", "default", ())
    scores = {piece.text: piece.score for piece in found.pieces}
    assert scores["ab"] > scores["bc"] > scores["abc"]
    kinds = {piece.text: piece.kind for piece in found.pieces}
    assert (kinds["<unk>"], kinds["<s>"], kinds["<0x41>"], kinds["ab"]) == (2, 3, 6, 1)
    assert found.adds == {"bos": True, "eos": False, "space_prefix": True}
    assert found.ids == {"bos": 1, "eos": 2}


def test_merges_that_scores_cannot_say_stay_merges(tmp_path):
    found = read_vocabulary(saved(tmp_path, by_pieces([("b", "c"), ("a", "b"), ("ab", "c")]), bos_token="<s>"), {})
    assert (found.model, found.split, found.merges) == ("gpt2", "gemma4", ("b c", "a b", "ab c"))


def test_merges_across_lines_are_refused(tmp_path):
    made = by_pieces([("b", "\n"), ("a", "b"), ("ab", "\n")], letters="abc▁\n")
    with pytest.raises(qkit.ArtifactError, match="within lines only"):
        read_vocabulary(saved(tmp_path, made, bos_token="<s>"), {})


def test_the_file_has_a_token_for_each_row_of_the_embedding(tmp_path):
    folder = saved(tmp_path, by_bytes(SPLITS["gpt-2"][0]))
    found = read_vocabulary(folder, {"vocab_size": 320})
    assert len(found.pieces) == 320
    assert [piece.text for piece in found.pieces[261:263]] == ["<|im_end|>", "[PAD262]"]
    with pytest.raises(qkit.ArtifactError, match="tokenizer has 262 tokens, and the embedding 250 rows"):
        read_vocabulary(folder, {"vocab_size": 250})


def test_every_token_that_ends_an_answer_is_in_the_file_or_known_to_llama_cpp(tmp_path):
    folder = saved(tmp_path, by_bytes(SPLITS["gpt-2"][0]), eos_token="<|im_end|>")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [261, 7, 8, 9]}))
    found = read_vocabulary(folder, {})
    assert found.ids == {"eos": 261, "eot": 7, "eom": 8}
    assert any("and not *" in note for note in found.notes)


@pytest.mark.parametrize("special", [False, True])
def test_an_ordinary_token_that_llama_cpp_takes_for_an_end_is_named(special, tmp_path):
    made = by_bytes(SPLITS["qwen2"][0])
    made.add_tokens([AddedToken("</s>", special=special)])
    found = read_vocabulary(saved(tmp_path, made, eos_token="<|im_end|>"), {})
    assert any(note.startswith("</s>: llama.cpp takes these letters") for note in found.notes) == (not special)


@pytest.mark.parametrize(
    ("template", "lacking"),
    [
        ("{% for m in messages %}{{ m['content'] | trim }}{% endfor %}", []),
        ("{% generation %}{{ x | tojson(indent=2) }}{% endgeneration %}", []),
        ("{{ x | urlize }}", ["filter 'urlize'"]),
        ("{% do x.append(1) %}", ["statement 'do'"]),
        ("{% if x is escaped %}{{ x.zfill(3) }}{% endif %}", ["test 'escaped'", "method 'zfill'"]),
        ("{% if %}", ["line 1"]),
        ("{{ 7 // 2 }}{{ 2 ** 3 }}{{ '%d' % 3 }}", ["operator '//'", "operator '**'", "operator '%' of a text"]),
        ("{{ cycler(1) }}{{ range(3) }}{{ f(*x) }}", ["function 'cycler'", "a call with * or **"]),
        ("{{ '%s' | format(1) }}{{ x | replace('a', 'b', 1) }}", ["filter 'format'", "'replace' with a count"]),
        ("{{ x | select('odd') }}{{ x | selectattr('a', 'equalto', 1) }}", ["filter 'select' by the name"]),
        ("{{ x | map('upper') | join }}{{ x | map(attribute='a') }}", ["filter 'map' by the name"]),
        ("{{ ', '.join(x) }}{{ x.startswith(('a', 'b')) }}", ["method 'join'", "method 'startswith' of several"]),
        ("{% macro f() %}{{ varargs }}{% endmacro %}", ["'varargs' of a macro"]),
        (
            "{% raw %}x{% endraw %}{%+ if 1 < 2 < 3 %}{% endif %}",
            ["statement 'raw'", "mark '{%+'", "comparisons in a chain"],
        ),
        (
            "{% for x, (y, z) in m recursive %}{{ loop(x) }}{% endfor %}",
            ["a recursive loop", "a loop that unpacks in depth"],
        ),
        ("{% for x in m %}{{ loop.cycle(1, 2) }}{{ loop.nextitem }}{% endfor %}", ["'loop.cycle'"]),
        ("{{ '\\u2581' }}{{ '\\n' }}{{ 1e3 }}", [r"escape '\\u'", "number 1e3"]),
        ("{{ x | tojson(sort_keys=True, ensure_ascii=False) }}", ["'tojson' with sort_keys"]),
        ("{% set a | upper %}x{% endset %}{% set b %}{% endset %}", ["a filter of 'set'"]),
    ],
)
def test_features_that_llama_cpp_lacks_are_named(template, lacking):
    found = unsupported(template)
    assert len(found) == len(lacking)
    assert all(one in text for one, text in zip(sorted(lacking), sorted(found), strict=True))


def test_templates_are_in_the_file_and_the_command_warns(tmp_path):
    folder = quantized(tmp_path, "int4-g32")
    (folder / "chat_template.jinja").write_text("{{ messages | urlize }}")
    done = CliRunner().invoke(application, ["export", str(folder), str(tmp_path / "m.gguf"), "--to", "gguf"])
    assert done.exit_code == 0
    assert "chat template 'default' uses filter 'urlize', which llama.cpp lacks" in done.output
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == "{{ messages | urlize }}"


def command(*words):
    return CliRunner().invoke(application, [str(word) for word in words])


def test_a_model_without_tokenizer_is_refused_with_the_way_out(tmp_path):
    for file in make(tmp_path / "float", "llama").glob("tokenizer*"):
        file.unlink()
    assert command("quantize", tmp_path / "float", tmp_path / "out", "--recipe", "int4-g32").exit_code == 0
    words = ["export", tmp_path / "out", tmp_path / "m.gguf", "--to", "gguf"]
    refused = command(*words)
    assert isinstance(refused.exception, qkit.ArtifactError)
    assert "no tokenizer.json" in str(refused.exception)
    assert "--without-tokenizer" in str(refused.exception)
    done = command(*words, "--without-tokenizer")
    assert done.exit_code == 0
    assert "takes no text" in done.output


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{}",
        '{"model": 3}',
        '{"model": {"type": "BPE", "vocab": [], "merges": []}}',
        '{"model": {"type": "Unigram", "vocab": []}}',
        '{"added_tokens": [{"id": -1, "content": "a"}], "model": {"type": "BPE", "vocab": {}, "merges": []}}',
    ],
)
def test_tokenizers_that_are_none_are_refused_by_name(text, tmp_path):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(qkit.ArtifactError, match=tmp_path.name):
        read_vocabulary(tmp_path, {})


def test_weights_without_a_type_fall_back_one_by_one(tmp_path):
    file = make(tmp_path / "float", "llama") / "model.safetensors"
    tensors = dict(load_file(file))
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name][0] *= 2.0**-40  # one neuron, almost dead: its scales are below float16
    save_file(tensors, file, metadata={"format": "pt"})
    assert command("quantize", tmp_path / "float", tmp_path / "out", "--recipe", "int4-g32").exit_code == 0
    words = ["export", tmp_path / "out", tmp_path / "m.gguf", "--to", "gguf"]
    reason = "4 of 1024 scales are no float16, which Q4_0 holds"
    assert f"{name}: {reason}: export --to dense, or --fallback f16" in str(command(*words).exception)
    done = command(*words, "--fallback", "f16")
    assert done.exit_code == 0
    assert f"{name} as float16: {reason}" in done.output
    assert "13 as Q4_0" in done.output
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    kinds = [found[f"blk.{i}.ffn_up.weight"].tensor_type.name for i in range(2)]
    assert kinds == ["F16", "Q4_0"]
    held = read_model(tmp_path / "out").weights[name.removesuffix(".weight")].read()
    values = qkit.dequantize(unpack(held))
    assert np.array_equal(found["blk.0.ffn_up.weight"].data.reshape(values.shape), values.astype(np.float16))


def test_a_width_that_a_block_does_not_divide_falls_back_and_the_plan_counts_it(tmp_path):
    make(tmp_path / "float", "llama", intermediate_size=272)
    planned = command("plan", tmp_path / "float", "--recipe", "int8-row", "--json")
    told = json.loads(planned.output)["gguf"]
    assert set(told["fallbacks"]) == {f"model.layers.{i}.mlp.down_proj.weight" for i in range(2)}
    assert told["kinds"] == {"Q8_0": 12}
    assert command("quantize", tmp_path / "float", tmp_path / "out", "--recipe", "int8-row").exit_code == 0
    done = command("export", tmp_path / "out", tmp_path / "m.gguf", "--to", "gguf", "--fallback", "f16")
    assert done.exit_code == 0
    tensors = gguf.GGUFReader(tmp_path / "m.gguf").tensors
    assert {t.tensor_type.name for t in tensors if "ffn_down" in t.name} == {"F16"}
    assert sum(t.n_bytes for t in tensors) == told["nbytes"]


def test_sizes_of_blocks_are_those_of_gguf():
    sizes = {kind: gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]] for kind in SIZES}
    assert {kind: 64 // numbers * nbytes for kind, (numbers, nbytes) in sizes.items()} == SIZES
