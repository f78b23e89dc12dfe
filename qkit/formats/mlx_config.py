"""What mlx-lm is told in a config.json, and what it calls things: rotary embeddings, quantised layers, a few other names.

Read off mlx-lm 0.32.2 (`utils.load_model`, `models/*.py`).
"""

from collections.abc import Collection, Mapping
from typing import Any, Final

from numpy.typing import NDArray

from qkit.errors import ArtifactError
from qkit.formats import settings
from qkit.formats.mlx_lm import MODES, Container, layout
from qkit.formats.rope import ropes, spell_rope
from qkit.grid import Grid
from qkit.reference import packing

_LLAMA = frozenset({"rope_theta", "rope_scaling"})
_GEMMA = frozenset({"rope_theta"})

#: What each of mlx-lm's model types reads of a rotary embedding; those whose tensors it takes under transformers' names.
ROPE: Final[Mapping[str, Collection[str]]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": frozenset({"rope_theta", "rope_scaling", "rope_parameters"}),
    "gemma": _GEMMA,
    "gemma2": _GEMMA,
    "gemma3_text": frozenset({"rope_theta", "rope_scaling", "rope_local_base_freq", "sliding_window_pattern"}),
    "gpt_neox": frozenset({"rotary_emb_base", "rotary_pct"}),
    "mixtral": _LLAMA,
    "olmo2": _LLAMA,
    "phi3": frozenset({"rope_theta", "rope_scaling", "partial_rotary_factor"}),
    "qwen3_moe": _LLAMA,
}

SAME_NAMES: Final = ROPE.keys() - {"gpt_neox", "mixtral", "qwen3_moe"}  #: whose tensors mlx-lm does not rename

#: By model type: how a layer's path begins here, and how mlx-lm has it.
RENAMED: Final = {"gpt_neox": ("lm_head.", "embed_out.")}


def model_config(config: Mapping[str, Any], *, tied: bool) -> dict[str, Any]:
    """A Hugging Face model's `config` in the words that mlx-lm reads; the types of models it knows are those of `ROPE`.

    Raises:
        ArtifactError: transformers 5 wrote it, for a type of model that is not one of these.
        BackendError: mlx-lm computes another rotary embedding; see `spell_rope`.
    """
    kind = str(config.get("model_type"))
    known = {name: value for name, value in config.items() if value is not None}
    if kind in ROPE:
        known = spell_rope(known, ROPE[kind])
    elif ropes(known) or "text_config" in known:
        raise ArtifactError(
            f"how mlx-lm reads the rotary embedding of a {kind!r} is not known to this qkit, and it would silently use its "
            f"default: known are {', '.join(ROPE)}"
        )
    for name, source in {"num_experts": "num_local_experts"}.items():
        if kind == "qwen3_moe" and source in known:
            known.setdefault(name, known[source])
    return {**config, **known, "tie_word_embeddings": tied}


def outward(name: str, config: Mapping[str, Any]) -> str:
    """What mlx-lm calls the tensor `name` of a model of qkit's, before its own renaming."""
    ours, theirs = RENAMED.get(str(config.get("model_type")), ("", ""))
    return theirs + name.removeprefix(ours) if ours and name.startswith(ours) else name


def inward(name: str, config: Mapping[str, Any]) -> str:
    """The inverse of `outward`."""
    ours, theirs = RENAMED.get(str(config.get("model_type")), ("", ""))
    return ours + name.removeprefix(theirs) if theirs and name.startswith(theirs) else name


def quantization_config(containers: Mapping[str, Container]) -> dict[str, Any]:
    """The `quantization` of a config.json: the commonest container for all, the others by the path of their layer."""
    kinds = list(containers.values())
    common = max(dict.fromkeys(kinds), key=kinds.count)
    return {**common.table, **{path: mine.table for path, mine in containers.items() if mine != common}}


def containers(quantization: Mapping[str, Any], shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]) -> Any:
    """What the `quantization` of a config.json says of each layer.

    Args:
        shapes: by path, the shapes of `weight` and `scales`.

    Raises:
        ArtifactError: it says nothing, what the shapes contradict, or anything that qkit does not carry out; see `settings`.
    """
    settings.check_mlx(quantization, shapes)
    out: dict[str, tuple[Container, tuple[int, ...]]] = {}
    for path, (weight, scales) in shapes.items():
        table = quantization.get(path, True)
        table = quantization if table is True else table
        try:
            mine = Container(str(table.get("mode", "affine")), int(table["bits"]), int(table["group_size"]))
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


def check_told(
    config: Mapping[str, Any], grids: Mapping[str, Grid | None], tensors: Mapping[str, NDArray[Any]]
) -> None:
    """Compares what mlx-lm is told of qkit's own export with the grids that the metadata name.

    Args:
        grids: by path, as qkit has it.
        tensors: as the files name them.

    Raises:
        ArtifactError: a layer is another container to mlx-lm, or it is told of anything that qkit does not carry out.
    """
    said = settings.quantization_of(config)
    settings.check_alike(said)
    ours = {outward(f"{path}.", config)[:-1]: grid for path, grid in grids.items()}
    shapes = {
        path: (tensors[f"{path}.weight"].shape, tensors[f"{path}.scales"].shape)
        for path in ours
        if f"{path}.weight" in tensors and f"{path}.scales" in tensors
    }
    for path, (container, shape) in containers(said["quantization"], shapes).items():
        grid = ours[path]
        if grid is not None and container != layout(grid, shape[-1]):
            raise ArtifactError(f"{path}: config.json has it as {container.table}, and the metadata on {grid}")
