"""`load_best_model_at_end` and early stopping: the artifact has the best evaluation on the grid, also after an interruption."""

import json

import numpy as np
import pytest
import runs
from runs import Stopped, arrays, codes_of, losses, same_run, stopping, table
from safetensors.numpy import load_file
from tables import TRAINERS as ENGINES
from typer.testing import CliRunner

import qkit
from qkit.cli.application import application
from qkit.report.master_weights import newest_checkpoint
from qkit.training import checkpoint, run_from_table, train_model
from qkit.training.best import best_step, waited
from qkit.training.folder import LOG, read_log, run_folder_of

pytestmark = pytest.mark.skipif(not ENGINES, reason="needs an engine that trains")
#: The held-out loss falls until step 7, and rises again: the rate is high, and the other text is another one.
RISING = {"steps": 12, "learning_rate": 4e-2, "schedule": "constant", "evaluate_every": 1, "checkpoint_every": 5}
BEST = {**RISING, "load_best_model_at_end": True}


OTHER = "".join(f"the root of {i * i} is {i}. " for i in range(40))


def folder(path, name=ENGINES[0] if ENGINES else ""):
    runs.folder(path, name)
    (path / "other.txt").write_text(OTHER)
    return path


def settings(path, **changes):
    return run_from_table(table(path, **{"held_out": [str(path / "other.txt")], **changes}))


def train(path, **changes):
    return train_model(settings(path, **changes))


def evaluations(out):
    events = read_log(run_folder_of(out) / LOG)
    return {event["step"]: event["loss"] for event in events if event["event"] == "evaluation"}


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize(
    "more", [{}, {"recipe": None, "adapter": {"rank": 4, "norms": "stored"}}], ids=["full", "adapter"]
)
def test_the_artifact_has_the_weights_of_the_best_evaluation(tmp_path, name, more):
    path = folder(tmp_path, name)
    if more:
        qkit.save(qkit.convert(qkit.load(path / "model", backend=name), "int4-g32"), path / "packed", backend=name)
        more = {**more, "model": str(path / "packed")}
    outcome = train(path, backend=name, **BEST, **more)
    seen = evaluations(path / "out")
    assert outcome.best_step == min(seen, key=seen.get)
    assert 0 < outcome.best_step < outcome.steps == 12
    assert outcome.held_out_saved == pytest.approx(seen[outcome.best_step], rel=1e-6)  # another order of sums
    assert outcome.held_out_saved < outcome.held_out_after
    assert outcome.forward_difference == 0
    options = {**RISING, "evaluate_every": None, "checkpoint_every": 1, "out": str(path / "other"), **more}
    with stopping(outcome.best_step) as tell:  # the same run, ended at its best step
        train_model(settings(path, backend=name, **options), tell=tell)
    states = [load_file(checkpoint.file_of(run_folder_of(path / out), outcome.best_step)) for out in ("out", "other")]
    assert states[0].keys() == states[1].keys()
    assert all(np.array_equal(states[0][key], states[1][key]) for key in states[0])
    if not more:
        for layer, codes in codes_of(path / "out").items():
            want = qkit.quantize(states[0][f"weights.{layer}.weight"], qkit.recipe("int4-g32").rules[-1].weight).codes
            assert np.array_equal(codes, want)


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("step", [0, 5, 10])
def test_a_resumed_run_ships_the_same_best_evaluation(tmp_path, name, step):
    path = folder(tmp_path, name)
    train(path, backend=name, **BEST, out=str(path / "whole"))
    with stopping(step) as tell:
        train_model(settings(path, backend=name, **BEST), tell=tell)
    train(path, backend=name, **BEST)
    assert same_run(path / "out", path / "whole")
    assert evaluations(path / "out") == evaluations(path / "whole")
    kept = [sorted(one.name for one in run_folder_of(path / out).glob(checkpoint.PATTERN)) for out in ("out", "whole")]
    assert kept[0] == kept[1]
    assert len(kept[0]) <= 4


