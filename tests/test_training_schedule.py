"""When training quantizes: start and windows change the trained weights when they should, and only then."""

import numpy as np
import pytest
from training import ENGINES, TOKENS, arrays, same, small

import qkit
from qkit.training.data import sequences
from qkit.training.loop import Order, train
from qkit.training.schedule import Schedule, switching

STEPS = 4
DATA = sequences(TOKENS.reshape(-1), length=16, name="random bytes")
MODES = [(name, compiled) for name in ENGINES for compiled in (False, True)]


class Runs:
    """Training with a schedule, each engine and mode once for each schedule; compiled once for all of them."""

    def __init__(self):
        self.made, self.trainers = {}, {}

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
            trainer = engine.trainer(model, weight_decay=0.0, seed=0, compiled=compiled)
            start = {key: np.array(array) for key, array in trainer.state().items()}
            self.trainers[name, compiled, recipe] = model, trainer, start
        model, trainer, start = self.trainers[name, compiled, recipe]
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
