"""What servers read of an artifact: the format of integers with activations, targets, `ignore`, and older artifacts."""

import json
import re
import warnings

import numpy as np
import pytest
from models import logits, make
from safetensors import safe_open
from safetensors.numpy import load_file

import qkit
from qkit.artifact.inspect import inspect_directory
from qkit.artifact.metadata import StoredRule
from qkit.artifact.servers import sentences
from qkit.artifact.verify import verify
from qkit.exchange.diff import compare
from qkit.exchange.export_model import export_dense
from qkit.exchange.import_model import read_model
from qkit.exchange.write_model import weights_only
from qkit.formats import compressed_groups, compressed_tensors
from qkit.formats.targets import ignored
from qkit.streaming.carry_out import quantize_directory
from qkit.streaming.plan import make_plan

ENGINE = next(status.name for status in qkit.backends() if status.ready and status.name != "numpy")
BYTES = ("int8-dynamic-act-int8-weight", "int8-dynamic-act-int4-weight")


def quantize(source, recipe, out):
    plan = make_plan(source, qkit.recipe(recipe))
    return quantize_directory(plan, out, engine=qkit.backend("numpy"), workers=1, tick=lambda *_: None)


@pytest.mark.parametrize("recipe", BYTES)
def test_integers_with_activations_are_a_byte_each(recipe, tmp_path):
    source = make(tmp_path / "float", "llama")
    out = quantize(source, recipe, tmp_path / "out")
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["format"] == config["config_groups"]["group_0"]["format"] == "int-quantized"
    tensors = load_file(out / "model.safetensors")
    path = "model.layers.0.mlp.up_proj"
    assert {name.removeprefix(f"{path}.") for name in tensors if name.startswith(path)} == {"weight", "weight_scale"}
    assert tensors[f"{path}.weight"].dtype == np.int8
    rule = qkit.recipe(recipe).rules[-1]
    law = qkit.quantize(load_file(source / "model.safetensors")[f"{path}.weight"], rule.weight)
    assert (tensors[f"{path}.weight"] == law.codes).all()
    assert not list(verify(out))
    assert inspect_directory(out).groups[0].format == "int-quantized"
    model = qkit.load(out, backend=ENGINE)
    qkit.save(model, tmp_path / "saved", source=source)
    for name, array in load_file(tmp_path / "saved" / "model.safetensors").items():
        assert (array == tensors[name]).all(), name
    export_dense(weights_only(read_model(out)), tmp_path / "dense")
    assert np.array_equal(load_file(tmp_path / "dense" / "model.safetensors")[f"{path}.weight"], qkit.dequantize(law))


def test_a_byte_that_is_no_code_is_found():
    parts = {"weight": np.full((2, 32), 9, np.int8), "weight_scale": np.ones((2, 1), np.float32)}
    with pytest.raises(qkit.ArtifactError, match="weight holds 64 numbers, each of which should be a code of int4"):
        compressed_tensors.restore(parts, grid=qkit.Grid("int4", 32), dtype="float32", shape=(2, 32))


@pytest.mark.parametrize("recipe", BYTES)
def test_an_artifact_of_earlier_versions_still_opens(recipe, tmp_path):
    """Packed, with `pack-quantized` in its configuration."""
    new = quantize(make(tmp_path / "float", "llama"), recipe, tmp_path / "new")
    model = qkit.load(new, backend=ENGINE)
    old = tmp_path / "old"
    with pytest.MonkeyPatch.context() as patch:
        for module in (compressed_tensors, compressed_groups):
            patch.setattr(module, "form_of", lambda rule: compressed_tensors.layout(rule.weight))
        qkit.save(model, old, source=tmp_path / "float")
    assert json.loads((old / "config.json").read_text())["quantization_config"]["format"] == "pack-quantized"
    assert any("weight_packed" in name for name in load_file(old / "model.safetensors"))
    assert not list(verify(old))
    assert inspect_directory(old).groups[0].format == "pack-quantized"
    assert (logits(ENGINE, qkit.load(old, backend=ENGINE)) == logits(ENGINE, model)).all()
    assert not [one for one in compare(read_model(old), read_model(new)) if one.codes or one.scales or one.values]


def test_embeddings_are_named_by_their_class_and_heads_by_their_name(tmp_path):
    out = quantize(make(tmp_path / "float", "llama"), "int4-g32-all", tmp_path / "out")
    groups = json.loads((out / "config.json").read_text())["quantization_config"]["config_groups"]
    assert sorted(group["targets"] for group in groups.values()) == [["Embedding"], ["Linear", "lm_head"]]


