"""Compilers of CUDA kernels, in new processes with empty caches: what `qkit warmup` compiles, and a broken C compiler."""

import os
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("typer", reason="the command line is not installed")

from models import make  # noqa: E402

import qkit  # noqa: E402

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

SERVED = """
import sys, numpy as np, torch, qkit
model = qkit.load(sys.argv[1], backend=qkit.backend("torchao").on("cuda"))
for rows in range(1, 67):
    qkit.backend("torchao").on("cuda").logits(model, np.zeros((1, rows), dtype=np.int32))
"""
CONVERTED = """
import torch, qkit
model = torch.nn.Sequential(torch.nn.Linear(64, 32)).to("cuda", torch.bfloat16)
q = qkit.quantize(model[0].weight.detach().cpu(), qkit.Grid("int4", 32))
model = qkit.convert(model, "int4-g32")
assert torch.equal(qkit.backend("torchao").unpack(model[0]).codes.cpu(), q.codes)
model(torch.randn(3, 64, device="cuda", dtype=torch.bfloat16))
print(qkit.coverage(model).rows[0].state)
"""


def run(tmp_path, *words, **more):
    """The output of a process with empty caches in `tmp_path`."""
    caches = {"XDG_CACHE_HOME": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path / "triton")}
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env={**os.environ, **caches, **more}
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("recipe", ["int3-g64", "nvfp4-a16"])
def test_after_warmup_a_model_compiles_nothing(recipe, tmp_path):
    made = qkit.convert(qkit.load(make(tmp_path / "model", "llama", dtype="bfloat16"), backend="torchao"), recipe)
    qkit.save(made, tmp_path / "out", source=tmp_path / "model")
    done = run(tmp_path, "-m", "qkit", "warmup", str(tmp_path / "out"), "--backend", "torchao", "--device", "cuda")
    assert "qkit compiles its kernels for this GPU" in done.stderr
    compiled = {file.name for file in (tmp_path / "qkit" / "kernels").iterdir()}
    triton = {file.parent.name for file in (tmp_path / "triton").rglob("*.cubin")}
    assert compiled
    done = run(tmp_path, "-c", SERVED, str(tmp_path / "out"))
    assert "compiles" not in done.stderr
    assert {file.name for file in (tmp_path / "qkit" / "kernels").iterdir()} == compiled
    assert {file.parent.name for file in (tmp_path / "triton").rglob("*.cubin")} == triton


def test_a_broken_c_compiler_is_named_and_torch_quantizes(tmp_path):
    done = run(tmp_path, "-c", CONVERTED, CC="/bin/false")
    assert done.stdout.startswith("decoded first")
    assert "the C compiler of Triton fails" in done.stdout
