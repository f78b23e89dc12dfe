"""`qkit warmup`: it runs each kind of quantized layer of a directory, in every number of rows that has kernels of its own."""

import json

import pytest
from mixtures import make
from models import make as make_model
from typer.testing import CliRunner

import qkit
from qkit.cli.application import application
from qkit.cli.warmup import ROWS
from qkit.errors import ArtifactError

torch = pytest.importorskip("torch", reason="torch is not installed")
RUNNER = CliRunner()


def test_a_float_model_has_no_kernels_to_compile(tmp_path):
    make_model(tmp_path / "model", "llama")
    done = RUNNER.invoke(application, ["warmup", str(tmp_path / "model")])
    assert isinstance(done.exception, ArtifactError)
    assert "no quantized layers" in str(done.exception)


@pytest.mark.parametrize("engine", ["torchao", "mlx"])
def test_experts_run_as_a_router_chooses_them(engine, tmp_path, monkeypatch):
    make("qwen3_moe").save_pretrained(tmp_path / "model")
    RUNNER.invoke(application, ["quantize", str(tmp_path / "model"), str(tmp_path / "out"), "--recipe", "int4-g32"])
    kind, seen = type(qkit.backend(engine)), []
    logits = kind.logits
    monkeypatch.setattr(kind, "logits", lambda self, model, x: seen.append(x.shape) or logits(self, model, x))
    done = RUNNER.invoke(application, ["warmup", str(tmp_path / "out"), "--backend", engine, "--json"])
    assert done.exit_code == 0, done.exception
    kinds = json.loads(done.stdout)["kinds"]
    assert any(len(one["shape"]) == 3 and one["runs"] for one in kinds)
    assert seen == [(1, rows) for rows in ROWS]


@pytest.mark.parametrize("recipe", ["int2-g64", "int3-g64", "int4-g32", "int8-row", "mxfp4-a16", "nvfp4-a16"])
def test_every_variant_of_a_product_is_compiled(recipe, monkeypatch):
    """Variants depend on the number of rows: one that is met first while the model serves would make a user wait."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from qkit_torchao.arithmetic import packing
    from qkit_torchao.kernels import cuda_words

    met = set()

    def record(name):
        return lambda constants, *_, **__: met.add((name, constants))

    for name in ("PRODUCT", "FEW_ROWS", "ARRANGEMENT"):
        monkeypatch.setattr(cuda_words, name, record(name))
    monkeypatch.setattr(cuda_words, "processors_of", lambda device: 132)
    monkeypatch.setattr(cuda_words.nvrtc, "why_not", lambda device: "")
    grid = qkit.recipe(recipe).rules[-1].weight
    laid = packing.lay(qkit.quantize(torch.randn(4224, 256), grid), "words")
    parts = laid.codes, laid.scales, laid.zeros, laid.tensor_scale, laid.biases

    def variants(counts):
        met.clear()
        for count in counts:
            x = torch.zeros(count, 256, dtype=torch.bfloat16)
            if cuda_words.multiplies(x):
                cuda_words.multiply(x, *parts, None, grid)
        return set(met)

    assert variants(ROWS) == variants(range(1, 70))
