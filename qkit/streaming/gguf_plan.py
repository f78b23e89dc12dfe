"""The GGUF file that `qkit export --to gguf` would make of a plan: from headers alone, so that scales count as float16."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from qkit.artifact.families import HEAD
from qkit.errors import ArtifactError
from qkit.experts import is_router
from qkit.formats.gguf import FLOATS, SIZES, layout
from qkit.formats.gguf_config import ARCHITECTURES, BIASES, Architecture
from qkit.streaming.plan import Plan, Row


@dataclass(frozen=True, slots=True)
class GgufPlan:
    """The tensors of a GGUF file.

    Attributes:
        nbytes: bytes of all tensors.
        kinds: how many quantized weights have each of GGUF's types.
        fallbacks: names of the quantized weights that need `--fallback f16`, and the reasons.
        float_ends: bytes of the embedding and of the head, where they are not quantized and other weights are.
        needs_weights_only: the first layer whose inputs or outputs are quantized, which GGUF does not state; else empty.
    """

    nbytes: int
    kinds: Mapping[str, int]
    fallbacks: Mapping[str, str]
    float_ends: int
    needs_weights_only: str = ""

    def __str__(self) -> str:
        parts = [f"{count} {kind}" for kind, count in self.kinds.items()]
        if self.fallbacks:
            name, reason = next(iter(self.fallbacks.items()))
            parts.append(f"{len(self.fallbacks)} that need --fallback f16 ({name}: {reason})")
        how = ""
        if self.needs_weights_only:
            how = f" with --weights-only, since {self.needs_weights_only} quantizes more than its weight"
        text = f"as GGUF{how}: {', '.join(parts)}; {self.nbytes:,} bytes"
        if self.float_ends:
            text += f", of which embedding and head, left float, are {self.float_ends / self.nbytes:.0%}"
            text += ": recipes whose names end in -all quantize them"
        return text


def gguf_plan(plan: Plan, config: Mapping[str, object]) -> GgufPlan | None:
    """The GGUF file of `plan`; None where GGUF has no such model, or nothing is quantized.

    Args:
        config: `config.json` of the model.
    """
    architecture = ARCHITECTURES.get(str(config.get("model_type")))
    if architecture is None or not any(row.rule and row.rule.weight for row in plan.rows):
        return None
    total, ends = 0, 0
    kinds: Counter[str] = Counter()
    fallbacks: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()  # GGUF has the experts of a block in one tensor for each projection
    for row in (row for row in plan.rows if row.slots):
        kind, reason = _kind(row, architecture)
        if reason:
            fallbacks[row.stored.slot.name] = reason
        elif row.rule and row.rule.weight:
            tensors = _tensors(row) - seen
            seen |= tensors
            kinds[kind] += len(tensors)
        nbytes = prod(row.stored.slot.shape) * SIZES[kind] // 64
        total += nbytes
        if not (row.rule and row.rule.weight) and (row.kind == "embedding" or row.path == HEAD):
            ends += nbytes
    more = (row.path for row in plan.rows if row.rule and row.rule.weight and (row.rule.activation or row.rule.output))
    return GgufPlan(total, dict(sorted(kinds.items())), fallbacks, ends, next(more, ""))


def _tensors(row: Row) -> set[tuple[str, str]]:
    """The tensors of the file that hold the weight, or a part of it, by block and projection of experts."""
    if row.member is None:
        return {(row.stored.slot.name, "")}
    return {(row.member.block, projection) for projection in row.member.projections}


def _kind(row: Row, architecture: Architecture) -> tuple[str, str]:
    """GGUF's type for a tensor, and the reason where no type holds its grid, or its scale unless that is 1."""
    slot = row.stored.slot
    if row.rule is None or row.rule.weight is None:
        if is_router(slot.name.rpartition(".")[0]) or BIASES.fullmatch(slot.name):
            return "F32", ""
        return (FLOATS.get(row.dtype, "F32") if len(slot.shape) > 1 else "F32"), ""
    try:
        kind = layout(row.rule.weight, row.shape[-1])
        reason = architecture.why_no_scale(row.rule.kind) if row.rule.weight.has_tensor_scale else ""
        return ("F16", reason) if reason else (kind, "")
    except ArtifactError as error:
        return "F16", str(error).partition(": ")[0]
