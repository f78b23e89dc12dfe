"""MLX's files: every quantized weight of a model. Read off mlx-lm 0.32 (`utils.py`)."""

from collections.abc import Mapping
from typing import Any

from qkit.errors import ArtifactError
from qkit.formats import mlx_config
from qkit.formats.mlx_families import FAMILIES
from qkit.formats.mlx_lm import Container
from qkit.formats.mlx_types import SAME_NAMES
from qkit.formats.packed import join
from qkit.qtensor import DType
from qkit.sources.encoded import Encoded
from qkit.sources.mlx_form import PARTS, Mlx
from qkit.sources.mlx_heads import is_stack, join_heads
from qkit.sources.mlx_stacks import Held, unstack
from qkit.sources.parts import Tensors, encoded, take, want_type
from qkit.storage.read import Stored


def mlx(
    tensors: Tensors, settings: Mapping[str, Any], dtype: DType | None, *, config: Mapping[str, Any]
) -> dict[str, Encoded]:
    """The weights in MLX's layout, by name. Removes their parts from `tensors`.

    Raises:
        ArtifactError: experts are stacked in other files too, or see `weights_of` and `whole_heads`.
    """
    held = weights_of(tensors, settings, config)
    found = whole_heads(tensors, held, config, dtype)
    unstack(tensors, held, config)
    for path, (container, shape) in held.items():
        if len(shape) != 2:
            raise ArtifactError(
                f"{path} stacks experts: qkit import DIR OUT makes an artifact of it, with the same codes"
            )
        parts = take(tensors, path, PARTS)
        form = _form(container)
        scale = form.check(parts)
        name = join(path, "weight")
        found[name] = encoded(name, shape, dtype=want_type(scale, dtype), form=form, parts=parts, codes="weight")
    return found


def weights_of(tensors: Mapping[str, Stored], settings: Mapping[str, Any], config: Mapping[str, Any]) -> Held:
    """Container and shape of each quantized weight in MLX's layout, by path.

    Raises:
        ArtifactError: mlx-lm renames the tensors of such a model, or see `mlx_config.containers`.
    """
    kind = config.get("model_type")
    if kind not in SAME_NAMES:
        known = ", ".join(sorted(SAME_NAMES))
        raise ArtifactError(
            f"how mlx-lm renames the tensors of a {kind!r} is not known to this qkit: known are {known}"
        )
    shapes = {
        path: (tensors[f"{path}.weight"].slot.shape, tensors[f"{path}.scales"].slot.shape)
        for path in sorted(name.removesuffix(".scales") for name in tensors if name.endswith(".scales"))
        if f"{path}.weight" in tensors
    }
    found: Held = mlx_config.containers(settings, shapes)
    return found


def whole_heads(tensors: Tensors, held: Held, config: Mapping[str, Any], dtype: DType | None) -> dict[str, Encoded]:
    """The layers that mlx-lm splits by heads, as float tensors by name: see `join_heads`. Removes them from both arguments."""
    if not FAMILIES[str(config["model_type"])].latent:
        return {}
    stacks = {path: (_form(container), shape) for path, (container, shape) in held.items() if is_stack(path)}
    for path in stacks:
        del held[path]
    return join_heads(tensors, stacks, dtype)


def _form(container: Container) -> Mlx:
    return Mlx(container.mode, container.bits, container.group)
