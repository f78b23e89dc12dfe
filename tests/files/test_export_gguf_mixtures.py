"""Mixtures in GGUF: the experts of a block are one tensor for each projection, with the values of their codes."""

import json
from dataclasses import replace

import numpy as np
import pytest
from checkpoints import quantized
from models import make
from safetensors.numpy import load_file

import qkit
from qkit.exchange.export_gguf import export_gguf
from qkit.exchange.export_model import export_dense
from qkit.exchange.import_model import read_model
from qkit.formats.gguf_config import architecture_of, numbers_of
from qkit.formats.gguf_rope import with_ropes
from qkit.streaming.gguf_plan import gguf_plan
from qkit.streaming.plan import make_plan

gguf = pytest.importorskip("gguf")

#: By family: the names of a block and of its projections in files.
BLOCKS = {
    "mixtral": ("block_sparse_moe", {"gate": "w1", "up": "w3", "down": "w2"}),
    "qwen2_moe": ("mlp", {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}),
    "qwen3_moe": ("mlp", {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}),
}

CHANGES = {"qwen3_moe": {"norm_topk_prob": True}}  #: published models have it, and the class does not
EXPERTS = range(4)
#: GGUF's type of the experts under each recipe below.
KINDS = {"int4": "Q4_0", "int8": "Q8_0", "mxfp4": "MXFP4", "zeros": "Q5_0", "only linear layers": "F32", "nvfp4": "F16"}


def decoded(file):
    """The values of every tensor of a GGUF file, in float32, and their types."""
    reader = gguf.GGUFReader(file)
    shapes = {one.name: tuple(int(n) for n in reversed(one.shape)) for one in reader.tensors}
    values = {one.name: gguf.dequantize(one.data, one.tensor_type) for one in reader.tensors}
    kinds = {one.name: one.tensor_type.name for one in reader.tensors}
    return {name: array.reshape(shapes[name]).astype(np.float32) for name, array in values.items()}, kinds


def floats(folder):
    return {name: array.astype(np.float32) for name, array in load_file(folder / "model.safetensors").items()}


