"""No silent seam: Trainer, peft, mlx-lm and averages of weights around prepared models. Each test is a fault that was found."""

import copy
import json
import re
import subprocess
import sys
import warnings

import numpy as np
import pytest
from models import CONFIG, TOKENS, build, make, small
from runs import folder, table
from typer.testing import CliRunner

import qkit
from qkit import adapters
from qkit.artifact.config import read_config
from qkit.cli.application import application
from qkit.errors import CoverageWarning, UnchangedWarning
from qkit.training import run_from_table, train_model
from qkit.training.text import read_text

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="Trainer needs accelerate")

from qkit_torchao import QatCallback  # noqa: E402
from transformers import Trainer, TrainingArguments  # noqa: E402

RECIPE = "int2-g64"
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{text}")  # of libraries, not of qkit
    for text in (
        ".*pin_memory:UserWarning",
        ".*:FutureWarning",
        ".*:DeprecationWarning",
        ".*use_reentrant:UserWarning",
        "TorchaoLoraLinear was:UserWarning",
    )
]


def data():
    drawn = torch.randint(0, 256, (8, 12), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in drawn]


def trainer(folder, model=None, *, callbacks=(), optimizers=(None, None), model_init=None, rows=None, **options):
    wishes = {
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **options,
    }
    rows = data() if rows is None else rows
    more = {"train_dataset": rows, "eval_dataset": rows, "callbacks": list(callbacks), "optimizers": optimizers}
    return Trainer(model, TrainingArguments(str(folder), **wishes), model_init=model_init, **more)


def losses(one):
    return [entry["loss"] for entry in one.state.log_history if "loss" in entry]


def prepared(model):
    return [row.path for row in qkit.coverage(model).rows if row.state.startswith("prepared")]


def grids(model):
    return {row.weight for row in qkit.coverage(model).rows if row.weight}


def logits(model):
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS).long()).logits


def lora(model, *, targets=("q_proj", "down_proj"), **options):
    peft = pytest.importorskip("peft")
    made = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=list(targets), **options))
    with torch.no_grad():
        for name, one in made.named_parameters():
            if "lora_B" in name:
                one.normal_(0, 0.05, generator=torch.Generator().manual_seed(1))
    return made


def reference_codes(model):
    """By path, the codes that the reference gives for the master weights of a prepared model."""
    engine = qkit.backend("torchao")
    layers = [layer for layer in engine.layers(model) if layer.stage == "prepared"]
    return {one.path: qkit.quantize(engine.to_numpy(one.module.weight), one.rule.weight).codes for one in layers}


def codes(model, name="torchao"):
    engine = qkit.backend(name)
    layers = [layer for layer in engine.layers(model) if layer.stage == "converted"]
    return {one.path: engine.to_numpy(engine.unpack(one.module).codes) for one in layers}


def assert_exact(model, converted):
    assert converted
    assert converted.keys() == model.keys()
    assert sum(int((converted[path] != model[path]).sum()) for path in model) == 0


# 1: state belongs to the model


def test_a_model_of_model_init_trains_on_the_grid(tmp_path):
    runs = [
        trainer(tmp_path, model_init=lambda: build("torchao"), callbacks=some) for some in ([QatCallback(RECIPE)], [])
    ]
    for one in runs:
        one.train()
    assert prepared(runs[0].model)
    assert losses(runs[0]) != losses(runs[1])


def test_one_callback_prepares_the_models_of_two_trainers(tmp_path):
    callback = QatCallback(RECIPE)
    first, second = (trainer(tmp_path, build("torchao"), callbacks=[callback]) for _ in range(2))
    assert prepared(first.model) == prepared(second.model) != []
    second.train()
    assert losses(second)


def test_a_callback_with_another_recipe_than_the_model_is_refused(tmp_path):
    model = qkit.prepare(build("torchao"), RECIPE)
    with pytest.raises(
        qkit.StageError, match=r"prepared on int2-g64-signed, and recipe 'int8-row' of the callback says"
    ):
        trainer(tmp_path, model, callbacks=[QatCallback("int8-row")])
    trainer(tmp_path, model, callbacks=[QatCallback(RECIPE)])


# 2, 5: mlx-lm


def mlx_lora(model, *, dora=False, keys=("self_attn.q_proj", "mlp.down_proj")):
    utils = pytest.importorskip("mlx_lm.tuner.utils")
    model.freeze()
    where = {"rank": 4, "scale": 2.0, "dropout": 0.0, "keys": list(keys)}
    utils.linear_to_lora_layers(model, 2, where, use_dora=dora)
    return model


def mlx_run(model):
    import mlx.core as mx

    return np.array(model(mx.array(TOKENS)))


@pytest.mark.parametrize("mode", ["training", "evaluation"])
@pytest.mark.parametrize("order", ["prepared first", "adapted first"])
@pytest.mark.parametrize("dora", [False, True])
def test_adapters_of_mlx_lm_do_not_bypass_the_grid(dora, order, mode):
    pytest.importorskip("mlx_lm")
    plain = mlx_lora(small("mlx"), dora=dora)
    if order == "prepared first":
        model = mlx_lora(qkit.prepare(small("mlx"), "int2-g32"), dora=dora)
    else:
        model = qkit.prepare(mlx_lora(small("mlx"), dora=dora), "int2-g32")
    bare = qkit.prepare(small("mlx"), "int2-g32")
    for one in (plain, model, bare):
        one.train(mode == "training")
    assert np.abs(mlx_run(model) - mlx_run(plain)).max() > 0.1
    if not dora or order == "prepared first":  # DoRA takes the lengths of rows from the layer that it is put on
        np.testing.assert_allclose(mlx_run(model), mlx_run(bare), atol=1e-4)  # B is zero; DoRA divides by a norm


