"""When training quantizes: start and windows change the trained weights when they should, and only then."""

import numpy as np
import pytest
from alike import same
from models import small
from runs import TOKENS, arrays
from tables import TRAINERS as ENGINES

import qkit
from qkit import Grid, Recipe, Rule
from qkit.engines.trainer import TrainerOptions
from qkit.training.data import sequences
from qkit.training.loop import Order, train
from qkit.training.schedule import Schedule, switching

STEPS = 4
DATA = sequences(TOKENS.reshape(-1), length=16, name="random bytes")
MODES = [(name, compiled) for name in ENGINES for compiled in (False, True)]


class Runs:
    """Training with a schedule, each engine and mode once for each schedule; compiled once for all of them."""

    def __init__(self):
        self.made, self.trainers, self.rules = {}, {}, {}

    def __call__(self, name, compiled, schedule, *, recipe="int4-g32"):
        """The weights after each step; without a recipe, those of the float model."""
        key = (name, compiled, schedule, recipe)
        if key not in self.made:
            self.made[key] = list(self._run(*key))
        return self.made[key]

    def _run(self, name, compiled, schedule, recipe):
        engine = qkit.backend(name)
        if (name, compiled, recipe) not in self.trainers:
            model = small(name, num_hidden_layers=1)
            model = qkit.prepare(model, recipe) if recipe else model
            trainer = engine.trainer(model, TrainerOptions(weight_decay=0.0, seed=0, compiled=compiled))
            start = {key: np.array(array) for key, array in trainer.state().items()}
            self.trainers[name, compiled, recipe] = model, trainer, start
        model, trainer, start = self.trainers[name, compiled, recipe]
        for layer in engine.layers(model):
            if layer.stage == "prepared":
                engine.freeze_values(layer.module, on=False)
                engine.regrid(layer.module, self.rules.setdefault((name, compiled, recipe, layer.path), layer.rule))
        trainer.restore(start)
        before = switching(engine, model, schedule) if recipe else lambda step: None
        order = Order(DATA, batch=2, accumulation=1, seed=0)
        for _ in train(trainer, order, first=1, last=STEPS, rate=lambda step: 1e-2, before=before):
            yield arrays(name, model)


@pytest.fixture(scope="module")
def runs():
    return Runs()


def agree(name, compiled, one, other):
    """Bit for bit; but a float model, and one whose layers are switched off, are two programs for torch's compiler."""
    if name == "torchao" and compiled:
        return all(abs(one[key] - other[key]).max() < 1e-4 for key in one)  # rates are 1e-2, in Adam's first steps
    return same(one, other)


@pytest.mark.parametrize(("name", "compiled"), MODES)
def test_before_its_start_the_float_model_is_trained_and_from_then_on_the_quantized_one(runs, name, compiled):
    plain = runs(name, compiled, Schedule(), recipe=None)
    late, always, never = (runs(name, compiled, Schedule(start=start)) for start in (3, 1, STEPS + 1))
    assert all(agree(name, compiled, one, other) for one, other in zip(never, plain, strict=True))
    assert same(late[0], never[0])
    assert same(late[1], never[1])
    assert not agree(name, compiled, late[2], never[2])
    assert not agree(name, compiled, always[0], never[0])


@pytest.mark.parametrize(("name", "compiled"), MODES)
def test_windows_open_and_close(runs, name, compiled):
    """Steps 2 to 3 quantize: step 1 is the float model's, step 4 is again, on weights that steps 2 and 3 have changed."""
    window, open_end = Schedule(windows=((2, 3),)), Schedule(windows=((2, STEPS),))
    closed, opened, never = (runs(name, compiled, one) for one in (window, open_end, Schedule(start=STEPS + 1)))
    assert same(closed[0], never[0])
    assert not agree(name, compiled, closed[1], never[1])
    assert same(closed[2], opened[2])
    assert not agree(name, compiled, closed[3], opened[3])


@pytest.mark.parametrize(("name", "compiled"), MODES)
def test_between_refreshes_values_stand_and_masters_move(runs, name, compiled):
    """Values are made before steps 1 and 3: step 1 is as ever, step 2 has old values, and in the end the masters differ."""
    always, second, never = (runs(name, compiled, Schedule(interval=n)) for n in (1, 2, STEPS))
    assert same(second[0], always[0])
    assert not agree(name, compiled, second[1], always[1])
    assert same(second[1], never[1])
    assert not agree(name, compiled, second[2], never[2])
    assert not same(second[1], second[0])


@pytest.mark.parametrize(("name", "compiled"), MODES)
def test_a_ramp_trains_on_one_recipe_and_then_on_the_next(runs, name, compiled):
    ramp = runs(name, compiled, Schedule(ramp=((1, "int8-g32"), (2, "mxfp8-a16"))))
    own, eight = runs(name, compiled, Schedule()), runs(name, compiled, Schedule(ramp=((STEPS, "int8-g32"),)))
    assert same(ramp[0], eight[0])
    assert not agree(name, compiled, ramp[0], own[0])
    assert not agree(name, compiled, ramp[1], eight[1])
    longer = runs(name, compiled, Schedule(ramp=((1, "int8-g32"), (STEPS, "mxfp8-a16"))))
    assert same(ramp[1], longer[1])
    assert not agree(name, compiled, ramp[2], longer[2])


