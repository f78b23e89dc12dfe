"""Every statement of other tools on training holds with qkit, in no more lines; docs/how-to/coming-from.md shows these lines."""

import json
import re
import shlex
import shutil
from importlib.util import find_spec
from pathlib import Path

import coming_from
import numpy as np
import pytest
from coming_from import (
    AXOLOTL,
    BITS,
    COMPARE,
    FINALIZE,
    FORGATHER,
    HOOK,
    INC,
    LOAD,
    LOADS,
    METHODS,
    MLX_LM,
    PAGE,
    SCHEDULE,
    STUDIO,
    TORCHAO,
    TORCHAO_AFTER,
    TORCHAO_LORA,
    TORCHAO_SCHEDULE,
    TRL,
    UNSLOTH,
    filled,
    lines,
)  # fmt: skip
from models import TOKENS, build, make
from runs import TEXT, arrays
from typer.testing import CliRunner

import qkit
from qkit.cli.application import application

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{text}")  # of libraries, not of qkit
    for text in (".*pin_memory:UserWarning", ".*:FutureWarning", ".*:DeprecationWarning")
]


def run(code, **names):
    """The names after the lines of a user."""
    exec(compile(code, "a user's lines", "exec"), names)
    return names


def masters(name, model):
    """By path, the codes of the reference for the master weights of a prepared model."""
    engine = qkit.backend(name)
    found = [layer for layer in engine.layers(model) if layer.stage == "prepared"]
    return {one.path: qkit.quantize(engine.to_numpy(engine.weight(one.module)), one.rule.weight).codes for one in found}


def differing(name, model, want):
    """How many codes of a converted model differ from `want`."""
    engine = qkit.backend(name)
    found = {one.path: one.module for one in engine.layers(model) if one.stage == "converted"}
    assert found.keys() == want.keys()
    assert want
    return sum(int((engine.to_numpy(engine.unpack(found[path]).codes) != one).sum()) for path, one in want.items())


