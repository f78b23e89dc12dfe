"""Which rules an artifact's codes are on: the text of its one metadata key, written and read."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qkit.engines.layer import Layer
from qkit.errors import ArtifactError, RecipeError
from qkit.formats import compressed_tensors
from qkit.formats.settings import check_compressed_tensors, quantization_of
from qkit.intake import parse_json
from qkit.qtensor import DTYPES, DType
from qkit.rules import Kind, Rule, rule_from_table, rule_table

KEY = "qkit"  #: the one metadata key of the weights file
NUMERICS = 1  #: version of the arithmetic that the codes follow
KEYS = {"numerics", "rules", "layout", "added"}  #: of the text; the last two where it is an export


@dataclass(frozen=True, slots=True)
class Entry:
    """One rule of an artifact, the type of the weights it was applied to, and the full paths of their layers."""

    rule: Rule
    dtype: DType
    paths: tuple[str, ...]


def group(saved: list[tuple[Layer, DType]]) -> list[Entry]:
    """The rules that were applied, each once per type of weight, with the layers that they were applied to."""
    paths: dict[tuple[Rule, DType], list[str]] = {}
    for layer, dtype in saved:
        assert layer.rule is not None
        rule = replace(layer.rule, match=("*",), kind=kind_of(layer), indivisible="error")
        paths.setdefault((rule, dtype), []).append(layer.path)
    return [
        Entry(rule, dtype, tuple(sorted(mine)))
        for (rule, dtype), mine in sorted(paths.items(), key=lambda item: min(item[1]))
    ]


def describe(entries: list[Entry]) -> str:
    """The text of the metadata key."""
    rules = [{**_without_match(entry.rule), "layers": list(entry.paths), "dtype": entry.dtype} for entry in entries]
    return json.dumps({"numerics": NUMERICS, "rules": rules}, sort_keys=True)


def entries_of(
    folder: Path, metadata: Mapping[str, str], config: Mapping[str, Any] | None, *, layout: str = "compressed-tensors"
) -> list[Entry]:
    """The rules of the artifact in `folder`; none for a float model.

    Raises:
        ArtifactError: the metadata are not readable or speak of another layout, another tool has quantized the model, or
            `config.json` says of quantization what the metadata do not.
    """
    entries = _described(folder, metadata[KEY], layout) if KEY in metadata else []
    try:
        if layout == "compressed-tensors":
            check_quantization(config, entries)
    except ArtifactError as error:
        raise ArtifactError(f"{folder}: {error}") from None
    return entries


def check_quantization(config: Mapping[str, Any] | None, entries: list[Entry]) -> None:
    """Compares what other readers of an artifact are told in its config.json with what the metadata say.

    Raises:
        ArtifactError: they differ, or the configuration asks for what qkit does not carry out.
    """
    said = quantization_of(config)
    foreign = said["quantization_config"] or said["quantization"]
    if not entries:
        if foreign:
            method = foreign.get("quant_method", "an unknown tool")
            raise ArtifactError(f"quantized by {method}, not by qkit: it does not say which grid its codes are on")
        return
    if config is None:
        return
    told = said["quantization_config"]
    check_compressed_tensors(told)
    ours = compressed_tensors.quantization_config([(entry.rule, entry.paths) for entry in entries], left_alone=[])
    for key in ("quant_method", "format", "config_groups"):
        if told.get(key) != ours[key]:
            raise ArtifactError(
                f"{key} of its quantization_config is not that of the {KEY} metadata: quantize or save it again"
            )
    if said["quantization"]:
        raise ArtifactError("config.json speaks of MLX's quantization, and the files are in compressed-tensors' layout")


def _described(folder: Path, text: str, layout: str) -> list[Entry]:
    try:
        described = parse_json(text)
        if not isinstance(described, dict):
            raise TypeError("want an object")
        if described.get("layout", "compressed-tensors") != layout:
            raise ArtifactError(f"{folder} is an export for {described['layout']}: qkit import makes an artifact of it")
        if described["numerics"] != NUMERICS:
            raise ArtifactError(f"{folder} follows numerics {described['numerics']}; this qkit reads {NUMERICS}")
        if unknown := sorted(described.keys() - KEYS):
            raise ArtifactError(
                f"{folder}: the {KEY} metadata have {', '.join(unknown)}, which this qkit does not know"
            )
        entries = [_entry(dict(table)) for table in described["rules"]]
        paths = [path for entry in entries for path in entry.paths]
        if len(paths) != len(set(paths)):
            raise ValueError("a layer stands twice")
        return entries
    except ArtifactError:
        raise
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise ArtifactError(f"{folder}: the {KEY} metadata is not readable ({error})") from None


def _entry(table: dict[str, Any]) -> Entry:
    paths, dtype = table.pop("layers"), table.pop("dtype")
    if not isinstance(paths, list) or not paths or not all(isinstance(path, str) for path in paths):
        raise RecipeError("layers: want a list of paths")
    if dtype not in DTYPES:
        raise RecipeError(f"unknown dtype {dtype!r}")
    rule = rule_from_table({**table, "match": ["*"]})
    if rule.weight is None:
        raise RecipeError("weight is missing")
    return Entry(rule, dtype, tuple(paths))


def kind_of(layer: Layer) -> Kind:
    """The kind of the rules that speak of `layer`."""
    return "embedding" if layer.kind == "embedding" else "linear"


def _without_match(rule: Rule) -> dict[str, Any]:
    return {name: value for name, value in rule_table(rule).items() if name != "match"}
