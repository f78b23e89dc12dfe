"""`qkit warmup`: it runs each kind of quantized layer of a directory, in every number of rows that has kernels of its own."""

import json

import pytest
from mixtures import make
from models import make as make_model
from typer.testing import CliRunner

import qkit
from qkit.cli.application import application
from qkit.cli.warmup import MANY, ROWS
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


@pytest.mark.parametrize("outputs", [128, 1024, 4096, 32000])
def test_every_tile_of_many_rows_is_compiled(outputs, monkeypatch):
    """A prefill is longer than `ROWS`, and its product of int8 codes has a tile of its own."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from qkit_torchao.kernels import cuda_rows

    monkeypatch.setattr(cuda_rows, "INTERPRETED", False)
    monkeypatch.setattr(cuda_rows, "limits", lambda device: (227 * 1024, 132))

    def tiles(counts):
        return {cuda_rows._tile(torch.device("cuda"), count, outputs) for count in counts}  # noqa: SLF001

    assert tiles(count for count in (*ROWS, MANY) if count > 64) == tiles(range(65, 1 << 15, 61))


def test_layers_that_quantize_inputs_run_with_many_rows(tmp_path, monkeypatch):
    make_model(tmp_path / "model", "llama")
    recipe = "int8-dynamic-act-int8-weight"
    RUNNER.invoke(application, ["quantize", str(tmp_path / "model"), str(tmp_path / "out"), "--recipe", recipe])
    kind, seen = type(qkit.backend("torchao")), set()
    run = kind.run_layer
    monkeypatch.setattr(kind, "run_layer", lambda self, module, x: seen.add(len(x)) or run(self, module, x))
    done = RUNNER.invoke(application, ["warmup", str(tmp_path / "out"), "--backend", "torchao"])
    assert done.exit_code == 0, done.exception
    assert seen == {*ROWS, MANY}
