"""The `quantization_config` that qkit writes for compressed-tensors: its groups, their targets and arguments."""

from collections.abc import Iterable, Sequence
from typing import Any

from qkit.formats.compressed_tensors import form_of, layout
from qkit.formats.targets import ignored, targets_of
from qkit.grid import Grid
from qkit.rules import Rule


def quantization_config(
    rules: Sequence[tuple[Rule, Sequence[str]]], *, left_alone: Iterable[str], earlier: bool = False
) -> dict[str, Any]:
    """The `quantization_config` of a config.json, with one group for each rule.

    Args:
        rules: rules of the converted layers, each with the full paths of its layers.
        left_alone: paths of the layers that stay float.
        earlier: as earlier versions of qkit wrote it: integers packed under any rule, and embeddings by their paths.
    """
    joined = _joined(rules)
    kinds = [rule.kind for rule, _ in joined]
    groups = {
        f"group_{i}": {
            "targets": targets_of(rule.kind, paths, beside=kinds, earlier=earlier),
            "weights": _arguments(rule.weight),
            "input_activations": _activation_arguments(rule.activation, rule),
            "output_activations": _activation_arguments(rule.output, rule),
            "format": layout(rule.weight) if earlier else form_of(rule),
        }
        for i, (rule, paths) in enumerate(joined)
        if rule.weight
    }
    forms = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": forms.pop() if len(forms) == 1 else "mixed-precision",
        "config_groups": groups,
        "ignore": ignored(left_alone, but=[path for _, paths in rules for path in paths]),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _joined(rules: Sequence[tuple[Rule, Sequence[str]]]) -> list[tuple[Rule, list[str]]]:
    """`rules` without those for experts on the grids of a rule for linear layers, which takes their paths."""
    out = [(rule, list(paths)) for rule, paths in rules if rule.kind != "experts"]
    for rule, paths in rules:
        if rule.kind == "experts":
            alike = (mine for one, mine in out if one.kind == "linear" and _grids(one) == _grids(rule))
            if (mine := next(alike, None)) is not None:
                mine.extend(paths)
            else:
                out.append((rule, list(paths)))
    return out


def _grids(rule: Rule) -> tuple[Any, ...]:
    return rule.weight, rule.activation, rule.output, rule.range


def _arguments(grid: Grid) -> dict[str, Any]:
    strategy = {"row": "channel", "tensor": "tensor"}.get(str(grid.group), "group")
    scale_dtype = {"mxfp4-pack-quantized": "torch.uint8", "mxfp8-quantized": "torch.uint8"}.get(layout(grid))
    if grid.scale == "nvfp4":
        strategy, scale_dtype = "tensor_group", "torch.float8_e4m3fn"
    return {
        "num_bits": grid.element.bits,
        "type": "int" if grid.element.kind == "integer" else "float",
        "symmetric": grid.symmetric,
        "strategy": strategy,
        "group_size": grid.group if isinstance(grid.group, int) else None,
        "dynamic": False,
        **({"scale_dtype": scale_dtype} if scale_dtype else {}),
    }


def _activation_arguments(grid: Grid | None, rule: Rule) -> dict[str, Any] | None:
    if grid is None:
        return None
    if rule.range != "dynamic":
        return _arguments(grid)
    arguments = {**_arguments(grid), "dynamic": "local" if grid.scale == "nvfp4" else True}
    return {**arguments, "strategy": "token"} if grid.group == "row" else arguments
