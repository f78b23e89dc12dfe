"""Cross-entropy over an output head, some rows at a time: no tensor has the logits of all tokens, or their gradient."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qkit.errors import StageError
from qkit.grid import Grid
from qkit_torchao.layers.sharded import is_managed, is_shard
from qkit_torchao.torch_private import parameter

IGNORED = -100  #: torch's own mark of a token that is not predicted
LOGITS = (
    2**25
)  #: the most logits at a time: 128 MB in float32, and as much again in their own type and for their gradient

Finish = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Predicted:
    """The prediction of a model before its head computes.

    Attributes:
        hidden: the input of the head [batch, length, width].
        head: the output head.
        finish: everything that the model does with its logits, number by number.
        output: the output of the model, with the hidden states in the place of logits.
    """

    hidden: Tensor
    head: nn.Module
    finish: Finish
    output: Any


def chunk_loss(model: nn.Module) -> nn.Module:
    """Has transformers' `model` compute the loss of `labels` in chunks while it trains; its output has no logits then.

    The loss is the one that the model computes otherwise, to the rounding of sums. A frozen head gets no gradient. Call it
    before the model is wrapped. Evaluation is as before. TRL's trainers have a way of their own.

    Raises:
        StageError: the model has no output head, or its head is sharded, or is quantized on ranges of all tokens together. In a
            forward: the model changes its logits in a way that is not known.
    """
    _want_chunks(model)
    hook = _Hooks()
    model.register_forward_pre_hook(hook.before, with_kwargs=True)
    model.register_forward_hook(hook.after, with_kwargs=True, always_call=True)
    return model


def sum_of_nats(model: nn.Module, ids: Tensor, aims: Tensor) -> Tensor:
    """The cross-entropy of `model` on tokens [batch, length], summed over the `aims` [batch, length] that are not -100.

    Few logits are computed at once, and so are those of models that `chunk_loss` refuses.
    """
    head = _head(model)
    outputs = getattr(head, "out_features", 0)
    if head is None or aims.numel() * outputs <= LOGITS or _why_whole(head):
        return _whole(model, ids, aims)
    with _without_head(head) as inputs:
        output = model(ids)
    predicted = _predicted(model, head, inputs, output)
    return _whole(model, ids, aims) if predicted is None else summed(predicted, aims)


def summed(predicted: Predicted, aims: Tensor) -> Tensor:
    """The cross-entropy of `predicted` summed over the `aims` [batch, length] that are not -100, float32 []."""
    hidden = predicted.hidden.flatten(0, -2)
    trained = [one for one in predicted.head.parameters() if one.requires_grad]
    total: Tensor = _Chunks.apply(hidden, predicted, aims.flatten(), *trained)  # type: ignore[no-untyped-call]
    return total


class _Chunks(torch.autograd.Function):
    """Computes the gradients together with the loss, since the logits of a chunk do not outlive it."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, predicted: Predicted, aims: Tensor, *trained: Tensor) -> Tensor:
        wants_hidden = ctx.needs_input_grad[0]
        head: Any = predicted.head
        rows = max(1, LOGITS // int(head.out_features))
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        to_hidden = torch.empty_like(hidden) if wants_hidden else None
        sums = [torch.zeros_like(one, dtype=torch.float32) for one in trained]
        for start in range(0, len(hidden), rows):
            part, aim = hidden[start : start + rows].detach(), aims[start : start + rows]
            part.requires_grad_(wants_hidden)
            wanted = ([part] if wants_hidden else []) + list(trained)
            with torch.set_grad_enabled(bool(wanted)):
                logits = predicted.finish(predicted.head(part))
            nats, gradient = _nats(logits, aim, with_gradient=bool(wanted))
            total += nats
            if gradient is None:
                continue
            found = list(torch.autograd.grad(logits, wanted, gradient, allow_unused=True))
            del logits, gradient
            if to_hidden is not None:
                to_hidden[start : start + rows] = found.pop(0)
            for own, one in zip(sums, found, strict=True):
                if one is not None:
                    own += one
        ctx.save_for_backward(to_hidden, *(own.to(one.dtype) for own, one in zip(sums, trained, strict=True)))
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        to_hidden, *to_trained = (
            None if one is None else one * gradients[0].to(one.dtype) for one in ctx.saved_tensors
        )
        return to_hidden, None, None, *to_trained


def _nats(logits: Tensor, aims: Tensor, *, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """The summed cross-entropy of logits [rows, vocabulary], and its gradient with respect to them."""
    with torch.no_grad():
        scores, counted = logits.detach().float(), aims != IGNORED
        picked = aims.clamp(min=0)[:, None]
        logarithms = scores.logsumexp(dim=-1, keepdim=True)
        nats = ((logarithms - scores.gather(-1, picked))[:, 0] * counted).sum()
        if not with_gradient:
            return nats, None
        own = scores if scores.data_ptr() != logits.data_ptr() else scores.clone()
        softmax = own.sub_(logarithms).exp_()
        softmax.scatter_add_(-1, picked, softmax.new_full((1, 1), -1.0).expand(picked.shape))
        return nats, softmax.mul_(counted[:, None]).to(logits.dtype)


class _Hooks:
    """Takes the labels from a forward, and puts the loss into its output. Copies of a model have their own."""

    def __init__(self) -> None:
        self.labels: dict[str, Any] = {}
        self.inputs: list[Tensor] = []
        self.without: Any = None

    def before(self, model: nn.Module, arguments: Any, named: dict[str, Any]) -> Any:
        if not model.training or named.get("labels") is None:
            return None
        head = _want_chunks(model)
        names = ("labels", "shift_labels", "num_items_in_batch")
        self.labels = {name: named[name] for name in names if named.get(name) is not None}
        self.without = _without_head(head)
        self.inputs = self.without.__enter__()
        return arguments, {name: one for name, one in named.items() if name not in names}

    def after(self, model: nn.Module, arguments: Any, named: Any, output: Any) -> Any:
        if self.without is None:
            return output
        self.without.__exit__(None, None, None)
        self.without, inputs, self.inputs = None, self.inputs, []
        if output is None:  # the forward failed
            return None
        predicted = _predicted(model, _want_chunks(model), inputs, output)
        if predicted is None:
            raise StageError(
                f"cannot compute the loss of {type(model).__name__} in chunks: it changes its logits in a way that is not "
                "known; leave chunk_loss out"
            )
        labels = self.labels.get("shift_labels")
        if labels is None:
            labels = F.pad(self.labels["labels"], (0, 1), value=IGNORED)[..., 1:]
        count = self.labels.get("num_items_in_batch", (labels != IGNORED).sum())
        loss = summed(predicted, labels) / count
        if (extra := getattr(output, "aux_loss", None)) is not None:
            known: Any = model.config
            loss = loss + known.get_text_config().router_aux_loss_coef * extra.to(loss.device)
        output.loss, output.logits = loss, None
        return output


def _whole(model: nn.Module, ids: Tensor, aims: Tensor) -> Tensor:
    out: Any = model(ids)
    scores: Tensor = getattr(out, "logits", out)
    return F.cross_entropy(scores.float().flatten(0, 1), aims.flatten(), ignore_index=IGNORED, reduction="sum")


def _head(model: Any) -> Any:
    """The output head of a model of transformers; None of another one."""
    try:
        return model.get_output_embeddings()
    except (NotImplementedError, AttributeError):
        return None


def _want_chunks(model: nn.Module) -> nn.Module:
    head = _head(model)
    why = "it has no output head" if not hasattr(head, "out_features") else _why_whole(head)
    if why:
        raise StageError(f"cannot compute the loss of {type(model).__name__} in chunks: {why}; leave chunk_loss out")
    return head  # type: ignore[no-any-return]


def _why_whole(head: nn.Module) -> str:
    """The reason why `head` has to compute all logits in one call; empty if it need not."""
    if is_managed(head) or is_shard(parameter(head, "weight")):
        return "its output head is sharded"
    rule: Any = getattr(head, "rule", None)
    grids: list[Grid] = [] if rule is None else [one for one in (rule.activation, rule.output) if one is not None]
    if grids and (rule.range != "dynamic" or any(grid.group == "tensor" or grid.scale == "nvfp4" for grid in grids)):
        return "its output head is quantized on ranges of all tokens together"
    return ""


@contextmanager
def _without_head(head: nn.Module) -> Iterator[list[Tensor]]:
    """Has `head` return its input, which is added to the list."""
    inputs: list[Tensor] = []

    def as_it_comes(x: Tensor) -> Tensor:
        inputs.append(x)
        return x

    before = head.__dict__.get("forward")  # accelerate puts one there
    head.__dict__["forward"] = as_it_comes
    try:
        yield inputs
    finally:
        if before is None:
            del head.__dict__["forward"]
        else:
            head.__dict__["forward"] = before


def _predicted(model: nn.Module, head: nn.Module, inputs: list[Tensor], output: Any) -> Predicted | None:
    """The prediction of a model whose head was left out; None where it changes logits in an unknown way.

    The output shows the model's own changes of its logits, so that a guess is compared with it.
    """
    found: Any = getattr(output, "logits", None)
    if len(inputs) != 1 or found is None or found.shape != inputs[0].shape or found.dim() != 3:
        return None
    if found is inputs[0]:
        return Predicted(found, head, lambda logits: logits, output)
    known: Any = getattr(model, "config", None)
    settings = known.get_text_config() if hasattr(known, "get_text_config") else known
    with torch.no_grad():
        for finish in _finishes(settings, found.dtype):
            if torch.equal(finish(inputs[0]), found):
                return Predicted(inputs[0], head, finish, output)
    return None


def _finishes(settings: Any, dtype: torch.dtype) -> Iterator[Finish]:
    """The ways in which models of transformers change their logits, with the numbers of `settings`."""
    yield lambda logits: logits.to(dtype)
    cap = getattr(settings, "final_logit_softcapping", None)
    if cap:
        yield lambda logits: (torch.tanh(logits / cap) * cap).to(dtype)
    for name in ("logits_scaling", "logit_scale", "lm_head_multiplier"):
        if factor := getattr(settings, name, None):
            yield lambda logits, factor=factor: (logits / factor).to(dtype)  # type: ignore[misc]
            yield lambda logits, factor=factor: (logits * factor).to(dtype)  # type: ignore[misc]
