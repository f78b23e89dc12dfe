"""The models of fit.py: Llamas of 0.8 and 1.7 million weights, trained on Python's source files byte by byte.

Every tenth file is held out.

Usage: python benchmarks/fit_model.py FOLDER [--size 1.7m|0.8m] [--steps N] [--batch N]
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from recover import texts
from small_llama import Run, train
from torch import Tensor, nn

SEED = 0
COMMON = {"vocab_size": 256, "num_hidden_layers": 4, "max_position_embeddings": 512, "tie_word_embeddings": False}
SPECIAL = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
SIZES = {
    "0.8m": {"hidden_size": 128, "intermediate_size": 352, "num_attention_heads": 4, "num_key_value_heads": 4},
    "1.7m": {"hidden_size": 192, "intermediate_size": 512, "num_attention_heads": 6, "num_key_value_heads": 6},
}


class Scores(nn.Module):
    """A model of transformers as one that gives logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        scores: Tensor = self.model(tokens, use_cache=False).logits
        return scores


def make(folder: Path, *, size: str, steps: int, batch: int) -> None:
    """Trains the model of a size, and saves it in `folder` with the losses of its training."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    torch.set_num_threads(1)  # the same sums on every machine of its kind
    model = LlamaForCausalLM(LlamaConfig(**COMMON, **SPECIAL, **SIZES[size]))
    text, _ = texts()
    run = Run(steps=steps, batch=batch, length=256, rate=3e-3, weight_decay=0.1, seed=SEED, half=True)
    losses = train(Scores(model), torch.from_numpy(text.astype(np.uint8)), run)
    model.eval().save_pretrained(folder)
    (folder / "training.json").write_text(
        json.dumps({"size": size, "steps": steps, "batch": batch, "losses": losses}), encoding="utf-8"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=2800)
    parser.add_argument("--size", choices=SIZES, default="1.7m")
    parser.add_argument("--batch", type=int, default=8)
    given = parser.parse_args()
    make(given.folder, size=given.size, steps=given.steps, batch=given.batch)