def test_dora_of_mlx_lm_is_refused_where_it_would_leave_out_the_grid_of_inputs():
    with pytest.raises(qkit.StageError, match="would leave out the grids of inputs"):
        mlx_lora(qkit.prepare(small("mlx"), "int8-dynamic-act-int8-weight"), dora=True)


def test_dropout_in_an_adapter_inside_of_a_grid_is_refused():
    layer = qkit.prepare(small("mlx"), "int4-g32").layers[0].self_attn.q_proj
    with pytest.raises(qkit.StageError, match=r"dropout is 0\.1"):
        layer.to_lora(r=4, dropout=0.1)


def fused(model):
    from mlx.utils import tree_unflatten

    model.update_modules(tree_unflatten([(n, m.fuse()) for n, m in model.named_modules() if hasattr(m, "fuse")]))
    return model


@pytest.mark.parametrize("base", ["prepared", "converted"])
def test_fuse_of_mlx_lm_leaves_lora_on_its_grid(base):
    pytest.importorskip("mlx_lm")
    model = qkit.prepare(small("mlx"), "int4-g32")
    model = mlx_lora(qkit.convert(model) if base == "converted" else model)
    move(model)
    count, want = len(grid_rows(model)), qkit.backend("mlx").logits(model, TOKENS)
    model = fused(model)
    model = qkit.convert(model) if base == "prepared" else model
    assert len(grid_rows(model)) == count
    assert np.array_equal(qkit.backend("mlx").logits(model, TOKENS), want)


def move(model):
    """Gives the factors B of adapters values."""
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_unflatten

    mx.random.seed(0)
    names = [(name, x) for name, x in tree_flatten(model.parameters()) if name.endswith("lora_b")]
    assert names
    model.update(tree_unflatten([(name, mx.random.normal(x.shape) * 0.05) for name, x in names]))


def grid_rows(model):
    return [row.path for row in qkit.coverage(model).rows if row.weight]


def test_layers_that_mlx_lm_fused_into_float_are_an_error(tmp_path):
    pytest.importorskip("mlx_lm")
    model = fused(mlx_lora(qkit.prepare(small("mlx"), "int4-g32"), dora=True))
    with pytest.raises(qkit.StageError, match=r"q_proj was on a grid, and is a plain .*like 3 others"):
        qkit.convert(model)
    with pytest.raises(qkit.StageError, match="was on a grid"):
        qkit.save(model, tmp_path / "out", source=qkit.save(small("mlx"), tmp_path / "model"))
    qkit.unprepare(model, "*_proj")
    assert not grid_rows(model)


class Rows(list):
    """A data set as mlx-lm has them."""

    def process(self, row):
        return row


@pytest.mark.parametrize("kind", ["full", "lora", "dora"])
def test_the_trainer_of_mlx_lm_trains_on_the_grid(tmp_path, kind):
    trainer = pytest.importorskip("mlx_lm.tuner.trainer")
    optim = pytest.importorskip("mlx.optimizers")
    engine = qkit.backend("mlx")

    def run(prepare):
        model = prepare(small("mlx"))
        model = model if kind == "full" else mlx_lora(model, dora=kind == "dora")
        np.random.seed(0)  # the loop draws its order from there
        data = trainer.CacheDataset(Rows([(row.tolist(), 0) for row in TOKENS.repeat(2, axis=0)]))
        arguments = trainer.TrainingArgs(batch_size=2, iters=4, adapter_file=str(tmp_path / "adapters.safetensors"))
        seen = []
        trainer.train(model, optim.Adam(learning_rate=1e-2), data, args=arguments, training_callback=Loss(seen))
        return model, seen

    class Loss:
        def __init__(self, seen):
            self.seen = seen

        def on_train_loss_report(self, info):
            self.seen.append(info["train_loss"])

        def on_val_loss_report(self, info):
            pass

    (model, on_grid), (_, plain) = run(lambda one: qkit.prepare(one, "int2-g32")), run(lambda one: one)
    assert on_grid != plain
    trained = engine.logits(model, TOKENS)
    model = model if kind == "full" else qkit.merge(model)
    layers = [layer for layer in engine.layers(model) if layer.rule]
    want = {
        one.path: qkit.quantize(engine.to_numpy(engine.weight(one.module)), one.rule.weight).codes for one in layers
    }
    model = qkit.convert(model)
    assert_exact(want, codes(model, "mlx"))
    assert np.array_equal(engine.logits(model, TOKENS), trained) == (
        kind != "dora"
    )  # DoRA of mlx-lm is beside the grid


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_of_mlx_lm_are_merged_when_told_to(dora):
    pytest.importorskip("mlx_lm")
    model = qkit.prepare(mlx_lora(small("mlx"), dora=dora), "int4-g32")
    move(model)
    count = len(grid_rows(model))
    with pytest.raises(qkit.StageError, match=r"inside of a (Lo|Do)RALinear; call model = qkit.merge"):
        qkit.convert(model)
    model = qkit.merge(model)
    engine = qkit.backend("mlx")
    masters = {one.path: engine.to_numpy(engine.weight(one.module)) for one in engine.layers(model) if one.rule}
    rules = {one.path: one.rule.weight for one in engine.layers(model) if one.rule}
    assert len(masters) == count
    assert not [path for path in masters if path.endswith(".linear")]
    want = {path: qkit.quantize(w, rules[path]).codes for path, w in masters.items()}
    assert_exact(want, codes(qkit.convert(model), "mlx"))


