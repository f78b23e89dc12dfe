"""Steps, losses and logits in torch, on next-token prediction."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from qkit.engines.protocol import Modules
from qkit.engines.trainer import Distillation, TopLogits, TrainerOptions, count_learned
from qkit.errors import ArtifactError, BackendError
from qkit.reference.learned import is_learned, is_offset
from qkit_torchao.training import head_loss
from qkit_torchao.training.adamw import AdamW
from qkit_torchao.training.head_loss import IGNORED

ROWS = 16  #: sequences evaluated at a time
MOMENTS = {"first_moment": "exp_avg", "second_moment": "exp_avg_sq"}  #: neutral names, and AdamW's


class TorchTrainer:
    """See `Trains.trainer`. A parameter that a step does not reach has a gradient of zero, as on other engines."""

    def __init__(self, engine: Modules, model: nn.Module, options: TrainerOptions) -> None:
        if options.recompute:
            _recompute(model)
        if options.seed is not None:
            torch.manual_seed(options.seed)
        self.engine, self.model, self.clip, self.autocast = engine, model, options.clip, options.autocast
        self.distillation, self.teacher, self.steps = options.distillation, options.teacher, 0
        self._trained = {name: x for name, x in engine.tensors(model).items() if x.requires_grad}
        self.optimizer = _optimizer(
            self._trained, betas=options.betas, weight_decay=options.weight_decay, offset_ratio=options.offset_ratio
        )
        self._objective: Any = torch.compile(_objective, dynamic=False) if options.compiled else _objective
        self._in_order = bool(options.compiled) and next(model.parameters()).device.type == "cpu"

    def step(
        self,
        batches: Sequence[NDArray[np.int32]],
        *,
        learning_rate: float,
        targets: Sequence[TopLogits] = (),
        masks: Sequence[NDArray[np.bool_]] = (),
    ) -> float:
        """See `qkit.engines.trainer.Trainer.step`."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group["ratio"]
        if not self.model.training:
            self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        count = count_learned(batches, masks)
        losses = [
            self._backward(tokens, targets[i] if targets else None, masks[i] if masks else None, count)
            for i, tokens in enumerate(batches)
        ]
        for parameter in self._trained.values():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        nn.utils.clip_grad_norm_(list(self._trained.values()), self.clip)
        self.optimizer.step()
        self.steps += 1
        return float(torch.stack(losses).sum())

    def _backward(
        self, tokens: NDArray[np.int32], target: TopLogits | None, mask: NDArray[np.bool_] | None, count: int
    ) -> Tensor:
        """Adds the gradient of this batch's share in the mean over `count` tokens; returns that share."""
        ids, learned = _ids(self.model, tokens), None if mask is None else _mask(self.model, mask)
        with _in_order() if self._in_order else nullcontext():
            with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.autocast):
                target_logits = self._target(ids, target)
                loss: Tensor = self._objective(self.model, ids, self.distillation, *target_logits, learned) / count
            loss.backward()
        return loss.detach()

    def _target(self, ids: Tensor, target: TopLogits | None) -> tuple[Tensor | None, Tensor | None]:
        """The teacher's logits [batch, length, k] and their tokens; None where they are all of the vocabulary."""
        if target is not None:
            return self.engine.from_numpy(target.logits), self.engine.from_numpy(target.tokens.astype(np.int64))
        if self.teacher is None:
            return None, None
        with torch.no_grad():
            return _logits(self.teacher, ids[:, :-1]).float(), None

    def state(self) -> dict[str, NDArray[Any]]:
        """See `qkit.engines.trainer.Trainer.state`."""
        found = {f"weights.{name}": x for name, x in self.engine.tensors(self.model).items()}
        for name, parameter in self._trained.items():
            known = self.optimizer.state[parameter]
            for moment, key in MOMENTS.items():
                found[f"{moment}.{name}"] = known[key] if known else torch.zeros_like(parameter)
        arrays = {name: self.engine.to_numpy(x) for name, x in found.items()}
        return {**arrays, **_random_state(_device(self.model)), "steps": np.array(self.steps, np.int64)}

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """See `qkit.engines.trainer.Trainer.restore`."""
        moments = {name: [_moment(state, f"{m}.{name}", x) for m in MOMENTS] for name, x in self._trained.items()}
        weights = {name.removeprefix("weights."): x for name, x in state.items() if name.startswith("weights.")}
        self.engine.fill(self.model, weights)
        self.steps = int(state["steps"])
        for name, parameter in self._trained.items():
            found = [self.engine.from_numpy(x).to(parameter) for x in moments[name]]
            step = torch.tensor(float(self.steps), device=parameter.device)
            self.optimizer.state[parameter] = {"step": step, **dict(zip(MOMENTS.values(), found, strict=True))}
        self.optimizer.load_state_dict(self.optimizer.state_dict())  # weights share one counter again
        _set_random_state(state, _device(self.model))


