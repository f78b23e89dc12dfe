"""One line in transformers' Trainer and in TRL's: what trains is the grid, and what is loaded is never stale."""

import pytest
from models import build

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="Trainer needs accelerate")

import qkit_torchao  # noqa: E402
from qkit_torchao import QatCallback  # noqa: E402
from transformers import Trainer, TrainingArguments  # noqa: E402

import qkit  # noqa: E402

RECIPE = "int2-g64"
#: of libraries, not of qkit: pinned memory without a GPU, what peft 0.21 and TRL 1.16 ask of transformers 5
theirs = [
    pytest.mark.filterwarnings(f"ignore:{text}")
    for text in (
        ".*pin_memory:UserWarning",
        ".*:FutureWarning",
        ".*:DeprecationWarning",
        ".*use_reentrant:UserWarning",
    )
]
pytestmark = theirs


def data():
    drawn = torch.randint(0, 256, (16, 12), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in drawn]


def trainer(folder, model=None, *, callbacks=None, **options):
    wishes = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **options,
    }
    arguments = TrainingArguments(str(folder), **wishes)
    model = build("torchao") if model is None else model
    callbacks = [QatCallback(RECIPE)] if callbacks is None else callbacks
    return Trainer(model, arguments, train_dataset=data(), eval_dataset=data(), callbacks=callbacks)


def losses(one):
    return [entry["loss"] for entry in one.state.log_history if "loss" in entry]


def assert_not_stale(model, *, bf16=False):
    """The model computes what a fresh one does that has its weights; accelerate leaves its autocast on it, and a cast to fp32."""
    twin = qkit.prepare(build("torchao"), RECIPE)
    twin.load_state_dict(model.state_dict())
    ids = torch.stack([one["input_ids"] for one in data()])
    with torch.no_grad():
        mine = model.eval()(ids).logits
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            assert torch.equal(mine, twin.eval()(ids).logits.float())


OPTIONS = {
    "plain": {},
    "accumulated": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "checkpointed": {"gradient_checkpointing": True},
    "bf16": {"bf16": True},
    "compiled": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
}


@pytest.mark.parametrize("case", OPTIONS)
def test_the_callback_trains_as_a_model_that_was_prepared_before(tmp_path, case):
    torch.compiler.reset()
    runs = [
        trainer(tmp_path, **OPTIONS[case]),
        trainer(tmp_path, qkit.prepare(build("torchao"), RECIPE), callbacks=[], **OPTIONS[case]),
        trainer(tmp_path, callbacks=[], **OPTIONS[case]),
    ]
    for one in runs:
        one.train()
    assert losses(runs[0]) == losses(runs[1]) != losses(runs[2])
    assert_not_stale(runs[0].model, bf16=case == "bf16")


def test_a_callback_that_comes_late_prepares_what_the_optimizer_holds(tmp_path):
    late = trainer(tmp_path, callbacks=[])
    late.add_callback(QatCallback(RECIPE))
    early = trainer(tmp_path)
    for one in (late, early):
        one.train()
    assert losses(late) == losses(early)


def test_what_is_trained_is_what_is_saved(tmp_path):
    callback = QatCallback(RECIPE)
    one = trainer(tmp_path / "run", callbacks=[callback])
    one.train()
    assert callback.coverage.bits_per_weight == qkit.coverage(one.model).bits_per_weight < 16
    ids = data()[0]["input_ids"][None]
    with torch.no_grad():
        trained = one.model.eval()(ids).logits
        again = qkit.load(qkit.save(qkit.convert(one.model), tmp_path / "out"), backend="torchao")
        assert torch.equal(again(ids).logits, trained)


def test_a_checkpoint_has_plain_names_and_a_resumed_run_goes_on(tmp_path):
    whole = trainer(tmp_path / "whole", save_strategy="steps", save_steps=2)
    whole.train()
    from safetensors.torch import load_file

    assert load_file(tmp_path / "whole/checkpoint-2/model.safetensors").keys() == build("torchao").state_dict().keys()
    resumed = trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    assert losses(resumed) == losses(whole)
    assert_not_stale(resumed.model)
    for mine, other in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_the_best_model_that_is_loaded_at_the_end_is_not_stale(tmp_path):
    every = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    one = trainer(tmp_path, load_best_model_at_end=True, learning_rate=1.0, **every)
    one.train()
    scores = {entry["step"]: entry["eval_loss"] for entry in one.state.log_history if "eval_loss" in entry}
    assert one.state.best_global_step == min(scores, key=scores.get) < 4
    assert one.evaluate()["eval_loss"] == min(scores.values())
    assert_not_stale(one.model)


def test_training_quantizes_from_the_start_step_on(tmp_path):
    runs = [
        trainer(tmp_path, callbacks=[]),
        trainer(tmp_path, callbacks=[QatCallback(RECIPE, start=2)]),
        trainer(tmp_path),
    ]
    for one in runs:
        one.train()
    plain, late, early = map(losses, runs)
    assert late[:2] == plain[:2] != early[:2]
    assert late[2] != plain[2]


def test_a_recipe_that_does_not_fit_is_refused_before_training(tmp_path):
    with pytest.raises(qkit.RecipeError, match="unknown recipe"):
        trainer(tmp_path, callbacks=[QatCallback("int9-g64")])


@pytest.mark.parametrize("adapted", ["full", "LoRA"])
def test_trl_trains_on_the_grid(tmp_path, adapted):
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    datasets = pytest.importorskip("datasets", reason="TRL needs datasets")
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(target_modules=["q_proj", "down_proj"]) if adapted == "LoRA" else None
    arguments = trl.SFTConfig(
        str(tmp_path), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1,
        save_strategy="no", report_to=[], use_cpu=True, bf16=False, disable_tqdm=True, gradient_checkpointing=False,
    )  # fmt: skip
    rows = datasets.Dataset.from_list([{"input_ids": one["input_ids"].tolist()} for one in data()])

    def run(callbacks):
        model = build("torchao")
        tokenizer = a_tokenizer()
        one = trl.SFTTrainer(
            model, arguments, train_dataset=rows, processing_class=tokenizer, peft_config=lora, callbacks=callbacks
        )
        one.train()
        return one

    callback = QatCallback(RECIPE)
    on_grid, plain = run([callback]), run([])
    assert losses(on_grid) != losses(plain)
    states = {row.path: row.state for row in callback.coverage.rows}
    prepared = [path for path, state in states.items() if state == "prepared"]
    assert len(prepared) == 14
    assert not [path for path in prepared if "lora" in path]
    if lora:
        assert sum(path.endswith(".base_layer") for path in prepared) == 4
        assert [path for path in states if "lora_A" in path]
        merged = on_grid.model.merge_and_unload()
        assert len([row for row in qkit.coverage(merged).rows if row.state == "prepared"]) == 14


def a_tokenizer():
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(256)}, unk_token="w0"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w2")


def test_the_callback_has_a_public_path_that_pluggy_does_not_load():
    from qkit_torchao.training import transformers as room

    assert qkit_torchao.QatCallback is room.QatCallback
    assert "QatCallback" not in dir(qkit_torchao)
    with pytest.raises(AttributeError, match="has no attribute 'Callback'"):
        qkit_torchao.Callback
