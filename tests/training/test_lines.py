"""One line in other trainers: `qkit mlx-lora`, unsloth's `qat_scheme`, and the arguments of TRL's scripts."""

import json
import re
import shutil
from importlib.util import find_spec

import numpy as np
import pytest
from models import TOKENS, build, make
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

import qkit
from qkit.cli.application import application
from qkit.engines.tuning import Quantizer
from qkit.training.commands import recipe_of

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{text}")  # of libraries, not of qkit
    for text in (".*pin_memory:UserWarning", ".*:FutureWarning", ".*:DeprecationWarning")
]
SHORT = ["--iters", "3", "--batch-size", "2", "--num-layers", "2", "--learning-rate", "5e-3", "--val-batches", "1"]


def data(path):
    make(path / "model", "llama")
    file = path / "model/tokenizer_config.json"
    words = json.loads((path / "model/tokenizer.json").read_text())["model"]["vocab"]
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token": next(iter(words))}))
    (path / "data").mkdir()
    for name in ("train", "valid"):
        rows = [{"text": f"{i} squared is {i * i}"} for i in range(8)]
        (path / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--data", str(path / "data")]


def mlx_lora(path, *more, recipe="int4-g32"):
    return CliRunner().invoke(
        application, ["mlx-lora", str(path / "model"), str(path / "out"), "-r", recipe, *SHORT, *more]
    )


needs_other = pytest.mark.skipif(not find_spec("mlx_lm_lora"), reason="mlx-lm-lora is not installed")


@pytest.mark.parametrize(
    "more",
    [
        ["--fine-tune-type", "lora"],
        ["--fine-tune-type", "full"],
        ["--fine-tune-type", "lora", "--packed"],
        pytest.param(["--train-mode", "sft", "--train-type", "full"], marks=needs_other),
        pytest.param(["--train-mode", "sft", "--train-type", "lora"], marks=needs_other),
    ],
)  # fmt: skip
def test_the_commands_of_mlx_train_on_the_grid(tmp_path, more):
    pytest.importorskip("mlx_lm")
    done = mlx_lora(tmp_path, *data(tmp_path), *more)
    assert done.exit_code == 0, (done.output, done.exception)
    assert "0 of 14" not in done.output
    opened = qkit.load(tmp_path / "out", backend="mlx")
    assert len([row for row in qkit.coverage(opened).rows if row.weight == "int4-g32-signed"]) == 14
    before = qkit.convert(qkit.load(tmp_path / "model", backend="mlx"), "int4-g32")
    engine = qkit.backend("mlx")
    assert not np.array_equal(engine.logits(opened, TOKENS), engine.logits(before, TOKENS))


def preferences(path):
    """Rows for every method of preferences, as mlx-lm-lora reads them."""
    given = data(path)
    for name in ("train", "valid"):
        rows = [{"prompt": f"{i}?", "chosen": f"it is {i * i}", "rejected": f"no {i}"} for i in range(8)]
        (path / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return given


@needs_other
@pytest.mark.parametrize("mode", ["dpo", "orpo"])
@pytest.mark.parametrize("more", [["--train-type", "full"], ["--train-type", "lora"], ["--packed"]], ids=" ".join)
def test_preferences_train_on_the_grid(tmp_path, mode, more):
    given = preferences(tmp_path)
    done = mlx_lora(tmp_path, *given, "--train-mode", mode, *more)
    assert done.exit_code == 0, (done.output, done.exception)
    assert "0 of 14" not in done.output
    assert_trained(tmp_path, "int4-g32-signed", "int4-g32")


def assert_trained(path, grid, recipe):
    """The artifact is on the grid, has other codes than before, and opens without qkit."""
    opened = qkit.load(path / "out", backend="mlx")
    assert len([row for row in qkit.coverage(opened).rows if row.weight == grid]) == 14
    before = qkit.convert(qkit.load(path / "model", backend="mlx"), recipe)
    engine = qkit.backend("mlx")
    assert not np.array_equal(engine.logits(opened, TOKENS), engine.logits(before, TOKENS))


SEEDS = {
    "python -m mlx_lm_lora.train --qat-enable --qat-bits 4": "int4-g64-absmax",
    "mlx_lm_lora.train --train-type full --qat-enable --qat-bits 4 --qat-group-size 32": "int4-g32-absmax",
    "mlx_lm_lora.train --train-type full --qat-enable": "int8-g64-absmax",
    "mlx_lm_lora train --qat-enable --qat-bits 2 --qat-group-size 0": "int2-tensor-absmax",
    "mlx_lm_lora.train --train-type full --qat-enable --qat-bits 4 --qat-start-step 3 --qat-interval 2": "int4-g64-absmax",
    "mlx_lm_lora.train --load-in-mxfp4": str(qkit.recipe("mxfp4-a16").rules[-1].weight),
}


@needs_other
@pytest.mark.parametrize("line", SEEDS)
def test_a_seeds_own_command_line_trains_on_its_grid(tmp_path, line):
    """`qkit mlx-lora` before it: `--adapter-path` is the artifact, and mlx-lm-lora's own options name the grid."""
    theirs = [*line.split(), "--model", str(tmp_path / "model"), "--train", *data(tmp_path), *SHORT]
    done = CliRunner().invoke(application, ["mlx-lora", *theirs, "--adapter-path", str(tmp_path / "out")])
    assert done.exit_code == 0, (done.output, done.exception)
    assert "0 of 14" not in done.output
    rows = qkit.coverage(qkit.load(tmp_path / "out", backend="mlx")).rows
    assert len([row for row in rows if row.weight == SEEDS[line]]) == 14, {row.weight for row in rows}


@needs_other
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_a_model_loaded_in_few_bits_trains_adapters_on_codes(tmp_path, bits):
    given = data(tmp_path)
    make(
        tmp_path / "wide", "llama", hidden_size=128, intermediate_size=256, head_dim=32
    )  # mlx-lm-lora's groups are of 128
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "wide" / name).write_bytes((tmp_path / "model" / name).read_bytes())
    line = ["mlx_lm_lora.train", "--model", str(tmp_path / "wide"), f"--load-in-{bits}bits", *given, *SHORT]
    done = CliRunner().invoke(application, ["mlx-lora", *line, "--adapter-path", str(tmp_path / "out")])
    assert done.exit_code == 0, (done.output, done.exception)
    rows = qkit.coverage(qkit.load(tmp_path / "out", backend="mlx")).rows
    assert len([row for row in rows if row.weight == f"int{bits}-g128-{'absmax' if bits == 8 else 'signed'}"]) == 14, {
        row.weight for row in rows
    }


@needs_other
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group", [32, 64, 0])
def test_the_grid_of_the_hook_is_that_of_mlx_lm_lora(bits, group):
    """One rule for scales. qkit rounds a scale to 8 bits (by at most 1 part in 256), so that a code moves where that decides."""
    import mlx.core as mx
    from mlx_lm_lora.trainer.sft_trainer import _symmetric_fake_quantize_tensor

    recipe = recipe_of(Quantizer("--qat-enable", packed=False, grid="affine", bits=bits, group=group))
    w = np.random.default_rng(bits).standard_normal((48, 128)).astype(np.float32)
    parts = w.reshape(-1, group or w.size)
    theirs = np.array(_symmetric_fake_quantize_tensor(mx.array(w), bits, group)).reshape(parts.shape)
    q = qkit.quantize(w, recipe.rules[-1].weight)
    scales = np.abs(parts).max(-1, keepdims=True) / (2 ** (bits - 1) - 1)
    np.testing.assert_allclose(q.scales.reshape(scales.shape), scales, rtol=2**-8)
    codes = np.rint(theirs / scales)
    assert np.abs(q.codes.reshape(parts.shape) - codes).max() <= 1
    assert (q.codes.reshape(parts.shape) != codes).mean() <= 0.001 * 2**bits  # measured: up to 0.0007 * 2**bits


@needs_other
def test_the_schedule_of_the_hook_begins_where_it_says(tmp_path):
    """Its losses are those of float until the start, and differ from there on."""
    given = [*data(tmp_path), *SHORT, "--train-type", "full", "--iters", "4", "--learning-rate", "1e-2"]
    seen = {}
    for name, more in (
        ("float", ["--qat-enable", "--qat-bits", "8", "--qat-start-step", "99"]),
        ("late", ["--qat-enable", "--qat-bits", "2", "--qat-start-step", "3"]),
    ):
        out = tmp_path / name
        line = ["mlx_lm_lora.train", "--model", str(tmp_path / "model"), *given, *more, "--adapter-path", str(out)]
        done = CliRunner().invoke(application, ["mlx-lora", *line])
        assert done.exit_code == 0, (done.output, done.exception)
        seen[name] = [float(one) for one in re.findall(r"Iter \d+: loss ([\d.]+)", done.output)]
    assert len(seen["late"]) == 4, seen
    assert seen["late"][:2] == seen["float"][:2]
    assert seen["late"][2] != seen["float"][2]


@needs_other
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["-r", "int4-g32", "--qat-enable"], "--qat-enable quantizes the model, and so does the recipe 'int4-g32'"),
        (["--qat-enable", "--load-in-4bits"], "--qat-enable and --load-in-4bits quantize one model twice"),
        (["--qat-enable", "--packed"], "--qat-enable says already whether codes are packed"),
        (["--train-mode", "sft"], "no recipe: name one by --recipe, or give mlx_lm_lora.train --qat-enable"),
        (["--iters", "3"], "no recipe: name one by --recipe"),
        (["--qat-enable", "--qat-bits", "12"], "--qat-enable with 12 bits in groups of 64"),
        (["--qat-enable", "--qat-bits", "7"], "--qat-enable with 7 bits in groups of 64"),
        (["--load-in-4bits", "--train-type", "full"], "--load-in-4bits leaves no weight to train"),
        (["--qat-enable", "--qat-start-step", "4", "--qat-interval", "2"], "begin at 3, or at 5"),
        (["--qat-enable", "--config", "none.yaml"], "none.yaml"),
        (["--qat-enable", "--nonsense", "4"], "does not take these options"),
    ],
)  # fmt: skip
def test_a_line_that_qkit_cannot_carry_out_is_refused_by_name(tmp_path, more, message):
    words = ["--model", str(tmp_path / "model"), "--adapter-path", str(tmp_path / "out"), *data(tmp_path), *SHORT]
    done = CliRunner().invoke(application, ["mlx-lora", "mlx_lm_lora.train", *words, *more])
    assert isinstance(done.exception, qkit.QkitError), (done.output, done.exception)
    assert message in str(done.exception)
    assert not (tmp_path / "out").exists()