def opened_elsewhere(folder):
    """The logits of a saved model in transformers."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return transformers.AutoModelForCausalLM.from_pretrained(folder)(torch.from_numpy(TOKENS).long()).logits


def torch_train(seen):
    """A user's loop, which notes its losses and the codes of the reference."""
    torch = pytest.importorskip("torch")

    def train(model):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        ids = torch.from_numpy(TOKENS).long()
        model.train()
        for _ in range(3):
            loss = model(ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.setdefault("losses", []).append(loss.item())
        seen["codes"] = masters("torchao", model)

    return train


def assert_holds(name, seen, plain, model, tmp_path, atol):
    """Active, exact, and opened without qkit."""
    assert seen["losses"] != plain["losses"]
    assert np.isfinite(seen["losses"]).all()
    assert differing(name, model, seen["codes"]) == 0
    out = qkit.save(model, tmp_path / "saved")
    if atol is not None:
        np.testing.assert_allclose(opened_elsewhere(out), qkit.backend(name).logits(model, TOKENS), atol=atol)


#: How far transformers' logits are from ours: its kernels for activations differ, and it decodes MX to bfloat16 alone.
NEAR = {"int4-weight-only": 1e-3, "int8-dynamic-act-int4-weight": 0.3, "float8-dynamic-act-float8-weight": 0.3}


def near(seed):
    return next((atol for recipe, atol in NEAR.items() if recipe in seed.ours), None)


@pytest.mark.parametrize("seed", [*TORCHAO, *INC], ids=str)
def test_a_loop_of_the_users_own(tmp_path, seed):
    assert lines(seed.ours) <= lines(seed.theirs)
    seen, plain = {}, {}
    torch_train(plain)(build("torchao"))
    model = run(seed.ours, model=build("torchao"), train=torch_train(seen))["model"]
    if seed in INC:  # whose lines end with training
        model = qkit.convert(model)
    assert_holds("torchao", seen, plain, model, tmp_path, near(seed))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("seed", TORCHAO, ids=str)
def test_the_lines_of_torchao_are_torchaos(seed):
    pytest.importorskip("torchao")
    seen = []
    code = seed.theirs.rpartition("\n")[0]  # its conversion needs kernels of a GPU
    run(code, model=build("torchao"), train=lambda model: seen.extend(type(one).__name__ for one in model.modules()))
    assert "FakeQuantizedLinear" in seen


def test_lora_on_the_grid(tmp_path):
    seed, seen, plain = TORCHAO_LORA, {}, {}
    assert lines(seed.ours) <= lines(seed.theirs)
    engine = qkit.backend("torchao")

    def train(model):
        torch_train(seen)(model)
        seen["logits"] = engine.logits(model, TOKENS)
        merged = qkit.merge(model)
        assert np.array_equal(engine.logits(merged, TOKENS), seen["logits"])
        seen["codes"] = masters("torchao", merged)

    torch_train(plain)(build("torchao"))
    code = seed.ours.replace("qkit.convert(qkit.merge(model))", "qkit.convert(model)")  # the test has merged it
    assert_holds("torchao", seen, plain, run(code, model=build("torchao"), train=train)["model"], tmp_path, 1e-3)
    other = run(seed.ours, model=build("torchao"), train=torch_train({}))["model"]
    assert np.array_equal(engine.logits(other, TOKENS), seen["logits"])


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_lines_of_torchao_with_lora_are_torchaos():
    pytest.importorskip("torchao")
    pytest.importorskip("peft")
    seen = []
    code = TORCHAO_LORA.theirs.rpartition("\n")[0]
    run(code, model=build("torchao"), train=lambda model: seen.extend(type(one).__name__ for one in model.modules()))
    assert "FakeQuantizedLinear" in seen


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_training_that_begins_in_float():
    pytest.importorskip("torchao")
    seed, plain = TORCHAO_SCHEDULE, {}
    assert lines(seed.ours) <= lines(seed.theirs)
    seen = []

    def train(model):
        note = {}
        torch_train(note)(model)
        seen.append(note)

    model = run(seed.ours, model=build("torchao"), train=train)["model"]
    torch_train(plain)(build("torchao"))
    assert seen[0]["losses"] == plain["losses"]
    run(seed.theirs, model=build("torchao"), train=train)
    assert seen[2]["losses"] == plain["losses"]
    twin = {}
    torch_train(twin)(half := build("torchao"))
    torch_train(twin)(half)
    assert seen[1]["losses"] != twin["losses"][3:] != seen[3]["losses"]
    assert differing("torchao", qkit.convert(model), seen[1]["codes"]) == 0


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_quantize_without_training(tmp_path):
    pytest.importorskip("torchao")
    assert lines(TORCHAO_AFTER.ours) <= lines(TORCHAO_AFTER.theirs)
    engine, plain = qkit.backend("torchao"), build("torchao")
    theirs, ours = (run(code, model=build("torchao"))["model"] for code in (TORCHAO_AFTER.theirs, TORCHAO_AFTER.ours))
    want = {one.path: qkit.quantize(engine.to_numpy(one.module.weight), qkit.recipe("int8-row").rules[-1].weight).codes
            for one in engine.layers(plain) if one.path in codes("torchao", ours)}  # fmt: skip
    assert differing("torchao", ours, want) == 0
    float_logits = engine.logits(plain, TOKENS)
    errors = [np.abs(engine.logits(one, TOKENS) - float_logits).mean() for one in (ours, theirs)]
    assert 0 < errors[0] < 1.1 * errors[1]  # torchao quantizes the head besides
    out = qkit.save(ours, tmp_path / "out")
    np.testing.assert_allclose(opened_elsewhere(out), engine.logits(ours, TOKENS), atol=1e-3)  # another order of sums


def forgathers_configuration(recipe):
    """The configuration of torchao that Forgather's registry of recipes names for a string."""
    torch, quantization = pytest.importorskip("torch"), pytest.importorskip("torchao.quantization")
    if recipe == "int8-dynamic-act-int4-weight":
        group = quantization.PerGroup(group_size=32)
        return quantization.Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=group)
    if recipe == "int4-weight-only":
        return quantization.Int4WeightOnlyConfig(group_size=128)
    return quantization.Float8DynamicActivationFloat8WeightConfig()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("seed", FORGATHER, ids=str)
