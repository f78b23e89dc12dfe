"""Trains and evaluates language models: token numbers in, logits out. The core has the loops."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from numpy.typing import NDArray

from qkit.engines.protocol import Modules
from qkit.engines.trainer import Distillation, TopLogits, TrainerOptions, count_learned
from qkit.errors import ArtifactError, BackendError
from qkit_mlx.mlx_private import set_training_mode
from qkit_mlx.training.adamw import AdamW, ids_named

TOKENS = 4096  #: the most tokens that are evaluated at once, so that their logits fit into memory
MOMENTS = {"first_moment": "m", "second_moment": "v"}  #: moments by their names in checkpoints, and in AdamW


class MlxTrainer:
    """See `Trains.trainer`. Compiled, unless the options say otherwise."""

    def __init__(self, engine: Modules, model: nn.Module, options: TrainerOptions) -> None:
        if options.autocast:
            raise BackendError("autocast: MLX has none: leave it out, and choose dtype = 'float32' or 'bfloat16'")
        if options.recompute:
            _recompute(model)
        if options.seed is not None:
            mx.random.seed(options.seed)
        self.engine, self.model, self.clip, self.steps = engine, model, options.clip, 0
        self.offset_ratio, self.compiled = options.offset_ratio, options.compiled is not False
        self.distillation, self.teacher = options.distillation, options.teacher
        self.optimizer = _optimizer(model, betas=options.betas, weight_decay=options.weight_decay)
        self._compile()

    def step(
        self,
        batches: Sequence[NDArray[np.int32]],
        *,
        learning_rate: float,
        targets: Sequence[TopLogits] = (),
        masks: Sequence[NDArray[np.bool_]] = (),
    ) -> float:
        """See `qkit.engines.trainer.Trainer.step`."""
        self.model.train()
        self.optimizer.learning_rate = learning_rate
        self.optimizer.offset_learning_rate = learning_rate * self.offset_ratio
        count = mx.array(float(count_learned(batches, masks)))
        total, gradients = mx.array(0.0), None
        for i, tokens in enumerate(batches):
            if gradients is not None:
                mx.eval(total, gradients, self.model.state)  # otherwise all micro-batches would be in memory at once
            mask = mx.array(masks[i]) if masks else None
            target = self._target(tokens, targets, i)
            total, gradients = self._add(mx.array(tokens), count, target, mask, total, gradients)
        self._update(gradients)
        mx.eval(total, self.model.state, self.optimizer.state)
        self.steps += 1
        loss: Any = total.item()
        return float(loss)

    def state(self) -> dict[str, NDArray[Any]]:
        """See `qkit.engines.trainer.Trainer.state`."""
        found = {f"weights.{name}": x for name, x in self.engine.tensors(self.model).items()}
        moments = dict(_flat(self.optimizer.state))
        for name in self._trained():
            for moment, key in MOMENTS.items():
                found[f"{moment}.{name}"] = moments[f"{name}.{key}"]
        arrays = {name: self.engine.to_numpy(x) for name, x in found.items()}
        return {**arrays, "rng.mlx": np.array(_random()[0]), "steps": np.array(self.steps, np.int64)}

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """See `qkit.engines.trainer.Trainer.restore`."""
        moments = {
            f"{name}.{key}": self.engine.from_numpy(_moment(state, f"{moment}.{name}", x)).astype(x.dtype)
            for name, x in self._trained().items()
            for moment, key in MOMENTS.items()
        }
        weights = {name.removeprefix("weights."): x for name, x in state.items() if name.startswith("weights.")}
        self.engine.fill(self.model, weights)
        self.steps = int(state["steps"])
        others = {name: x for name, x in _flat(self.optimizer.state) if name not in moments}
        others["step"] = mx.array(self.steps, others["step"].dtype)
        self.optimizer.state = tree_unflatten([*others.items(), *moments.items()])
        if "rng.mlx" in state:
            high, low = (int(half) for half in state["rng.mlx"])
            mx.random.seed(high << 32 | low)  # the state is the two halves of a seed, and MLX cannot set it otherwise
        self._compile()

    def _trained(self) -> dict[str, mx.array]:
        return dict(_flat(self.model.trainable_parameters()))

    def _compile(self) -> None:
        """Compiles the steps for the current state. Compiled functions refer to one state, so that another needs new ones."""
        self._add = self._compiled(self._accumulate, [self.model.state, _random()])
        self._update = self._compiled(self._apply, [self.model.state, self.optimizer.state])

    def _compiled(self, function: Any, state: Any) -> Callable[..., Any]:
        return mx.compile(function, inputs=state, outputs=state) if self.compiled else function

    def _accumulate(
        self, tokens: mx.array, count: mx.array, target: Any, mask: mx.array | None, total: mx.array, before: Any
    ) -> Any:
        """Loss and gradients so far, plus those of one batch: its share in the mean over `count` tokens."""

        def objective(tokens: mx.array) -> mx.array:
            return _objective(self.model, tokens, self.distillation, target, mask) / count

        share, gradients = nn.value_and_grad(self.model, objective)(tokens)
        if before is not None:
            gradients = tree_map(lambda a, b: a + b, before, gradients)
        return total + share, gradients

    def _apply(self, gradients: Any) -> None:
        self.optimizer.update(self.model, _clipped(gradients, self.clip))

    def _target(self, tokens: NDArray[np.int32], targets: Sequence[TopLogits], i: int) -> Any:
        """The teacher's logits [batch, length, k], and their tokens unless they span the vocabulary; empty without a teacher."""
        if targets:
            return [mx.array(targets[i].logits), mx.array(targets[i].tokens)]
        return [] if self.teacher is None else [self.teacher(mx.array(tokens[:, :-1])).astype(mx.float32)]


