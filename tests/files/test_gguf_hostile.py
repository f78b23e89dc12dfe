"""A config.json whose numbers GGUF cannot hold, or that the tensors contradict: refused by name, before any work."""

import json

import pytest
from hostile import CONFIG, make_sound

import qkit
from qkit.exchange.export_gguf import export_gguf
from qkit.exchange.import_model import read_model

pytest.importorskip("gguf")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_hidden_layers", 10**9, "num_hidden_layers is 1000000000: want a whole number from 0 to 10,000"),
        ("num_attention_heads", 0, "config.json describes no model"),
        ("num_attention_heads", 2**31 - 1, "and config.json has 2147483647 heads of 32"),
        ("num_key_value_heads", 3, "has .64. rows, and config.json has 3 heads of 32"),
        ("head_dim", 64, "and config.json has 2 heads of 64"),
        ("intermediate_size", [1], "is no feed_forward_length of GGUF"),
        ("vocab_size", None, "is no vocab_size of GGUF"),
        ("rope_parameters", {"rope_theta": "x"}, "config.json describes no model"),
        ("rms_norm_eps", "x", "rms_norm_eps is 'x': want a finite number"),
    ],
)
def test_a_number_that_does_not_go_is_refused(tmp_path, key, value, message):
    make_sound(tmp_path)
    config = {**CONFIG, key: value}
    if key == "num_attention_heads" and not value:
        del config["head_dim"]
    (tmp_path / "float/config.json").write_text(json.dumps(config))
    edit = tmp_path / "float/model.safetensors"
    without_mask(edit)
    with pytest.raises(qkit.ArtifactError, match=message):
        export_gguf(read_model(tmp_path / "float"), tmp_path / "out.gguf")
    assert not list(tmp_path.glob("*out.gguf*"))


def test_a_key_that_is_missing_is_named(tmp_path):
    make_sound(tmp_path)
    (tmp_path / "float/config.json").write_text(json.dumps({k: v for k, v in CONFIG.items() if k != "hidden_size"}))
    without_mask(tmp_path / "float/model.safetensors")
    with pytest.raises(qkit.ArtifactError, match=r"config.json: hidden_size is missing"):
        export_gguf(read_model(tmp_path / "float"), tmp_path / "out.gguf")


def without_mask(file):
    from safetensors.numpy import load_file, save_file

    save_file({name: array for name, array in load_file(file).items() if name != "mask"}, file)