def patched():
    nn = pytest.importorskip("mlx.nn")

    class Patched(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.lora_down = inner, nn.Linear(32, 4, bias=False)

    class Around(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

    return {"Patched": Patched, "Around": Around, "Sequential": nn.Sequential}


@pytest.mark.parametrize("name", ["Patched", "Around", "Sequential"])
def test_a_wrapper_of_mlx_that_qkit_does_not_know_is_refused_by_name(tmp_path, name):
    model = qkit.prepare(small("mlx"), "int4-g32")
    attention = model.layers[0].self_attn
    attention.q_proj = patched()[name](attention.q_proj)
    for verb in (qkit.convert, qkit.merge, lambda one: qkit.save(one, tmp_path / "out")):
        with pytest.raises(qkit.StageError, match=f"q_proj.*is inside of a {name}; qkit cannot see past {name}"):
            verb(model)
    assert not (tmp_path / "out").exists()


def test_an_unknown_adapter_on_a_float_model_of_mlx_is_refused_by_name():
    model = small("mlx")
    attention = model.layers[0].self_attn
    attention.q_proj = patched()["Patched"](attention.q_proj)
    with pytest.raises(qkit.StageError, match=r"cannot prepare: .* is inside of a Patched"):
        qkit.prepare(model, "int4-g32")


# 3, 4, 6: peft


def test_peft_around_prepared_layers_is_refused_or_merged(tmp_path):
    model = lora(qkit.prepare(build("torchao"), RECIPE))
    weight = model.base_model.model.lm_head.weight.clone()
    for verb in (qkit.convert, lambda one: qkit.save(one, tmp_path / "out")):
        with pytest.raises(qkit.StageError, match=r"inside of a lora.Linear; call model = qkit\.merge"):
            verb(model)
    assert prepared(model)
    merged = qkit.merge(model)
    assert type(merged).__name__ == "LlamaForCausalLM"
    want = reference_codes(merged)
    assert_exact(want, codes(qkit.convert(merged)))
    qkit.save(merged, tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    np.testing.assert_allclose(logits(again), logits(merged), atol=1e-4)  # another order of sums
    assert torch.equal(merged.lm_head.weight, weight)


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}, {"modules_to_save": ["embed_tokens"]}])
def test_a_recipe_sees_through_peft(options):
    model = qkit.prepare(lora(build("torchao"), **options), RECIPE)
    bare = qkit.prepare(build("torchao"), RECIPE)
    layers = {layer.path: layer for layer in qkit.backend("torchao").layers(model)}
    assert {layers[path].name for path in prepared(model)} == set(prepared(bare))
    assert not [path for path in prepared(model) if "lora_" in path or "lm_head" in path]
    rows = {row.path: row.state for row in qkit.coverage(model).rows}
    assert [state for path, state in rows.items() if "lora_A" in path] == [
        "left alone: a part of a lora.Linear, which stays float"
    ] * 4


def test_a_pattern_of_a_recipe_matches_the_path_without_peft():
    grid = qkit.Grid("int4", 64)
    recipe = qkit.Recipe("mine", (qkit.Rule(("model.layers.0.*",), weight=grid),))
    model = qkit.prepare(lora(build("torchao")), recipe)
    assert len(prepared(model)) == 7
    assert len(prepared(qkit.prepare(torch.compile(build("torchao")), recipe))) == 7


def test_a_head_of_a_model_that_names_no_backbone_stays_float():
    made = {"d_model": 64, "d_kv": 32, "d_ff": 128, "num_layers": 1, "num_heads": 2, "vocab_size": 256}
    model = transformers.AutoModelForQuestionAnswering.from_config(transformers.AutoConfig.for_model("t5", **made))
    model = qkit.prepare(model, RECIPE)
    assert prepared(model)
    assert not [path for path in prepared(model) if "block" not in path]


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("kind", ["SequenceClassification", "TokenClassification", "QuestionAnswering"])
def test_output_heads_stay_float_by_their_role(kind, wrapped):
    config = transformers.AutoConfig.for_model(**{**CONFIG, "pad_token_id": 0})
    model = getattr(transformers, f"AutoModelFor{kind}").from_config(config)
    model = lora(model, task_type={"SequenceClassification": "SEQ_CLS"}.get(kind)) if wrapped else model
    model = qkit.prepare(model, RECIPE)
    assert len(prepared(model)) == 14
    assert all("layers." in path for path in prepared(model))


def test_a_head_by_another_name_stays_float_in_a_directory_too(tmp_path):
    from qkit.streaming.plan import make_plan

    config = transformers.AutoConfig.for_model(**{**CONFIG, "pad_token_id": 0})
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    rows = {row.path: row.rule for row in make_plan(tmp_path, qkit.recipe(RECIPE)).rows if row.path}
    assert rows["score"] is None
    assert rows["model.layers.0.mlp.up_proj"] is not None


@pytest.mark.parametrize("method", ["HRA", "SHIRA"])
def test_methods_of_peft_that_leave_the_grid_out_are_refused_before_the_first_step(tmp_path, method):
    peft = pytest.importorskip("peft")
    config = peft.PEFT_TYPE_TO_CONFIG_MAPPING[method](target_modules=["q_proj"])
    with pytest.raises(qkit.StageError, match=rf"{method.lower()}\.\w+; qkit cannot see past"):
        qkit.prepare(peft.get_peft_model(build("torchao"), config), RECIPE)
    model = peft.get_peft_model(qkit.prepare(build("torchao"), RECIPE), config)
    with pytest.raises(qkit.StageError, match=r"cannot train: .* or it leaves the grid out"):
        trainer(tmp_path, model, callbacks=[QatCallback(RECIPE)])


METHODS = ["ADALORA", "BOFT", "DELORA", "GRALORA", "IA3", "LOHA", "LOKR", "LORA", "OFT", "RANDLORA", "VERA"]
MORE = {
    "IA3": {"feedforward_modules": ["down_proj"]},
    "ADALORA": {"total_step": 10, "init_r": 4, "target_r": 2},
}


def adapted(method, model, **options):
    peft = pytest.importorskip("peft")
    config = peft.PEFT_TYPE_TO_CONFIG_MAPPING[method]
    return peft.get_peft_model(model, config(target_modules=["q_proj", "down_proj"], **MORE.get(method, {}), **options))


