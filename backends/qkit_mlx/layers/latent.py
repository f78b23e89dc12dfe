"""The weight of DeepSeek's `kv_b_proj`, which mlx-lm keeps as two stacks of heads: prepared and converted. Modules only.

Each head has rows of keys, then rows of values, on [latent] inputs. `embed_q` has the keys transposed, [heads, latent, nope], and
`unembed_out` the values [heads, rows, latent]. A row of either is one of `kv_b_proj`, and has its codes.
"""

import sys
from dataclasses import replace
from typing import Any, Final, cast

import mlx.core as mx
import mlx.nn as nn

from qkit.errors import BackendError
from qkit.grid import Grid
from qkit.qtensor import QTensor
from qkit.rules import Rule
from qkit_mlx.arithmetic import rounding
from qkit_mlx.arithmetic.packing import unpacked_codes
from qkit_mlx.kernels import choose
from qkit_mlx.layers.containers import Contents, contain, contained
from qkit_mlx.layers.execution import Execution, choose_execution
from qkit_mlx.layers.float32_scales import Float32Scales
from qkit_mlx.layers.prepared import FakeLinear, evaluate_packed, quantizes
from qkit_mlx.layers.straight_through import values_view
from qkit_mlx.mlx_private import frozen_names

KEYS, VALUES = "embed_q", "unembed_out"  #: mlx-lm's names of the two halves
NAME: Final = "kv_b_proj"  #: of the layer in transformers


class Halves:
    """Both halves of one layer, together the module of the engine's verbs. Other attributes are those of the values.

    Attributes:
        keys: `embed_q`.
        values: `unembed_out`.
    """

    def __init__(self, keys: Any, values: Any) -> None:
        self.__dict__.update(keys=keys, values=values)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["values"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["values"], name, value)


def halves_of(module: Any) -> Halves | None:
    """The two halves among the parts of an attention module; None where it has none."""
    keys, values = module.get(KEYS), module.get(VALUES)
    if any(_is_half(part) for part in (keys, values)) and type(keys) is type(values):
        return Halves(keys, values)
    return None


def weight_of(halves: Any) -> mx.array:
    """The weight [heads * (nope + values), latent] of both halves, float or prepared."""
    return _whole(halves.keys["weight"].swapaxes(-1, -2), halves.values["weight"])


def split_weight(weight: mx.array, halves: Any) -> tuple[mx.array, mx.array]:
    """The inverse of `weight_of`: the weights of `embed_q` and `unembed_out`, for halves of these shapes."""
    heads, latent, nope = halves.keys["weight"].shape
    each = weight.reshape(heads, -1, latent)
    return mx.contiguous(each[:, :nope].swapaxes(-1, -2)), mx.contiguous(each[:, nope:])


def prepare_halves(halves: Any, rule: Rule) -> Halves:
    """See the protocol's `prepare_layer`.

    Raises:
        BackendError: the rule has more than a weight grid.
    """
    _check(rule)
    made = [FakeHeads(half, rule) for half in (halves.keys, halves.values)]
    for layer, partner in (made, made[::-1]):
        layer.__dict__.update(partner=partner, transposed=layer is made[0])
    return Halves(*made)


def restore_halves(halves: Any) -> Halves:
    """See the protocol's `restore_layer`: mlx-lm's own stacks of heads, with the same parameters."""
    cls = sys.modules["mlx_lm.models.mla"].MultiLinear  # whoever has such modules has imported it
    made = []
    for half in (halves.keys, halves.values):
        plain = cls.__new__(cls)
        nn.Module.__init__(plain)  # not its own, which draws a random weight
        plain["weight"] = half["weight"]
        plain.freeze(keys=list(frozen_names(half) & {"weight"}))
        made.append(plain.train(half.training))
    return Halves(*made)


def pack_halves(halves: Any, q: QTensor[mx.array], rule: Rule) -> Halves:
    """See the protocol's `pack`.

    Raises:
        BackendError: the rule has more than a weight grid.
    """
    _check(rule)
    if isinstance(halves.keys, PackedHeads):
        heads, nope = halves.keys.heads, halves.keys.rows
    else:
        heads, _, nope = halves.keys["weight"].shape
    made = [_pack_heads(_rows(q, heads, nope, keys=keys), rule, heads, transposed=keys) for keys in (True, False)]
    for layer, half in zip(made, (halves.keys, halves.values), strict=True):
        layer.train(half.training)
    return Halves(*made)


