"""The programs that qkit writes for open its directories, each in a process that cannot import qkit."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from models import make

import qkit
from qkit import reference
from qkit.exchange.export_gguf import export_gguf
from qkit.exchange.export_model import export_dense, export_mlx
from qkit.exchange.import_model import read_model
from qkit.experts import expert_of, module_name
from qkit.formats.packed import unpack
from qkit.streaming.carry_out import quantize_directory
from qkit.streaming.plan import make_plan

pytest.importorskip("transformers")
TOKENS = np.random.default_rng(0).integers(0, 256, (2, 9))


@dataclass(frozen=True)
class Case:
    """A checkpoint, what is made of it, and who opens it."""

    family: str
    recipe: str
    readers: tuple[str, ...] = ("transformers", "mlx-lm")
    changes: dict = field(default_factory=dict)
    shard_bytes: int = 5_000_000_000
    live: bool = False  # through a model of transformers', and `qkit.save`
    mlx_tolerance: float = 1e-5  # of the largest logit: two libraries order a matrix product otherwise


TOLD = ("transformers-told",)
BRAIN = {"dtype": "bfloat16"}
CASES = {
    "int4": Case("llama", "int4-g64", ("transformers", "mlx-lm", "dense")),
    "int8": Case("llama", "int8-g64"),
    "int3": Case("llama", "int3-g32"),
    "int8 rows": Case("llama", "int8-row"),
    "odd width": Case("llama", "int8-row", ("transformers",), {"intermediate_size": 172}),
    "zero points": Case("llama", "int4-g64-minmax", ("transformers-told", "mlx-lm")),
    "tied": Case("llama", "int4-g64", changes={"tie_word_embeddings": True}),
    "all": Case(
        "llama", "int4-g32-all", ("transformers-told", "mlx-lm")
    ),  # compressed-tensors 0.20 runs no packed embedding
    "all, tied": Case("llama", "int4-g32-all", ("transformers-told", "mlx-lm"), {"tie_word_embeddings": True}),
    "sharded": Case("llama", "int4-g64", shard_bytes=60_000),
    "mxfp4": Case("llama", "mxfp4-a16", ("transformers-told", "mlx-lm")),
    "mxfp8": Case("llama", "mxfp8-a16", ("transformers-told", "mlx-lm")),
    "fp8": Case("llama", "fp8"),
    "nvfp4": Case("llama", "nvfp4-a16", TOLD),
    "mxfp4 in bfloat16": Case("llama", "mxfp4-a16", ("transformers", "transformers-told"), BRAIN),
    "nvfp4 in bfloat16": Case("llama", "nvfp4-a16", TOLD, BRAIN),
    "int4 in bfloat16": Case(
        "llama",
        "int4-g64",
        changes=BRAIN,
        mlx_tolerance=5e-2,  # MLX adds up bfloat16 products in bfloat16 on a CPU
    ),
    "int8 in bfloat16": Case("llama", "int8-g64", changes=BRAIN, mlx_tolerance=1.1e-2),  # the reference's own rounding
    "mistral": Case("mistral", "int4-g32"),
    "qwen2": Case("qwen2", "int4-g32", changes={"tie_word_embeddings": True}),
    "qwen3": Case("qwen3", "int4-g32"),
    "gemma": Case("gemma", "int4-g32", mlx_tolerance=2e-4),  # mlx-lm 0.32.2 has another gelu there than transformers
    "gemma2": Case("gemma2", "int4-g32"),
    "gemma3": Case("gemma3_text", "int4-g32"),
    "gpt_neox": Case("gpt_neox", "int4-g32"),
    "mixtral": Case("mixtral", "int4-g32", ("transformers", "transformers-told", "dense", "mlx-lm")),
    "mixtral with stacked experts": Case("mixtral", "int4-g32", ("transformers", "dense"), live=True),
    "qwen3_moe": Case("qwen3_moe", "int4-g32", ("transformers", "transformers-told", "dense")),
    "qwen3_moe in fp8": Case("qwen3_moe", "fp8", ("transformers", "transformers-told"), BRAIN),
    "qwen3_moe in mxfp4": Case("qwen3_moe", "mxfp4-a16", ("transformers", "transformers-told"), BRAIN),
    "Q4_0": Case("llama", "int4-g32", ("gguf",), {"num_attention_heads": 8}),
    "Q4_0 tied": Case("llama", "int4-g32", ("gguf",), {"tie_word_embeddings": True}),
    "Q4_0 of all, tied": Case("qwen2", "int4-g32-all", ("gguf",), {"tie_word_embeddings": True}),
    "Q4_0 from longer groups": Case("llama", "int4-g64-absmax", ("gguf",)),
    "Q8_0 in bfloat16": Case("llama", "int8-row", ("gguf",), BRAIN),
    "MXFP4": Case("llama", "mxfp4-a16", ("gguf",)),
    "Q4_0 of mistral": Case("mistral", "int4-g32", ("gguf",), {"sliding_window": None}),
    "Q4_0 of qwen2": Case("qwen2", "int4-g32", ("gguf",)),
    "Q4_0 of qwen3": Case("qwen3", "int4-g32", ("gguf",), {"head_dim": 128}),  # which its reader takes for granted
    "Q4_0 of gemma2": Case("gemma2", "int4-g32", ("gguf",), {**BRAIN, "head_dim": 256, "query_pre_attn_scalar": 256}),
    "Q4_0 of gemma3": Case(
        "gemma3_text", "int4-g32", ("gguf",), {**BRAIN, "head_dim": 256, "query_pre_attn_scalar": 256}
    ),
}
PAIRS = [(name, reader) for name, case in CASES.items() for reader in case.readers]


@dataclass(frozen=True)
class Opened:
    """Logits by reader and directory, what the readers said, what the logits should be, and what was quantized."""

    logits: dict
    said: dict
    wanted: dict
    paths: dict


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Every case written, and opened by all its readers: a process for each reader."""
    root = tmp_path_factory.mktemp("readers")
    np.save(root / "tokens.npy", TOKENS)
    wanted, paths, folders = {}, {}, {}
    for name, case in CASES.items():
        folder = root / name.replace(" ", "-")
        source = make(folder / "float", case.family, **case.changes)
        write(case, source, folder / "qkit")
        held = read_model(folder / "qkit")
        wanted[name] = by_hand(source, held, dtype="float32" if "gguf" in case.readers else "auto")
        paths[name] = list(held.weights)
        for reader in case.readers:
            place = {"mlx-lm": "mlx", "dense": "dense", "gguf": "model.gguf"}.get(reader, "qkit")
            folders.setdefault(reader, {})[name] = folder / place
        if "mlx-lm" in case.readers:
            export_mlx(held, folder / "mlx", shard_bytes=case.shard_bytes)
        if "gguf" in case.readers:
            export_gguf(held, folder / "model.gguf")
        if "dense" in case.readers:
            export_dense(held, folder / "dense")
    logits, said = {}, {}
    for reader, mine in folders.items():
        found, words = run("transformers" if reader == "dense" else reader, list(mine.values()), root)
        for name, folder in mine.items():
            logits[name, reader] = found.get(str(folder))
            said[name, reader] = words[str(folder)]
    return Opened(logits, said, wanted, paths)


