"""Facts about vLLM 0.32: outputs that it does not open, or runs with other arithmetic than qkit's. Read off its sources."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from qkit import fused
from qkit.artifact.metadata import StoredRule
from qkit.formats.compressed_tensors import form_of
from qkit.formats.read_layout import BYTES, OWN, PACKED
from qkit.rules import Rule

VLLM: Final = "vLLM"
BITS: Final = range(2, 9)  #: widths of integers: `WNA16_SUPPORTED_TYPES_MAP`
TRIED: Final = "(vLLM 0.32)"


def sentences(
    rules: Sequence[StoredRule], *, tied: bool, tensor_scales: Mapping[str, float] | None = None
) -> Iterable[str]:
    """The differences of vLLM for an output with these rules, a sentence each without its full stop.

    Args:
        tied: whether the output head is the embedding.
        tensor_scales: those of weights on `nvfp4` grids, by path, where they are known. In a plan they are shared.
    """
    found: dict[str, None] = dict.fromkeys(_unshared(tensor_scales or {}))
    for one in rules:
        if one.rule.kind == "embedding" and tied:
            found[f"does not open a tied head of codes: --untie writes the head as a weight of its own {TRIED}"] = None
        closed = _closed(one.rule)
        for text in [closed] if closed else _other_arithmetic(one.rule):
            found[f"{text} {TRIED}"] = None
    return found


def _unshared(scales: Mapping[str, float]) -> Iterable[str]:
    """Layers that vLLM runs as one, with one tensor scale, although theirs differ: artifacts of qkit's earlier versions."""
    wrong = [group for group in fused.groups(scales) if len({scales[path] for path in group}) > 1]
    if wrong:
        more = f", and {len(wrong) - 1} more such groups," if len(wrong) > 1 else ""
        yield (
            f"reads {', '.join(wrong[0])}{more} wrongly, as one layer with one tensor scale, and theirs differ: qkit import "
            f"DIR NEW writes the same model with shared ones {TRIED}"
        )


def _closed(rule: Rule) -> str:
    """Why vLLM does not open weights under `rule`; empty where it does."""
    grid = rule.weight
    assert grid is not None
    form, bits = form_of(rule), grid.element.bits
    if form == OWN:
        return f"does not open {grid}, whose format only qkit opens: export --to dense, or --to mlx or gguf where they hold it"
    if rule.kind == "embedding" and (form != PACKED or not grid.symmetric or grid.group == "tensor" or 32 % bits):
        return f"opens no embedding on {grid}, only symmetric integers of 2, 4 or 8 bits in groups or rows"
    if form == PACKED and grid.group == "tensor":
        return f"does not open {grid}: it has no integers on one scale"
    if form == PACKED and bits not in BITS:
        return f"does not open {grid}: it has no integers of {bits} bits"
    if rule.activation is None:
        return ""
    wrong = form in (PACKED, BYTES) and not _multiplies_codes(rule, form)
    if wrong or (grid.scale == "nvfp4" and rule.activation.scale != "nvfp4"):
        return f"does not open {grid} with inputs on {rule.activation}, {rule.range}"
    return ""


def _multiplies_codes(rule: Rule, form: str) -> bool:
    """Whether vLLM has a scheme for integers in `form` with the inputs of `rule`; see its `_get_scheme_from_parts`."""
    grid, activation = rule.weight, rule.activation
    assert grid is not None
    assert activation is not None
    if activation.element.kind != "integer":
        return False
    bits, byte = activation.element.bits, activation.element.bits == 8
    if rule.range != "dynamic":
        whole = form == BYTES and grid.element.bits == 8
        return byte and activation.group == "tensor" and (whole or _rounds_outputs(rule))
    if form == BYTES:
        return byte and activation.group == "row"
    return activation.symmetric and bits in (4, 8) and activation.group != "tensor"


def _rounds_outputs(rule: Rule) -> bool:
    """Whether vLLM rounds outputs under `rule`: around integers, with static scales of inputs and outputs."""
    grid, slots = rule.weight, (rule.activation, rule.output)
    assert grid is not None
    held = grid.element.name in ("int2", "int4", "int8") and grid.symmetric and grid.group != "tensor"
    static = all(
        one is not None and one.symmetric and (one.element.name, one.group) == ("int8", "tensor") for one in slots
    )
    return held and static and rule.range != "dynamic"


def _other_arithmetic(rule: Rule) -> Iterable[str]:
    """The differences of vLLM's arithmetic under `rule` from qkit's."""
    grid, activation = rule.weight, rule.activation
    assert grid is not None
    if form_of(rule).startswith("mx"):
        yield "rounds inputs or not by the kind of the GPU, whatever the recipe says: MX formats have no other setting there"
    elif activation is None:
        pass
    elif activation.scale == "nvfp4" == grid.scale:
        yield "divides inputs by a tensor scale of 1, where qkit's follows each input"
    elif grid.element.kind == "float" and activation.element.kind == "integer":
        yield f"leaves inputs as they are beside {grid}, where qkit rounds them to {activation}"
    elif grid.element.kind == "float" and (activation.element.name != "e4m3" or isinstance(activation.group, int)):
        yield f"rounds inputs to e4m3 by token, where qkit rounds them to {activation}"
    else:
        yield "rounds inputs by its own rule, with scales of 24 bits, where qkit's have 8 or are powers of two"
    if rule.output and not _rounds_outputs(rule):
        yield f"leaves outputs as they are, where qkit rounds them to {rule.output}"
