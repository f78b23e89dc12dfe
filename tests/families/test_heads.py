"""Output heads: files, torch and MLX agree on which layers they are, so that a recipe leaves the same ones in float."""

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("mlx_lm")

from catalogue import COMMON, FAMILIES, make
from openings import in_mlx_lm_at_all, run

import qkit
from qkit.artifact.config import read_config
from qkit.artifact.families import layer_of, output_name
from qkit.artifact.known import model_path
from qkit.engines.layer import Layer
from qkit.storage.read import read_folder

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own, about small models


def mark(name):
    return pytest.param(name, marks=() if FAMILIES[name].quick else pytest.mark.families)


@pytest.mark.parametrize("name", [mark(name) for name in COMMON])
def test_files_and_engines_agree_on_heads(name, tmp_path):
    model = make(FAMILIES[name], tmp_path)
    config = read_config(tmp_path)
    found = [layer for layer in qkit.backend("torchao").layers(model) if layer.head and layer.kind == "linear"]
    tied = {layer.path for layer in found if layer.tied}
    on_torch = {layer.path for layer in found} - tied
    slots = [one.slot for one in read_folder(tmp_path)[0].values()]
    layers = [layer_of(replace(slot, name=output_name(slot.name, config)), config) for slot in slots]
    in_files = {model_path(one.path, config) for one in layers if isinstance(one, Layer) and one.head}
    assert in_files - tied == on_torch
    if not in_mlx_lm_at_all(config):
        return
    try:
        opened = qkit.backend("mlx").build(config)
    except qkit.QkitError:
        return
    on_mlx = {layer.path.removeprefix("language_model.") for layer in qkit.backend("mlx").layers(opened) if layer.head}
    assert on_mlx - tied == on_torch


@pytest.mark.parametrize("name", ["CamembertForMaskedLM", "RoBERTa"])
def test_an_embedding_owns_its_tied_head_in_whatever_order_a_model_has_both(name, tmp_path):
    model = make(FAMILIES[name], tmp_path / "in")
    model = qkit.prepare(model, "int4-g32-all")
    logits = [run(model)]
    model = qkit.convert(model)
    logits.append(run(model))
    owners = {layer.path: layer.tied for layer in qkit.backend("torchao").layers(model) if layer.kind == "embedding"}
    assert owners["roberta.embeddings.word_embeddings"] == ""
    qkit.save(model, tmp_path / "out")
    logits.append(run(qkit.load(tmp_path / "out", backend="torchao")))
    assert all(np.array_equal(logits[0], one) for one in logits)
