"""What families need beyond names and shapes: both names of a layer, tied copies, types, odd values of configurations."""

import json

import numpy as np
import openings
import pytest
from catalogue import COMMON, FAMILIES, Family, make
from checkpoints import whole
from openings import TOKENS, in_transformers
from page import PAGE, README, page, readme

import qkit
from qkit.artifact import known
from qkit.formats.mlx_limits import limits_of
from qkit.streaming.carry_out import quantize_directory
from qkit.streaming.plan import make_plan

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # transformers' own

INT4, INT8 = qkit.Grid("int4", 32), qkit.Grid("int8", 32)
TWO = qkit.Recipe("two", (qkit.Rule(("*.0.*",), weight=INT8), qkit.Rule(("*",), weight=INT4)))


def quantized(folder, family, recipe="int4-g32"):
    """The plan and the artifact of a small model of a family."""
    make(family if isinstance(family, Family) else FAMILIES[family], folder / "in")
    plan = make_plan(folder / "in", recipe if isinstance(recipe, qkit.Recipe) else qkit.recipe(recipe))
    quantize_directory(plan, folder / "out", engine=qkit.backend("numpy"), workers=1, tick=lambda *_: None)
    return plan, folder / "out"


def change(folder, **keys):
    """Changes keys of a config.json; None removes one."""
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in {**config, **keys}.items() if key not in keys or value != "gone"}
    (folder / "config.json").write_text(json.dumps(config))


def test_layers_stand_in_the_configuration_under_both_names(tmp_path):
    _, out = quantized(tmp_path, "Llava", TWO)
    stated = json.loads((out / "config.json").read_text())["quantization_config"]
    targets = {target for group in stated["config_groups"].values() for target in group["targets"]}
    for name in ("language_model.model.layers.1.mlp.up_proj", "model.language_model.layers.1.mlp.up_proj"):
        assert name in targets


def test_layers_that_stay_in_float_stand_there_under_both_names(tmp_path):
    _, out = quantized(tmp_path, "Llava")
    ignored = json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
    assert {"language_model.lm_head", "lm_head"} <= set(ignored)


def test_a_head_without_a_tensor_of_its_own_is_ignored(tmp_path):
    _, out = quantized(tmp_path, "BERT")
    assert "cls.predictions.decoder" in json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]


def test_a_tied_head_that_is_stored_is_one_weight(tmp_path):
    plan, out = quantized(tmp_path, "Llama, tied head stored", "int4-g32-all")
    head = next(row for row in plan.rows if row.stored.slot.name == "lm_head.weight")
    assert head.slots == ()
    assert head.reason == "a copy of model.embed_tokens.weight, which is stored once"
    model = qkit.load(out, backend="torchao")
    assert model.lm_head.owner == (model.model.embed_tokens,)


def test_weights_that_a_module_reads_itself_are_left_alone_in_files_and_in_memory(tmp_path):
    plan, out = quantized(tmp_path, "Mamba")
    left = [row.reason for row in plan.rows if row.stored.slot.name.endswith("dt_proj.weight")]
    assert left == ["another module reads its weight, or changes it"] * 2
    model = qkit.prepare(in_transformers(tmp_path / "in"), "int4-g32")
    assert type(model.backbone.layers[0].mixer.dt_proj) is torch.nn.Linear
    assert qkit.load(out, backend="torchao")(torch.from_numpy(TOKENS).long()).logits.isfinite().all()


def test_the_projection_of_multihead_attention_is_left_alone_in_a_family_that_nobody_tried(tmp_path):
    make(FAMILIES["SigLIP"], tmp_path)
    change(tmp_path, model_type="unheard_of")
    rows = {row.stored.slot.name: row for row in make_plan(tmp_path, qkit.recipe("int4-g32")).rows}
    row = rows["vision_model.head.attention.out_proj.weight"]
    assert (row.rule, row.reason) == (None, "nn.MultiheadAttention reads it itself")