TALK = [{"role": "user", "content": "2?"}, {"role": "assistant", "content": "four"}]
BAD = {
    "no roles": ({"messages": [{"content": "2?"}, {"content": "four"}]}, [], r"row 1 of .* a message without a role"),
    "no answer": (
        {"prompt": "2?", "completion": ""},
        ["--mask-prompt"],
        r"row 1 of \S+train.jsonl has an empty completion",
    ),
    "too long": (
        {"prompt": "2" * 40, "completion": "4"},
        ["--mask-prompt", "--max-seq-length", "32"],
        "no token to learn",
    ),
    "no template": ({"messages": TALK}, [], r"row 1 of train cannot be read .*chat template beside the model"),
    "no text": ({"words": "2?"}, [], "cannot be read"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("tool", ["mlx_lm", pytest.param("mlx_lm_lora", marks=needs_other)])
def test_bad_rows_are_refused_by_name_before_the_first_step(tmp_path, tool, case):
    pytest.importorskip("mlx_lm")
    row, more, message = BAD[case]
    given = data(tmp_path)
    if case != "no template":
        turns = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        (tmp_path / "model/chat_template.jinja").write_text(turns)
    elif tool == "mlx_lm_lora":
        pytest.skip("it puts a template of its own where there is none")
    for name in ("train", "valid"):
        (tmp_path / "data" / f"{name}.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    other = ["--train-mode", "sft"] if tool == "mlx_lm_lora" else []
    done = mlx_lora(tmp_path, *given, *other, *more)
    assert isinstance(done.exception, qkit.RunError), (done.output, done.exception)
    assert re.search(message, str(done.exception)), done.exception
    assert "Iter 1" not in done.output
    assert not (tmp_path / "out").exists()


@needs_other
def test_preferences_without_roles_are_refused_by_name(tmp_path):
    given = preferences(tmp_path)
    row = {"chosen": [{"content": "2?"}, {"content": "4"}], "rejected": [{"content": "2?"}, {"content": "5"}]}
    (tmp_path / "data/train.jsonl").write_text(json.dumps(row) + "\n")
    done = mlx_lora(tmp_path, *given, "--train-mode", "dpo")
    assert isinstance(done.exception, qkit.RunError), (done.output, done.exception)
    assert "a message without a role" in str(done.exception)


TOOLS = [
    pytest.param(["--fine-tune-type", "lora"], id="mlx_lm"),
    pytest.param(["--train-type", "lora"], id="mlx_lm_lora", marks=needs_other),
]


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize(
    ("name", "what"),
    [("model.layers.0.self_attn.q_proj.lora_a", r"\[128, 8\]"), ("model.layers.9.x.lora_a", "missing")],
)
def test_an_adapter_file_of_another_base_is_refused_by_name(tmp_path, tool, name, what):
    mx = pytest.importorskip("mlx.core")
    given = data(tmp_path)
    mx.save_safetensors(str(tmp_path / "other.safetensors"), {name: mx.zeros((7, 8))})
    done = mlx_lora(tmp_path, *given, *tool, "--resume-adapter-file", str(tmp_path / "other.safetensors"))
    assert isinstance(done.exception, qkit.RunError), (done.output, done.exception)
    assert re.search(rf"is for another base: its {name} is \[7, 8\], and the model's is {what}", str(done.exception))
    assert "Iter 1" not in done.output


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("packed", [[], ["--packed"]], ids=["prepared", "packed"])
def test_adapters_go_on_with_their_base_and_no_other_of_the_same_shapes(tmp_path, tool, packed):
    pytest.importorskip("mlx_lm")
    given = [*data(tmp_path), *tool, *packed]
    assert mlx_lora(tmp_path, *given).exit_code == 0
    (found,) = tmp_path.glob("out.run/adapters/adapters.safetensors")
    shutil.move(found.parent, tmp_path / "first")
    shutil.rmtree(tmp_path / "out")
    again = [*given, "--resume-adapter-file", str(tmp_path / "first/adapters.safetensors")]
    done = mlx_lora(tmp_path, *again)
    assert done.exit_code == 0, (done.output, done.exception)
    shutil.rmtree(tmp_path / "out")
    weights = tmp_path / "model/model.safetensors"
    moved = {name: array * np.float32(1.5) for name, array in load_file(weights).items()}
    save_file(moved, weights, metadata={"format": "pt"})
    done = mlx_lora(tmp_path, *again)
    assert isinstance(done.exception, qkit.RunError), (done.output, done.exception)
    assert re.search(
        "is for another base: it was trained on weights with digest [0-9a-f]{32}, and", str(done.exception)
    )
    assert "Iter 1" not in done.output
    assert not (tmp_path / "out").exists()


def test_adapters_of_mlx_lm_itself_are_checked_against_the_model_that_they_name(tmp_path):
    mx = pytest.importorskip("mlx.core")
    given = [*data(tmp_path), "--fine-tune-type", "lora"]
    shutil.copytree(tmp_path / "model", tmp_path / "other")
    weights = tmp_path / "other/model.safetensors"
    save_file({name: x * np.float32(1.5) for name, x in load_file(weights).items()}, weights, metadata={"format": "pt"})
    (tmp_path / "theirs").mkdir()
    names = {"lora_a": mx.zeros((128, 8)), "lora_b": mx.zeros((8, 128))}
    file = tmp_path / "theirs/adapters.safetensors"
    mx.save_safetensors(str(file), {f"model.layers.1.self_attn.q_proj.{name}": x for name, x in names.items()})
    for base in ("other", "model"):
        (file.parent / "adapter_config.json").write_text(json.dumps({"model": str(tmp_path / base)}))
        done = mlx_lora(tmp_path, *given, "--resume-adapter-file", str(file))
        assert (done.exit_code == 0) == (base == "model"), (done.output, done.exception)
        assert base == "model" or "is for another base: it was trained on weights" in str(done.exception)


@pytest.mark.parametrize(("scheme", "grid"), [("int4", "int4-g128"), ("fp8-fp8", "e4m3"), ("int8-int4", "int4-g32")])
def test_the_schemes_of_unsloth_are_recipes(scheme, grid):
    pytest.importorskip("transformers")
    from qkit_torchao import qat_scheme

    model = qat_scheme(build("torchao"), scheme)
    grids = {row.weight for row in qkit.coverage(model).rows if row.weight}
    assert all(str(one).startswith(grid) for one in grids), grids
    assert grids


def test_an_unknown_scheme_is_refused_by_name():
    pytest.importorskip("transformers")
    from qkit_torchao import qat_scheme

    with pytest.raises(qkit.RecipeError, match=r"no scheme 'fp8-int4': there is int4, int8"):
        qat_scheme(build("torchao"), "fp8-int4")


def test_the_arguments_of_a_trl_script_make_the_callback():
    trl = pytest.importorskip("trl")
    from qkit_torchao import QatArguments

    parser = trl.TrlParser((trl.ScriptArguments, QatArguments))
    line = ["--dataset_name", "rows", "--qat_recipe", "int4-g32", "--qat_start", "4", "--qat_interval", "2"]
    _, arguments = parser.parse_args_and_config(line)
    (callback,) = arguments.callbacks()
    assert (callback.recipe, callback.schedule.start, callback.schedule.interval) == ("int4-g32", 5, 2)
    assert QatArguments().callbacks() == []
