"""`qkit plan` on GGUF: types, bytes, weights that need floats, and options that the export needs, are those of the export."""

import json

import gguf
import numpy as np
import pytest
from checkpoints import quantized
from models import make

import qkit
from qkit.exchange.export_gguf import export_gguf
from qkit.exchange.import_model import read_model
from qkit.exchange.write_model import check_weights_only, weights_only
from qkit.formats.packed import unpack
from qkit.streaming.gguf_plan import gguf_plan
from qkit.streaming.plan import make_plan

RECIPES = ["int3-g64", "int4-g32-all", "mxfp4", "nvfp4", "nvfp4-a16", "fp8", "float8-dynamic-act-float8-weight"]
RECIPES += ["int8-dynamic-act-int8-weight", "int8-g64-all"]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "mixtral"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_plan_says_how_the_export_goes(recipe, family, tmp_path):
    source = make(tmp_path / "model", family)
    planned = gguf_plan(
        make_plan(source, qkit.recipe(recipe)), json.loads((source / "config.json").read_text(encoding="utf-8"))
    )
    made = read_model(quantized(tmp_path / "made", recipe, family=family))
    if more := planned.needs_weights_only:
        assert f"with --weights-only, since {more} quantizes more" in str(planned)
        with pytest.raises(qkit.ArtifactError, match=rf"{more}\S* quantizes its"):
            check_weights_only(made, made.weights)
    else:
        check_weights_only(made, made.weights)
    out = tmp_path / "model.gguf"
    if planned.fallbacks:
        with pytest.raises(qkit.ArtifactError, match="--fallback f16"):
            export_gguf(weights_only(made), out)
    done = export_gguf(weights_only(made), out, fallback="f16" if planned.fallbacks else None)
    assert dict(planned.kinds) == dict(done.kinds)
    assert set(planned.fallbacks.values()) == set(done.fallbacks.values())
    for one in gguf.GGUFReader(out).tensors:
        assert np.isfinite(gguf.dequantize(one.data, one.tensor_type)).all()
    tensors = [one for one in gguf.GGUFReader(out).tensors if not one.name.endswith(".scale")]
    assert planned.nbytes == sum(one.n_bytes for one in tensors)


NV = qkit.Grid("e2m1", 16, "nvfp4")


@pytest.mark.parametrize(
    ("family", "kind", "path", "theirs"),
    [
        ("gemma3_text", "linear", "model.layers.0.mlp.down_proj", "blk.0.ffn_down"),
        ("llama", "embedding", "model.embed_tokens", "token_embd"),
    ],
)
def test_values_whose_scale_llama_cpp_ignores_fall_back_to_floats(family, kind, path, theirs, tmp_path):
    recipe = qkit.Recipe("nv", (qkit.Rule((f"*.{path.rpartition('.')[2]}",), kind=kind, weight=NV),))
    made = read_model(quantized(tmp_path / "made", recipe, family=family))
    done = export_gguf(made, tmp_path / "model.gguf", fallback="f16")
    assert f"{path}.weight" in done.fallbacks
    there = {one.name: one for one in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert there[f"{theirs}.weight"].tensor_type.name == "F16"
    assert f"{theirs}.scale" not in there
    want = qkit.dequantize(unpack(made.weights[path].read())).astype(np.float16)
    assert np.array_equal(there[f"{theirs}.weight"].data, want)