@pytest.mark.parametrize("name", ENGINES)
def test_compiled_steps_are_compiled_once_for_each_recipe_and_not_for_each_step(name, monkeypatch):
    engine, model = qkit.backend(name), qkit.prepare(small(name, num_hidden_layers=1), "int4-g32")
    counted = []
    if name == "torchao":
        import torch
        from torch._dynamo.utils import counters

        torch.compiler.reset()
        start = counters["stats"]["unique_graphs"]
    else:
        kind = type(model)
        call = kind.__call__
        monkeypatch.setattr(kind, "__call__", lambda *a, **k: (counted.append(1), call(*a, **k))[1])
    trainer = engine.trainer(model, TrainerOptions(weight_decay=0.0, seed=0, compiled=True))
    before = switching(engine, model, Schedule(interval=2, ramp=((4, "int8-g32"),)))
    made = []
    for step in range(1, 9):
        before(step)
        trainer.step([TOKENS[:2]], learning_rate=1e-3)
        made.append(counters["stats"]["unique_graphs"] - start if name == "torchao" else len(counted))
    assert made[0] == made[1] == made[2] == made[3] < made[4] == made[5] == made[6] == made[7]


@pytest.mark.parametrize("name", ENGINES)
def test_what_a_ramp_ends_on_is_the_recipe_of_the_run(name):
    engine, model = qkit.backend(name), qkit.prepare(small(name, num_hidden_layers=1), "int4-g32")
    before = switching(engine, model, Schedule(ramp=((2, "int8-g32"),), interval=2))
    grids = []
    for step in (1, 2, 3):
        before(step)
        grids.append({row.weight for row in qkit.coverage(model).rows if row.state == "prepared"})
    assert grids == [{"int8-g32-absmax"}, {"int8-g32-absmax"}, {"int4-g32-signed"}]


@pytest.mark.parametrize("name", ENGINES)
def test_held_values_are_not_evaluated(name):
    """They are for training: evaluation, and what is converted, have the values of the weights as they are."""
    engine, model = qkit.backend(name), qkit.prepare(small(name, num_hidden_layers=1), "int4-g32")
    trainer = engine.trainer(model, TrainerOptions(weight_decay=0.0, seed=0))
    switching(engine, model, Schedule(interval=9))(1)
    first = engine.loss(model, TOKENS)
    for _ in range(2):
        trainer.step([TOKENS[:2]], learning_rate=1e-2)
    logits = engine.logits(model, TOKENS[:, :-1])
    assert engine.loss(model, TOKENS) != first
    trainer.step([TOKENS[:2]], learning_rate=0.0)
    assert np.array_equal(engine.logits(model, TOKENS[:, :-1]), logits)
    assert np.array_equal(engine.logits(qkit.convert(model), TOKENS[:, :-1]), logits)


@pytest.mark.parametrize("name", ENGINES)
def test_evaluation_in_between_does_not_refresh(name):
    """The loss of a step is that of held values, before and after somebody has looked."""
    engine, model = qkit.backend(name), qkit.prepare(small(name, num_hidden_layers=1), "int4-g32")
    trainer = engine.trainer(model, TrainerOptions(weight_decay=0.0, seed=0))
    switching(engine, model, Schedule(interval=9))(1)
    losses = [trainer.step([TOKENS[:2]], learning_rate=rate) for rate in (1e-2, 0.0)]
    engine.loss(model, TOKENS)
    losses.append(trainer.step([TOKENS[:2]], learning_rate=0.0))
    assert losses[1] == losses[2]
    assert losses[1] != losses[0]  # norms, and the embedding, are not held


@pytest.mark.parametrize("name", ENGINES)
def test_layers_that_cannot_follow_are_refused(name):
    engine, model = qkit.backend(name), small(name, num_hidden_layers=1)
    learns = Recipe("learns", (Rule(("*",), weight=Grid("int4", 32), scales="learned"),))
    with pytest.raises(qkit.RunError, match=r"interval: .*q_proj learns its scales, and cannot follow"):
        switching(engine, qkit.prepare(model, learns), Schedule(interval=2))
    model = qkit.adapt(
        qkit.prepare(small(name, num_hidden_layers=1), "int4-g32"), qkit.Adapter(rank=2, match=("*q_proj",))
    )
    with pytest.raises(qkit.RunError, match=r"ramp: .*q_proj has an adapter, and cannot follow"):
        switching(engine, model, Schedule(ramp=((2, "int8-g32"),)))
    every = Recipe("every", (Rule(("*",), weight=Grid("int4", 32)),))
    model = qkit.prepare(small(name, num_hidden_layers=1), every)
    with pytest.raises(qkit.RunError, match=r"ramp: lm_head: 'int8-g32' leaves it alone"):
        switching(engine, model, Schedule(ramp=((2, "int8-g32"),)))


@pytest.mark.parametrize("name", ENGINES)
def test_only_the_layers_that_are_named_wait(runs, name):
    some = runs(name, False, Schedule(start=2, match="*.mlp.*"))
    rest, always, never = (
        runs(name, False, one) for one in (Schedule(start=2, match="*.self_attn.*"), Schedule(), Schedule(9))
    )
    for other in (rest, always, never):
        assert not same(some[0], other[0])


@pytest.mark.parametrize("name", ENGINES)
def test_a_schedule_that_names_no_layer_is_refused(name):
    model = qkit.prepare(small(name), "int4-g32")
    with pytest.raises(qkit.RunError, match=r"no prepared layer matches 'nothing'"):
        switching(qkit.backend(name), model, Schedule(match="nothing"))
    with pytest.raises(qkit.RunError, match=r"no prepared layer matches '\*'"):
        switching(qkit.backend(name), small(name), Schedule(start=2))


def test_the_mode_is_a_function_of_the_step():
    schedule = Schedule(start=3, windows=((1, 4), (6, 6)))
    assert [schedule.mode(step) for step in range(1, 8)] == ["off", "off", "on", "on", "off", "on", "off"]