@pytest.mark.filterwarnings(
    "ignore:(Failed to load the CUDA extension|Setting boft_n):UserWarning"
)  # BOFT goes on without
@pytest.mark.parametrize(
    ("method", "order"), [*((one, "adapted first") for one in METHODS), ("LORA", "prepared first")]
)
def test_methods_of_peft_train_on_the_grid_and_ship_exactly(tmp_path, method, order):
    """The grid is on the adapted layers alone, so that a method that left it out would have the losses of float."""
    rule = qkit.Rule(("*.q_proj", "*.down_proj"), weight=qkit.Grid("int2", 64))
    recipe = qkit.Recipe("adapted", (qkit.Rule(("lm_head",)), rule))

    def run(callbacks):
        torch.manual_seed(0)
        base = qkit.prepare(build("torchao"), recipe) if callbacks and order == "prepared first" else build("torchao")
        one = trainer(tmp_path, adapted(method, base), callbacks=callbacks, learning_rate=2e-2, max_steps=3)
        one.train()
        return one

    on_grid, plain = run([QatCallback(recipe)]), run([])
    assert losses(on_grid)[0] != pytest.approx(losses(plain)[0], abs=1e-5)
    merged = qkit.merge(on_grid.model)
    assert type(merged).__name__ == "LlamaForCausalLM"
    assert len(prepared(merged)) == 4
    want, before = reference_codes(merged), reference_codes(qkit.prepare(build("torchao"), recipe))
    assert any((want[path] != before[path]).any() for path in want) or method == "VERA"
    assert_exact(want, codes(qkit.convert(merged)))


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("LILY", {}, "which cannot be merged"),
        ("BEFT", {}, "which cannot be merged .*no bias"),
        ("POLY", {"n_tasks": 1, "r": 4}, "which cannot be merged"),
        ("LORA", {"lora_bias": True}, "which cannot be merged .*no bias"),
        ("LORA", {"alora_invocation_tokens": [1]}, "which cannot be merged .*aLoRA"),
        ("LN_TUNING", {}, "ln_tuning.LNTuningLayer leaves it out"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # peft's own doubts
def test_adapters_that_could_not_be_shipped_are_refused_before_the_first_step(tmp_path, method, options, message):
    with pytest.raises((qkit.StageError, qkit.RecipeError), match=message):
        qkit.prepare(adapted(method, build("torchao"), **options), RECIPE)
    model = adapted(method, qkit.prepare(build("torchao"), RECIPE), **options)
    with pytest.raises(qkit.StageError, match=message if method != "LN_TUNING" else "cannot see past ln_tuning"):
        trainer(tmp_path, model, callbacks=[QatCallback(RECIPE)])


@pytest.mark.parametrize("method", ["PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"])
def test_prompts_of_peft_train_beside_a_base_that_is_shipped_alone(tmp_path, method):
    peft = pytest.importorskip("peft")
    config = peft.PEFT_TYPE_TO_CONFIG_MAPPING[method](task_type="CAUSAL_LM", num_virtual_tokens=2)
    recipe = qkit.Recipe("first", (qkit.Rule(("model.layers.0.*",), weight=qkit.Grid("int2", 64)),))
    runs = []
    for callbacks in ([QatCallback(recipe)], []):
        torch.manual_seed(0)
        runs.append(trainer(tmp_path, peft.get_peft_model(build("torchao"), config), callbacks=callbacks))
        runs[-1].train()
    assert losses(runs[0]) != losses(runs[1])
    model = runs[0].model
    assert len(prepared(model)) == 7
    with pytest.raises(qkit.StageError, match=r"prompts of a PeftModelForCausalLM .*convert model\.get_base_model\(\)"):
        qkit.merge(model)
    with pytest.raises(qkit.StageError, match="is inside of a PeftModelForCausalLM"):
        qkit.save(model, tmp_path / "out")
    base = model.get_base_model()
    assert_exact(reference_codes(base), codes(qkit.convert(base)))


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")  # peft's, of each norm that is no LayerNorm
def test_the_merge_takes_norms_tokens_and_adapters_inside_of_copies(tmp_path):
    peft = pytest.importorskip("peft")
    norms = peft.get_peft_model(build("torchao"), peft.LNTuningConfig(target_modules=["input_layernorm"]))
    tokens = lora(build("torchao"), trainable_token_indices=[1, 2])
    copies = lora(build("torchao"), modules_to_save=["mlp"])
    cases = [(norms, "ln_tuning", 3.0), (tokens, "trainable_tokens_delta", 0.5), (copies, "lora_B", 0.2)]
    for model, part, step in cases:
        model = qkit.prepare(model, "int8-g64")
        with torch.no_grad():
            for key, one in model.named_parameters():
                if part in key:
                    one.add_(step)
        want = logits(model.eval())
        moved = (logits(qkit.prepare(build("torchao"), "int8-g64").eval()) - want).abs().max()
        merged = qkit.merge(model)
        assert (logits(merged) - want).abs().max() < moved / 8  # rounding of merged weights
        assert {key for key, _ in merged.named_parameters()} == {key for key, _ in build("torchao").named_parameters()}
        out = qkit.save(qkit.convert(merged), tmp_path / part)
        there = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
        np.testing.assert_allclose(logits(there), logits(merged), atol=1e-3)  # another order of sums


def test_tokens_that_train_in_an_embedding_on_a_grid_are_refused(tmp_path):
    both = qkit.Recipe("both", (qkit.Rule(("*",), kind="embedding", weight=qkit.Grid("int8", 64)),))
    with pytest.raises(qkit.RecipeError, match="TrainableTokensLayer leaves it out"):
        qkit.prepare(lora(build("torchao"), trainable_token_indices=[1, 2]), both)
    model = lora(qkit.prepare(build("torchao"), both), trainable_token_indices=[1, 2])
    with pytest.raises(qkit.StageError, match=r"cannot see past trainable_tokens\.TrainableTokensLayer"):
        trainer(tmp_path, model, callbacks=[QatCallback(both)])


def test_the_merge_takes_the_trained_copy_of_a_module():
    model = qkit.prepare(lora(build("torchao"), modules_to_save=["lm_head"]), RECIPE)
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save.default.weight.mul_(2)
    want = logits(model)
    merged = qkit.merge(model)
    assert torch.equal(merged.lm_head.weight, build("torchao").lm_head.weight * 2)
    assert not [name for name, _ in merged.named_parameters() if "modules_to_save" in name or "lora" in name]
    assert logits(merged).shape == want.shape


@pytest.mark.parametrize("adapted", [False, True])
def test_trl_trains_a_model_that_transformers_opens(tmp_path, adapted):
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    datasets = pytest.importorskip("datasets", reason="TRL needs datasets")
    peft = pytest.importorskip("peft")
    make(tmp_path / "model", "llama", vocab_size=260)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.add_special_tokens({"eos_token": "<end>", "pad_token": "<pad>"})
    options = {
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "bf16": False,
    }
    options |= {
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    }
    rows = datasets.Dataset.from_list([{"text": f"{i} squared is {i * i}"} for i in range(16)])

    def run(callbacks):
        one = trl.SFTTrainer(
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model"),
            trl.SFTConfig(str(tmp_path / "run"), **options),
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=peft.LoraConfig(target_modules=["q_proj", "down_proj"]) if adapted else None,
            callbacks=callbacks,
        )
        one.train()
        return one

    on_grid, plain = run([QatCallback(RECIPE)]), run([])
    assert losses(on_grid) != losses(plain)
    model = qkit.merge(on_grid.model) if adapted else on_grid.model
    assert_exact(reference_codes(model), codes(qkit.convert(model)))
    out = qkit.save(model.eval(), tmp_path / "out")
    assert (out / "tokenizer.json").exists()
    there = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    np.testing.assert_allclose(logits(there), logits(model), atol=1e-3)  # another order of sums


def test_a_wrapper_that_qkit_does_not_know_is_refused_by_name():
    class Patched(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.lora_down = inner, torch.nn.Linear(128, 4, bias=False)

        def forward(self, x):
            return self.inner(x) + self.lora_down(x).sum()

    before, after = build("torchao"), qkit.prepare(build("torchao"), RECIPE)
    for model in (before, after):
        attention = model.model.layers[0].self_attn
        attention.q_proj = Patched(attention.q_proj)
    for verb in (lambda: qkit.prepare(before, RECIPE), lambda: qkit.convert(after), lambda: qkit.merge(after)):
        with pytest.raises(qkit.StageError, match="is inside of a Patched; qkit cannot see past Patched"):
            verb()


def test_a_wrapper_without_usual_names_is_seen_where_a_layer_was_prepared():
    class Around(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

    model = qkit.prepare(build("torchao"), RECIPE)
    model.model.layers[1].mlp.up_proj = Around(model.model.layers[1].mlp.up_proj)
    with pytest.raises(qkit.StageError, match=r"up_proj\.inner is inside of a Around"):
        qkit.convert(model)


CONVERTED = ["mxfp4-a16", "int4-g64", "int8-row", "mxfp8-a16", "int2-g64", "nvfp4-a16"]


@pytest.mark.parametrize("recipe", CONVERTED)
def test_peft_on_a_converted_model_is_merged_and_not_dropped(recipe):
    model = lora(qkit.convert(build("torchao"), recipe))
    base = codes(qkit.convert(build("torchao"), recipe))
    merged = qkit.merge(model)
    changed = [path for path, one in codes(merged).items() if (one != base[path]).any()]
    assert len(changed) == 4
    assert type(merged).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize("recipe", CONVERTED)
def test_the_merge_of_peft_itself_into_codes_is_refused(recipe):
    model = lora(qkit.convert(build("torchao"), recipe))
    theirs = type(model.base_model.model.model.layers[0].self_attn.q_proj).__name__ == "TorchaoLoraLinear"
    with pytest.raises(ValueError if theirs else qkit.StageError, match="get_apply" if theirs else r"call qkit\.merge"):
        model.merge_and_unload()


def test_an_adapter_that_nobody_merged_leaves_the_model_unchanged():
    model = lora(qkit.convert(build("torchao"), "mxfp4-a16"))
    want = logits(model.eval())
    with model.disable_adapter():
        assert not torch.equal(logits(model), want)
    assert torch.equal(logits(model), want)


# 7: learned scales


def test_learned_scales_in_the_optimizer_of_the_trainer_are_refused(tmp_path):
    one = trainer(tmp_path, build("torchao"), callbacks=[QatCallback("mxfp4-a16-learned")], weight_decay=0.1)
    with pytest.raises(qkit.StageError, match=r"is a learned scale, and the trainer's optimizer .*qkit.adamw"):
        one.train()
    late = trainer(tmp_path, build("torchao"))
    late.add_callback(QatCallback("mxfp4-a16-learned"))
    with pytest.raises(qkit.StageError, match="leaves it out"):
        late.train()


def test_learned_scales_move_with_the_optimizer_that_the_message_names(tmp_path):
    model = qkit.prepare(build("torchao"), "mxfp4-a16-learned")
    before = {name: one.detach().clone() for name, one in model.named_parameters() if name.endswith("weight_offset")}
    assert before
    one = trainer(
        tmp_path, model, callbacks=[QatCallback("mxfp4-a16-learned")], optimizers=(qkit.adamw(model, lr=1e-3), None)
    )
    one.train()
    moved = max(
        float((x.detach() - before[name]).abs().max()) for name, x in model.named_parameters() if name in before
    )
    assert moved > 0.01


# 8: evaluation


@pytest.mark.parametrize(
    "schedule", [{"start": 3}, {"windows": [(4, 4)]}, {"ramp": [(3, "int8-g64")]}, {"start": 2, "interval": 2}]
)
def test_evaluation_is_on_the_grid_whatever_the_schedule_says(tmp_path, schedule):
    seen = []

    class Watch(transformers.TrainerCallback):
        def on_evaluate(self, *_, model=None, **more):
            twin = qkit.prepare(build("torchao"), RECIPE)
            twin.load_state_dict(model.state_dict())
            seen.append(torch.equal(logits(model.eval()), logits(twin.eval())))

    every = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 4}
    callbacks = [QatCallback(RECIPE, **schedule), Watch()]
    one = trainer(tmp_path, build("torchao"), callbacks=callbacks, **every)
    one.train()
    assert seen == [True] * 4
    assert grids(one.model) == {"int2-g64-signed"}


# 9: save_pretrained


@pytest.mark.parametrize("recipe", ["int4-g64", "mxfp4-a16", "int8-dynamic-act-int8-weight"])
def test_save_pretrained_of_a_converted_model_writes_the_artifact(tmp_path, recipe):
    model = qkit.convert(build("torchao"), recipe).eval()
    model.save_pretrained(tmp_path / "out")
    again = qkit.load(tmp_path / "out", backend="torchao").eval()
    assert torch.equal(logits(again), logits(model))
    assert_exact(codes(model), codes(again))
    if not recipe.startswith("mx"):  # compressed-tensors decodes those to bfloat16 alone
        there = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
        np.testing.assert_allclose(
            logits(there), logits(model), atol=1e-3 if "act" not in recipe else 0.2
        )  # its kernels


def test_the_trainer_saves_a_converted_model(tmp_path):
    model = qkit.convert(build("torchao"), "int4-g64")
    trainer(tmp_path / "run", model).save_model(str(tmp_path / "out"))
    assert_exact(codes(model), codes(qkit.load(tmp_path / "out", backend="torchao")))


# 11: averages of weights


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("recipe", [RECIPE, "int8-dynamic-act-int8-weight", "mxfp4-a16"])
def test_weights_that_are_copied_in_while_a_model_evaluates_are_seen(recipe, compiled):
    torch.compiler.reset()
    model = qkit.prepare(build("torchao"), recipe).eval()
    run = torch.compile(model, backend="aot_eager") if compiled else model
    logits(run)
    averages = [one.detach() * 0.5 for one in model.parameters()]
    before = [one.detach().clone() for one in model.parameters()]
    for wanted in (averages, before):  # as torch_ema's copy_to and restore, and diffusers'
        for one, value in zip(model.parameters(), wanted, strict=True):
            one.data.copy_(value)
        twin = qkit.prepare(build("torchao"), recipe)
        twin.load_state_dict(model.state_dict())
        want = logits(torch.compile(twin.eval(), backend="aot_eager") if compiled else twin.eval())
        assert torch.equal(logits(run), want)


def moved_copies(model):
    return [one.detach() * 0.5 + 0.01 for one in model.parameters()]


def _averaged(model, wanted):
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5)).eval()
    logits(average)
    for _ in range(2):
        with torch.no_grad():
            for one, value in zip(model.parameters(), wanted, strict=True):
                one.copy_(value)
        average.update_parameters(model)
        logits(average)
    return average, average.module