def groups(model: nn.Module, *, weight_decay: float, offset_learning_rate: float) -> list[dict[str, Any]]:
    """The trained parameters of `model` in an optimizer's groups. Learned ranges do not decay; offsets have their own rate."""
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    offsets = [one for name, one in trained.items() if is_offset(name)]
    scales = [one for name, one in trained.items() if is_learned(name) and not is_offset(name)]
    kinds: list[dict[str, Any]] = [
        {"params": [one for name, one in trained.items() if not is_learned(name)], "weight_decay": weight_decay},
        {"params": scales, "weight_decay": 0.0},
        {"params": offsets, "weight_decay": 0.0, "lr": offset_learning_rate},
    ]
    return [group for group in kinds if group["params"]]


def loss(model: nn.Module, tokens: NDArray[np.int32], *, mask: NDArray[np.bool_] | None = None) -> float:
    """Mean loss in nats per predicted token of `tokens` [batch, length + 1], of those in `mask` [batch, length]."""
    ids = _ids(model, tokens)
    masks = [None] * len(ids.split(ROWS)) if mask is None else _mask(model, mask).split(ROWS)
    with evaluating(model):
        parts = [_nats_of(model, part, one) for part, one in zip(ids.split(ROWS), masks, strict=True)]
    return float(torch.stack(parts).double().sum()) / (tokens[:, 1:].size if mask is None else int(mask.sum()))