def test_forgathers_recipe_strings_have_the_grids_of_its_registry(seed):
    """The same bits, groups and rounding error as torchao's quantizers, within 10 %: measured 0.93 to 1.03 of them."""
    torch = pytest.importorskip("torch")
    from torchao.quantization import quantize_
    from torchao.quantization.qat import QATConfig

    recipe = re.search(r'QatCallback\("(.*?)"\)', seed.ours)[1]
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(256, 64, bias=False))
    w, x = model[0].weight.detach().clone(), torch.randn(8, 256)
    quantize_(model, QATConfig(forgathers_configuration(recipe), step="prepare"))
    rule = qkit.recipe(recipe).rules[-1]
    pairs = [(w, model[0].weight_fake_quantizer, rule.weight), (x, model[0].activation_fake_quantizer, rule.activation)]
    for values, theirs, grid in pairs:
        assert (theirs is None) == (grid is None)
        if grid is None:
            continue
        ours = qkit.dequantize(qkit.quantize(values.numpy(), grid))
        errors = [
            float((one - values).pow(2).mean().sqrt()) for one in (torch.from_numpy(ours), theirs(values).detach())
        ]
        assert errors[0] == pytest.approx(errors[1], rel=0.1)
    group = getattr(model[0].weight_fake_quantizer.config, "group_size", None)
    if recipe.endswith("int4-weight") or recipe.startswith("int4"):
        assert (rule.weight.element.name, rule.weight.group) == ("int4", group)


