"""What tests of training share: a very small Llama and its text, as directories and files."""

import numpy as np
from llama import ENGINES as BUILDERS
from llama import build

import qkit
from qkit.engines.abilities import offers
from qkit.engines.protocol import Trains

ENGINES = [name for name in BUILDERS if offers(qkit.backend(name), Trains)]
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
LENGTH = 16
TEXT = "".join(f"{i} squared is {i * i}; " for i in range(400))
TOKENS = np.random.default_rng(3).integers(0, 256, (6, LENGTH + 1)).astype(np.int32)


def small(name, **changes):
    """The test Llama on engine `name`, smaller."""
    return build(name, **{**SMALL, **changes})


def folder(path, name=ENGINES[0] if ENGINES else "", **changes):
    """A directory with the small Llama, and a text beside it."""
    qkit.save(small(name, **changes), path / "model", backend=name)
    (path / "text.txt").write_text(TEXT)
    return path


def table(path, **changes):
    """A run of 12 short steps in `folder`, as a run file has it."""
    made = {
        "model": str(path / "model"),
        "out": str(path / "out"),
        "data": [str(path / "text.txt")],
        "recipe": "int4-g32",
        "backend": ENGINES[0],
        "steps": 12,
        "batch": 2,
        "length": LENGTH,
        "learning_rate": 1e-3,
        "checkpoint_every": 5,
    }
    return {key: value for key, value in {**made, **changes}.items() if value is not None}


def arrays(name, model):
    """Every stored array of a model, copied."""
    engine = qkit.backend(name)
    return {key: engine.to_numpy(x).copy() for key, x in engine.tensors(model).items()}


def same(one, other):
    """Whether two maps hold equal arrays under equal names."""
    return one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)
