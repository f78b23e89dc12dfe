"""`compile = true` in torch, from directory to artifact: the losses of the same run without it, whatever the schedule does."""

import numpy as np
import pytest
from runs import codes_of, folder, learning, losses, same_run, stopping, table
from tables import TRAINERS as ENGINES

from qkit.training import run_from_table, train_model

torch = pytest.importorskip("torch", reason="torch is not installed")
pytestmark = pytest.mark.skipif("torchao" not in ENGINES, reason="needs torchao")

NEAR = 2e-6  #: of a loss: compiled products and sums are taken in another order; measured: 2e-7
RUN = {"backend": "torchao", "steps": 8, "learning_rate": 1e-4, "checkpoint_every": 4}
SCHEDULES = {
    "plain": {},
    "start": {"quantization": {"start": 5}},
    "windows": {"quantization": {"windows": [[2, 3], [6, 8]]}},
    "interval": {"quantization": {"interval": 4}},
    "ramp": {"quantization": {"ramp": [[3, "int8-g32"], [5, "int6-g32"]]}},
    "learned": {"recipe": ("int3", "signed")},
    "activations": {"recipe": "int8-dynamic-act-int4-weight"},
}


@pytest.fixture(scope="module", autouse=True)
def no_way_back():
    """Code that could not be compiled, or was too often, is an error: torch would go on without a word, in eager mode."""
    from torch._dynamo import config

    torch.compiler.reset()
    with config.patch(fail_on_recompile_limit_hit=True, suppress_errors=False):
        yield


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The losses of an eager run that quantizes from its first step on."""
    path = folder(tmp_path_factory.mktemp("plain"), num_hidden_layers=1)
    train_model(run(path, compile=False))
    return losses(path / "out")


def run(path, **changes):
    changes = {"recipe": "int4-g32", **changes}
    if isinstance(changes["recipe"], tuple):
        changes["recipe"] = learning(path, *changes["recipe"])
    return run_from_table(table(path, **{**RUN, **changes}))


@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_compiled_run_has_the_losses_of_the_eager_one(tmp_path, plain, kind):
    path = folder(tmp_path, num_hidden_layers=1)
    for name, wanted in (("eager", False), ("compiled", True)):
        outcome = train_model(run(path, **SCHEDULES[kind], out=str(path / name), compile=wanted))
        assert outcome.forward_difference == 0.0
    eager, compiled = (np.array(losses(path / name)) for name in ("eager", "compiled"))
    print(kind, "largest difference of a loss", np.abs(eager - compiled).max())
    assert np.abs(eager - compiled).max() < NEAR * eager.max()
    assert (np.abs(eager - plain).max() > 10 * NEAR * eager.max()) == (kind != "plain")  # the schedule is one
    mine, theirs = codes_of(path / "eager"), codes_of(path / "compiled")
    equal = sum(int((mine[key] == theirs[key]).sum()) for key in mine)
    assert equal >= 0.999 * sum(array.size for array in mine.values())


def test_it_is_compiled(tmp_path):
    """In whole: nothing that a step computes is left to Python."""
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    train_model(run(folder(tmp_path, num_hidden_layers=1), compile=True, steps=2))
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_a_compiled_run_that_is_resumed_is_the_uninterrupted_one(tmp_path):
    path, kind = folder(tmp_path, num_hidden_layers=1), SCHEDULES["interval"]
    train_model(run(path, **kind, compile=True, out=str(path / "whole")))
    with stopping(4) as tell:
        train_model(run(path, **kind, compile=True), tell=tell)
    train_model(run(path, **kind, compile=True))
    assert same_run(path / "out", path / "whole")
