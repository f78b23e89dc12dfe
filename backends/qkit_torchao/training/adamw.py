"""AdamW that steps weights, or parts of sharded ones, and writes their quantized values in one kernel. On a CPU, torch's own."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from qkit_torchao.cache import values
from qkit_torchao.cache.kept_values import Values
from qkit_torchao.kernels import adamw, choose
from qkit_torchao.layers.sharded import is_shard
from qkit_torchao.torch_private import local_part, without_subclasses


class AdamW(torch.optim.AdamW):
    """torch's AdamW (Loshchilov and Hutter, 2019), with its options, its state and its state's types.

    On CUDA with Triton, one launch steps all weights of a kind. It reads tensors only, so that a CUDA graph can capture a step.
    It also writes the quantized values of prepared layers, but not while a graph is captured. There the values are computed at
    their first use, so that a weight edited between two replays is seen. Of weights that FSDP2 shards, each process steps its
    own part and writes the values that it will gather.

    Arithmetic is in float32 and rounded once to the type of the weight. Rates may be tensors: a captured graph reads them.
    """

    def __init__(
        self, params: Iterable[Any], *, lr: float | Tensor, betas: tuple[float, float], eps: float, weight_decay: float
    ) -> None:
        parameters = list(params)
        flat = [p for group in parameters for p in (group["params"] if isinstance(group, dict) else [group])]
        self.in_kernels = all(p.is_cuda and not choose.why_no_triton(p.device) for p in flat)
        options = {"capturable": True, "foreach": True} if self.in_kernels else {"fused": True}
        self.written: list[Values] = []
        super().__init__(parameters, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **options)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns the result of `closure`. Afterwards `written` lists the cached values that it has written."""
        stepped = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not self.in_kernels or any(map(_needs_torch, stepped)):
            return super().step(closure)
        self.written = []
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As any optimizer; weights that have taken as many steps share one counter again."""
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            counters: dict[float, Tensor] = {}
            for weight in group["params"]:
                if self.in_kernels and self.state[weight]:
                    state = self.state[weight]
                    state["step"] = counters.setdefault(float(state["step"]), state["step"])

    def _step_group(self, group: dict[str, Any]) -> None:
        stepped = [weight for weight in group["params"] if weight.grad is not None]
        self._begin([weight for weight in stepped if not self.state[weight]])
        self._split_counters(group, stepped)
        together: dict[int, list[Tensor]] = defaultdict(list)
        for weight in stepped:
            together[id(self.state[weight]["step"])].append(weight)
        hyper = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
        for weights in together.values():
            self._launch(weights, hyper)

    def _launch(self, weights: list[Tensor], hyper: dict[str, Any]) -> None:
        """Steps `weights`, which have one counter of steps."""
        there = [weight for weight in weights if _own(weight).numel()]  # of few rows, some process has none
        if not there:
            return
        states = [{name: _own(one) for name, one in self.state[weight].items()} for weight in there]
        parts, gradients = [_own(weight) for weight in there], [_own(weight.grad) for weight in there]
        with without_subclasses():
            cached = {} if torch.cuda.is_current_stream_capturing() else values.cached(parts)
            targets = [_target(part, cached.get(id(part))) for part in parts]
            adamw.step(parts, gradients, states, targets, **hyper)
            self.written += [cached[id(part)] for part, one in zip(parts, targets, strict=True) if one]

    def _begin(self, weights: list[Tensor]) -> None:
        """The moments of weights that are stepped for the first time. They share a counter on the device."""
        counters: dict[torch.device, Tensor] = {}
        for weight in weights:
            step = torch.zeros((), dtype=torch.float32, device=weight.device)
            self.state[weight] = {
                "step": counters.setdefault(weight.device, step),
                "exp_avg": torch.zeros_like(weight),
                "exp_avg_sq": torch.zeros_like(weight),
            }

    def _split_counters(self, group: dict[str, Any], stepped: list[Tensor]) -> None:
        """Weights that sit a step out, for lack of a gradient, keep the counter that they shared with the others."""
        idle = {id(self.state[w]["step"]) for w in group["params"] if w.grad is None and self.state[w]}
        copies: dict[int, Tensor] = {}
        for weight in stepped:
            step = self.state[weight]["step"]
            if id(step) in idle:
                self.state[weight]["step"] = copies.setdefault(id(step), step.clone())


def _target(weight: Tensor, cached: Values | None) -> Any:
    """The target of a step for the values of `weight`; None where there are none, or a step cannot write them."""
    if cached is None or cached.value is None or cached.grid is None or cached.gate is None:
        return None
    return adamw.target_of(weight, cached.value, cached.grid, cached.gate)


def _needs_torch(weight: Tensor) -> bool:
    """Whether the kernels cannot step `weight`, a whole one or a part with a gradient of this part."""
    gradient: Any = weight.grad
    if is_shard(weight) and getattr(gradient, "placements", None) != weight.placements:  # type: ignore[attr-defined]
        return True
    return bool(gradient.is_sparse) or not _own(weight).is_contiguous()


def _own(tensor: Any) -> Tensor:
    """`tensor`, or its part in this process."""
    return local_part(tensor) if is_shard(tensor) else tensor