def test_the_finalize_of_forgather(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    monkeypatch.chdir(tmp_path)
    assert lines(FINALIZE.ours) <= lines(FINALIZE.theirs)
    seen = {}
    model = qkit.prepare(build("torchao"), "int4-weight-only")
    torch_train(seen)(model)
    for source, want in ((model, seen["codes"]), (build("torchao"), None)):
        source.save_pretrained("run")
        done = CliRunner().invoke(application, shlex.split(FINALIZE.ours)[1:])
        assert done.exit_code == 0, (done.output, done.exception)
        opened = qkit.load("out", backend="torchao")
        want = want or masters("torchao", qkit.prepare(source, "int4-weight-only"))
        assert differing("torchao", opened, want) == 0
        shutil.rmtree("run")
        shutil.rmtree("out")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_three_way_evaluation_of_forgather(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    assert lines(COMPARE.ours) <= lines(COMPARE.theirs)
    make(tmp_path / "float", "llama")
    (tmp_path / "text.txt").write_text(TEXT)
    short = "--steps 4 --batch 2 --length 16 --learning-rate 1e-2 --backend torchao"
    line = f"train float qat -r int4-weight-only --data text.txt {short}"
    assert CliRunner().invoke(application, shlex.split(line)).exit_code == 0
    done = CliRunner().invoke(
        application,
        [*shlex.split(COMPARE.ours)[1:], "--backend", "torchao", "--length", "16", "--windows", "4", "--json"],
    )
    assert done.exit_code == 0, (done.output, done.exception)
    found = json.loads((tmp_path / "report/report.json").read_text())
    assert (tmp_path / "report/report.html").exists()
    losses = {row["name"]: row["loss"]["value"] for row in found["rows"]}
    assert list(losses)[:3] == ["float", "PTQ", "QAT"]
    assert losses["QAT"] < losses["PTQ"] != losses["float"]


@pytest.mark.parametrize("seed", FORGATHER, ids=str)
def test_forgathers_recipe_strings_and_its_model_init(tmp_path, monkeypatch, seed):
    torch = pytest.importorskip("torch")
    pytest.importorskip("accelerate")
    assert lines(seed.ours) <= lines(seed.theirs)
    monkeypatch.chdir(tmp_path)
    data = [{"input_ids": row, "labels": row} for row in torch.from_numpy(TOKENS).long()]
    options = {
        "max_steps": 3, "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no", "report_to": [],
        "use_cpu": True, "disable_tqdm": True,
    }  # fmt: skip
    given = {"options": options, "model_factory": lambda: build("torchao"), "data": data}
    plainly = re.sub(r"callbacks=\[.*?\]", "callbacks=[]", seed.ours)
    trainers = [run(code, **given)["trainer"] for code in (seed.ours, plainly)]
    seen, plain = ({"losses": [one["loss"] for one in each.state.log_history if "loss" in one]} for each in trainers)
    seen["codes"] = masters("torchao", trainers[0].model)
    model = qkit.convert(trainers[0].model)
    model.save_pretrained("out")
    assert differing("torchao", qkit.load("out", backend="torchao"), seen["codes"]) == 0
    assert_holds("torchao", seen, plain, model, tmp_path, near(seed))


@pytest.mark.skipif(not find_spec("neural_compressor"), reason="neural-compressor is not installed")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", INC, ids=str)
def test_the_lines_of_inc_are_incs(seed):
    torch = pytest.importorskip("torch")
    seen = []
    run(
        seed.theirs,
        torch=torch,
        model=build("torchao").train(),
        train=lambda model: seen.extend(type(one).__name__ for one in model.modules()),
    )
    assert "QuantLinear" in seen


def rows_of_text(path):
    """A model with a tokenizer that ends texts, and rows for TRL and mlx-lm."""
    make(path / "model", "llama")
    file = path / "model/tokenizer_config.json"
    words = list(json.loads((path / "model/tokenizer.json").read_text())["model"]["vocab"])
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token": words[0], "pad_token": words[0]}))
    (path / "data").mkdir()
    rows = [{"text": f"{i} squared is {i * i}"} for i in range(8)]
    for name in ("train", "valid"):
        (path / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_callback_in_the_trainer_of_trl(tmp_path, monkeypatch):
    pytest.importorskip("trl")
    datasets, transformers = pytest.importorskip("datasets"), pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    data = datasets.Dataset.from_list(rows_of_text(tmp_path))
    options = {
        "output_dir": "run", "max_steps": 3, "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no", "bf16": False,
        "report_to": [], "use_cpu": True, "disable_tqdm": True, "per_device_train_batch_size": 2,
    }  # fmt: skip
    given = {"options": options, "data": data, "tokenizer": transformers.AutoTokenizer.from_pretrained("model")}
    trainers = [
        run(code, model=transformers.AutoModelForCausalLM.from_pretrained("model"), **given)["trainer"]
        for code in (TRL.ours, TRL.theirs)
    ]
    seen, plain = ({"losses": [one["loss"] for one in each.state.log_history if "loss" in one]} for each in trainers)
    seen["codes"] = masters("torchao", trainers[0].model)
    assert_holds("torchao", seen, plain, qkit.convert(trainers[0].model), tmp_path, 1e-3)


def test_the_scheme_of_unsloth_on_a_model_of_transformers(tmp_path):
    """unsloth's own loader needs unsloth; on a CPU it returns the model of transformers, as this stand-in does."""
    pytest.importorskip("transformers")
    assert lines(UNSLOTH.ours) <= lines(UNSLOTH.theirs) + 1
    seen, plain = {}, {}
    torch_train(plain)(build("torchao", hidden_size=128, intermediate_size=256, head_dim=32))
    code = UNSLOTH.ours.partition("FastLanguageModel.from_pretrained")[2].partition("\n")[2]
    wide = build("torchao", hidden_size=128, intermediate_size=256, head_dim=32)
    from qkit_torchao import qat_scheme

    model = run(code, model=wide, qat_scheme=qat_scheme, train=torch_train(seen))["model"]
    assert_holds("torchao", seen, plain, qkit.convert(model), tmp_path, 1e-3)


def test_the_block_of_axolotl_names_the_plugin_and_a_recipe():
    """axolotl itself trains with such a block in test_axolotl.py, where it is installed."""
    yaml = pytest.importorskip("yaml")
    block = yaml.safe_load(AXOLOTL.ours)
    (plugin,) = block["plugins"]
    module, _, name = plugin.rpartition(".")
    assert f"class {name}(BasePlugin)" in Path(find_spec(module).origin).read_text(encoding="utf-8")
    assert qkit.recipe(block["qkit"]["recipe"])
    assert len(AXOLOTL.ours.splitlines()) <= len(AXOLOTL.theirs.splitlines())


# MLX


class Rows(list):
    def process(self, row):
        return row


def mlx_names():
    """What a user of mlx-lm has at hand: an optimizer and data."""
    trainer = pytest.importorskip("mlx_lm.tuner.trainer")
    optim = pytest.importorskip("mlx.optimizers")
    np.random.seed(0)  # the loop draws its order from there
    rows = Rows([(row.tolist(), 0) for row in TOKENS.repeat(2, axis=0)])
    return {"optimizer": optim.Adam(learning_rate=1e-2), "data": trainer.CacheDataset(rows)}


def opened_by_mlx_lm(folder):
    """The logits of a saved model in mlx-lm, after `qkit export --to mlx`."""
    import mlx.core as mx

    done = CliRunner().invoke(application, ["export", str(folder), f"{folder}-mlx", "--to", "mlx"])
    assert done.exit_code == 0, done.output
    model, _ = pytest.importorskip("mlx_lm.utils").load_model(Path(f"{folder}-mlx"))
    return np.array(model(mx.array(TOKENS)).astype(mx.float32))


def same_weights(one, other):
    return all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("bits", "group"), BITS)
def test_the_hook_of_mlx_lm_lora_with_its_bits_and_groups(tmp_path, monkeypatch, bits, group):
    seed = filled(HOOK, bits=bits, group=group)
    assert lines(seed.ours) <= lines(seed.theirs)
    monkeypatch.chdir(tmp_path)  # mlx-lm writes its adapters there
    model = run(seed.ours, model=build("mlx"), **mlx_names())["model"]
    plain = run(
        seed.ours.replace("qkit.prepare(model", "(lambda one, _: one)(model"), model=build("mlx"), **mlx_names()
    )
    assert not same_weights(arrays("mlx", model), arrays("mlx", plain["model"]))
    want = masters("mlx", model)
    converted = qkit.convert(model)
    assert differing("mlx", converted, want) == 0
    out = qkit.save(converted, tmp_path / "out", source=qkit.save(build("mlx"), tmp_path / "float"))
    np.testing.assert_allclose(
        opened_by_mlx_lm(out), qkit.backend("mlx").logits(converted, TOKENS), atol=1e-3
    )  # its kernels


@pytest.mark.skipif(not find_spec("mlx_lm_lora"), reason="mlx-lm-lora is not installed")
@pytest.mark.parametrize("bits", [4, 8])
def test_the_trainer_of_mlx_lm_lora_trains_a_prepared_model(tmp_path, monkeypatch, bits):
    import mlx.core as mx

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 0})  # which a CPU does not have
    monkeypatch.setattr(mx, "set_wired_limit", lambda size: None)
    theirs = filled(HOOK, bits=bits, group=64).theirs
    plain = run(theirs.replace("qat_enable=True", "qat_enable=False"), model=build("mlx"), **mlx_names())["model"]
    code = theirs.replace("qat_enable=True", "qat_enable=False")
    model = run(code, model=qkit.prepare(build("mlx"), f"int{bits}-g64"), **mlx_names())["model"]
    assert not same_weights(arrays("mlx", model), arrays("mlx", plain))
    want = masters("mlx", model)
    assert differing("mlx", qkit.convert(model), want) == 0


