"""The bits per weight of a mixture: `coverage` of a model, in training and after, counts those of the files of its plan."""

import pytest
from models import make
from tables import MODULES

import qkit
from qkit.streaming.plan import make_plan

pytest.importorskip("transformers")


@pytest.mark.parametrize("backend", [name for name in ("torchao", "mlx") if name in MODULES])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_bits_per_weight_are_those_of_the_plan(family, dtype, backend, tmp_path):
    source = make(tmp_path / "float", family, dtype=dtype)
    with_inputs = (
        () if (family, backend) == ("deepseek_v3", "mlx") else ("int8-dynamic-act-int8-weight",)
    )  # refused there
    for recipe in ("int4-g32", "mxfp4-a16", *with_inputs):
        planned = make_plan(source, qkit.recipe(recipe)).bits_per_weight
        model = qkit.prepare(qkit.load(source, backend=backend), recipe)
        assert qkit.coverage(model).bits_per_weight == pytest.approx(planned, rel=1e-3)  # a router's type in DeepSeek
        model = qkit.convert(model)
        assert qkit.coverage(model).bits_per_weight == pytest.approx(planned, rel=1e-3)  # likewise


def test_a_model_without_linear_layers_is_refused_with_that_reason(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=131, bos_token_id=0, eos_token_id=0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "gpt2")
    reason = r"the rule for linear \* is first for no layer.*no rule can match .*c_fc\.weight: .*Conv1D"
    with pytest.raises(qkit.PlanError, match=reason):
        make_plan(tmp_path / "gpt2", qkit.recipe("int4-g32"))
    with pytest.raises(qkit.RecipeError, match=reason):
        qkit.prepare(model, "int4-g32")


def test_a_recipe_for_experts_alone_is_refused_for_a_model_without_them(tmp_path):
    source = make(tmp_path / "float", "llama")
    recipe = qkit.Recipe("only", (qkit.Rule(("*",), "experts", qkit.Grid("int4", 32)),))
    with pytest.raises(qkit.PlanError, match=r"the rule for experts \* is first for no layer"):
        make_plan(source, recipe)
