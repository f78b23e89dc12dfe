"""Prepared stacks of experts: mlx-lm's `SwitchLinear` on a grid, with the grid's own scales or with learned ones."""

from typing import Any

import mlx.core as mx

from qkit.errors import StageError
from qkit.fused import shares
from qkit.grid import Grid
from qkit.qtensor import QTensor
from qkit.reference.learned import FIRST, names, stored_names
from qkit.reference.ranges import static_names
from qkit.rules import Rule
from qkit_mlx.arithmetic import learned, ranges
from qkit_mlx.layers.converted_experts import on_grid, pack_stack, quantize_stack
from qkit_mlx.layers.execution import GPU
from qkit_mlx.layers.learned import freeze_ranges
from qkit_mlx.layers.prepared import FakeLinear, evaluate_packed, quantizes, values_of


class FakeSwitchLinear(FakeLinear):
    """A stack of linear layers whose weights [experts, outputs, inputs] are on a grid; otherwise as `FakeLinear`.

    Static ranges are those of each expert, [experts, 2].

    Attributes:
        partner: the other of gate and up, which shares the tensor's scale of each expert under `nvfp4`; no part of the model
            at this place. Absent where there is none.
    """

    def __init__(self, layer: Any, rule: Rule) -> None:
        super().__init__(layer, rule)
        for name in static_names(rule):
            self[f"{name}_range"] = mx.broadcast_to(mx.array(ranges.EMPTY), (self.num_experts, 2))

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:  # type: ignore[override]
        """x [..., 1 or chosen, rows, inputs], indices [..., chosen] -> [..., chosen, rows, outputs]."""
        trained = [*self.ranges, *([self["bias"]] if "bias" in self else [])]

        def run_prepared(x: mx.array, weight: mx.array, *trained: mx.array) -> mx.array:
            x = self._slot(x, self.rule.activation, "input", indices)
            learns, bias = self._split(trained)
            y = _gather_multiply(x, self._values(weight, *learns).swapaxes(-1, -2), indices, sorted_indices)
            y = y if bias is None else y + mx.expand_dims(bias[indices], -2)
            return self._slot(y, self.rule.output, "output", indices)

        def run_packed(x: mx.array, weight: mx.array, *trained: mx.array) -> mx.array:
            learns, bias = self._split(trained)
            pieces = self._quantized(weight, *learns)
            packed = pack_stack(pieces, self.rule, bias=bias, experts=len(weight), static=self._static())
            return packed(x, indices, sorted_indices)

        if self.training or self.calibrating or not quantizes(self):
            return run_prepared(x, self["weight"], *trained)
        return evaluate_packed(run_packed, run_prepared, x, self["weight"], *trained)

    @property
    def num_experts(self) -> int:
        """As in mlx-lm's layer."""
        return len(self["weight"])

    @property
    def ranges(self) -> list[mx.array]:
        """The learned parameters, in the order of `qkit.reference.learned.names`; none where scales follow the grid's rule."""
        return []

    def shared_peak(self, weight: mx.array) -> mx.array | None:
        """The largest magnitude of each expert's weight and its partner's, [experts]; None where they share no tensor scale."""
        partner = self.__dict__.get("partner")
        if partner is None or not shares(self.rule.weight):
            return None
        both = (mx.abs(mx.stop_gradient(one)).max(axis=(1, 2)) for one in (weight, partner.own_weight()))
        return mx.maximum(*both).astype(mx.float32)

    def to_lora(self, r: int = 8, dropout: float = 0.0, scale: float = 20.0) -> Any:
        """See `Tunable.to_lora`."""
        from qkit_mlx.layers.adapted_experts import with_lora  # here, since adapted stacks are stacks of this kind

        return with_lora(self, r, dropout, scale)

    def _values(self, weight: mx.array, *learns: mx.array) -> mx.array:
        """The values [experts, outputs, inputs] that the stack multiplies with."""
        return values_of(self, weight)

    def _quantized(self, weight: mx.array, *learns: mx.array) -> list[QTensor[mx.array]]:
        """The codes of `weight` in pieces, see `quantize_stack`."""
        return quantize_stack(weight, self.rule.weight, peaks=self.shared_peak(weight))

    def _split(self, trained: tuple[mx.array, ...]) -> tuple[tuple[mx.array, ...], mx.array | None]:
        return (trained[:-1], trained[-1]) if "bias" in self else (trained, None)

    def _slot(self, x: mx.array, grid: Grid | None, name: str, indices: mx.array) -> mx.array:
        """`x` on the grid of the slot `name`; while the stack calibrates, the ranges of the experts widen instead."""
        rule = self.rule
        if grid is None or not quantizes(self) or not x.size:
            return x
        if rule.range == "dynamic":
            return self._on_grid(x, grid, name)
        key = f"{name}_range"
        if self.calibrating or (rule.range == "average" and self.training):
            every = mx.broadcast_to(x, (*indices.shape, *x.shape[-2:]))
            seen = ranges.extremes_of_experts(every, indices, self.num_experts)
            self[key] = (ranges.wider if self.calibrating else ranges.averaged)(self[key], seen)
        if self.calibrating:
            _evaluate(self[key])
            return x
        return on_grid(ranges.scales_of_experts(self[key], grid, name=name), x, grid, name, indices, rule.ste)

    def _static(self) -> dict[str, mx.array]:
        static: dict[str, mx.array] = {}
        for name, grid in static_names(self.rule).items():
            static |= ranges.scales_of_experts(self[f"{name}_range"], grid, name=name)
        return static


