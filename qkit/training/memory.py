"""The estimate of a training run's memory, from a plan's shapes and the configuration: no tensor is read."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Final

from qkit.adapters.adapter import Adapter
from qkit.engines.layer import is_head_path
from qkit.engines.trainer import LOGITS as AT_A_TIME
from qkit.errors import RunError
from qkit.streaming.plan import Plan, Row

SIZES: Final = {"float32": 4, "bfloat16": 2}
#: Numbers that an optimizer stores for each that it trains, in the type of the weights.
OPTIMIZERS: Final = {"adamw": 2.0, "adam": 2.0, "lion": 1.0, "muon": 1.0, "momentum": 1.0, "sgd": 0.0}
#: By engine, copies of all quantized weights that layers with adapters hold at the peak: on a prepared base (sum and values),
#: and on packed codes (the decoded base as well). Measured on a CPU. On torch none wait for the backward pass.
COPIES: Final = {"torchao": (0.0, 0.0), "mlx": (1.2, 1.4)}
#: By engine and device, copies of a weight that its layer with an adapter holds while it computes, in float32 and in the type
#: of the weights, on either base. Measured on a CPU; on CUDA one kernel makes the values.
AT_ONCE: Final = {
    ("torchao", "cpu"): ((5.0, 0.0), (3.0, 4.0)),
    ("torchao", "cuda"): ((0.0, 1.0), (0.0, 1.0)),
    **dict.fromkeys((("mlx", "cpu"), ("mlx", "cuda")), ((0.0, 0.0), (0.0, 0.0))),
}
BASES: Final = ("prepared weights", "packed codes")
DEVICES: Final = ("cuda", "cpu")
LOGITS: Final = 4  #: float32 copies of the logits: themselves, their logarithms, and the gradients of both
CHUNK: Final = 2  #: as above, of a chunk of them; those of 16 bits have a copy of their own besides


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
    device: str = "cuda",
    recompute: bool = False,
) -> list[Memory]:
    """The memory of each way to train the model of `plan`: all weights, or adapters of `rank` on either base.

    Args:
        batch, length: sequences in a micro-batch, tokens in each.
        dtype: of the master weights.
        optimizer: a name in `OPTIMIZERS`.
        device: `cpu`, or `cuda` for any GPU. On MLX all devices take as much.
        recompute: gradient checkpointing.

    Raises:
        RunError: a value is out of range, or the configuration does not say how large the layers are.
    """
    for key, value, known in (
        ("dtype", dtype, SIZES),
        ("optimizer", optimizer, OPTIMIZERS),
        ("backend", engine, COPIES),
        ("device", device.partition(":")[0], DEVICES),
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
    forward = activations(plan, config, batch=batch, length=length, size=size, engine=engine, recompute=recompute)
    linear = [row for row in stored if row.rule and row.kind == "linear"]
    trained = [sum(_factors(row, rank, packed=packs) for row in linear) for packs in (False, True)]
    largest, head = (
        max((prod(row.shape[-2:]) for row in linear if is_head_path(row.path) == on_head), default=0)
        for on_head in (False, True)
    )
    each = AT_ONCE[engine, device.partition(":")[0]]
    at_once = [4 * in_float + size * in_own for in_float, in_own in each]
    copies = [count * quantized * size for count in COPIES[engine]]
    peaks = [forward.with_values(once * largest, once * head) for once in at_once]
    rest = (numbers - quantized) * size
    _, full = forward.with_values(0, 0)
    return [
        Memory("full", numbers * size, numbers * size, states * numbers * size, quantized * size, full),
        *(
            Memory(
                f"adapter on {base}", held + rest + own * size, own * size, states * own * size, cached + values, needed
            )
            for base, held, own, cached, (values, needed) in zip(
                BASES, (quantized * size, packed), trained, copies, peaks, strict=True
            )
        ),
    ]


def _factors(row: Row, rank: int, *, packed: bool) -> int:
    """How many numbers the factors of an adapter on a linear layer have."""
    grid = row.rule.weight if row.rule else None
    columns = Adapter(rank=rank).columns(grid) if packed and grid else rank
    return columns * sum(row.shape[-2:])


@dataclass(frozen=True, slots=True)
class Forward:
    """Bytes of activations.

    Attributes:
        stored: everything that waits for the backward pass.
        layer: of a layer that is recomputed, beside them; 0 where nothing is.
        head: of the logits, beside them.
    """

    stored: float
    layer: float
    head: float

    def with_values(self, layer: float, head: float) -> tuple[float, float]:
        """The values and the activations at the peak: of a layer whose values take `layer` bytes, or of the head."""
        return max(
            ((layer, self.stored + self.layer), (head, self.stored + self.head)),
            key=sum,
        )


def activations(
    plan: Plan, config: Mapping[str, Any], *, batch: int, length: int, size: int, engine: str, recompute: bool
) -> Forward:
    """The activations of a decoder with gated feed-forward layers.

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
    tokens, logits = batch * length, LOGITS * 4.0 * batch * length * vocabulary
    if engine == "torchao" and tokens * vocabulary > AT_A_TIME:
        logits = (
            CHUNK * 4 + 2 * (size % 4)
        ) * AT_A_TIME + 3.0 * tokens * width * size  # the head's input, and gradients
    if not recompute:
        return Forward(tokens * layers * each, 0.0, logits)
    return Forward(tokens * layers * width * size, tokens * float(each), logits)


def _known(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if type(value) is not int or value < 1:
        raise RunError(f"config.json has {key} = {value!r}, so that activations cannot be estimated: leave --train out")
    return value
