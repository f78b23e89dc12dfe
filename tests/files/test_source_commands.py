"""Whole commands on directories that other programs quantized, one of each kind: from the file to an artifact, and on."""

import json
from pathlib import Path

import pytest
from foreign import awq, fp8, gptq, nvfp4, rewritten
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


SETTINGS = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False}
WRITTEN = {
    "gptq": (gptq(4, 64), SETTINGS),
    "awq": (awq(64), {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}),
    "modelopt": (nvfp4(), {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
    "fp8": (fp8((1, 64)), {"quant_method": "fp8", "weight_block_size": [1, 64]}),  # blocks of more rows become values
}


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
