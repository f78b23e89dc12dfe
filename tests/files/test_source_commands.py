"""Whole commands on directories that other programs quantized, one of each kind: from the file to an artifact, and on."""

import json
from pathlib import Path
from tempfile import gettempdir

import pytest
from foreign import awq, fp8, gptq, nvfp4, rewritten
from models import make
from small_tokenizers import SPLITS, by_bytes, saved
from typer.testing import CliRunner

import qkit
from qkit.cli.application import application
from qkit.exchange.import_model import read_model

OTHERS = Path(__file__).parents[1] / "golden" / "others"
KINDS = (
    *("gptq-4", "gptq-4-order", "awq-gemm", "awq-gemv", "bnb-nf4-double", "bnb-int8", "ct-w4a16-fp16", "ct-nvfp4"),
    *("auto-round-mxfp4", "auto-round-fp8-block", "modelopt-int8", "modelopt-int4-awq", "modelopt-fp8-blocks"),
)


def run(*line):
    """The standard output of a command, which has to end well."""
    done = CliRunner().invoke(application, [str(part) for part in line])
    assert done.exit_code == 0, done.exception or done.output
    return done.stdout


@pytest.mark.parametrize("name", KINDS)
def test_commands_take_such_a_directory(name, tmp_path):
    folder, own, dense = OTHERS / name, tmp_path / "own", tmp_path / "dense"
    assert json.loads(run("inspect", folder, "--json"))
    run("import", folder, own, "--weights-only")
    run("verify", own)
    run("export", own, dense, "--to", "dense")
    run("quantize", folder, tmp_path / "again", "-r", "int4-g32")
    run("verify", tmp_path / "again")
    for other in (own, dense):
        assert json.loads(run("diff", own, other, "--json"))
    first, second = read_model(own), read_model(dense)
    assert set(second.tensors) == {*first.tensors, *(f"{path}.weight" for path in first.weights)}


def refused(*line):
    """The message of a command that has to end with an error."""
    done = CliRunner().invoke(application, [str(part) for part in line])
    assert done.exit_code, done.output
    return str(done.exception)


#: Directories whose weights GGUF and MLX hold, and those whose weights are values; others are refused by the name of a layer.
IN_GGUF = {"gptq-4", "awq-gemm", "awq-gemv", "ct-w4a16-fp16", "auto-round-mxfp4"}
IN_MLX = {"auto-round-mxfp4"}
VALUES = {"gptq-4-order", "bnb-nf4-double", "bnb-int8", "modelopt-fp8-blocks"}


@pytest.mark.parametrize("name", KINDS)
def test_exports_hold_the_codes_or_name_the_layer(name, tmp_path):
    for target, takes in (("gguf", IN_GGUF), ("mlx", IN_MLX)):
        out = tmp_path / f"m.{target}"
        line = ["export", OTHERS / name, out, "--to", target, *(["--without-tokenizer"] if target == "gguf" else [])]
        if name in takes | VALUES:
            run(*line)
            assert out.exists()
        else:
            said = refused(*line)
            assert "model.layers.0." in said
            assert "integers want 2, 3" not in said  # which has it already
            assert not out.exists()


