"""A run as a value: what it takes, what it refuses, and that its table is its inverse."""

from pathlib import Path

import pytest

import qkit
from qkit.engines.trainer import OFFSET_RATE
from qkit.training import Schedule, read_run, run_from_table
from qkit.training.run import run_table

LEAST = {"model": "m", "out": "o", "data": ["a.txt"]}


def test_the_defaults_of_the_field():
    run = run_from_table(LEAST)
    assert (run.learning_rate, run.warmup, run.schedule, run.weight_decay) == (1e-5, 0.03, "linear", 0.0)
    assert run.offset_learning_rate == OFFSET_RATE
    assert (run.betas, run.dtype, run.steps, run.quantization) == ((0.9, 0.999), "float32", None, Schedule())


def test_a_run_and_its_table_are_inverse():
    table = {
        **LEAST,
        "recipe": "int4-g32",
        "betas": [0.9, 0.95],
        "warmup": 7,
        "quantization": {"start": 3, "windows": [[4, 5], [8, 9]], "match": "*.q_proj"},
        "distillation": {"teacher": "t", "temperature": 2, "weight": 0.5},
    }
    run = run_from_table(table)
    assert run.quantization == Schedule(3, ((4, 5), (8, 9)), "*.q_proj")
    assert run_from_table(run_table(run)) == run
    assert run.model == Path("m")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rat": 1}, "unknown key learning_rat: did you mean learning_rate?"),
        ({"zzz": 1}, "unknown key zzz: there is model, out, data"),
        ({"model": None}, "model is None: want a folder"),
        ({"data": []}, r"data is \(\): want at least one file"),
        ({"data": [1]}, r"data is \(1,\): want file names"),
        ({"batch": 0}, "batch is 0: want a whole number from 1 on"),
        ({"steps": 1.5}, r"steps is 1\.5: want a whole number"),
        ({"seed": True}, "seed is True: want a whole number"),
        ({"learning_rate": 0}, "learning_rate is 0: want a number above 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"offset_learning_rate": -1}, "offset_learning_rate is -1: want a number from 0 on"),
        ({"offset_learning_rate": float("inf")}, "offset_learning_rate is inf: want a number from 0 on"),
        ({"warmup": 1.5}, r"warmup is 1\.5: want a share below 1, or a whole number of steps"),
        ({"schedule": "line"}, "schedule is 'line': want one of linear, cosine, constant"),
        ({"betas": [0.9]}, r"betas is \(0\.9,\): want two numbers"),
        ({"dtype": "float16"}, "dtype is 'float16': want float32 or bfloat16"),
        ({"dtype": "bfloat16", "autocast": True}, "autocast is for float32 master weights"),
        ({"compile": 1}, "compile is 1: want true or false"),
        ({"quantization": {"begin": 1}}, "unknown key quantization.begin"),
        ({"quantization": {"interval": 0}}, "quantization.interval is 0: want a whole number from 1 on"),
        (
            {"quantization": {"interval": 4, "start": 3}},
            "step 3 begins to quantize between two refreshes.*begin at 1, or at 5",
        ),
        ({"quantization": {"interval": 4}, "checkpoint_every": 6}, "checkpoint_every is 6.*such as 4"),
        (
            {"quantization": {"ramp": [[3, "int8-g64"], [3, "int6-g64"]]}},
            "want .last step, recipe., with last steps that rise",
        ),
        ({"quantization": {"ramp": [[3, "int8-g64"]]}, "steps": 3}, "ramp ends at step 3, and steps is 3"),
        ({"quantization": {"start": 0}}, "quantization.start is 0: steps count from 1"),
        ({"quantization": {"windows": [[5, 4]]}}, r"quantization.windows has \[5, 4\]"),
        ({"quantization": {"windows": 5}}, "quantization.windows is 5: want a list"),
        ({"distillation": {}}, "distillation.teacher is None"),
        (
            {"distillation": {"teacher": "t", "temprature": 1}},
            "unknown key distillation.temprature: did you mean distillation.temp",
        ),
        ({"distillation": {"teacher": "t", "weight": 2}}, "distillation.weight is 2"),
        ({"adapter": 3}, "adapter is 3: want a table"),
        ({"adapter": {"rnk": 8}}, "adapter: unknown key 'rnk' in an adapter: there is rank"),
        ({"adapter": {}, "recipe": "float"}, "adapter: an adapter is trained on a grid, and recipe is 'float'"),
    ],
)
def test_a_wrong_value_is_refused_by_its_key(change, message):
    with pytest.raises(qkit.RunError, match=message):
        run_from_table({**LEAST, **change})


def test_a_missing_key_is_named():
    with pytest.raises(qkit.RunError, match="data is missing"):
        run_from_table({"model": "m", "out": "o"})


def test_a_run_file_that_is_no_toml_is_refused_by_name(tmp_path):
    (tmp_path / "run.toml").write_text("steps = \n")
    with pytest.raises(qkit.RunError, match=r"run\.toml: "):
        read_run(tmp_path / "run.toml")
