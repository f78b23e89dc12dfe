"""Sliding windows that mlx-lm ignores: an export says so, where a text may be longer than the window; qkit's engine has them."""

import json
import warnings

import pytest
from checkpoints import quantized
from typer.testing import CliRunner

import qkit
from qkit.cli.application import application
from qkit.formats.mlx_limits import WINDOWLESS

pytest.importorskip("mlx_lm")
SENTENCE = "ignores the sliding window of a {!r}, so that texts of more than 32 tokens give other results"
SLIDING = {
    "mistral": {"sliding_window": 32},
    "mixtral": {"sliding_window": 32},
    "qwen3": {"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 0},
    "qwen2": {"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 0},
}
WHOLE = {
    "mistral": {"sliding_window": 4096},  # longer than any text of the model
    "qwen2": {"sliding_window": 32, "use_sliding_window": False},
    "qwen3": {"sliding_window": None},
    "gemma3_text": {},  # mlx-lm has its window
    "llama": {},
}


def exported(folder, out):
    done = CliRunner().invoke(application, ["export", str(folder), str(out), "--to", "mlx", "--json"])
    assert done.exit_code == 0, (done.output, done.exception)
    return json.loads(done.stdout)["notes"]


@pytest.mark.parametrize("family", SLIDING)
def test_a_window_that_mlx_lm_ignores_is_named(family, tmp_path):
    assert family in WINDOWLESS
    folder = quantized(tmp_path, "int4-g32", family=family, **SLIDING[family])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qkit.load(folder, backend="mlx")
    assert [note for note in exported(folder, tmp_path / "mlx") if SENTENCE.format(family) in note]


@pytest.mark.parametrize("family", WHOLE)
def test_a_window_that_no_text_meets_needs_no_word(family, tmp_path):
    folder = quantized(tmp_path, "int4-g32", family=family, **WHOLE[family])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qkit.load(folder, backend="mlx")
    assert not [note for note in exported(folder, tmp_path / "mlx") if "window" in note]
