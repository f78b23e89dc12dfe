"""The readers that will not open an output, or open it only in one way, known before any work."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qkit.artifact.known import is_known, table
from qkit.artifact.metadata import StoredRule
from qkit.artifact.servers import VLLM, sentences
from qkit.artifact.transformers_experts import misread
from qkit.formats.compressed_tensors import layout
from qkit.formats.mlx_limits import limits_of

TRANSFORMERS, DEQUANTIZED = "transformers", "transformers, dequantized"
GOOD = ("equal", "none")  #: results of the table that need no word: equal, or the reader has no such model
TRIED = "with transformers 5.23, compressed-tensors 0.20 and mlx-lm 0.32"


@dataclass(frozen=True, slots=True)
class Caveat:
    """A reader, and the part of the output that it does not open or reads otherwise.

    Attributes:
        reader: name of the reader, as the table has it; empty where the caveat is about all.
        text: a sentence without its full stop.
        tabled: whether a small model of the family failed so, without a known cause.
    """

    reader: str
    text: str
    tabled: bool = False

    def __str__(self) -> str:
        return f"{self.reader}: {self.text}" if self.reader else self.text


def caveats(
    config: Mapping[str, Any] | None,
    rules: Sequence[StoredRule],
    *,
    tied: bool = False,
    single_experts: bool = False,
) -> tuple[Caveat, ...]:
    """The caveats of an output with these rules of a model with this configuration.

    Args:
        tied: whether its output head is the embedding.
        single_experts: whether the output has float experts that are stored one by one.
    """
    if config is None:
        return ()
    found = list(_of_experts(config, rules, single_experts and bool(rules)))
    found += [one for one in _of_layout(rules) if one.reader not in {known.reader for known in found}]
    found += [Caveat(VLLM, text) for text in sentences(rules, tied=tied)]
    if not is_known(config):
        found.append(
            Caveat(
                "",
                f"no model of type {config.get('model_type')!r} is in the table of tried families, so that names alone say what "
                "is quantized: load the output with qkit and compare before you use it",
            )
        )
    elif not rows_of(config):
        found.append(
            Caveat(
                "",
                f"the names of a {config.get('model_type')!r} are known, and no output of this type was opened in other readers: "
                "load it with qkit and compare before you use it",
            )
        )
    found += [Caveat(one, f"{text} ({TRIED})") for readers, text in limits_of(config) for one in readers]
    said = {one.reader for one in found}
    found += [one for one in _of_family(config, _recipe(rules)) if one.reader not in said]
    return tuple(found)


def _of_layout(rules: Sequence[StoredRule]) -> Iterable[Caveat]:
    grids = {one.rule.weight for one in rules}
    embeddings = any(one.rule.kind == "embedding" for one in rules)
    asymmetric = any(grid is not None and not grid.symmetric for grid in grids)
    other = "open it by default" if not (embeddings or asymmetric) else "its default does not open it either"
    if len(grids) > 1:
        text = f"dequantize=True reads every layer by the first of several grids, and is wrong or fails; {other}"
        yield Caveat(DEQUANTIZED, f"{text} ({TRIED})")
    way = "open it with dequantize=True" if len(grids) < 2 else "and dequantize=True takes one grid only"
    if embeddings:
        yield Caveat(TRANSFORMERS, f"its default has no embedding of codes: {way} ({TRIED})")
    elif asymmetric:
        yield Caveat(TRANSFORMERS, f"its default gives zero points another shape: {way} ({TRIED})")


def _of_experts(config: Mapping[str, Any], rules: Sequence[StoredRule], float_ones: bool) -> Iterable[Caveat]:
    """Experts that transformers does not open; where it would open others, config.json stops it."""
    mixed = [one.rule for one in rules if one.rule.kind == "experts"]
    text = misread(config, rules, single_experts=float_ones)
    stopped = ", and is stopped by a key of config.json" if text else ""
    if not text and mixed:
        forms = {layout(rule.weight) for rule in mixed if rule.weight is not None}
        asymmetric = any(rule.weight is not None and not rule.weight.symmetric for rule in mixed)
        if "mxfp8-quantized" in forms or asymmetric:
            text = "it fails on experts with " + ("zero points" if asymmetric else "MXFP8 scales")
    if text:
        way_out = f"{stopped}: open the output with qkit ({TRIED})"
        yield from (Caveat(one, text + way_out) for one in (TRANSFORMERS, DEQUANTIZED))
    if any(rule.slots for rule in mixed):
        yield Caveat("", f"transformers does not quantize the inputs of experts, and qkit does ({TRIED})")


def _recipe(rules: Sequence[StoredRule]) -> str:
    """The recipe of the table that is most like `rules`."""
    if any(one.rule.kind == "embedding" for one in rules):
        return "all"
    return "mixed" if len({one.rule.weight for one in rules}) > 1 else "int4"


def rows_of(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The rows of the table for the type of model that `config` names, without those of structural variants."""
    rows = table()["rows"].values()
    return [row for row in rows if row["type"] == config.get("model_type") and not row.get("variant")]


def _of_family(config: Mapping[str, Any], recipe: str) -> Iterable[Caveat]:
    """The results of the table that are not good, each reader once."""
    names = config.get("architectures") or []
    mine = rows_of(config)
    mine = [row for row in mine if row["architecture"] in names] or mine
    found: dict[str, str] = {}
    for row in mine:
        found.update((reader, cell) for reader, cell in row[recipe].items() if cell not in GOOD)
    way = "" if DEQUANTIZED in found or recipe == "mixed" else "; open it with dequantize=True"
    for reader, cell in found.items():
        text = f"{_outcome(cell)} under such a recipe{way if reader == TRANSFORMERS else ''}"
        yield Caveat(reader, f"a small model of this family {text} ({TRIED}: {cell})", tabled=True)


def _outcome(cell: str) -> str:
    word = cell.partition(":")[0]
    return {"warned": "opens there with other values", "differs in float": "is another model there"}.get(
        word, "does not open there"
    )
