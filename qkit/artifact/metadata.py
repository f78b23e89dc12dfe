"""The rules of an artifact, as the one metadata key of its weights file states them: written, read and checked."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qkit.artifact.known import both_names
from qkit.engines.layer import Layer
from qkit.errors import ArtifactError, RecipeError
from qkit.formats import compressed_groups
from qkit.formats.settings import check_compressed_tensors, quantization_of
from qkit.intake import parse_json
from qkit.path_patterns import collapse, expand
from qkit.qtensor import DTYPES, DType
from qkit.rules import Kind, Rule, rule_from_table, rule_table
from qkit.storage.read import TENSORS

KEY = "qkit"  #: the one metadata key of the weights file
NUMERICS = 1  #: version of the arithmetic that the codes follow
#: Keys of the text. `layout`, `added` and `replaced` stand in exports only, and `fit` where codes are not those of the rule.
KEYS = {"numerics", "rules", "layout", "added", "replaced", "fit"}


@dataclass(frozen=True, slots=True)
class StoredRule:
    """One rule of an artifact and its layers.

    Attributes:
        rule: the rule, without the patterns that chose the layers.
        dtype: type of the weights before they were quantized.
        paths: full paths of the layers.
    """

    rule: Rule
    dtype: DType
    paths: tuple[str, ...]


def stored_rule(rule: Rule) -> Rule:
    """`rule` as an artifact states it: without the patterns that chose the layers, and the way to its codes."""
    return replace(rule, match=("*",), part="all", indivisible="error", rounding="nearest")


def group_paths(applied: Iterable[tuple[Rule, DType, str]]) -> list[StoredRule]:
    """The rules among `applied`, each once for each type of weight, with the paths that have them."""
    paths: dict[tuple[Rule, DType], list[str]] = {}
    for rule, dtype, path in applied:
        paths.setdefault((rule, dtype), []).append(path)
    ordered = sorted(paths.items(), key=lambda item: min(item[1]))
    return [StoredRule(rule, dtype, tuple(sorted(mine))) for (rule, dtype), mine in ordered]


def describe(rules: Iterable[StoredRule], *, fit: Mapping[str, Any] | None = None) -> str:
    """The text of the metadata key that states `rules`, with patterns of `qkit.path_patterns` for the paths.

    Args:
        fit: how codes were chosen; None: by the rule of their grid.
    """
    tables = [{**_without_match(one.rule), "patterns": list(collapse(one.paths)), "dtype": one.dtype} for one in rules]
    fitted = {} if fit is None else {"fit": dict(fit)}
    return json.dumps({"numerics": NUMERICS, "rules": tables, **fitted}, sort_keys=True)


def read_rules(
    folder: Path, metadata: Mapping[str, str], config: Mapping[str, Any] | None, *, layout: str = "compressed-tensors"
) -> list[StoredRule]:
    """The rules of the artifact in `folder`; an empty list for a float model.

    Args:
        metadata: of the weights file.
        config: content of `config.json`; None skips the comparison with it.
        layout: the layout that the metadata have to state.

    Raises:
        ArtifactError: the metadata are not readable or state another layout, another tool has quantized the model, or
            `config.json` contradicts the metadata.
    """
    rules = _parse(folder, metadata[KEY], layout) if KEY in metadata else []
    try:
        if layout == "compressed-tensors":
            check_quantization(config, rules)
    except ArtifactError as error:
        raise ArtifactError(f"{folder}: {error}") from None
    return rules


def layout_of(metadata: Mapping[str, str]) -> str:
    """The layout of a directory with these metadata: `mlx` for an export of qkit's, else `compressed-tensors`."""
    return "mlx" if KEY in metadata and about(metadata).get("layout") == "mlx" else "compressed-tensors"


