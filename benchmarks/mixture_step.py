"""The training step of a prepared mixture of experts over that of the float model, on a CPU: whole steps, processor time.

`python benchmarks/mixture_step.py [--engine torchao|mlx] [--recipe int4-g32] [--steps 5]` prints one line for each family. Float
and prepared steps take turns, so that other work on the machine falls on both; the median of the ratios counts.
"""

import argparse
import json
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np

import qkit
from qkit.engines.trainer import TrainerOptions

SIZE = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
FAMILIES = {
    "mixtral": ("MixtralConfig", {**SIZE, "intermediate_size": 512, "num_local_experts": 8}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {**SIZE, "intermediate_size": 512, "moe_intermediate_size": 192, "num_experts": 16, "head_dim": 64},
    ),
}
TOKENS = np.random.default_rng(0).integers(0, 1024, (4, 129)).astype(np.int32)


def checkpoint(family: str, folder: Path) -> Path:
    """A checkpoint of random weights."""
    import torch
    import transformers

    kind, sizes = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**sizes)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def seconds(trainer: object) -> float:
    """Processor seconds of one step, of all threads."""
    begin = time.process_time()
    trainer.step([TOKENS], learning_rate=1e-4)
    return time.process_time() - begin


def ratios(engine: str, source: Path, recipe: str, steps: int) -> list[float]:
    """Prepared over float, for each pair of steps."""
    backend = qkit.backend(engine)
    trainers = []
    for prepared in (False, True):
        model = qkit.load(source, backend=engine)
        model = qkit.prepare(model, recipe) if prepared else model
        trainers.append(backend.trainer(model, TrainerOptions(weight_decay=0.01)))
    for trainer in trainers:
        seconds(trainer)  # compiles, or fills caches
    pairs = [tuple(seconds(trainer) for trainer in trainers) for _ in range(steps)]
    return [prepared / plain for plain, prepared in pairs]


def main() -> None:
    """Prints a line for each family."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", choices=("torchao", "mlx"), default="torchao")
    parser.add_argument("--recipe", default="int4-g32")
    parser.add_argument("--steps", type=int, default=5)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as place:
            found = ratios(arguments.engine, checkpoint(family, Path(place)), arguments.recipe, arguments.steps)
        line = {"family": family, "engine": arguments.engine, "recipe": arguments.recipe}
        print(
            json.dumps({**line, "ratio": round(statistics.median(found), 3), "all": [round(one, 3) for one in found]})
        )


if __name__ == "__main__":
    main()