def unpack_halves(halves: Any) -> QTensor[mx.array]:
    """See the protocol's `unpack`."""
    keys, values = halves.keys.unpack(), halves.values.unpack()
    heads = halves.keys.heads

    def joined(one: mx.array, other: mx.array) -> mx.array:
        if one.ndim < 2 or one.shape[0] == 1:  # one scale for the whole tensor
            return one
        return _whole(one.reshape(heads, -1, one.shape[-1]), other.reshape(heads, -1, other.shape[-1]))

    others = values.parts()
    parts = {name: joined(array, others[name]) for name, array in keys.parts().items()}
    return QTensor(grid=keys.grid, dtype=keys.dtype, **parts)


class FakeHeads(FakeLinear):
    """One half, with its weight on a grid; otherwise as `FakeLinear`.

    Attributes:
        partner: the other half, for grids with one scale for the whole tensor; no part of the model at this place.
        transposed: whether it is `embed_q`.
    """

    partner: Any
    transposed: bool

    def __call__(self, x: mx.array, transpose: bool = True) -> mx.array:
        """x [..., heads or 1, rows, inputs] -> [..., heads, rows, outputs], as mlx-lm's `MultiLinear`."""

        def run_prepared(x: mx.array, weight: mx.array) -> mx.array:
            rows = weight.swapaxes(-1, -2) if self.transposed else weight
            rows = self._on_its_grid(rows)
            return x @ (rows.swapaxes(-1, -2) if transpose != self.transposed else rows)

        def run_packed(x: mx.array, weight: mx.array) -> mx.array:
            own = weight.swapaxes(-1, -2) if self.transposed else weight
            heads, nope = own.shape[0], self._nope()
            q = choose.quantize(self._joined(own), self.rule.weight)
            packed = _pack_heads(
                _rows(q, heads, nope, keys=self.transposed), self.rule, heads, transposed=self.transposed
            )
            return packed(x, transpose)

        if self.training or not quantizes(self):
            return run_prepared(x, self["weight"])
        return evaluate_packed(run_packed, run_prepared, x, self["weight"])

    def quantized(self, weight: mx.array, *, peak: mx.array | None = None) -> mx.array:
        """The values of `weight` on its grid, computed anew; the rows of `embed_q` are its columns."""
        own = weight.swapaxes(-1, -2) if self.transposed else weight
        if self.rule.weight.by_rows:
            return choose.fake_quantize_weight(mx.contiguous(own), self.rule.weight)
        whole = choose.fake_quantize_weight(self._joined(own), self.rule.weight).reshape(
            own.shape[0], -1, own.shape[-1]
        )
        return whole[:, : self._nope()] if self.transposed else whole[:, self._nope() :]

    def _on_its_grid(self, rows: mx.array) -> mx.array:
        if not quantizes(self):
            return rows
        grid, ste = cast(Grid, self.rule.weight), self.rule.ste
        if self.training and "_frozen_values" in self:
            return values_view(rows, self["_frozen_values"].astype(rows.dtype), grid, ste=ste)
        if not grid.by_rows:
            return values_view(rows, self.quantized(self["weight"]), grid, ste=ste)
        return values_view(
            rows, self.cached_values.of(self["weight"], self.quantized, grid, traced=True), grid, ste=ste
        )

    def _joined(self, own: mx.array) -> mx.array:
        other = mx.stop_gradient(self.partner["weight"])
        return _whole(own, other) if self.transposed else _whole(other.swapaxes(-1, -2), own)

    def _nope(self) -> int:
        return int((self if self.transposed else self.partner)["weight"].shape[-1])