@pytest.mark.parametrize("family", ["Gemma 3, text", "BART"])
def test_embeddings_that_scale_their_rows_are_quantized(family, tmp_path):
    make(FAMILIES[family], tmp_path)
    dense, model = in_transformers(tmp_path), qkit.convert(in_transformers(tmp_path), "int4-g32-all")
    embedding = model.get_input_embeddings()
    assert embedding.rule.weight == INT4
    expected = dense.get_input_embeddings()
    with torch.no_grad():
        expected.weight.copy_(embedding.weight)
    tokens = torch.from_numpy(TOKENS).long()
    assert torch.equal(embedding(tokens), expected(tokens))
    prepared = qkit.prepare(in_transformers(tmp_path), "int4-g32-all").get_input_embeddings()
    assert torch.equal(prepared(tokens), expected(tokens))


def test_buffers_that_the_model_computes_itself_are_ignored(tmp_path):
    _, out = quantized(tmp_path, "Llama, with rotary buffers")
    assert qkit.load(out, backend="torchao").dtype == torch.bfloat16


def test_modules_that_ask_for_float32_keep_it(tmp_path):
    _, out = quantized(tmp_path, Family("DeepseekV3ForCausalLM", {"num_key_value_heads": 4}, dtype="bfloat16"))
    want = {name: one.dtype for name, one in in_transformers(tmp_path / "in").named_buffers()}
    assert torch.float32 in want.values()
    found = dict(qkit.load(out, backend="torchao").named_buffers())
    assert {name: found[name].dtype for name in want} == want


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_configuration_without_a_type_has_that_of_the_files(dtype, tmp_path):
    make(Family("LlamaForCausalLM", dtype=dtype), tmp_path)
    change(tmp_path, dtype="gone", torch_dtype="gone")
    assert qkit.load(tmp_path, backend="torchao").dtype == in_transformers(tmp_path).dtype == getattr(torch, dtype)


def test_odd_values_of_a_configuration_open(tmp_path):
    make(FAMILIES["Mamba 2"], tmp_path / "mamba")
    assert "__float__" in (tmp_path / "mamba/config.json").read_text()
    assert qkit.load(tmp_path / "mamba", backend="torchao").config.time_step_limit[1] == float("inf")
    make(FAMILIES["Llama"], tmp_path / "llama")
    change(tmp_path / "llama", rope_scaling=None)
    assert qkit.load(tmp_path / "llama", backend="torchao").config.rope_parameters["rope_type"] == "default"


def test_everything_beside_the_weights_is_copied_and_no_code(tmp_path):
    source = whole(tmp_path / "in")
    copied = {"spiece.model", "modules.json", "video_preprocessor_config.json", "chat_template.jinja", "LICENSE"}
    left = {"modeling.py", "pytorch_model.bin", "model.onnx", "run.sh", ".gitattributes", "scaler.pkl"}
    for name in copied | left:
        (source / name).write_text("{}")
    plan = make_plan(source, qkit.recipe("int4-g32"))
    assert copied <= plan.files.keys()
    assert not left & plan.files.keys()
    assert left <= set(plan.left_behind)


def test_a_family_that_nobody_tried_gets_a_warning(tmp_path):
    source = whole(tmp_path / "in")
    assert make_plan(source, qkit.recipe("int4-g32")).caveats == ()
    change(source, model_type="unheard_of")
    (caveat,) = make_plan(source, qkit.recipe("int4-g32")).caveats
    assert "no model of type 'unheard_of' is in the table of tried families" in str(caveat)


@pytest.mark.parametrize(
    ("recipe", "reader"),
    [(TWO, "transformers, dequantized"), ("int4-g32-all", "transformers"), ("int4-g32-minmax", "transformers")],
)
def test_the_plan_names_the_way_in_which_a_reader_does_not_open_the_output(recipe, reader, tmp_path):
    source = whole(tmp_path / "in")
    plan = make_plan(source, recipe if isinstance(recipe, qkit.Recipe) else qkit.recipe(recipe))
    assert [one.reader for one in plan.caveats] == [reader]


