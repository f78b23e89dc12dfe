"""Output heads: files, torch and MLX agree on which layers they are, so that a recipe leaves the same ones in float."""

from dataclasses import replace

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("mlx_lm")

from catalogue import COMMON, FAMILIES, make
from openings import in_mlx_lm_at_all

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