FLOAT = [f"model.layers.{i}.mlp.gate" for i in range(40)]


@pytest.mark.parametrize(
    ("left_alone", "quantized", "entries"),
    [
        (["lm_head"], ["model.layers.0.mlp.up_proj"], ["lm_head"]),
        ([*FLOAT, "lm_head"], ["model.layers.0.mlp.gate_proj"], ["lm_head", r"re:(.*\.)?layers\.\d+\.mlp\.gate$"]),
        (FLOAT[:2], ["model.layers.2.mlp.gate"], FLOAT[:2]),  # some of them are quantized
        (FLOAT[:2], ["draft.layers.0.mlp.gate"], [r"re:^model\.layers\.\d+\.mlp\.gate$"]),
        (["a.0", "a.1"], ["b.0"], [r"re:(.*\.)?a\.\d+$"]),
        (["0", "1"], ["2.x"], [r"re:(.*\.)?\d+$"]),
        (["a.b.0.c", "a.b.1.c", "d.a.b.0.c", "d.a.b.1.c"], ["e.0.c"], [r"re:(.*\.)?b\.\d+\.c$"]),  # under two names
    ],
)
def test_ignore_lists_float_layers_by_pattern_and_no_other_layer(left_alone, quantized, entries):
    found = ignored(left_alone, but=quantized)
    assert found == entries

    def matches(path):
        return any(re.match(e[3:], path) if e.startswith("re:") else e == path for e in found)

    assert all(map(matches, left_alone))
    assert not any(map(matches, quantized))


def test_inputs_on_nvfp4_have_a_tensor_scale_for_servers(tmp_path):
    source = make(tmp_path / "float", "llama")
    out = quantize(source, "nvfp4", tmp_path / "out")
    with safe_open(out / "model.safetensors", "numpy") as file:
        names = [name for name in file.keys() if name.endswith(".input_global_scale")]  # noqa: SIM118
        assert [file.get_tensor(name).tolist() for name in names] == [[1.0]] * len(read_model(out).weights)
    assert not list(verify(out))
    model = qkit.load(out, backend=ENGINE)
    qkit.save(model, tmp_path / "saved", source=source)
    assert (tmp_path / "saved" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    assert inspect_directory(out).groups[0].format == "nvfp4-pack-quantized"


def test_embeddings_named_by_their_paths_still_open(tmp_path):
    out = quantize(make(tmp_path / "float", "llama"), "int4-g32-all", tmp_path / "out")
    model = qkit.load(out, backend=ENGINE)
    config = json.loads((out / "config.json").read_text())
    paths = {
        "Embedding": ["model.embed_tokens"],
        "Linear": sorted(set(read_model(out).weights) - {"model.embed_tokens"}),
    }
    for group in config["quantization_config"]["config_groups"].values():
        group["targets"] = paths[group["targets"][0]]
    (out / "config.json").write_text(json.dumps(config))
    assert (logits(ENGINE, qkit.load(out, backend=ENGINE)) == logits(ENGINE, model)).all()


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("int4-g32", ""),
        ("int4-g32-minmax", ""),
        ("nvfp4-a16", ""),
        ("int4-g32-all", "vLLM: does not open a tied head of codes: --untie writes the head as a weight of its own"),
        ("mxfp4-a16-all", "vLLM: opens no embedding on e2m1-g32-even, only symmetric integers"),
        ("mxfp4-a16", "vLLM: rounds inputs or not by the kind of the GPU, whatever the recipe says"),
        ("mxfp8", "vLLM: rounds inputs or not by the kind of the GPU, whatever the recipe says"),
        ("nvfp4", "vLLM: divides inputs by a tensor scale of 1, where qkit's follows each input"),
        ("int8-dynamic-act-int4-weight", "vLLM: rounds inputs by its own rule"),
    ],
)
def test_plans_directories_and_saving_say_what_a_server_would_do_otherwise(recipe, said, tmp_path):
    source = make(tmp_path / "float", "llama", tie_word_embeddings=True)
    found = [str(one) for one in make_plan(source, qkit.recipe(recipe)).caveats if one.reader == "vLLM"]
    assert bool(found) == bool(said)
    assert not said or any(one.startswith(said) for one in found), found
    untied = [str(one) for one in make_plan(source, qkit.recipe(recipe), untie=True).caveats if "untie" in str(one)]
    assert not untied
    out = quantize(source, recipe, tmp_path / "out")
    assert sorted(f"vLLM: {one}" for one in inspect_directory(out).served) == sorted(found)
    with warnings.catch_warnings(record=True, category=qkit.errors.ServerWarning) as caught:
        warnings.simplefilter("always")
        qkit.save(qkit.load(out, backend=ENGINE), tmp_path / "saved", source=source)
    assert sorted(str(one.message) for one in caught) == sorted(found)