class LearnedSwitchLinear(FakeSwitchLinear):
    """A stack that learns the scales of each expert, parameters such as `weight_scale` [experts, ...]."""

    @property
    def ranges(self) -> list[mx.array]:
        """See `FakeSwitchLinear.ranges`."""
        return [self[name] for name in stored_names(self.rule.weight, self.rule.scales)]

    def _values(self, weight: mx.array, *learns: mx.array) -> mx.array:
        grid = self.rule.weight
        if not quantizes(self):
            return weight
        values = learned.values_alone if self.rule.scales == "alone" else learned.fake_quantize
        if grid.by_rows:
            return values(weight, grid, *learns)
        return mx.stack([values(one, grid, *mine) for one, *mine in zip(weight, *learns, strict=True)])

    def _quantized(self, weight: mx.array, *learns: mx.array) -> list[QTensor[mx.array]]:
        quantize = learned.quantize_alone if self.rule.scales == "alone" else learned.quantize
        return [quantize(one, self.rule.weight, *mine) for one, *mine in zip(weight, *learns, strict=True)]


def prepare_stack(part: Any, rule: Rule) -> FakeSwitchLinear:
    """The training form of mlx-lm's `SwitchLinear`. Learned scales begin with the grid's rule, frozen if the weight is."""
    if rule.scales == "rule":
        return FakeSwitchLinear(part, rule)
    layer = LearnedSwitchLinear(part, rule)
    assert rule.weight is not None
    grid = rule.weight
    each = [learned.initial(one, grid) for one in layer["weight"]]
    for name, several in zip(names(grid), zip(*each, strict=True), strict=True):
        layer[name] = mx.stack(list(several))
        if rule.scales == "alone":
            layer[FIRST + name] = mx.array(layer[name])
    freeze_ranges(layer, rule)
    return layer


def share(gate: Any, up: Any) -> None:
    """Has gate and up know each other, which share a tensor scale under `nvfp4`."""
    gate.__dict__["partner"], up.__dict__["partner"] = up, gate


def _evaluate(seen: mx.array) -> None:
    """Computes a range now, which releases the graph that it comes from."""
    try:
        mx.eval(seen)
    except ValueError:
        raise StageError("ranges cannot be recorded while a function is compiled: calibrate the model itself") from None


def _gather_multiply(x: mx.array, w: mx.array, indices: mx.array, sorted_indices: bool) -> mx.array:
    """`mx.gather_mm`, which takes float32 alone on a CPU (0.32.4)."""
    if mx.default_device() == GPU:
        return mx.gather_mm(x, w, rhs_indices=indices, sorted_indices=sorted_indices)
    wide = mx.gather_mm(x.astype(mx.float32), w.astype(mx.float32), rhs_indices=indices, sorted_indices=sorted_indices)
    return wide.astype(x.dtype)
