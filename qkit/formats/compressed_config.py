"""The `quantization_config` that another tool wrote for compressed-tensors: the grid of each weight."""

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final

from qkit.errors import ArtifactError, GridError
from qkit.formats import settings
from qkit.formats.compressed_tensors import FORMATS, layout
from qkit.formats.read_layout import BYTES, PACKED
from qkit.formats.targets import CLASSES, Targets, patterns_limit, readable
from qkit.grid import Grid
from qkit.rules import Kind

#: Read off `QuantizationArgs` of compressed-tensors 0.20.
DEFAULTS: Final = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": None, "group_size": None}


def grids(
    config: Mapping[str, Any], tensors: Collection[str], *, kind_of: Callable[[str], Kind]
) -> dict[str, tuple[Grid | None, bool]]:
    """The grid of every quantized weight by path, and whether the layer's inputs or outputs are quantized too.

    The grid is None where qkit has none that lies in the files so: blocks of rows, groups in the order of activations, and zero
    points beside codes of a byte each.

    Scale rules are those of compressed-tensors: `midmax` for symmetric integers, `minmax` for the others, `even` for MXFP4,
    `rceil` for MXFP8; see "Scale rules" in numerics.md. Decoding does not depend on them.

    Args:
        config: the `quantization_config`.
        tensors: names of all tensors of the model.
        kind_of: returns the kind of the layer at a path, for groups that name a class.

    Raises:
        ArtifactError: the configuration is not readable, needs a grid that qkit does not have, or has a setting that qkit does
            not carry out; see `settings`.
    """
    settings.check_compressed_tensors(config)
    out, used, targets = {}, set(), Targets.of(config)
    for path in sorted(name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")):
        try:
            with readable(), patterns_limit():
                settings.check_ignored(path, config.get("ignore"))
            name = targets.group_of(path, kind=CLASSES[kind_of(path)])
            used.add(name)
            with readable():
                group = config["config_groups"][name]
                form = form_of(config.get("format"), group.get("format"))
                weights = arguments(group["weights"])
                apart = weights["strategy"] == "block" or f"{path}.weight_g_idx" in tensors
                grid = None if apart else _grid(weights, form)
        except (ArtifactError, GridError) as error:
            raise ArtifactError(f"{path}: {error}") from None
        out[path] = grid, any(group.get(part) is not None for part in ("input_activations", "output_activations"))
    if not out:
        raise ArtifactError("the quantization_config has groups of quantized layers, and no layer has a weight_scale")
    settings.check_unused(config["config_groups"], used)
    return out


def arguments(weights: Mapping[str, Any]) -> dict[str, Any]:
    """The `weights` of a group with compressed-tensors' own defaults for those that are left out."""
    found = {**DEFAULTS, **weights}
    if found["strategy"] is None:
        size = found["group_size"]
        found["strategy"] = "tensor" if size is None else "channel" if size == -1 else "group"
    if isinstance(blocks := found.get("block_structure"), str) and re.fullmatch(r"\d{1,9}x\d{1,9}", blocks):
        found["block_structure"] = [int(size) for size in blocks.split("x")]
    return found


def form_of(whole: Any, group: Any) -> str:
    """The format of a group: the group's own, or that of the whole configuration.

    Raises:
        ArtifactError: qkit does not read the format, or the two differ.
    """
    form = str(group or whole)
    if form not in FORMATS:
        raise ArtifactError(f"qkit does not read {form!r}: it reads {', '.join(FORMATS)}")
    if whole not in (None, form, "mixed-precision"):
        raise ArtifactError(f"its format is {form!r} in its group, and {whole!r} in the quantization_config")
    return form


def _grid(weights: Mapping[str, Any], form: str) -> Grid | None:
    bits, kind, strategy, size, symmetric = (
        weights[key] for key in ("num_bits", "type", "strategy", "group_size", "symmetric")
    )
    sizes = {"channel": "row", "tensor": "tensor", "group": size, "tensor_group": size}
    element = {"int": f"int{bits}", "float": {4: "e2m1", 8: "e4m3"}.get(bits)}.get(kind)
    if strategy not in sizes or element is None or type(symmetric) is not bool or not (symmetric or kind == "int"):
        raise ArtifactError(f"qkit has no grid for {bits} bits of {kind} by {strategy}, symmetric {symmetric}")
    if size not in (None, -1, sizes[strategy]):
        raise ArtifactError(f"its group_size is {size}, and its strategy is {strategy!r}, which has none")
    if form == BYTES and not symmetric:
        return None
    rules = {"nvfp4-pack-quantized": "nvfp4", "mxfp4-pack-quantized": "even"}
    integers = "midmax" if symmetric else "minmax"
    grid = Grid(element, sizes[strategy], integers if kind == "int" else rules.get(form, "rceil"))
    if layout(grid) != (PACKED if form == BYTES and symmetric else form):
        raise ArtifactError(f"its format is {form!r}, and {grid} is stored as {layout(grid)!r}")
    return grid