@pytest.mark.parametrize("name", ENGINES)
def test_early_stopping_ends_the_run_as_its_patience_says(tmp_path, name):
    path = folder(tmp_path, name)
    stopped = {**BEST, "early_stopping_patience": 2}
    outcome = train(path, backend=name, **stopped)
    whole = train(path, backend=name, **BEST, out=str(path / "whole"))
    assert outcome.steps == outcome.best_step + 2 < whole.steps
    assert losses(path / "out") == losses(path / "whole")[: outcome.steps]
    kinds = [event["event"] for event in read_log(run_folder_of(path / "out") / LOG)]
    assert kinds[-3:] == ["checkpoint", "early_stop", "end"]
    last = train(path, backend=name, **{**RISING, "early_stopping_patience": 2}, out=str(path / "last"))
    assert (last.steps, last.best_step) == (outcome.steps, None)
    assert codes_of(path / "last").keys() == codes_of(path / "out").keys()


@pytest.mark.parametrize("moment", ["checkpoint", "early_stop", "end"])
def test_a_run_that_is_killed_after_it_stopped_early_only_ends(tmp_path, moment):
    path = folder(tmp_path)
    stopped = {**BEST, "early_stopping_patience": 2}
    outcome = train(path, **stopped, out=str(path / "whole"))

    def tell(event):
        if (event["event"], event["step"]) == (moment, outcome.steps):
            raise Stopped

    with pytest.raises(Stopped):
        train_model(settings(path, **stopped), tell=tell)
    again = train(path, **stopped)
    assert (again.steps, again.best_step) == (outcome.steps, outcome.best_step)
    assert same_run(path / "out", path / "whole")


def test_more_patience_goes_on_where_a_run_stopped_early(tmp_path):
    path = folder(tmp_path)
    train(path, **BEST, early_stopping_patience=1)
    longer = {**BEST, "early_stopping_patience": 20, "replace": True}
    assert train(path, **longer).steps == 12
    train(path, **BEST, out=str(path / "whole"))
    assert codes_of(path / "out").keys() == codes_of(path / "whole").keys()
    assert losses(path / "out") == losses(path / "whole")


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("schedule", [{"ramp": [[4, "int8-g32"]]}, {"start": 5}, {"windows": [[5, 6]]}])
def test_evaluations_are_on_the_grid_of_the_recipe_and_do_not_touch_training(tmp_path, name, schedule):
    path, run = folder(tmp_path, name), {"backend": name, "steps": 6, "quantization": schedule, "checkpoint_every": 3}
    train(path, **run, evaluate_every=1)
    train(path, **run, out=str(path / "plain"))
    assert losses(path / "out") == losses(path / "plain")
    assert same_run(path / "out", path / "plain")
    state = load_file(checkpoint.file_of(run_folder_of(path / "out"), 3))
    model = qkit.prepare(qkit.load(path / "model", backend=name), "int4-g32")
    weights = {key.removeprefix("weights."): x for key, x in state.items() if key.startswith("weights.")}
    qkit.backend(name).fill(model, weights)
    seen = evaluations(path / "out")
    text = [str(path / "text.txt")]
    found = train(
        path, model=save(name, model, path / "third"), steps=1, backend=name, data=text, out=str(path / "one")
    )
    assert seen[3] == pytest.approx(found.held_out_before, rel=1e-6)  # the same sequences; another order of sums


def save(name, model, out):
    """The masters of a prepared model as a float model."""
    like = qkit.load(out.parent / "model", backend=name)
    qkit.backend(name).fill(like, {key: x for key, x in arrays(name, model).items() if key in arrays(name, like)})
    return str(qkit.save(like, out, source=out.parent / "model", backend=name))


@pytest.mark.parametrize("name", ENGINES)
def test_patience_begins_with_the_first_step_on_the_grid(tmp_path, name):
    path = folder(tmp_path, name)
    schedule = {"ramp": [[8, "int8-g32"]]}
    outcome = train(path, backend=name, **BEST, early_stopping_patience=1, quantization=schedule)
    assert outcome.steps >= 9
    assert {row.weight for row in qkit.coverage(qkit.load(path / "out", backend=name)).rows if row.weight} == {
        "int4-g32-signed"
    }