SETTINGS = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False}
WRITTEN = {
    "gptq": (gptq(4, 64), SETTINGS),
    "awq": (awq(64), {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}),
    "modelopt": (nvfp4(), {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
    "fp8": (fp8((1, 64)), {"quant_method": "fp8", "weight_block_size": [1, 64]}),  # blocks of more rows become values
}


@pytest.mark.parametrize("name", WRITTEN)
def test_the_values_of_such_a_model_are_compared_with_a_grid(name, tmp_path):
    folder = rewritten(tmp_path / "m", *WRITTEN[name], dtype="float16" if name == "awq" else "bfloat16")
    (tmp_path / "text.txt").write_text("Some text to learn from. " * 40)
    line = ["compare", folder, "--data", tmp_path / "text.txt", "-r", "int4-g32", "--length", 32, "--windows", 4]
    found = json.loads(run(*line, "--out", tmp_path / "report", "--json"))
    assert len(found["rows"]) == 2
    assert (tmp_path / "report" / "report.html").exists()


def test_weights_that_no_grid_holds_say_so_where_a_recipe_is_wanted(tmp_path):
    folder = rewritten(tmp_path / "m", fp8((64, 32)), {"quant_method": "fp8", "weight_block_size": [64, 32]})
    (tmp_path / "text.txt").write_text("Some text to learn from. " * 40)
    said = refused("train", folder, tmp_path / "out", "--data", tmp_path / "text.txt", "--set", "adapter.rank=2")
    assert "has 14 quantized weights (" in said
    assert "that no grid of qkit holds, and is trained by their values: name a recipe" in said


@pytest.fixture
def gguf_file(tmp_path):
    """A quantized model in one file, with its tokenizer."""
    pytest.importorskip("gguf")
    made, folder = by_bytes(SPLITS["qwen2"][0], size=290), tmp_path / "m"
    make(folder, "llama", dtype="bfloat16", vocab_size=300)
    saved(folder, made, eos_token="<|im_end|>")
    run("quantize", folder, tmp_path / "q", "-r", "int4-g32")
    (tmp_path / "alone").mkdir()
    run("export", tmp_path / "q", tmp_path / "alone" / "m.gguf", "--to", "gguf")
    (tmp_path / "text.txt").write_text("the cat and the hat sat on a mat. " * 60)
    return tmp_path / "alone" / "m.gguf"


def test_every_command_takes_a_gguf_file(gguf_file, tmp_path):
    text = ["--data", tmp_path / "text.txt", "--length", 32]
    assert json.loads(run("inspect", gguf_file, "--json"))["rules"]
    assert json.loads(run("verify", gguf_file, "--json"))["whole"]
    first, second = (json.loads(run("eval", one, *text, "--json")) for one in (gguf_file, tmp_path / "q"))
    assert abs(first["models"][0]["loss"] - second["models"][0]["loss"]) < 1e-3  # norms went through float32
    assert first["models"][0]["tokens"] == second["models"][0]["tokens"]
    line = ["compare", gguf_file, *text, "-r", "int4-g32", "--windows", 4, "--out", tmp_path / "report"]
    assert len(json.loads(run(*line, "--json"))["rows"]) == 2
    run("plan", gguf_file, "-r", "int4-g32")
    run("quantize", gguf_file, tmp_path / "again", "-r", "int4-g32")
    run("verify", tmp_path / "again")
    run("export", gguf_file, tmp_path / "dense", "--to", "dense")
    assert json.loads(run("diff", gguf_file, tmp_path / "dense", "--json"))
    assert "int4-g32-stored" in refused("export", gguf_file, tmp_path / "mlx", "--to", "mlx")
    assert not [left for left in Path(gettempdir()).glob("qkit-*") if (left / gguf_file.name).exists()]


def test_training_wants_the_directory_of_a_gguf_file_before_any_work(gguf_file, tmp_path):
    sizes = ["--steps", 2, "--set", "batch=2", "--set", "length=32", "--set", "adapter.rank=2"]
    text = ["--data", tmp_path / "text.txt"]
    assert "qkit import" in refused("train", gguf_file, tmp_path / "out", *text, *sizes)
    run("import", gguf_file, tmp_path / "own")
    run("train", tmp_path / "own", tmp_path / "out", *text, *sizes)
    run("verify", tmp_path / "out")


@pytest.mark.parametrize("engine", ["torchao", "mlx"])
@pytest.mark.parametrize("name", WRITTEN)
def test_text_is_read_and_adapters_are_trained_on_it(name, engine, tmp_path):
    if not any(status.name == engine and status.ready for status in qkit.backends()):
        pytest.skip(f"{engine} is not installed")
    folder = rewritten(tmp_path / "m", *WRITTEN[name], dtype="float16" if name == "awq" else "bfloat16")
    (tmp_path / "text.txt").write_text("Some text to learn from. " * 200)
    more = ["--data", tmp_path / "text.txt", "--backend", engine]
    assert json.loads(run("eval", folder, *more, "--length", 32, "--json"))
    run("import", folder, tmp_path / "own")
    sizes = ["--steps", 2, "--set", "batch=2", "--set", "length=32", "--set", "adapter.rank=2"]
    run("train", tmp_path / "own", tmp_path / "out", *more, *sizes)
    run("verify", tmp_path / "out")
    assert {str(one.rule.weight) for one in read_model(tmp_path / "out").weights.values()} == {
        str(one.rule.weight) for one in read_model(tmp_path / "own").weights.values()
    }
