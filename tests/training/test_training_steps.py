"""One step on every engine: micro-batches, clipping, recomputing, compiling, distillation, and state that goes elsewhere."""

import numpy as np
import pytest
from alike import same
from models import small
from runs import TOKENS, arrays
from tables import TRAINERS as ENGINES

import qkit
from qkit.engines.trainer import Distillation, TopLogits, TrainerOptions

RATE = {"learning_rate": 1e-2}


def trainer(name, model, **options):
    return qkit.backend(name).trainer(
        model, TrainerOptions(**{"weight_decay": 0.01, "seed": 0, "compiled": False, **options})
    )


def trained(name, steps=(([TOKENS],),), *, model=None, **options):
    """Losses and arrays after steps on lists of micro-batches, with or without targets."""
    model = model or qkit.prepare(small(name), "int4-g32")
    stepper = trainer(name, model, **options)
    losses = [stepper.step(batches, targets=targets[0] if targets else (), **RATE) for batches, *targets in steps]
    return losses, arrays(name, model)


def close(one, other, *, within):
    return all(np.allclose(one[key], other[key], rtol=0, atol=within) for key in one)


@pytest.mark.parametrize("name", ENGINES)
def test_micro_batches_are_one_batch(name):
    """Sums are in another order, and Adam's first steps divide by the gradient: within a tenth of the rate."""
    whole, parts = trained(name), trained(name, [([TOKENS[:4], TOKENS[4:]],)])
    assert parts[0] == pytest.approx(whole[0], rel=1e-6)
    assert close(parts[1], whole[1], within=1e-3)
    assert not close(trained(name, [([TOKENS[:4]],)])[1], whole[1], within=1e-3)


@pytest.mark.skipif("mlx" not in ENGINES, reason="torch's compiled steps are tested where it takes less time")
def test_a_compiled_step_is_the_eager_one():
    steps = [([TOKENS[:3], TOKENS[3:]],)] * 2
    eager, compiled = trained("mlx", steps), trained("mlx", steps, compiled=True)
    assert compiled[0] == pytest.approx(eager[0], rel=1e-5)
    assert close(compiled[1], eager[1], within=1e-3)  # as for micro-batches


@pytest.mark.parametrize("name", ENGINES)
def test_the_gradient_is_clipped(name):
    """The first moment after one step is a tenth of the gradient."""

    def norm(clip):
        stepper = trainer(name, small(name), clip=clip)
        stepper.step([TOKENS], **RATE)
        moments = [array for key, array in stepper.state().items() if key.startswith("first_moment.")]
        return 10 * sum(float(np.square(moment, dtype=np.float64).sum()) for moment in moments) ** 0.5

    whole = norm(float("inf"))
    assert norm(whole / 2) == pytest.approx(whole / 2, rel=1e-5)  # a norm in float32
    assert norm(whole * 2) == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("name", ENGINES)
def test_matrices_decay_and_vectors_do_not(name):
    """By the engine's own optimizer: after one step, decay is the only difference."""
    (_, plain), (_, decayed) = (trained(name, weight_decay=decay) for decay in (0.0, 0.5))
    for key, array in plain.items():
        assert np.array_equal(array, decayed[key]) == (array.ndim == 1), key


@pytest.mark.parametrize("name", ENGINES)
def test_a_trainer_steps_with_the_engines_own_optimizer(name):
    own = type(qkit.adamw(small(name), lr=0.0))
    assert isinstance(trainer(name, small(name)).optimizer, own)


@pytest.mark.parametrize("name", ENGINES)
def test_recomputing_layers_changes_nothing(name):
    plain, recomputed = trained(name), trained(name, recompute=True)
    assert plain[0] == recomputed[0]
    assert close(plain[1], recomputed[1], within=1e-6)  # MLX sums the gradients of a layer in another order