def test_the_page_of_models_and_the_readme_are_those_of_the_table():
    assert PAGE.read_text(encoding="utf-8") == page()
    text = README.read_text(encoding="utf-8")
    assert readme(text) == text
    assert "checkpoints of" in text


def test_every_row_of_the_table_is_a_family_of_the_gate():
    rows = known.table()["rows"]
    assert COMMON.keys() <= rows.keys() <= FAMILIES.keys()
    for name, row in rows.items():
        assert row["architecture"] == FAMILIES[name].architecture
    assert {row["type"] for row in rows.values()} <= known.table()["types"].keys()


@pytest.mark.parametrize(
    "name", ["gpt-oss", "Granite 4, experts", "Llama 4", "Aria", "Qwen3VLMoeForConditionalGeneration", "Mixtral"]
)
def test_values_of_experts_are_stacked_where_files_of_the_type_stack_them(name, tmp_path):
    from openings import weights

    from qkit.artifact.snapshot import read_own
    from qkit.exchange.export_model import export_dense

    quantized(tmp_path, name)
    export_dense(read_own(tmp_path / "out"), tmp_path / "dense")
    found, want = (
        weights(one) for one in (in_transformers(tmp_path / "dense"), qkit.load(tmp_path / "out", backend="torchao"))
    )
    assert any("experts" in key for key in found)
    for key, array in found.items():
        assert (array == want[key]).all(), key


def test_layers_that_run_several_times_are_counted_once(tmp_path):
    quantized(tmp_path, "HrmTextForCausalLM")
    assert json.loads((tmp_path / "in/config.json").read_text())["num_hidden_layers"] == 16
    qkit.load(tmp_path / "out", backend="torchao")


@pytest.mark.parametrize("architecture", ["Qwen3ForCausalLM", "LlamaModel"])
def test_files_with_or_without_the_name_of_the_base_model_open_as_its_other_classes_do(architecture, tmp_path):
    renamed = {"^": "model."} if architecture == "LlamaModel" else {r"^model\.": ""}
    make(Family(architecture, {"tie_word_embeddings": False}, renamed=renamed), tmp_path / "in")
    plan = make_plan(tmp_path / "in", TWO)
    quantize_directory(plan, tmp_path / "out", engine=qkit.backend("numpy"), workers=1, tick=lambda *_: None)
    wanted, found = openings.in_qkit(tmp_path / "out"), openings.by_default(tmp_path / "out")
    assert np.allclose(openings.run(wanted), openings.run(found), atol=1e-5)  # the order of sums is torch's own
    if architecture == "LlamaModel":
        assert {one.reader for one in plan.caveats if "language models alone" in one.text} == {"qkit, MLX", "mlx-lm"}
    else:
        for logits in (openings.on_mlx(tmp_path / "out"), openings.in_mlx_lm(tmp_path / "out")):
            assert logits.shape == (1, 8, 160)


def test_positions_that_a_module_embeds_in_its_own_way_stay_float_without_the_name_of_the_base_model(tmp_path):
    make(Family("OPTForCausalLM", renamed={r"^model\.": ""}), tmp_path / "in")
    plan = make_plan(tmp_path / "in", qkit.recipe("int4-g32-all"))
    reasons = {row.stored.slot.name: row.reason for row in plan.rows}
    assert "positions in its own way" in reasons["decoder.embed_positions.weight"]


@pytest.mark.parametrize("alone", [True, False])
def test_experts_of_gemma_4_are_refused_on_mlx_by_name(alone):
    inner = {"model_type": "gemma4_text", "enable_moe_block": True}
    config = inner if alone else {"model_type": "gemma4", "text_config": inner}
    assert {one for readers, text in limits_of(config) for one in readers if "experts" in text} == {
        "qkit, MLX",
        "mlx-lm",
    }
