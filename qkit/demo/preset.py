"""The model and the text of the demo: a small Llama, and Python's own source."""

import sysconfig
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from qkit.training import read_bytes, sequences
from qkit.training.data import Tokens


@dataclass(frozen=True, slots=True)
class Preset:
    """The sizes of the model and of its training. `length` counts tokens, which are bytes."""

    hidden: int
    layers: int
    intermediate: int
    batch: int
    length: int
    float_steps: int
    float_rate: float
    more_steps: int
    more_rate: float

    @property
    def config(self) -> dict[str, Any]:
        """The Hugging Face configuration of the model."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": 256,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "intermediate_size": self.intermediate,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "initializer_range": 0.08,
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": None,
            "dtype": "float32",
        }


PRESET = Preset(128, 3, 256, batch=8, length=128, float_steps=700, float_rate=1.5e-3, more_steps=250, more_rate=5e-4)

#: MLX multiplies matrices at some 6 GFLOP/s on a Linux CPU. The demo takes a smaller model there, and its result says so.
PRESETS = {"mlx": replace(PRESET, layers=2, batch=4, length=64, float_steps=230, more_steps=100)}


def standard_library(preset: Preset) -> tuple[list[str], Tokens]:
    """Python's own source files: those to train on, and windows [rows, length + 1] of every tenth file, held out."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    apart = ("site-packages", "test", "tests", "idlelib")
    files = [file for file in folder.rglob("*.py") if not set(apart) & set(file.relative_to(folder).parts)]
    files = sorted(file for file in files if file.stat().st_size)
    unseen = sequences(read_bytes(files[::10], limit=1 << 27), length=preset.length, name=str(folder))
    picked = np.linspace(0, len(unseen) - 1, 8192 // preset.length).astype(np.int64)
    return [str(file) for number, file in enumerate(files) if number % 10], unseen.rows(picked)
