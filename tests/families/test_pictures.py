"""Models of pictures and text, quantized by README's command and opened with pictures by transformers and by qkit."""

from dataclasses import replace

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import transformers
from catalogue import FAMILIES, Family, make
from gate import TOLERANCE

import qkit
from qkit.cli.application import application

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own, about small models
PICTURE = 150  #: the token that stands for a part of a picture
COMPANIONS = ("preprocessor_config.json", "processor_config.json", "chat_template.jinja")
SIZES = {"Gemma 3": {"mm_tokens_per_image": 4}, "PaliGemma": {"projection_dim": 64}}


def given(name):
    """Inputs with one picture of 32 x 32 in patches of 16, by the names that processors give them."""
    drawing = torch.Generator().manual_seed(1)
    if name == "Qwen2-VL":  # four patches of two frames, merged into one token
        tokens = torch.tensor([[1, 152, PICTURE, 153, 9, 3, 44]])
        pixels = torch.randn(4, 3 * 2 * 16 * 16, generator=drawing)
        more = {"image_grid_thw": torch.tensor([[1, 2, 2]]), "mm_token_type_ids": (tokens == PICTURE).long()}
    elif name == "Mllama":  # one tile of four; every token sees it
        tokens, tiles = torch.tensor([[1, 5, PICTURE, 9, 3, 44]]), 4
        pixels = torch.randn(1, 1, tiles, 3, 32, 32, generator=drawing)
        more = {
            "aspect_ratio_ids": torch.tensor([[1]]),
            "aspect_ratio_mask": torch.tensor([[[1, 0, 0, 0]]]),
            "cross_attention_mask": torch.tensor([1, 0, 0, 0]).expand(1, 6, 1, tiles),
        }
    elif name in ("Idefics 3", "SmolVLM"):  # four patches, shuffled into one token
        tokens, more = torch.tensor([[1, 5, PICTURE, 9, 3, 44]]), {}
        pixels = torch.randn(1, 1, 3, 32, 32, generator=drawing)
    else:
        tokens = torch.tensor([[1, 5, *[PICTURE] * 4, 9, 3, 44]])
        pixels = torch.randn(1, 3, 32, 32, generator=drawing)
        more = {} if name == "Llava" else {"token_type_ids": torch.zeros_like(tokens)}
    return {"input_ids": tokens, "pixel_values": pixels, **more}


@pytest.mark.parametrize(
    "name",
    [
        "Llava",
        *(
            pytest.param(one, marks=pytest.mark.families)
            for one in ("Qwen2-VL", "PaliGemma", "Gemma 3", "Mllama", "Idefics 3", "SmolVLM")
        ),
    ],
)
def test_logits_of_a_picture_are_those_of_the_values(name, tmp_path):
    family: Family = replace(FAMILIES[name], sizes={**FAMILIES[name].sizes, **SIZES.get(name, {})})
    make(family, tmp_path / "in")
    for file in COMPANIONS:
        (tmp_path / "in" / file).write_text("{}")
    application(["quantize", str(tmp_path / "in"), str(tmp_path / "out"), "-r", "int4-g32"], standalone_mode=False)
    application(["export", str(tmp_path / "out"), str(tmp_path / "dense"), "--to", "dense"], standalone_mode=False)
    assert all((tmp_path / "out" / file).read_text() == "{}" for file in COMPANIONS)
    reader = transformers.AutoModelForImageTextToText
    with torch.no_grad():
        want = reader.from_pretrained(tmp_path / "dense", dtype="auto").eval()(**given(name)).logits
        for opened in (
            reader.from_pretrained(tmp_path / "out", dtype="auto"),
            qkit.load(tmp_path / "out", backend="torchao"),
        ):
            off = (opened.eval()(**given(name)).logits - want).abs().max() / want.abs().max()
            assert off <= TOLERANCE["transformers"]  # sums depend on where a weight lies in memory
        blind = reader.from_pretrained(tmp_path / "dense", dtype="auto").eval()
        other = {**given(name), "pixel_values": -given(name)["pixel_values"]}
        assert (blind(**other).logits - want).abs().max() > 1e-2 * want.abs().max()  # the picture is seen