def _timm(model, wanted):
    """ModelEmaV3: a copy in evaluation mode, whose parameters move by one call for all of them."""
    average = copy.deepcopy(model).eval()
    logits(average)
    with torch.no_grad():
        torch._foreach_lerp_(list(average.parameters()), wanted, weight=0.5)
    return average, average


def _diffusers(model, wanted):
    """EMAModel.store, copy_to and restore, and copy_to again."""
    stored = [one.detach().cpu().clone() for one in model.parameters()]
    for values in (wanted, stored, wanted):
        for one, value in zip(model.parameters(), values, strict=True):
            one.data.copy_(value.to(one.device).data)
        logits(model)
    return model, model


def _foreach(model, wanted):
    """diffusers' EMAModel with foreach."""
    torch._foreach_copy_([one.data for one in model.parameters()], wanted)
    return model, model


def _swapped(model, wanted):
    for one, value in zip(model.parameters(), wanted, strict=True):
        one.data = value.clone()
    return model, model


@pytest.mark.parametrize("average", [_averaged, _timm, _diffusers, _foreach, _swapped], ids=lambda one: one.__name__)
@pytest.mark.parametrize("recipe", [RECIPE, "int8-dynamic-act-int8-weight", "mxfp4-a16-learned", "mixture"])
def test_averages_of_each_library_are_seen_in_evaluation(recipe, average):
    def made():
        if recipe != "mixture":
            return qkit.prepare(build("torchao"), recipe).eval()
        made = {"num_local_experts": 4, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
        config = transformers.AutoConfig.for_model(
            "mixtral", vocab_size=256, hidden_size=64, intermediate_size=64, **made
        )
        torch.manual_seed(0)
        return qkit.prepare(transformers.AutoModelForCausalLM.from_config(config), RECIPE).eval()

    model = made()
    before = logits(model)
    ran, holder = average(model, moved_copies(model))
    twin = made()
    twin.load_state_dict(holder.state_dict())
    assert torch.equal(logits(ran), logits(twin))
    assert not torch.equal(logits(ran), before)


@pytest.mark.parametrize("order", ["qkit first", "accelerate first"])
def test_the_loop_of_accelerate_trains_on_the_grid_and_ships_exactly(tmp_path, order):
    accelerate = pytest.importorskip("accelerate")

    def run(prepare):
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = prepare(build("torchao")) if order == "qkit first" else build("torchao")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        loader = torch.utils.data.DataLoader(data(), batch_size=2)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        model = model if order == "qkit first" else prepare(model)
        seen = []
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                seen.append(loss.item())
        accelerator.save_state(tmp_path / "state")
        want = logits(model)
        with torch.no_grad():
            for one in model.parameters():
                one.mul_(0.5)
        accelerator.load_state(tmp_path / "state")
        assert torch.equal(logits(model), want)
        return accelerator.unwrap_model(model), seen

    (model, on_grid), (_, plain) = run(lambda one: qkit.prepare(one, RECIPE)), run(lambda one: one)
    assert on_grid != plain
    want = reference_codes(model)
    assert_exact(want, codes(qkit.convert(model)))
    out = qkit.save(model.eval(), tmp_path / "out")
    there = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    np.testing.assert_allclose(logits(there), logits(model), atol=1e-3)  # another order of sums


# 12: the share of a model


def test_a_recipe_for_less_than_half_of_a_mixture_warns_by_name_and_share():
    config = transformers.AutoConfig.for_model(
        "mixtral", vocab_size=256, hidden_size=64, num_hidden_layers=1, intermediate_size=128, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=8,
    )  # fmt: skip
    dense = qkit.Recipe("dense", (qkit.Rule(("lm_head",)), qkit.Rule(("*",), weight=qkit.Grid("int4", 64))))
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.warns(
        CoverageWarning, match=r"quantizes 6\.\d% of the weights, and leaves in float model.layers.\*.mlp.experts"
    ):
        qkit.prepare(model, dense)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qkit.prepare(build("torchao"), RECIPE)


def test_a_recipe_for_less_than_half_of_a_directory_warns_on_one_line(tmp_path):
    make(tmp_path / "model", "mixtral", intermediate_size=512)
    dense = (
        '[grids.w]\nelement = "int4"\ngroup = 64\n[[rules]]\nmatch = "lm_head"\n[[rules]]\nmatch = "*"\nweight = "w"\n'
    )
    (tmp_path / "dense.toml").write_text("schema = 1\n" + dense)
    command = [
        sys.executable,
        "-c",
        "from qkit.cli import main; main()",
        "quantize",
        "model",
        "out",
        "-r",
        "dense.toml",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"^warning: recipe 'dense' quantizes \d\.\d% of the weights, and leaves in float .*experts",
        done.stderr,
        re.MULTILINE,
    )


# 14: nothing changed


def test_training_that_changes_no_code_warns(tmp_path):
    one = trainer(tmp_path, build("torchao"), callbacks=[QatCallback("int2-g64")], learning_rate=1e-9)
    with pytest.warns(UnchangedWarning, match=r"changed no code of 14 layers.*now 1e-09"):
        one.train()


@pytest.mark.parametrize("adapted_first", [True, False])
def test_adapters_of_peft_that_change_no_code_warn(tmp_path, adapted_first):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    for rate, warns in ((1e-9, True), (1e-1, False)):
        model = build("torchao")
        model = peft.get_peft_model(model if adapted_first else qkit.prepare(model, "int2-g64"), config)
        one = trainer(tmp_path, model, callbacks=[QatCallback("int2-g64")], learning_rate=rate)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            one.train()
        told = [str(one.message) for one in seen if one.category is UnchangedWarning]
        assert len(told) == warns
        assert all("changed no code of 4 layers" in one for one in told)


# regrid and unprepare


def trained(name):
    model = qkit.prepare(small(name), "int2-g32")
    return qkit.regrid(model, "int8-g32"), qkit.prepare(small(name), "int8-g32")


@pytest.mark.parametrize("name", ["torchao", "mlx"])
def test_regrid_puts_a_prepared_model_on_another_grid(name):
    engine = qkit.backend(name)
    model, want = trained(name)
    assert np.array_equal(engine.logits(model, TOKENS), engine.logits(want, TOKENS))
    with pytest.raises(qkit.StageError, match="no layer of this model is prepared"):
        qkit.regrid(small(name), "int8-g32")
    with pytest.raises(qkit.RecipeError, match="learns scales"):
        qkit.regrid(model, "mxfp4-a16-learned")


@pytest.mark.parametrize("name", ["torchao", "mlx"])
@pytest.mark.parametrize("recipe", ["int2-g32", "mxfp4-a16-learned"])
def test_unprepare_gives_the_float_model_back(name, recipe):
    engine = qkit.backend(name)
    model, plain = qkit.unprepare(qkit.prepare(small(name), recipe)), small(name)
    assert np.array_equal(engine.logits(model, TOKENS), engine.logits(plain, TOKENS))
    assert engine.tensors(model).keys() == engine.tensors(plain).keys()
    assert {type(layer.module) for layer in engine.layers(model)} == {
        type(layer.module) for layer in engine.layers(plain)
    }
    qkit.prepare(model, "int4-g32")
    part = qkit.unprepare(model, "model.layers.0.*")
    assert len([row for row in qkit.coverage(part).rows if row.state == "prepared"]) == 7
    with pytest.raises(qkit.StageError, match="no prepared layer matches"):
        qkit.unprepare(model, "nothing")


# the origin of a model


def test_save_without_a_source_writes_the_tokenizer_of_a_model_that_knows_it(tmp_path):
    make(tmp_path / "model", "llama")
    for number, model in enumerate(
        (
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model"),
            qkit.load(tmp_path / "model", backend="torchao"),
            qkit.load(tmp_path / "model", backend="mlx"),
        )
    ):
        out = qkit.save(qkit.convert(model, "int4-g64"), tmp_path / f"out{number}")
        assert {"config.json", "tokenizer.json", "model.safetensors"} <= {one.name for one in out.iterdir()}


def test_save_refuses_a_model_of_mlx_lm_that_does_not_say_where_it_came_from(tmp_path):
    load = pytest.importorskip("mlx_lm").load
    make(tmp_path / "model", "llama")
    model = qkit.convert(load(str(tmp_path / "model"))[0], "int4-g64")
    with pytest.raises(qkit.ArtifactError, match=r"does not say where it came from.*give source="):
        qkit.save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    qkit.save(model, tmp_path / "out", source=tmp_path / "model")
    assert (tmp_path / "out/config.json").exists()


# 10: files of rows

CHAT = [[{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"it is {i * i}"}] for i in range(40)]
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"


def chat_model(path, template=TEMPLATE):
    make(path / "model", "llama")
    if template:
        (path / "model/chat_template.jinja").write_text(template)
    return path / "model"


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def text_of(folder, file):
    tokens = read_text([str(file)], folder=folder, config=read_config(folder)).tokens
    return transformers.AutoTokenizer.from_pretrained(folder).decode(tokens)


@pytest.mark.parametrize("key", ["messages", "conversations"])
def test_chat_rows_are_trained_on_through_the_template_of_the_model(tmp_path, key):
    folder = chat_model(tmp_path)
    file = jsonl(tmp_path / "chat.jsonl", [{key: one} for one in CHAT])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert text_of(folder, file) == "".join(tokenizer.apply_chat_template(one, tokenize=False) for one in CHAT)


def test_rows_of_text_are_trained_on_without_their_braces(tmp_path):
    file = jsonl(tmp_path / "rows.jsonl", [{"text": "one "}, {"text": "two"}])
    assert text_of(chat_model(tmp_path), file) == "one two"
    whole = tmp_path / "rows.json"
    whole.write_text(json.dumps([{"text": "one "}, {"text": "two"}]))
    assert text_of(tmp_path / "model", whole) == "one two"


@pytest.mark.parametrize(
    ("name", "rows", "template", "message"),
    [
        ("a.jsonl", [{"messages": [{"content": "hello"}]}], TEMPLATE, r"row 1 of .*a message without a role"),
        ("a.jsonl", [{"messages": CHAT[0]}], None, r"does not write conversations .*put a chat_template\.jinja there"),
        ("a.jsonl", [{"messages": CHAT[0]}], "{{ raise_exception('no such role') }}", "conversation 1: no such role"),
        ("a.jsonl", [{"prompt": "2?"}], TEMPLATE, "row 1 of .* has a prompt without a completion"),
        (
            "a.jsonl",
            [{"prompt": "2?", "chosen": "4", "rejected": "5"}],
            TEMPLATE,
            "for preferences: train with --method",
        ),
        ("a.jsonl", [{"title": "x"}], TEMPLATE, "row 1 of .* has neither text nor messages nor a prompt: it has title"),
        ("a.jsonl", [{"text": "x"}, {"messages": CHAT[0]}], TEMPLATE, "rows with messages and rows with text"),
        ("a.jsonl", [{"text": 3}], TEMPLATE, "text is 3: want a string"),
        ("a.json", [1], TEMPLATE, "rows that are no objects: write one object a line; to train on the JSON itself"),
        ("a.parquet", [{"text": "x"}], TEMPLATE, "datasets does not open it"),
        ("a.tsv", [{"text": "x"}], TEMPLATE, "is no text: write its rows as Parquet or JSON Lines"),
    ],
)
def test_rows_that_cannot_be_trained_on_are_refused_by_name(tmp_path, name, rows, template, message):
    folder = chat_model(tmp_path, template)
    with pytest.raises(qkit.RunError, match=message):
        text_of(folder, jsonl(tmp_path / name, rows))


# 13, 14: on the command line


def test_the_merge_says_which_adapters_are_exact(tmp_path):
    peft = pytest.importorskip("peft")
    path = folder(tmp_path, "torchao")
    model = qkit.load(path / "model", backend="torchao")
    lora(model).save_pretrained(tmp_path / "theirs")
    assert peft
    ours = qkit.adapt(
        qkit.prepare(qkit.load(path / "model", backend="torchao"), "int4-g32"), qkit.Adapter(match=("*_proj",))
    )
    adapters.save(ours, tmp_path / "ours")
    for name in ("ours", "theirs"):
        arguments = [str(path / "model"), str(tmp_path / name), str(tmp_path / f"out-{name}"), "--recipe", "int4-g32"]
        done = CliRunner().invoke(application, ["merge", *arguments, "--backend", "torchao"])
        assert done.exit_code == 0, done.output
        assert ("the merge moves the loss" in " ".join(done.stderr.split())) == (name == "theirs")
    said = " ".join(CliRunner().invoke(application, ["merge", "--help"]).output.split())
    assert "Exact for adapters that qkit trained" in said


def test_compare_names_the_master_weights_it_took(tmp_path):
    path = folder(tmp_path, "torchao")
    train_model(run_from_table(table(path, backend="torchao")))
    arguments = [str(path / "model"), "--qat", str(path / "out"), "--data", str(path / "text.txt"), "--windows", "2"]
    done = CliRunner().invoke(
        application, ["compare", *arguments, "--length", "16", "--backend", "torchao", "--out", str(tmp_path / "page")]
    )
    assert done.exit_code == 0, done.output
    said = " ".join(done.output.split())
    assert "codes of , " not in said
    assert "the trained master weights, equal to those of the trained model" in said


@pytest.mark.parametrize("name", ["torchao", "mlx"])
@pytest.mark.parametrize("adapter", [None, {"rank": 4}])
def test_a_run_that_changes_no_code_warns_and_counts(tmp_path, name, adapter):
    path = folder(tmp_path, name)
    run = run_from_table(table(path, backend=name, adapter=adapter, learning_rate=1e-9, steps=2))
    with pytest.warns(UnchangedWarning, match="changed no code of 14 layers"):
        outcome = train_model(run)
    assert (outcome.changed_layers, outcome.quantized_layers) == (0, 14)
    moved = train_model(run_from_table(table(path, backend=name, out=str(path / "moved"), learning_rate=1e-2)))
    assert moved.changed_layers == 14
