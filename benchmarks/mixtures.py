"""Small mixtures of experts in every form that a user meets: how far their logits lie apart, and how many tensors differ.

Random models of transformers' own classes. One line for each family and engine has the largest difference of logits between two
forms next to each other: float, prepared, converted, saved and loaded again, quantized by `qkit quantize` and loaded. It counts
tensors whose digests differ from those of `qkit quantize` on NumPy. An adapter on experts is trained, merged and converted, and a
second trainer goes on from the state after two steps. Last, bits per weight of the files over those of `qkit plan`.

Usage: python benchmarks/mixtures.py [--recipe int4-g32] [--out FILE.json]
"""

import argparse
import tempfile
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from measure import Report

import qkit
from qkit.artifact.inspect import inspect_directory
from qkit.engines.trainer import TrainerOptions
from qkit.exchange.import_model import read_model
from qkit.streaming.carry_out import quantize_directory
from qkit.streaming.plan import make_plan

SIZE = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "head_dim": 16,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Mixtral": ("MixtralConfig", {"num_local_experts": 8}),
    "Qwen3-MoE": ("Qwen3MoeConfig", {"num_experts": 8, "moe_intermediate_size": 32}),
    "gpt-oss": ("GptOssConfig", {"num_local_experts": 8, "intermediate_size": 64}),
    "DeepSeek-V3": (
        "DeepseekV3Config",
        {
            "num_key_value_heads": 4,
            "n_routed_experts": 8,
            "moe_intermediate_size": 32,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 32,
            "kv_lora_rank": 32,
            "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
        },
    ),
}
TOKENS = np.random.default_rng(0).integers(0, 256, (2, 48)).astype(np.int32)
RATE = 1e-2


def checkpoint(family: str, folder: Path) -> Path:
    """A checkpoint of random weights."""
    import torch
    import transformers

    kind, sizes = FAMILIES[family]
    config = getattr(transformers, kind)(**{**SIZE, **sizes}, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():  # transformers leaves some of them as they lie in memory
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    return folder


def forms(engine: str, source: Path, written: Path, recipe: str, home: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The differences between the forms of one model on one engine, and the digests of its saved tensors."""
    backend, seen = qkit.backend(engine), []

    def watch(model: Any) -> Any:
        seen.append(backend.logits(model, TOKENS))
        return model

    model = watch(qkit.load(source, backend=engine))
    qkit.save(watch(qkit.convert(watch(qkit.prepare(model, recipe)))), home / engine)
    watch(qkit.load(home / engine, backend=engine))
    watch(qkit.load(written, backend=engine))
    gaps = [float(np.abs(one - other).max()) for one, other in pairwise(seen)]
    names = ("float to prepared", "prepared to converted", "converted to saved", "saved to quantize's")
    return dict(zip(names, gaps, strict=True)), read_model(home / engine).digests()


def adapted(engine: str, source: Path, recipe: str) -> dict[str, Any]:
    """An adapter on the experts: trained, merged, converted; and the same from the state after two of four steps."""
    backend = qkit.backend(engine)

    def begun() -> tuple[Any, Any]:
        model = qkit.prepare(qkit.load(source, backend=engine), recipe)
        model = qkit.adapt(model, qkit.Adapter(rank=4, match=("*.experts",)))
        return model, backend.trainer(model, TrainerOptions(weight_decay=0.01))

    model, trainer = begun()
    losses = [trainer.step([TOKENS], learning_rate=RATE) for _ in range(2)]
    state = trainer.state()
    weights = {name: array.copy() for name, array in state.items()}
    losses += [trainer.step([TOKENS], learning_rate=RATE) for _ in range(2)]
    before = backend.logits(model, TOKENS)
    _, other = begun()
    other.restore(weights)
    again = [other.step([TOKENS], learning_rate=RATE) for _ in range(2)]
    after = backend.logits(qkit.convert(qkit.merge(model)), TOKENS)
    return {
        "adapted to merged and converted": float(np.abs(after - before).max()),
        "losses of 4 steps": [round(loss, 4) for loss in losses],
        "losses that differ after a resume": sum(one != two for one, two in zip(losses[2:], again, strict=True)),
    }


def main() -> None:
    """Prints a line for each family and engine."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="int4-g32")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    report = Report(given.out, packages=("transformers", "mlx-lm"), about={"recipe": given.recipe})
    engines = [one.name for one in qkit.backends() if one.ready and one.name != "numpy"]
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as name:
            home = Path(name)
            source = checkpoint(family, home / "float")
            plan = make_plan(source, qkit.recipe(given.recipe))
            quantize_directory(plan, home / "quantized", engine=qkit.backend("numpy"), workers=1, tick=lambda *_: None)
            wanted = read_model(home / "quantized").digests()
            bits = inspect_directory(home / "quantized").bits_per_weight
            for engine in engines:
                found, digests = forms(engine, source, home / "quantized", given.recipe, home)
                report.add(
                    {
                        "family": family,
                        "engine": engine,
                        **found,
                        "tensors": len(wanted),
                        "tensors that differ from NumPy's": sum(digests.get(name) != wanted[name] for name in wanted),
                        **adapted(engine, source, given.recipe),
                        "bits per weight": round(bits, 4),
                        "over plan": round(bits / plan.bits_per_weight, 4),
                    }
                )
    report.finish()


if __name__ == "__main__":
    main()