class _Optimizer(AdamW):
    """Decays parameters of more than one dimension only, and no magnitudes of DoRA, which have a row for each expert."""

    def apply_gradients(self, gradients: Any, parameters: Any) -> Any:
        self.magnitudes = ids_named(parameters, lambda name: name.rpartition(".")[2] == "m")
        return super().apply_gradients(gradients, parameters)

    def decays(self, parameter: mx.array) -> bool:
        return parameter.ndim > 1 and id(parameter) not in self.magnitudes


def _optimizer(model: nn.Module, *, betas: tuple[float, float], weight_decay: float) -> AdamW:
    optimizer = _Optimizer(
        learning_rate=0.0, betas=betas, eps=1e-8, weight_decay=weight_decay, offset_learning_rate=0.0
    )
    optimizer.init(model.trainable_parameters())
    return optimizer


def _clipped(gradients: Any, largest: float) -> Any:
    """`gradients`, scaled to a common norm of at most `largest`. `optim.clip_grad_norm` would sum in bfloat16."""
    squares = [g.astype(mx.float32).square().sum() for _, g in _flat(gradients)]
    factor = mx.minimum(largest / (mx.sqrt(mx.stack(squares).sum()) + 1e-6), 1.0)
    return tree_map(lambda g: (g * factor).astype(g.dtype), gradients)


def loss(model: nn.Module, tokens: NDArray[np.int32], *, mask: NDArray[np.bool_] | None = None) -> float:
    """Mean next-token loss over `tokens` [batch, length + 1] in nats, of those in `mask` [batch, length], in evaluation mode."""
    with evaluating(model):
        parts = (mx.array(part) for part in _parts(tokens))
        nats = np.concatenate([np.array(_nats(model(part[:, :-1]), part)) for part in parts])
    chosen = nats if mask is None else nats[mask]
    return float(chosen.sum(dtype=np.float64)) / chosen.size


def logits(model: nn.Module, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
    """Logits [batch, length, vocabulary] of the model in evaluation mode."""
    with evaluating(model):
        return np.concatenate([np.array(model(mx.array(part)).astype(mx.float32)) for part in _parts(tokens)])


def divergence(student: mx.array, teacher: mx.array, *, temperature: float, mask: mx.array | None = None) -> mx.array:
    """temperature^2 * KL(teacher || student) of logits [..., k], in nats, summed over all positions, or those in `mask` [...]."""
    p, q = (nn.log_softmax(x.astype(mx.float32) / temperature, axis=-1) for x in (teacher, student))
    each = mx.exp(p) * (p - q)
    summed: mx.array = (each if mask is None else each * mask[..., None]).sum() * temperature**2
    return summed


def _objective(
    model: nn.Module,
    tokens: mx.array,
    distillation: Distillation | None,
    target: list[Any],
    mask: mx.array | None = None,
) -> mx.array:
    """The loss of `tokens` [batch, length + 1], summed over its tokens, or over those in `mask` [batch, length]."""
    scores = model(tokens[:, :-1])
    each = _nats(scores, tokens)
    nats = (each if mask is None else each * mask).sum()
    if distillation is None or not target:
        return nats
    student = scores if len(target) == 1 else mx.take_along_axis(scores, target[1], axis=-1)
    learned = divergence(student, target[0], temperature=distillation.temperature, mask=mask)
    both: mx.array = (1 - distillation.weight) * nats + distillation.weight * learned
    return both


def _random() -> Any:
    """The state of MLX's random numbers."""
    return mx.random.state


def _nats(scores: mx.array, tokens: mx.array) -> mx.array:
    """Next-token losses [batch, length] of `tokens` [batch, length + 1], in fp32."""
    nats: mx.array = nn.losses.cross_entropy(scores.astype(mx.float32), tokens[:, 1:])
    return nats


def _moment(state: Mapping[str, NDArray[Any]], name: str, parameter: mx.array) -> NDArray[Any]:
    if name not in state or state[name].shape != tuple(parameter.shape):
        found = list(state[name].shape) if name in state else "missing"
        raise ArtifactError(
            f"{name} is {found} in the checkpoint, and {list(parameter.shape)} in the model: resume with that model"
        )
    return state[name]


def _flat(tree: Any) -> list[tuple[str, mx.array]]:
    arrays: list[tuple[str, mx.array]] = tree_flatten(tree)  # type: ignore[assignment]
    return arrays


def _recompute(model: nn.Module) -> None:
    """Switches on gradient checkpointing of each layer of `model`, without a change to the layers' class."""
    blocks = getattr(model, "layers", None)
    if not isinstance(blocks, list) or not blocks:
        raise BackendError(f"gradient_checkpointing: {type(model).__name__} has no list of layers: leave it out")
    for block in blocks:
        kind: Any = type(block)
        block.__class__ = _recomputing(kind)


@cache
def _recomputing(kind: Any) -> type[nn.Module]:
    """A subclass of `kind` whose backward pass computes its values again instead of storing them."""

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        before = self.trainable_parameters()

        def inner(parameters: Any, *arguments: Any, **options: Any) -> Any:
            self.update(parameters)
            return kind.__call__(self, *arguments, **options)

        try:
            return mx.checkpoint(inner)(before, *arguments, **options)
        finally:
            self.update(before)

    return type(kind.__name__, (kind,), {"__call__": call})


def _parts(tokens: NDArray[np.int32]) -> Iterator[NDArray[np.int32]]:
    rows = max(1, TOKENS // tokens.shape[1])
    return (tokens[i : i + rows] for i in range(0, len(tokens), rows))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside of the block; afterwards every module has its former mode."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            set_training_mode(module, training)