def about(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The content of qkit's metadata key; {} where it is not readable, which `read_rules` refuses."""
    try:
        return dict(parse_json(metadata[KEY]))
    except (ValueError, TypeError):
        return {}


def fit_of(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """How the codes of an artifact were chosen, by its metadata; None: by the rule of their grid, or nobody says."""
    found = about(metadata).get("fit") if KEY in metadata else None
    return found if isinstance(found, dict) and isinstance(found.get("method"), str) else None


def fit_text(fit: Mapping[str, Any]) -> str:
    """How codes were chosen, in words: the method and its settings."""
    listed = {key: " ".join(value) if isinstance(value, list) else value for key, value in fit.items()}
    settings = [f"{key} {value}" for key, value in sorted(listed.items()) if key != "method"]
    return f"fitted by {', '.join([str(fit['method']), *settings])}"


def check_quantization(config: Mapping[str, Any] | None, rules: Sequence[StoredRule]) -> None:
    """Compares the `quantization_config`, which other programs read, with the rules in the metadata.

    Raises:
        ArtifactError: the two differ, or the configuration asks for something that qkit does not carry out.
    """
    stated = quantization_of(config)
    foreign = stated["quantization_config"] or stated["quantization"]
    if not rules:
        if foreign:
            method = foreign.get("quant_method", "an unknown tool")
            raise ArtifactError(f"quantized by {method}, not by qkit: it does not say which grid its codes are on")
        return
    if config is None:
        return
    theirs = stated["quantization_config"]
    check_compressed_tensors(theirs)
    groups = [(one.rule, both_names(one.paths, config)) for one in rules]
    ours = compressed_groups.quantization_config(groups, left_alone=[])
    older = compressed_groups.quantization_config(groups, left_alone=[], earlier=True)
    compared = ("quant_method", "format", "config_groups")
    if all(theirs.get(key) == older[key] for key in compared):
        ours = older
    for key in compared:
        if theirs.get(key) != ours[key]:
            raise ArtifactError(
                f"{key} of its quantization_config is not that of the {KEY} metadata: quantize or save it again"
            )
    if stated["quantization"]:
        raise ArtifactError(
            "config.json has MLX's quantization, and the files are in compressed-tensors' layout: fetch the directory again"
        )


def kind_of(layer: Layer) -> Kind:
    """The kind of the rules that apply to `layer`."""
    return "linear" if layer.kind == "other" else layer.kind


def _parse(folder: Path, text: str, layout: str) -> list[StoredRule]:
    try:
        described = parse_json(text)
        if not isinstance(described, dict):
            raise TypeError("want an object")
        if described.get("layout", "compressed-tensors") != layout:
            raise ArtifactError(f"{folder} is an export for {described['layout']}: qkit import makes an artifact of it")
        if described["numerics"] != NUMERICS:
            raise ArtifactError(
                f"{folder} follows numerics {described['numerics']}; this qkit reads {NUMERICS}: "
                "quantize again, or take the qkit that wrote it"
            )
        if unknown := sorted(described.keys() - KEYS):
            raise ArtifactError(
                f"{folder}: the {KEY} metadata have {', '.join(unknown)}, which this qkit does not know: take a newer one"
            )
        rules, seen = list[StoredRule](), set[str]()
        for table in described["rules"]:
            rules.append(_parse_rule(dict(table), most=TENSORS - len(seen)))
            seen.update(rules[-1].paths)
        if len(seen) != sum(len(one.paths) for one in rules):
            raise ValueError("a layer stands twice")
        return rules
    except ArtifactError:
        raise
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise ArtifactError(f"{folder}: the {KEY} metadata is not readable ({error})") from None


def _parse_rule(table: dict[str, Any], *, most: int) -> StoredRule:
    key = "patterns" if "patterns" in table else "layers"  # the first version of qkit listed every path
    paths, dtype = table.pop(key), table.pop("dtype")
    if not isinstance(paths, list) or not paths or not all(isinstance(path, str) for path in paths):
        raise RecipeError(f"{key}: want a list of paths")
    if key == "patterns":
        paths = sorted(expand(paths, most=most))
    if dtype not in DTYPES:
        raise RecipeError(f"unknown dtype {dtype!r}")
    rule = rule_from_table({**table, "match": ["*"]})
    if rule.weight is None:
        raise RecipeError("weight is missing")
    return StoredRule(rule, dtype, tuple(paths))


def _without_match(rule: Rule) -> dict[str, Any]:
    return {name: value for name, value in rule_table(rule).items() if name != "match"}