def test_a_comparison_takes_the_masters_of_the_best_evaluation(tmp_path):
    path = folder(tmp_path)
    outcome = train(path, **BEST)
    assert newest_checkpoint(path / "out") == checkpoint.file_of(run_folder_of(path / "out"), outcome.best_step)


LISTS = [[3.0, 2.0, 2.5, 1.9, 1.95, 1.94, 1.93], [1.0, 2.0, 3.0], [3, 2.95, 2.9, 2.85, 2.0, 2.0, 2.0], [2.0, 2.0, 2.0]]


@pytest.mark.parametrize("series", LISTS)
@pytest.mark.parametrize("threshold", [0.0, 0.08])
def test_patience_is_counted_as_in_transformers(series, threshold):
    transformers = pytest.importorskip("transformers")
    callback = transformers.EarlyStoppingCallback(early_stopping_patience=99, early_stopping_threshold=threshold)
    arguments = transformers.TrainingArguments("unused", metric_for_best_model="loss", report_to=[], use_cpu=True)
    arguments.greater_is_better = False
    state, control = transformers.TrainerState(), transformers.TrainerControl()
    for count, loss in enumerate(series):
        callback.check_metric_value(arguments, state, control, loss)
        state.best_metric = (
            loss if state.best_metric is None else min(loss, state.best_metric)
        )  # as Trainer does after it
        mine = waited(list(enumerate(series[: count + 1], start=1)), first=1, threshold=threshold)
        assert mine == callback.early_stopping_patience_counter


def test_the_best_is_the_first_of_equals_and_never_no_number():
    assert best_step([(0, float("nan")), (1, 2.0), (2, 1.0), (3, 1.0)]) == 2
    assert best_step([(0, 3.0), (1, 2.0), (2, 1.0)], until=1) == 1
    assert best_step([(0, float("nan"))]) is None
    assert best_step([]) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"load_best_model_at_end": True}, "load_best_model_at_end needs evaluations to choose from: give evaluate_every"),
        ({"early_stopping_patience": 2}, "early_stopping_patience needs evaluations to choose from"),
        ({"early_stopping_patience": 0, "evaluate_every": 2}, "early_stopping_patience is 0: want a whole number from 1"),
        ({"early_stopping_threshold": 0.1}, "early_stopping_threshold is for early_stopping_patience"),
        ({"early_stopping_threshold": -1.0}, "early_stopping_threshold is -1.0: want a number from 0 on"),
        ({"load_best_model_at_end": 1}, "load_best_model_at_end is 1: want true or false"),
        ({**BEST, "method": "sft"}, "method = 'sft' evaluates on held_out, each evaluate_every steps: give both, or none"),
        (
            {**BEST, "evaluate_every": 2, "checkpoint_every": 6, "quantization": {"interval": 3}},
            "evaluate_every is 2, and quantization.interval 3: .* such as 3",
        ),
    ],
)  # fmt: skip
def test_a_choice_without_evaluations_is_refused_by_name(tmp_path, changes, message):
    with pytest.raises(qkit.RunError, match=message):
        run_from_table(table(tmp_path, **changes))


def test_a_text_too_short_to_evaluate_on_is_refused_before_the_first_step(tmp_path):
    path = folder(tmp_path)
    (path / "text.txt").write_text("some few words, and no more of them")
    with pytest.raises(qkit.RunError, match=r"load_best_model_at_end needs held-out text.*: give held_out"):
        train(path, **BEST, early_stopping_patience=2, held_out=None)


def test_on_the_command_line(tmp_path, monkeypatch):
    path = folder(tmp_path)
    monkeypatch.chdir(path)
    line = "train model out -r int4-g32 --data text.txt --held-out other.txt --steps 12 --batch 2 --length 16"
    more = "--learning-rate 4e-2 --schedule constant --evaluate-every 1 --load-best-model-at-end --early-stopping-patience 2"
    threshold = "--early-stopping-threshold 0.001"
    done = CliRunner().invoke(
        application, [*line.split(), *more.split(), *threshold.split(), "--backend", ENGINES[0], "--json"]
    )
    assert done.exit_code == 0, done.output
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [event["event"] for event in events][-2:] == ["early_stop", "end"]
    seen = evaluations(path / "out")
    assert events[-1]["best_step"] == min(seen, key=seen.get)
