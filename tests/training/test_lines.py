"""One line in other trainers: `qkit mlx-lora`, unsloth's `qat_scheme`, and the arguments of TRL's scripts."""

import json
from importlib.util import find_spec

import numpy as np
import pytest
from models import TOKENS, build, make
from typer.testing import CliRunner

import qkit
from qkit.cli.application import application

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


def test_a_second_quantizer_on_the_command_line_is_refused(tmp_path):
    pytest.importorskip("mlx_lm_lora")
    done = mlx_lora(tmp_path, *data(tmp_path), "--train-mode", "sft", "--qat-enable")
    assert isinstance(done.exception, qkit.RunError)
    assert "--qat-enable quantizes the model, and so does the recipe" in str(done.exception)
    assert not (tmp_path / "out").exists()


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
