"""The damage of W8A8 with and without smoothing: KL of held-out text to the float model, on a model of fit_model.py.

Strengths are `qkit smooth`'s; 0.5 is its default. "outliers" is a model of the same function with some inputs 32 times as large
behind every norm, as trained models of billions of weights have them: W8A8 loses more there.

Usage: python benchmarks/smooth.py MODEL [--recipe R] [--windows N] [--length N] [--calibration N] [--text FILE.npz]
       [--device NAME] [--out FILE.json]

`--text` is as for fit.py.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fit import read_texts
from measure import Report
from transformers import LlamaForCausalLM

import qkit
from qkit.calibration import calibrate
from qkit.evaluation import consecutive
from qkit.fitting.statistics import open_statistics
from qkit.smoothing import smooth

STRENGTHS = (0.25, 0.5, 0.75)
LARGE, MANY = 32.0, 4  # how much larger some inputs are, and how many of them behind each norm


def with_outliers(folder: Path, out: Path) -> Path:
    """The model in `folder` with some large inputs, and weights as much smaller: the same function, exactly."""
    model = LlamaForCausalLM.from_pretrained(folder)
    draw = np.random.default_rng(0)
    with torch.no_grad():
        for block in model.model.layers:
            readers = block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj
            gated = block.mlp.gate_proj, block.mlp.up_proj
            for norm, layers in ((block.input_layernorm, readers), (block.post_attention_layernorm, gated)):
                some = torch.from_numpy(draw.choice(len(norm.weight), MANY, replace=False))
                norm.weight[some] *= LARGE
                for layer in layers:
                    layer.weight[:, some] /= LARGE
    model.save_pretrained(out)
    return out


def log_probabilities(model: Any, rows: np.ndarray) -> torch.Tensor:
    """Of the next token at each place of each window, in fp64."""
    tokens = torch.from_numpy(rows[:, :-1]).long().to(next(model.parameters()).device)
    with torch.no_grad():
        return model(tokens, use_cache=False).logits.double().log_softmax(-1)


def main() -> None:
    """Measures the model, and the one with outliers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--recipe", default="int8-dynamic-act-int8-weight")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--calibration", type=int, default=64, help="windows of the training text")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    trained = json.loads((given.model / "training.json").read_text(encoding="utf-8"))
    about = {"recipe": given.recipe, **{name: trained[name] for name in ("size", "steps", "batch")}}
    report = Report(given.out, device=given.device, packages=("transformers", "qkit-quant"), about=about)
    engine, (text, unseen) = qkit.backend("torchao").on(given.device), read_texts(given.text)
    rows = consecutive(unseen, length=given.length, windows=given.windows)
    seen = consecutive(text, length=given.length - 1, windows=given.calibration)
    with tempfile.TemporaryDirectory() as aside:
        place = Path(aside)
        wanted = log_probabilities(qkit.load(given.model, backend=engine), rows)
        for name, model in (("as trained", given.model), ("outliers", with_outliers(given.model, place / "outliers"))):
            statistics = open_statistics(calibrate(model, place / f"{name}-stats", seen, engine=engine))
            row: dict[str, Any] = {"model": name}
            for strength in (None, *STRENGTHS):
                folder = model
                if strength is not None:
                    folder = place / f"{name}-{strength}"
                    smooth(model, folder, statistics, strength=strength)
                converted = qkit.convert(qkit.load(folder, backend=engine), given.recipe)
                found = log_probabilities(converted, rows)
                divergence = float((wanted.exp() * (wanted - found)).sum(-1).mean())
                row["KL" if strength is None else f"KL, smoothed {strength:g}"] = round(divergence, 7)
            report.add(row)
    report.finish()


if __name__ == "__main__":
    main()