@pytest.mark.skipif("mlx" not in ENGINES, reason="needs MLX")
def test_layers_that_are_recomputed_are_computed_twice():
    model, calls = small("mlx"), []

    class Counted(type(model.layers[0].mlp)):
        def __call__(self, x):
            calls.append(self)
            return super().__call__(x)

    for layer in model.layers:
        layer.mlp.__class__ = Counted
    trained("mlx", model=model)
    once = len(calls)
    trained("mlx", model=model, recompute=True)
    assert len(calls) == 3 * once


@pytest.mark.skipif("torchao" not in ENGINES, reason="needs torch")
def test_torch_recomputes_what_transformers_can():
    model, calls = small("torchao"), []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    trained("torchao", model=model)
    assert len(calls) == 1
    trained("torchao", model=model, recompute=True)
    assert len(calls) == 3


@pytest.mark.parametrize("name", ENGINES)
def test_a_model_that_cannot_recompute_is_refused_by_name(name):
    engine = qkit.backend(name)
    with pytest.raises(qkit.BackendError, match=r"gradient_checkpointing: .*Linear"):
        trainer(name, engine.make_layer("linear", np.ones((4, 4), np.float32)), recompute=True)


@pytest.mark.parametrize("name", ENGINES)
def test_autocast_is_refused_or_changes_the_products_only(name):
    if name == "mlx":
        with pytest.raises(qkit.BackendError, match="autocast: MLX has none"):
            trained(name, autocast=True)
        return
    plain, mixed = trained(name), trained(name, autocast=True)
    assert 0 < abs(plain[0][0] - mixed[0][0]) < 0.02
    assert all(array.dtype == np.float32 for array in mixed[1].values())


@pytest.mark.parametrize("name", ENGINES)
def test_masters_of_bfloat16_train(name):
    losses, _ = trained(name, [([TOKENS],)] * 3, model=qkit.prepare(small(name, dtype="bfloat16"), "int4-g32"))
    assert losses[2] < losses[0]


@pytest.mark.parametrize("name", ENGINES)
def test_a_state_that_is_restored_goes_on_bit_for_bit(name):
    steps = [([TOKENS[:3], TOKENS[3:]],)] * 4
    _, want = trained(name, steps)
    model = qkit.prepare(small(name), "int4-g32")
    first = trainer(name, model)
    for (batches,) in steps[:2]:
        first.step(batches, **RATE)
    state = {key: np.array(array) for key, array in first.state().items()}
    assert int(state["steps"]) == 2
    other = qkit.prepare(small(name, vocab_size=256), "int4-g32")
    again = trainer(name, other, seed=5)
    again.step([TOKENS], **RATE)  # whatever it did before
    again.restore(state)
    assert same({k: np.array(v) for k, v in again.state().items()}, state)
    for (batches,) in steps[2:]:
        again.step(batches, **RATE)
    assert same(arrays(name, other), want)


@pytest.mark.parametrize("name", ENGINES)
def test_states_have_the_same_names_on_every_engine(name):
    def names(name):
        model = qkit.prepare(small(name), "int8-average-act-int8-weight")
        stepper = trainer(name, model)
        stepper.step([TOKENS], **RATE)
        return {key: (array.shape, array.dtype) for key, array in stepper.state().items() if not key.startswith("rng.")}

    found = names(name)
    assert found == names(ENGINES[0])
    assert {key.partition(".")[0] for key in found} == {"weights", "first_moment", "second_moment", "steps"}
    assert "weights.model.layers.0.mlp.up_proj.input_range" in found
    assert "first_moment.model.layers.0.mlp.up_proj.input_range" not in found


@pytest.mark.parametrize("name", ENGINES)
def test_a_state_that_does_not_fit_is_refused_by_name(name):
    stepper = trainer(name, small(name))
    stepper.step([TOKENS], **RATE)
    state = dict(stepper.state())
    key = "first_moment.model.norm.weight"
    with pytest.raises(qkit.ArtifactError, match=rf"{key} is missing in the checkpoint, and \[32\] in the model"):
        stepper.restore({name: array for name, array in state.items() if name != key})
    with pytest.raises(qkit.ArtifactError, match=rf"{key} is \[3\] in the checkpoint"):
        stepper.restore({**state, key: np.zeros(3, np.float32)})