@pytest.mark.parametrize("recipe", LOADS)
def test_adapters_on_a_model_loaded_in_few_bits(tmp_path, monkeypatch, recipe):
    seed = filled(LOAD, recipe=recipe, table=LOADS[recipe])
    assert lines(seed.ours) <= lines(seed.theirs)
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "model", "llama")
    names = mlx_names()
    trainer = pytest.importorskip("mlx_lm.tuner.trainer")
    seen = {}

    def train(model):
        seen["before"] = codes("mlx", model)
        trainer.train(model, names["optimizer"], names["data"], args=trainer.TrainingArgs(iters=4, batch_size=2))

    model = run(seed.ours, path=str(tmp_path / "model"), train=train)["model"]
    want = qkit.backend("mlx").logits(model, TOKENS)
    merged = qkit.merge(model)
    assert np.array_equal(qkit.backend("mlx").logits(merged, TOKENS), want)
    after = codes("mlx", merged)
    assert after.keys() == seen["before"].keys()
    assert any((after[path] != seen["before"][path]).any() for path in after)
    out = qkit.save(merged, tmp_path / "out")
    np.testing.assert_allclose(opened_by_mlx_lm(out), want, atol=2e-2)  # its kernels


def codes(name, model):
    engine = qkit.backend(name)
    found = [layer for layer in engine.layers(model) if layer.stage == "converted"]
    return {one.path: engine.to_numpy(engine.unpack(one.module).codes) for one in found}


