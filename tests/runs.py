"""Runs of training: the folder of a small Llama and a text, a run's settings, and the files that a run leaves."""

from contextlib import contextmanager

import numpy as np
import pytest
from alike import contents
from models import made_once, small
from safetensors.numpy import load_file
from tables import TRAINERS as ENGINES

import qkit
from qkit.exchange.import_model import read_model
from qkit.formats.packed import unpack
from qkit.training import checkpoint, run_from_table, train_model
from qkit.training.folder import LOG, read_log, run_folder_of

LENGTH = 16
TEXT = "".join(f"{i} squared is {i * i}; " for i in range(400))
TOKENS = np.random.default_rng(3).integers(0, 256, (6, LENGTH + 1)).astype(np.int32)


@made_once
def _model(folder, name, **changes):
    return qkit.save(small(name, **changes), folder, backend=name)


def folder(path, name=ENGINES[0] if ENGINES else "", **changes):
    """A directory with the small Llama, and a text beside it."""
    _model(path / "model", name, **changes)
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


def last(out):
    return sorted(run_folder_of(out).glob(checkpoint.PATTERN))[-1]


class Stopped(Exception):
    """Ends a run from inside, as an interruption would."""


@contextmanager
def stopping(step):
    """A function to tell events to, that ends the run once the checkpoint of `step` is written."""

    def tell(event):
        if (event["event"], event["step"]) == ("checkpoint", step):
            raise Stopped

    with pytest.raises(Stopped):
        yield tell


def losses(out):
    return [event["loss"] for event in read_log(run_folder_of(out) / LOG) if event["event"] == "step"]


def same_run(one, other):
    """Whether two artifacts, and all that training left behind them, are equal: masters, moments, ranges, random numbers."""
    states = [load_file(last(out)) for out in (one, other)]
    assert states[0].keys() == states[1].keys()
    equal = all(np.array_equal(states[0][key], states[1][key]) for key in states[0])
    return equal and contents(one) == contents(other) and losses(one) == losses(other)


def learning(path, element, scale):
    """A file with a recipe that learns its ranges."""
    grid = f'schema = 1\n[grids.w]\nelement = "{element}"\ngroup = 32\nscale = "{scale}"\n'
    rules = '[[rules]]\nmatch = "lm_head"\n[[rules]]\nmatch = "*"\nweight = "w"\nscales = "learned"\n'
    (path / "mine.toml").write_text(grid + rules)
    return str(path / "mine.toml")


def codes_of(out):
    return {path: unpack(held.read()).codes for path, held in read_model(out).weights.items()}


def check_resumed(run, path, *, stop):
    """Stops a run into `path`/out after `stop` steps, goes on with it, and compares it with one that nothing stopped."""
    with stopping(stop) as tell:
        train_model(run_from_table(run), tell=tell)
    train_model(run_from_table(run))
    train_model(run_from_table({**run, "out": str(path / "whole")}))
    assert same_run(path / "out", path / "whole")
    found = losses(path / "out")
    assert found[-1] < found[0]