def write(case, source, folder):
    """The artifact of a case."""
    if case.live:
        from transformers import AutoModelForCausalLM

        model = qkit.convert(AutoModelForCausalLM.from_pretrained(source, dtype="auto"), case.recipe)
        qkit.save(model, folder, source=source)
    else:
        plan = make_plan(source, qkit.recipe(case.recipe), shard_bytes=case.shard_bytes)
        quantize_directory(plan, folder, engine=qkit.backend("numpy"), workers=1, tick=lambda *_: None)


def by_hand(source, held, *, dtype):
    """Logits of the float model with each quantized weight replaced by what the NumPy reference decodes.

    Args:
        dtype: `auto`, the model's own, to which values are rounded; or `float32`, which holds them exactly.
    """
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    engine = qkit.backend("torchao")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    assert held.weights
    with torch.no_grad():
        for path, weight in held.weights.items():
            w = weight_of(model, path)
            made = reference.quantize(engine.to_numpy(w), weight.rule.weight)
            assert np.array_equal(made.codes, unpack(weight.read()).codes)
            w.copy_(engine.from_numpy(reference.dequantize(made)))
        return model(torch.from_numpy(TOKENS)).logits.float().numpy()


def weight_of(model, path):
    """The weight of the layer at `path` in files; of an expert a part of the parameter that stacks it."""
    expert = expert_of(module_name(path, model.config.to_dict()))
    if expert is None:
        return model.get_submodule(path).weight
    block, number, name = expert
    stack = model.get_submodule(block)
    if name == "down_proj":
        return stack.down_proj[number]
    return stack.gate_up_proj[number].chunk(2)[name == "up_proj"]


def run(reader, folders, root):
    """The logits of `folders` in `reader`, and what it said, from a process without qkit."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    script, out = Path(__file__).parents[1] / "outside.py", root / f"{reader}.npz"
    command = [sys.executable, str(script), reader, str(root / "tokens.npy"), str(out), *map(str, folders)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    return dict(np.load(out)), json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("name", "reader"), [pair for pair in PAIRS if pair[1] != "mlx-lm"])
def test_transformers_computes_what_the_reference_says(opened, name, reader):
    pytest.importorskip("compressed_tensors")
    assert opened.logits[name, reader] is not None, opened.said[name, reader]
    assert np.array_equal(opened.logits[name, reader], opened.wanted[name])


@pytest.mark.parametrize("name", [name for name, reader in PAIRS if reader == "mlx-lm"])
def test_mlx_lm_computes_what_the_reference_says_and_generates(opened, name):
    pytest.importorskip("mlx_lm")
    found, wanted = opened.logits[name, "mlx-lm"], opened.wanted[name]
    assert found is not None, opened.said[name, "mlx-lm"]
    assert np.abs(found - wanted).max() <= CASES[name].mlx_tolerance * np.abs(wanted).max()
    assert opened.said[name, "mlx-lm"]


def test_routers_are_left_alone(opened):
    attention = {"q_proj", "k_proj", "v_proj", "o_proj"}
    for name in ("mixtral", "qwen3_moe", "mixtral with stacked experts"):
        paths = opened.paths[name]
        own = {"gate_proj", "up_proj", "down_proj"} if name == "qwen3_moe" else {"w1", "w2", "w3"}
        assert {path.rpartition(".")[2] for path in paths} == attention | own
        assert len(paths) == 8 + 2 * 4 * 3
