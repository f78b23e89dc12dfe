"""The estimate of a training run's memory, from a plan's shapes and the configuration: no tensor is read."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Final

from qkit.errors import RunError
from qkit.streaming.plan import Plan

SIZES: Final = {"float32": 4, "bfloat16": 2}
#: Numbers that an optimizer stores for each that it trains, in the type of the weights.
OPTIMIZERS: Final = {"adamw": 2.0, "adam": 2.0, "lion": 1.0, "muon": 1.0, "momentum": 1.0, "sgd": 0.0}
#: By engine, copies of all quantized weights that layers with adapters hold at the peak: on a prepared base (sum and values),
#: and on packed codes (the decoded base as well). Measured on a CPU. On torch none wait for the backward pass.
COPIES: Final = {"torchao": (0.0, 0.0), "mlx": (1.2, 1.4)}
#: By engine, float32 copies of the largest weight that its layer with an adapter holds while it computes, on either base.
AT_ONCE: Final = {"torchao": (5.0, 7.0), "mlx": (0.0, 0.0)}
LOGITS: Final = 4  #: float32 copies of the logits: themselves, their logarithms, and the gradients of both


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes that a way to train needs, at its peak.

    Attributes:
        way: `full`, `adapter on prepared weights` or `adapter on packed codes`.
        weights, gradients, optimizer: master weights or codes, with everything that is not trained; of the trained numbers.
        values: quantized values: cached from step to step, or of merged weights for the backward pass.
        activations: the numbers of the forward pass that the backward pass needs, and the logits.
    """

    way: str
    weights: float
    gradients: float
    optimizer: float
    values: float
    activations: float

    @property
    def total(self) -> float:
        """All of them. An engine's own 0.1 to 0.5 GB, and on CUDA its context, come on top."""
        return self.weights + self.gradients + self.optimizer + self.values + self.activations


def training_memory(
    plan: Plan,
    config: Mapping[str, Any],
    *,
    batch: int,
    length: int,
    dtype: str = "float32",
    optimizer: str = "adamw",
    rank: int = 8,
    engine: str = "torchao",
    recompute: bool = False,
) -> list[Memory]:
    """The memory of each way to train the model of `plan`: all weights, or adapters of `rank` on either base.

    Args:
        batch, length: sequences in a micro-batch, tokens in each.
        dtype: of the master weights.
        optimizer: a name in `OPTIMIZERS`.
        recompute: gradient checkpointing.

    Raises:
        RunError: a value is out of range, or the configuration does not say how large the layers are.
    """
    for key, value, known in (
        ("dtype", dtype, SIZES),
        ("optimizer", optimizer, OPTIMIZERS),
        ("backend", engine, COPIES),
    ):
        if value not in known:
            raise RunError(f"{key} is {value!r}: want one of {', '.join(known)}")
    for key, number in (("batch", batch), ("length", length), ("rank", rank)):
        if number < 1:
            raise RunError(f"{key} is {number}: want a whole number from 1 on")
    size, states = SIZES[dtype], OPTIMIZERS[optimizer]
    stored = [row for row in plan.rows if row.slots]  # without copies of tied tensors
    numbers = sum(prod(row.stored.slot.shape) for row in stored)
    quantized = sum(prod(row.stored.slot.shape) for row in stored if row.rule)
    packed = sum(slot.nbytes for row in stored if row.rule for slot in row.slots)
    trained = sum(rank * sum(row.shape[-2:]) for row in stored if row.rule and row.kind == "linear")
    forward = activations(plan, config, batch=batch, length=length, size=size, engine=engine, recompute=recompute)
    largest = max((prod(row.shape[-2:]) for row in stored if row.rule and row.kind == "linear"), default=0)
    copies = [
        count * quantized * size + once * largest * 4
        for count, once in zip(COPIES[engine], AT_ONCE[engine], strict=True)
    ]
    small = (trained * size, states * trained * size)
    rest = (numbers - quantized + trained) * size
    return [
        Memory("full", numbers * size, numbers * size, states * numbers * size, quantized * size, forward),
        Memory("adapter on prepared weights", quantized * size + rest, *small, copies[0], forward),
        Memory("adapter on packed codes", packed + rest, *small, copies[1], forward),
    ]


def activations(
    plan: Plan, config: Mapping[str, Any], *, batch: int, length: int, size: int, engine: str, recompute: bool
) -> float:
    """Bytes of a forward pass of a decoder with gated feed-forward layers that the backward pass needs.

    For each token of a layer: both norms and both residuals (6 widths in float32); the inputs and outputs of the projections of
    attention; gate, up, their activation and product; on MLX the scores, too. Quantized inputs are stored beside the float ones.
    """
    text = config.get("text_config") or config
    width, layers, heads = (_known(text, key) for key in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
    inner, vocabulary = _known(text, "intermediate_size"), _known(text, "vocab_size")
    if experts := text.get("num_experts_per_tok"):
        inner = int(text.get("moe_intermediate_size") or inner) * int(experts)
    keys = int(text.get("num_key_value_heads") or heads) * int(text.get("head_dim") or width // heads)
    each = 6 * width * 4 + (6 * width + 4 * inner + 4 * keys) * size
    if any(row.rule and row.rule.activation for row in plan.rows):
        each += (3 * width + inner) * size
    if engine == "mlx":
        each += 2 * heads * length * size
    held = 2 * each + layers * width * size if recompute else layers * each  # recomputed: one layer, and its gradients
    return batch * length * float(held + LOGITS * 4 * vocabulary)


def _known(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if type(value) is not int or value < 1:
        raise RunError(f"config.json has {key} = {value!r}, so that activations cannot be estimated: leave --train out")
    return value
