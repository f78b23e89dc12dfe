"""mlx-lm's config.json and names of tensors, by `mlx_families`. Read off mlx-lm 0.32.2 (`utils.load_model`, `models/*.py`)."""

import re
from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from qkit.errors import ArtifactError
from qkit.experts import PROJECTIONS, expert_of
from qkit.formats import settings
from qkit.formats.mlx_families import FAMILIES, Family, read_config
from qkit.formats.mlx_limits import BOTH, limits_of
from qkit.formats.mlx_lm import AFFINE, MODES, Container, layout
from qkit.grid import Grid
from qkit.reference import packing


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a model in mlx-lm.

    Raises:
        ArtifactError: its type is not in `FAMILIES`.
    """
    kind = str(config.get("model_type"))
    if kind not in FAMILIES:
        raise ArtifactError(
            f"how mlx-lm reads a {kind!r}, its rotary embedding and the names of its tensors, is not known to this qkit, and it "
            f"could silently compute another model: {len(FAMILIES)} other types are, such as {', '.join(list(FAMILIES)[:4])}"
        )
    return FAMILIES[kind]


def model_config(config: Mapping[str, Any], *, tied: bool) -> dict[str, Any]:
    """A Hugging Face model's `config` with the keys that mlx-lm reads.

    Raises:
        ArtifactError: its type is not in `FAMILIES`, or mlx-lm reads a key that it does not have.
        BackendError: mlx-lm computes another rotary embedding; see `spell_rope`.
    """
    family, known = family_of(config), {**config, "tie_word_embeddings": tied}
    for readers, text in limits_of(config):
        if readers == BOTH:
            raise ArtifactError(f"mlx-lm cannot compute this model: {text}: export --to dense")
    return {**known, **read_config(known, family=family)}


def to_mlx_name(name: str, config: Mapping[str, Any]) -> str:
    """mlx-lm's name of the tensor `name` of a file. Those of single experts are those of their stacks, see `place_of`."""
    family = FAMILIES.get(str(config.get("model_type")), Family())
    for pattern, text, _, _ in family.names:
        name = re.sub(pattern, text, name)
    return name


def from_mlx_name(name: str, config: Mapping[str, Any]) -> str:
    """The inverse of `to_mlx_name`."""
    family = FAMILIES.get(str(config.get("model_type")), Family())
    for _, _, pattern, text in family.names:
        name = re.sub(pattern, text, name)
    return name


def place_of(path: str, config: Mapping[str, Any]) -> tuple[str, int | None]:
    """The path in mlx-lm of the layer at `path` in files; for one of many experts that of their stack, and its number."""
    if (found := expert_of(path)) is None:
        return to_mlx_name(f"{path}.", config)[:-1], None
    block, number, projection = found
    return stack_path(block, projection, config), number


def stack_path(block: str, projection: str, config: Mapping[str, Any]) -> str:
    """The path in mlx-lm of a projection of all experts of the block at `block` in files."""
    family = FAMILIES.get(str(config.get("model_type")), Family())
    place = to_mlx_name(f"{block.removesuffix('experts')}{family.stack}.", config)[:-1]
    return f"{place}.{dict(family.projections).get(projection, projection)}"


def block_of(place: str, config: Mapping[str, Any]) -> tuple[str, str]:
    """The inverse of `stack_path`: the block in files, and the projection.

    Raises:
        ArtifactError: there is no such stack.
    """
    family = FAMILIES.get(str(config.get("model_type")), Family())
    path, _, name = from_mlx_name(f"{place}.", config)[:-1].rpartition(".")
    before, _, last = path.rpartition(".")
    projection = {theirs: ours for ours, theirs in family.projections}.get(name, name)
    if last != family.stack or projection not in PROJECTIONS:
        raise ArtifactError("three axes, and no stack of experts")
    return f"{before}.experts" if before else "experts", projection


def quantization_config(containers: Mapping[str, Container]) -> dict[str, Any]:
    """The `quantization` of a config.json: the most common container for all layers, the others by their path."""
    kinds = list(containers.values())
    common = max(dict.fromkeys(kinds), key=kinds.count)
    return {**common.table, **{path: mine.table for path, mine in containers.items() if mine != common}}


def containers(quantization: Mapping[str, Any], shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]) -> Any:
    """Container and shape of each quantized weight, by path, from the `quantization` of a config.json.

    Args:
        shapes: by path, the shapes of `weight` and `scales`.

    Raises:
        ArtifactError: a layer's settings are missing, contradict the shapes, or need something that qkit does not carry out;
            see `settings`.
    """
    settings.check_mlx(quantization, shapes)
    out: dict[str, tuple[Container, tuple[int, ...]]] = {}
    for path, (weight, scales) in shapes.items():
        table = quantization.get(path, True)
        table = quantization if table is True else table
        try:
            mine = _container(table)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise ArtifactError(
                f"{path}: the quantization in config.json is {table!r}: want bits and group_size"
            ) from None
        inputs = scales[-1] * mine.group
        if mine.mode != "affine" and MODES.get(mine.mode, ("", 0))[1] != mine.group:
            raise ArtifactError(f"{path}: MLX has no mode {mine.mode!r} in groups of {mine.group}")
        if weight != (*scales[:-1], packing.words(inputs, mine.bits)):
            raise ArtifactError(f"{path}: {list(weight)} words and {list(scales)} scales are not those of {mine.table}")
        out[path] = mine, (*weight[:-1], inputs)
    return out


def _container(table: Mapping[str, Any]) -> Container:
    """The container of one table. Null, or a missing number, is the default of the mode, as `mx.quantize` has it."""
    mode = str(table.get("mode") or "affine")
    bits, size = ({"mxfp8": 8}.get(mode, 4), MODES[mode][1]) if mode in MODES else AFFINE
    bits = bits if table["bits"] is None else int(table["bits"])
    return Container(mode, bits, size if table["group_size"] is None else int(table["group_size"]))


def check_export(
    config: Mapping[str, Any], grids: Mapping[str, Grid | None], tensors: Mapping[str, NDArray[Any]]
) -> None:
    """Compares the `quantization` of an export of qkit's, which mlx-lm reads, with the grids in the metadata.

    Args:
        grids: by path in qkit's names.
        tensors: by their names in the files.

    Raises:
        ArtifactError: a layer has another container for mlx-lm, or a setting that qkit does not carry out.
    """
    stated = settings.quantization_of(config)
    settings.check_alike(stated)
    ours = {place_of(path, config)[0]: grid for path, grid in grids.items()}
    shapes = {
        path: (tensors[f"{path}.weight"].shape, tensors[f"{path}.scales"].shape)
        for path in ours
        if f"{path}.weight" in tensors and f"{path}.scales" in tensors
    }
    for path, (container, shape) in containers(stated["quantization"], shapes).items():
        grid = ours[path]
        if grid is not None and container != layout(grid, shape[-1]):
            raise ArtifactError(f"{path}: config.json has it as {container.table}, and the metadata on {grid}")