# Distillation. The reference is NumPy's, in float64; its gradient by hand: T * (softmax(student / T) - softmax(teacher / T)).


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def reference(student, teacher, temperature):
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    return (p * (np.log(p) - np.log(q))).sum() * temperature**2, temperature * (q - p)


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_divergence_and_its_gradient_are_the_references(name, temperature):
    random = np.random.default_rng(1)
    student, teacher = (random.standard_normal((2, 3, 7)).astype(np.float32) * 3 for _ in range(2))
    want, slope = reference(student.astype(np.float64), teacher.astype(np.float64), temperature)
    if name == "torchao":
        import torch
        from qkit_torchao.training.trainer import divergence

        x = torch.from_numpy(student).requires_grad_()
        value = divergence(x, torch.from_numpy(teacher), temperature=temperature)
        value.backward()
        found, gradient = value.item(), x.grad.numpy()
    else:
        import mlx.core as mx
        from qkit_mlx.training.trainer import divergence

        value, gradient = mx.value_and_grad(lambda x: divergence(x, mx.array(teacher), temperature=temperature))(
            mx.array(student)
        )
        found, gradient = value.item(), np.array(gradient)
    assert found == pytest.approx(want, rel=1e-5)  # sums of float32
    assert np.abs(gradient - slope).max() < 1e-5 * np.abs(slope).max()


@pytest.mark.parametrize("name", ENGINES)
def test_the_loss_of_distillation_is_the_references(name):
    engine, loss = qkit.backend(name), Distillation(temperature=2.0, weight=0.75)
    model, teacher = small(name), small(name, rms_norm_eps=0.5)
    student, told = (engine.logits(one, TOKENS[:, :-1]).astype(np.float64) for one in (model, teacher))
    learned = reference(student, told, 2.0)[0] / TOKENS[:, 1:].size
    want = 0.25 * engine.loss(model, TOKENS) + 0.75 * learned
    found, _ = trained(name, model=model, distillation=loss, teacher=teacher)
    assert found[0] == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("name", ENGINES)
def test_a_file_of_all_logits_teaches_as_the_teacher_does(name):
    engine, loss = qkit.backend(name), Distillation(temperature=2.0, weight=0.5)
    teacher = small(name, rms_norm_eps=0.5)
    batches = [TOKENS[:4], TOKENS[4:]]
    logits = [engine.logits(teacher, tokens[:, :-1]) for tokens in batches]
    order = [np.argsort(-one, axis=-1).astype(np.int32) for one in logits]
    targets = [TopLogits(np.take_along_axis(one, by, -1), by) for one, by in zip(logits, order, strict=True)]
    ours, theirs = small(name), small(name)
    learned = trained(name, [(batches, targets)], model=ours, distillation=loss)
    taught = trained(name, [(batches,)], model=theirs, distillation=loss, teacher=teacher)
    assert learned[0] == pytest.approx(taught[0], rel=1e-6)
    assert close(learned[1], taught[1], within=1e-3)  # as for micro-batches
    few = [TopLogits(one.logits[..., :4], one.tokens[..., :4]) for one in targets]
    assert trained(name, [(batches, few)], model=small(name), distillation=loss)[0] != pytest.approx(
        taught[0], rel=1e-3
    )


@pytest.mark.parametrize("name", ENGINES)
def test_a_student_that_equals_its_teacher_has_nothing_to_learn_from_some_of_its_logits(name):
    engine, model = qkit.backend(name), small(name)
    logits = engine.logits(model, TOKENS[:, :-1])
    best = np.argsort(-logits, axis=-1)[..., :5].astype(np.int32)
    target = TopLogits(np.take_along_axis(logits, best, -1), best)
    losses, _ = trained(name, [([TOKENS], [target])], model=model, distillation=Distillation(1.0, 1.0))
    assert losses[0] == pytest.approx(0.0, abs=1e-5)  # rounding of float32
