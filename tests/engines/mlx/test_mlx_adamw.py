"""qkit's AdamW on MLX: the steps of the paper, in float32, and the interface of MLX's own."""

import numpy as np
import pytest
from models import build

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
nn = pytest.importorskip("mlx.nn")
optim = pytest.importorskip("mlx.optimizers")

from mlx.utils import tree_map  # noqa: E402

import qkit  # noqa: E402
from qkit.engines.trainer import AdamWOptions  # noqa: E402

BE = qkit.backend("mlx")
GIVEN = {"learning_rate": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.3}


def model(dtype=None):
    mx.random.seed(0)
    made = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8))
    made.set_dtype(dtype or mx.float32)
    mx.eval(made.state)
    return made


def run(model, optimizer, *, steps=5, compiled=False):
    x = mx.random.normal((16, 64), key=mx.random.key(1))
    gradient = nn.value_and_grad(model, lambda x: model(x).square().mean())

    def step(x):
        optimizer.update(model, gradient(x)[1])

    state = [model.state, optimizer.state]
    step = mx.compile(step, inputs=state, outputs=state) if compiled else step
    for _ in range(steps):
        step(x)
        mx.eval(state)
    return {name: BE.to_numpy(array) for name, array in BE.tensors(model).items()}


def test_steps_are_those_of_the_paper():
    """In double precision, from the same gradients: two steps on one parameter, bias correction and decay included."""
    w = nn.Linear(64, 32, bias=False)
    optimizer = BE.adamw(w, AdamWOptions(**GIVEN))
    p, m, v = BE.to_numpy(w.weight).astype(np.float64), 0.0, 0.0
    for t in (1, 2, 3):
        g = np.random.default_rng(t).standard_normal(p.shape).astype(np.float32)
        optimizer.update(w, {"weight": mx.array(g)})
        g = g.astype(np.float64)
        m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g * g
        p = p * (1 - 1e-2 * 0.3) - 1e-2 * (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-6)
        assert np.allclose(BE.to_numpy(w.weight), p, rtol=1e-5, atol=1e-6)  # float32, an optimizer's sums


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_it_takes_the_steps_of_mlx(compiled):
    ours, theirs = model(), model()
    got = run(ours, BE.adamw(ours, AdamWOptions(**GIVEN)), compiled=compiled)
    plain = optim.AdamW(*GIVEN.values(), bias_correction=True)
    plain.init(theirs.trainable_parameters())
    for name, want in run(theirs, plain, compiled=compiled).items():
        assert np.allclose(got[name], want, rtol=1e-5, atol=1e-6), name  # another order of the same operations


def test_compiled_steps_are_those_of_eager():
    eager, compiled = model(), model()
    one = run(eager, BE.adamw(eager, AdamWOptions(**GIVEN)))
    two = run(compiled, BE.adamw(compiled, AdamWOptions(**GIVEN)), compiled=True)
    for name, want in one.items():
        assert np.allclose(two[name], want, rtol=1e-5, atol=1e-6), name  # gradients, too, are summed in another order


def test_half_precision_steps_are_float32s_rounded():
    """MLX's own would square gradients and take roots in bfloat16."""
    half = nn.Linear(64, 32, bias=False)
    half.set_dtype(mx.bfloat16)
    wide = nn.Linear(64, 32, bias=False)
    wide.weight = half.weight.astype(mx.float32)
    g = mx.random.normal((32, 64), key=mx.random.key(1)).astype(mx.bfloat16)
    optimizer = BE.adamw(half, AdamWOptions(**GIVEN))
    optimizer.update(half, {"weight": g})
    BE.adamw(wide, AdamWOptions(**GIVEN)).update(wide, {"weight": g.astype(mx.float32)})
    assert half.weight.dtype == mx.bfloat16
    assert {array.dtype for array in (optimizer.state["weight"]["m"], optimizer.state["weight"]["v"])} == {mx.bfloat16}
    assert mx.array_equal(half.weight, wide.weight.astype(mx.bfloat16))


def test_a_schedule_and_a_new_rate_are_obeyed():
    def moved(rate, *, then=None):
        w = nn.Linear(64, 32, bias=False)
        w.weight = mx.zeros((32, 64))
        optimizer = BE.adamw(w, AdamWOptions(learning_rate=rate, weight_decay=0.0))
        for _ in range(2):
            optimizer.update(w, {"weight": mx.ones((32, 64))})
            if then is not None:
                optimizer.learning_rate = then
        return w.weight[0, 0].item()

    steps = optim.step_decay(1e-2, 0.5, 1)
    assert np.isclose(moved(1e-2), -2e-2, rtol=1e-5)  # every step of Adam's on equal gradients is the rate
    assert np.isclose(moved(steps), -(steps(mx.array(0)) + steps(mx.array(1))).item(), rtol=1e-5)
    assert np.isclose(moved(1e-2, then=1e-1), -1.1e-1, rtol=1e-5)


def test_two_optimizers_with_other_settings_do_not_meet():
    ends = []
    for decay in (0.0, 0.5):
        w = model()
        ends.append(
            run(w, BE.adamw(w, AdamWOptions(learning_rate=1e-2, weight_decay=decay)), steps=1)["layers.0.weight"]
        )
    start = BE.to_numpy(model().layers[0].weight)
    assert np.allclose(ends[0] - ends[1], start * 1e-2 * 0.5, atol=1e-7)  # float32


def test_its_state_is_there_before_the_first_step_and_comes_back():
    one = model()
    optimizer = BE.adamw(one, AdamWOptions(**GIVEN))
    assert set(optimizer.state["layers"][0]) == {"weight", "bias"}
    run(one, optimizer)
    other = BE.adamw(one, AdamWOptions(**GIVEN))
    other.state = tree_map(lambda array: array, optimizer.state)
    twin = model()
    twin.update(one.parameters())
    want = run(one, optimizer)
    assert all(np.array_equal(array, want[name]) for name, array in run(twin, other).items())


class Reports:
    def __init__(self):
        self.losses = []

    def on_train_loss_report(self, info):
        self.losses.append(info["train_loss"])

    def on_val_loss_report(self, info):
        raise AssertionError(info)


def test_the_trainer_of_mlx_lm_takes_it(tmp_path, capsys):
    """On a prepared model, whose gradients of four batches it adds, each in a compiled call of its own."""
    tuner = pytest.importorskip("mlx_lm.tuner.trainer")
    data = [(np.random.default_rng(i).integers(1, 256, 24).tolist(), 0) for i in range(16)]
    ends = []
    for ours in (True, False):
        llama = qkit.prepare(build("mlx"), "int4-g64")
        plain = optim.AdamW(1e-3, weight_decay=0.01, bias_correction=True)
        optimizer = BE.adamw(llama, AdamWOptions(learning_rate=1e-3)) if ours else plain
        optimizer.init(llama.trainable_parameters())
        reports = Reports()
        given = {
            "batch_size": 4,
            "iters": 12,
            "grad_accumulation_steps": 4,
            "steps_per_report": 4,
            "max_seq_length": 64,
        }
        args = tuner.TrainingArgs(**given, adapter_file=str(tmp_path / "adapters.safetensors"))
        np.random.seed(0)
        tuner.train(llama, optimizer, data, args=args, training_callback=reports)
        ends.append(reports.losses)
    assert ends[0][-1] < ends[0][0]
    assert np.allclose(*ends, rtol=1e-4)  # two orders of the same operations, rounded to four bits