BYTES = qkit.Recipe(
    "bytes",
    (qkit.Rule(("*",), weight=qkit.Grid("int8", 32)), qkit.Rule(("*",), kind="experts", weight=qkit.Grid("int8", 32))),
)
ZEROS = qkit.Grid("int4", 32, "minmax")
RECIPES = {
    "int4": "int4-g32",
    "int8": BYTES,
    "mxfp4": "mxfp4-a16",
    "zeros": qkit.Recipe("zeros", (qkit.Rule(("*",), kind="experts", weight=ZEROS),)),
    "only linear layers": qkit.Recipe("linear", (qkit.Rule(("*",), weight=qkit.Grid("int4", 32)),)),
    "nvfp4": "nvfp4-a16",  # a scale of each expert, for which GGUF has no place: the values as float16
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", BLOCKS)
def test_the_experts_of_a_block_are_one_tensor_with_the_values_of_their_codes(family, recipe, tmp_path):
    source = read_model(quantized(tmp_path, RECIPES[recipe], family=family, **CHANGES.get(family, {})))
    done = export_gguf(source, tmp_path / "model.gguf", fallback="f16")
    export_dense(source, tmp_path / "dense")
    (got, kinds), want = decoded(tmp_path / "model.gguf"), floats(tmp_path / "dense")
    block, names = BLOCKS[family]
    for layer in range(source.config["num_hidden_layers"]):
        for projection, name in names.items():
            count = len(EXPERTS)
            experts = [want[f"model.layers.{layer}.{block}.experts.{i}.{name}.weight"] for i in range(count)]
            theirs = f"blk.{layer}.ffn_{projection}_exps.weight"
            assert np.array_equal(got[theirs], np.stack(experts))
            assert kinds[theirs] == KINDS[recipe]
        router = f"blk.{layer}.ffn_gate_inp.weight"
        assert np.array_equal(got[router], want[f"model.layers.{layer}.{block}.gate.weight"])
    assert any("_exps" in one or "experts" in one for one in done.fallbacks) == (recipe == "nvfp4")


@pytest.mark.parametrize("family", BLOCKS)
def test_routers_are_float32_though_the_model_is_bfloat16(family, tmp_path):
    export_gguf(
        read_model(quantized(tmp_path, "int4-g32", family=family, dtype="bfloat16", **CHANGES.get(family, {}))),
        tmp_path / "model.gguf",
    )
    _, kinds = decoded(tmp_path / "model.gguf")
    assert {kind for name, kind in kinds.items() if "ffn_gate_inp" in name} == {"F32"}


@pytest.mark.parametrize("family", BLOCKS)
@pytest.mark.parametrize("recipe", ["int4", "int8"])
def test_a_plan_knows_the_tensors_and_the_bytes_of_the_file(family, recipe, tmp_path):
    source = make(tmp_path / "model", family, **CHANGES.get(family, {}))
    recipe = RECIPES[recipe]
    plan = make_plan(source, recipe if isinstance(recipe, qkit.Recipe) else qkit.recipe(recipe))
    planned = gguf_plan(plan, json.loads((source / "config.json").read_text()))
    done = export_gguf(
        read_model(quantized(tmp_path / "made", recipe, family=family, **CHANGES.get(family, {}))),
        tmp_path / "model.gguf",
    )
    sizes = [one.n_bytes for one in gguf.GGUFReader(tmp_path / "model.gguf").tensors]
    assert (dict(planned.kinds), planned.nbytes) == (dict(done.kinds), sum(sizes))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("recipe", ["int4", "mxfp4", "only linear layers"])
def test_gpt_oss_has_its_biases_and_sinks_beside_the_stacks(recipe, dtype, tmp_path):
    source = read_model(quantized(tmp_path, RECIPES[recipe], family="gpt_oss", dtype=dtype))
    done = export_gguf(source, tmp_path / "model.gguf")
    config = json.loads((tmp_path / "float/config.json").read_text())
    plan = make_plan(tmp_path / "float", RECIPES[recipe] if recipe[0] == "o" else qkit.recipe(RECIPES[recipe]))
    sizes = [one.n_bytes for one in gguf.GGUFReader(tmp_path / "model.gguf").tensors]
    planned = gguf_plan(plan, config)
    assert (dict(planned.kinds), planned.nbytes) == (dict(done.kinds), sum(sizes))
    got, kinds = decoded(tmp_path / "model.gguf")
    plain = floats(tmp_path / "float")
    values = {
        path: qkit.dequantize(qkit.quantize(np.ascontiguousarray(one), KINDS_OF[recipe])) if KINDS_OF[recipe] else one
        for path, one in split(plain).items()
    }
    for layer in range(2):
        block = f"model.layers.{layer}.mlp"
        up = plain[f"{block}.experts.gate_up_proj_bias"]
        assert np.array_equal(got[f"blk.{layer}.ffn_gate_exps.bias"], up[:, ::2])
        assert np.array_equal(got[f"blk.{layer}.ffn_up_exps.bias"], up[:, 1::2])
        assert np.array_equal(got[f"blk.{layer}.ffn_down_exps.bias"], plain[f"{block}.experts.down_proj_bias"])
        assert np.array_equal(got[f"blk.{layer}.attn_sinks.weight"], plain[f"model.layers.{layer}.self_attn.sinks"])
        assert np.array_equal(got[f"blk.{layer}.ffn_gate_inp.weight"], plain[f"{block}.router.weight"])
        for projection in ("gate", "up", "down"):
            theirs = got[f"blk.{layer}.ffn_{projection}_exps.weight"]
            want = np.stack([values[f"{block}.experts.{i}.{projection}"] for i in EXPERTS])
            assert np.array_equal(theirs, want if dtype == "float32" else want.astype(theirs.dtype))
    assert {kinds[name] for name in kinds if "sinks" in name or name.endswith(".bias")} == {"F32"}


KINDS_OF = {
    "int4": qkit.Grid("int4", 32),
    "mxfp4": qkit.Grid("e2m1", 32, "even"),
    "only linear layers": None,
}


def split(plain):
    """Each expert of gpt-oss by itself, [outputs, inputs]."""
    found = {}
    for layer in range(2):
        block = f"model.layers.{layer}.mlp.experts"
        for i in EXPERTS:
            both, down = plain[f"{block}.gate_up_proj"][i].T, plain[f"{block}.down_proj"][i].T
            found |= {f"{block}.{i}.gate": both[::2], f"{block}.{i}.up": both[1::2], f"{block}.{i}.down": down}
    return found


def test_a_missing_expert_and_experts_on_several_grids_are_named(tmp_path):
    source = read_model(quantized(tmp_path, "int4-g32", family="mixtral"))
    path = "model.layers.1.block_sparse_moe.experts.1.w3"
    without = {name: weight for name, weight in source.weights.items() if name != path}
    with pytest.raises(qkit.ArtifactError, match=r"layers\.1.*w3\.weight: expert 1 is missing"):
        export_gguf(replace(source, weights=without), tmp_path / "model.gguf")
    other = replace(source.weights[path], rule=qkit.Rule(("*",), kind="experts", weight=qkit.Grid("int8", 32)))
    with pytest.raises(qkit.ArtifactError, match=r"w3\.weight: the experts are on several grids.*--to dense"):
        export_gguf(replace(source, weights={**source.weights, path: other}), tmp_path / "model.gguf")
    one = {f"{path}.weight": np.zeros(source.weights[path].shape, np.float32)}
    with pytest.raises(qkit.ArtifactError, match=r"w3\.weight: some experts are quantized and some are not"):
        export_gguf(replace(source, weights=without, tensors={**source.tensors, **one}), tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


def test_experts_with_a_scale_of_their_own_are_refused_without_the_fallback(tmp_path):
    source = read_model(quantized(tmp_path, "nvfp4-a16", family="mixtral"))
    with pytest.raises(qkit.ArtifactError, match=r"w1\.weight: GGUF's NVFP4 of experts.*--fallback f16"):
        export_gguf(source, tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("family", "changes", "feature"),
    [
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob False"),
        ("qwen2_moe", {"norm_topk_prob": True}, "norm_topk_prob True"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step 2"),
        ("qwen2_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers \[0\]"),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 8}, "a sliding window of 8"),
        ("gpt_oss", {"layer_types": ["full_attention"] * 2}, "layer_types in another order"),
        ("gpt_oss", {"attention_bias": False}, "attention_bias False"),
        ("deepseek_v2", {"topk_method": "group_limited_greedy", "n_group": 2}, "topk_method 'group_limited_greedy'"),
        ("deepseek_v2", {"num_key_value_heads": 2}, "2 heads of keys and 4 of queries"),
    ],
)
def test_mixtures_that_llama_cpp_computes_otherwise_are_refused(family, changes, feature, tmp_path):
    config = json.loads((make(tmp_path / "model", family, **CHANGES.get(family, {})) / "config.json").read_text())
    architecture_of(config)
    with pytest.raises(qkit.ArtifactError, match=f"{family!r} with {feature} is not one"):
        architecture_of({**config, **changes})


@pytest.mark.parametrize("key", ["num_experts", "num_local_experts"])
def test_the_count_of_experts_has_either_name(key, tmp_path):
    config = json.loads((make(tmp_path / "model", "qwen3_moe", **CHANGES["qwen3_moe"]) / "config.json").read_text())
    rest = {name: value for name, value in config.items() if name not in ("num_experts", "num_local_experts")}
    config = with_ropes({**rest, key: 4})
    assert numbers_of(config, architecture_of(config))["expert_count"] == 4