@pytest.mark.parametrize("name", ["torchao", "mlx"])
def test_the_start_and_the_interval_of_mlx_lm_lora(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "model", "llama")
    (tmp_path / "text.txt").write_text(TEXT)
    short = " --steps 4 --batch 2 --length 16 --learning-rate 1e-2 --set checkpoint_every=4"
    done = CliRunner().invoke(
        application, shlex.split(SCHEDULE.ours.replace("--backend mlx", f"--backend {name}") + short)[1:]
    )
    assert done.exit_code == 0, done.output
    rows = qkit.coverage(qkit.load(tmp_path / "out", backend=name)).rows
    assert len([row for row in rows if row.weight == "int4-g32-signed"]) == 14
    assert "0 of 14" not in done.output


def carried_out(path, line):
    """The exit of a command line of qkit's, with short training."""
    short = ["--iters", "3", "--batch-size", "2", "--num-layers", "2", "--learning-rate", "5e-3", "--val-batches", "1"]
    done = CliRunner().invoke(application, [*shlex.split(line)[1:], *short])
    assert done.exit_code == 0, (done.output, done.exception)
    assert "0 of 14" not in done.output
    return {row.weight for row in qkit.coverage(qkit.load(path / "out", backend="mlx")).rows if row.weight}


def test_the_command_of_mlx_lm_trains_on_the_grid(tmp_path, monkeypatch):
    pytest.importorskip("mlx_lm")
    rows_of_text(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert carried_out(tmp_path, MLX_LM.ours) == {"int4-g64-signed"}


@pytest.mark.skipif(not find_spec("mlx_lm_lora"), reason="mlx-lm-lora is not installed")
def test_a_line_of_the_studio_works_after_qkit_mlx_lora(tmp_path, monkeypatch):
    rows_of_text(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert STUDIO.ours == f"qkit mlx-lora {STUDIO.theirs}"
    assert carried_out(tmp_path, STUDIO.ours) == {"int4-g64-absmax"}


@pytest.mark.skipif(not find_spec("mlx_lm_lora"), reason="mlx-lm-lora is not installed")
@pytest.mark.parametrize("seed", METHODS, ids=str)
def test_the_methods_of_mlx_lm_lora_on_a_model_loaded_in_four_bits(tmp_path, monkeypatch, seed):
    rows_of_text(tmp_path)
    assert lines(seed.ours) <= lines(seed.theirs)
    if "sft" not in seed.name:
        for name in ("train", "valid"):
            rows = [{"prompt": f"{i}?", "chosen": f"it is {i * i}", "rejected": f"no {i}"} for i in range(8)]
            (tmp_path / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    assert carried_out(tmp_path, seed.ours) == {"int4-g128-signed"}


# the page


def test_the_page_is_the_lines_that_run():
    assert PAGE.read_text(encoding="utf-8") == coming_from.page()