def logits(model: nn.Module, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
    """Logits of every position of `tokens` [batch, length] -> float32 [batch, length, vocabulary]."""
    with evaluating(model):
        parts = [_logits(model, ids).float().cpu() for ids in _ids(model, tokens).split(ROWS)]
    return torch.cat(parts).numpy()


def divergence(student: Tensor, teacher: Tensor, *, temperature: float, mask: Tensor | None = None) -> Tensor:
    """temperature^2 * KL(teacher || student) of logits [..., k], in nats, summed over all positions, or those in `mask` [...]."""
    p, q = (F.log_softmax(x.float() / temperature, dim=-1) for x in (teacher, student))
    each = p.exp() * (p - q)
    return (each if mask is None else each * mask[..., None]).sum() * temperature**2


def _objective(
    model: nn.Module,
    ids: Tensor,
    distillation: Distillation | None,
    teacher: Tensor | None,
    among: Tensor | None,
    mask: Tensor | None = None,
) -> Tensor:
    """The loss of `ids` [batch, length + 1], summed over its tokens, or over those in `mask` [batch, length]."""
    if distillation is None or teacher is None:
        return _nats_of(model, ids, mask)
    scores = _logits(model, ids[:, :-1])
    nats = _nats(scores, ids, mask)
    student = scores if among is None else scores.gather(-1, among)
    learned = divergence(student, teacher, temperature=distillation.temperature, mask=mask)
    return (1 - distillation.weight) * nats + distillation.weight * learned


@contextmanager
def _in_order() -> Iterator[None]:
    """Makes sums have one order, so that a run can be repeated.

    In code compiled for a CPU, threads would add to an embedding's gradient in any order.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _nats(scores: Tensor, ids: Tensor, mask: Tensor | None) -> Tensor:
    aims = _aims(ids, mask)
    return F.cross_entropy(scores.float().flatten(0, 1), aims.flatten(), ignore_index=IGNORED, reduction="sum")


def _nats_of(model: nn.Module, ids: Tensor, mask: Tensor | None) -> Tensor:
    if torch.compiler.is_compiling():
        return _nats(_logits(model, ids[:, :-1]), ids, mask)
    return head_loss.sum_of_nats(model, ids[:, :-1], _aims(ids, mask))


def _aims(ids: Tensor, mask: Tensor | None) -> Tensor:
    return ids[:, 1:] if mask is None else ids[:, 1:].masked_fill(~mask, IGNORED)


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    out: Any = model(ids)
    scores: Tensor = getattr(out, "logits", out)
    return scores


def _ids(model: nn.Module, tokens: NDArray[np.int32]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(tokens, np.int64)).to(_device(model))


def _mask(model: nn.Module, mask: NDArray[np.bool_]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(mask)).to(_device(model))


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _optimizer(
    parameters: Mapping[str, Tensor], *, betas: tuple[float, float], weight_decay: float, offset_ratio: float
) -> AdamW:
    """AdamW with groups of which each has a `ratio`: its learning rate is that of the step times `ratio`."""
    kinds: dict[tuple[float, float], list[Tensor]] = {(weight_decay, 1.0): [], (0.0, 1.0): [], (0.0, offset_ratio): []}
    for name, one in parameters.items():
        vectors = one.dim() < 2 or name.endswith("lora_magnitude")  # of experts these are a row for each
        decay = 0.0 if vectors or is_learned(name) else weight_decay
        kinds[decay, offset_ratio if is_offset(name) else 1.0].append(one)
    groups = [{"params": ones, "weight_decay": decay, "ratio": ratio} for (decay, ratio), ones in kinds.items() if ones]
    return AdamW(groups, lr=0.0, betas=betas, eps=1e-8, weight_decay=weight_decay)


def _moment(state: Mapping[str, NDArray[Any]], name: str, parameter: Tensor) -> NDArray[Any]:
    if name not in state or state[name].shape != tuple(parameter.shape):
        found = list(state[name].shape) if name in state else "missing"
        raise ArtifactError(
            f"{name} is {found} in the checkpoint, and {list(parameter.shape)} in the model: resume with that model"
        )
    return state[name]


def _recompute(model: nn.Module) -> None:
    """Gradient checkpointing, by transformers' own switch, which excludes a cache for generation."""
    kind = next((kind for kind in ("activation", "gradient") if hasattr(model, f"{kind}_checkpointing_enable")), None)
    if kind is None or not getattr(model, "supports_gradient_checkpointing", False):
        raise BackendError(f"gradient_checkpointing: {type(model).__name__} has no such switch: leave it out")
    known: Any = model
    known.config.use_cache = False
    enable = getattr(known, f"{kind}_checkpointing_enable")  # the second name warns where there is the first
    enable(**{f"{kind}_checkpointing_kwargs": {"use_reentrant": False}})


def _random_state(device: torch.device) -> dict[str, NDArray[Any]]:
    """The states of the random numbers of the CPU and, if it is a GPU, of `device`, which need not be the current one."""
    states = {"rng.torch": torch.get_rng_state()}
    if device.type == "cuda":
        states["rng.torch.cuda"] = torch.cuda.get_rng_state(device)
    return {name: x.numpy() for name, x in states.items()}


def _set_random_state(state: Mapping[str, NDArray[Any]], device: torch.device) -> None:
    if "rng.torch" in state:
        torch.set_rng_state(torch.from_numpy(np.array(state["rng.torch"])))
    if "rng.torch.cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(torch.from_numpy(np.array(state["rng.torch.cuda"])), device)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module has the mode it had."""
    were_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in were_training:
            module.training = True