@pytest.mark.parametrize("recipe", ["int4-g32-all", "int4-g32"])
def test_an_untied_head_is_a_weight_of_its_own_with_the_same_logits(recipe, tmp_path):
    source = make(tmp_path / "float", "llama", tie_word_embeddings=True)
    tied = quantize(source, recipe, tmp_path / "tied")
    plan = make_plan(source, qkit.recipe(recipe), untie=True)
    out = quantize_directory(plan, tmp_path / "untied", engine=qkit.backend("numpy"), workers=1, tick=lambda *_: None)
    config = json.loads((out / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    with safe_open(out / "model.safetensors", "numpy") as file:
        assert {"lm_head.weight", "lm_head.weight_packed"} & set(file.keys())
    assert not list(verify(out))
    there, here = (logits(ENGINE, qkit.load(folder, backend=ENGINE)) for folder in (tied, out))
    assert np.allclose(there, here, atol=1e-5)  # a tied head of codes multiplies in another kernel


def test_a_model_without_a_tied_head_cannot_be_untied(tmp_path):
    with pytest.raises(qkit.PlanError, match="has no tied output head: leave --untie out"):
        make_plan(make(tmp_path / "float", "llama"), qkit.recipe("int4-g32"), untie=True)


INT8, TENSOR = qkit.Grid("int8", "row"), qkit.Grid("int8", "tensor")
ROUNDS, LEAVES = (
    "rounds inputs by its own rule",
    "leaves outputs as they are, where qkit rounds them to int8-tensor-absmax",
)


@pytest.mark.parametrize(
    ("weight", "more", "said"),
    [
        ("int4-g32-signed", {"activation": INT8}, [ROUNDS]),
        (
            "int4-g32-signed",
            {"activation": TENSOR},
            ["does not open int4-g32-signed with inputs on int8-tensor-absmax, dynamic"],
        ),
        ("int4-g32-signed", {"activation": qkit.Grid("int4", "row")}, ["does not open"]),
        ("int4-g32-signed", {"activation": qkit.Grid("e4m3", "row")}, ["does not open"]),
        ("int3-g64-signed", {"activation": qkit.Grid("int4", "row")}, [ROUNDS]),
        ("int3-g64-signed", {"activation": TENSOR, "range": "calibrated"}, ["does not open"]),
        ("int8-row-absmax", {"activation": TENSOR, "range": "calibrated"}, [ROUNDS]),
        ("int8-row-absmax", {"activation": INT8, "output": TENSOR}, [ROUNDS, LEAVES]),
        ("int4-row-signed", {"activation": TENSOR, "output": TENSOR, "range": "calibrated"}, [ROUNDS]),
        ("int8-g64-absmax", {"output": TENSOR, "range": "calibrated"}, [LEAVES]),
        ("e2m1-g16-nvfp4", {"activation": INT8}, ["does not open e2m1-g16-nvfp4 with inputs on int8-row-absmax"]),
        (
            "e4m3-row-rceil",
            {"activation": INT8},
            ["leaves inputs as they are beside e4m3-row-rceil, where qkit rounds them"],
        ),
        (
            "e4m3-row-rceil",
            {"activation": qkit.Grid("e2m1", 32)},
            ["rounds inputs to e4m3 by token, where qkit rounds them"],
        ),
        ("e4m3-row-rceil", {"activation": qkit.Grid("e4m3", "row")}, [ROUNDS]),
    ],
)
def test_rules_of_every_kind_are_told_as_vllm_takes_them(weight, more, said):
    """As vLLM 0.32's `_get_scheme_from_parts` answered for each."""
    rule = qkit.Rule(("*",), weight=qkit.Grid.parse(weight), **more)
    found = list(sentences([StoredRule(rule, "float32", ("a",))], tied=False))
    assert len(found) == len(said)
    assert all(text.startswith(start) for text, start in zip(found, said, strict=True)), found