class PackedHeads(Float32Scales):
    """One half with codes, in one of MLX's containers or in plain arrays. Its words are rows of latents in either half.

    Attributes:
        heads: their number.
        rows: of one head.
        transposed: whether it is `embed_q`, whose rows are its columns.
    """

    def __init__(self, q: QTensor[mx.array], rule: Rule, execution: Execution, heads: int, transposed: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        container = execution.container
        self.rule, self.grid, self.inputs, self.dtype = rule, q.grid, q.shape[-1], q.dtype
        self.execution, self.heads, self.rows, self.transposed = execution, heads, q.shape[0] // heads, transposed
        if container is None:
            self.weight, self.scales = choose.packed_codes(q.codes, q.grid.element), q.scales
            if q.zeros is not None:
                self.zeros = q.zeros
        else:
            contents = contain(q, container)
            self.weight, self.scales = contents.weight, contents.scales
            if contents.biases is not None:
                self.biases = contents.biases
        if q.tensor_scale is not None:
            self.tensor_scale = q.tensor_scale

    def __call__(self, x: mx.array, transpose: bool = True) -> mx.array:
        """As mlx-lm's `MultiLinear`; computes in float32."""
        wide, along_rows = x.astype(mx.float32), transpose != self.transposed
        container = self.execution.container
        if container is None or not x.size:
            values = rounding.dequantize(replace(self.unpack(), dtype="float32")).reshape(self.heads, self.rows, -1)
            return (wide @ (values.swapaxes(-1, -2) if along_rows else values)).astype(x.dtype)
        y = mx.quantized_matmul(
            wide,
            self._by_head("weight"),
            scales=self._by_head("scales"),
            biases=self._by_head("biases") if "biases" in self else None,
            transpose=along_rows,
            group_size=container.group,
            bits=container.bits,
            mode=container.mode,
        )
        y = y * self["tensor_scale"] if "tensor_scale" in self else y
        return y.astype(x.dtype)

    def unpack(self) -> QTensor[mx.array]:
        """The codes and scales [heads * rows, latent]."""
        tensor_scale = self.get("tensor_scale")
        if self.execution.container is not None:
            contents = Contents(self["weight"], self["scales"], self.get("biases"), tensor_scale)
            return contained(contents, self.grid, inputs=self.inputs, dtype=self.dtype)
        element, symmetric = self.grid.element, self.grid.symmetric
        codes = unpacked_codes(self["weight"], element=element, n=self.inputs, symmetric=symmetric)
        more = {name: self.get(name) for name in ("zeros", "biases")}
        return QTensor(codes, self["scales"], self.grid, self.dtype, tensor_scale=tensor_scale, **more)

    def _by_head(self, name: str) -> mx.array:
        array: mx.array = self[name]
        return array.reshape(self.heads, self.rows, -1)


def _pack_heads(q: QTensor[mx.array], rule: Rule, heads: int, *, transposed: bool) -> PackedHeads:
    shape = (q.shape[0] // heads, q.shape[1])
    execution = choose_execution(rule, device=mx.default_device(), dtype="float32", shape=shape)
    layer = PackedHeads(q, rule, execution, heads, transposed)
    layer.freeze()
    return layer


def _rows(q: QTensor[mx.array], heads: int, nope: int, *, keys: bool) -> QTensor[mx.array]:
    """The rows of one half among those of both."""

    def own(part: mx.array) -> mx.array:
        if part.ndim < 2 or part.shape[0] == 1:  # one scale for the whole tensor
            return part
        each = part.reshape(heads, -1, part.shape[-1])
        return (each[:, :nope] if keys else each[:, nope:]).reshape(-1, part.shape[-1])

    return q.map(own)


def _whole(keys: mx.array, values: mx.array) -> mx.array:
    both = mx.concatenate([keys, values], axis=1)
    return both.reshape(-1, both.shape[-1])


def _is_half(part: Any) -> bool:
    return isinstance(part, (FakeHeads, PackedHeads)) or (
        type(part).__name__ == "MultiLinear" and type(part).__module__.startswith("mlx_lm.")
    )


def _check(rule: Rule) -> None:
    if rule.slots or rule.scales != "rule":
        raise BackendError(
            f"{NAME}: mlx-lm multiplies its heads in another order for one token than for several, so that MLX has a weight grid "
            "for it and nothing else: put a rule without the other keys before"
        )
