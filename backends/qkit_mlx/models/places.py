"""The layers of a model of mlx-lm for the paths in files, by the model's own `sanitize`."""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from qkit.errors import ArtifactError
from qkit.formats.mlx_config import to_mlx_name
from qkit_mlx.models.names import config_of, outward


def places(
    model: Any, shapes: Mapping[str, tuple[int, ...]], codes: Mapping[str, tuple[int, ...]], *, known: set[str]
) -> dict[str, str]:
    """The path in the model of each layer with codes. One that the model leaves out, as of a vision tower, is not there.

    Args:
        shapes: shapes of the other tensors in the files, by name.
        codes: shapes of the weights, by path in the files.
        known: paths of the model's layers.

    Raises:
        ArtifactError: the model splits, joins or permutes one of these weights.
    """
    if codes.keys() <= known or not hasattr(model, "sanitize"):
        return {path: path for path in codes}
    config = config_of(model)
    named = {path: to_mlx_name(_weight(path), config) for path in codes}
    weights = {named[path]: mx.zeros(shape) for path, shape in codes.items()}  # nothing evaluates these zeros
    given = {to_mlx_name(name, config): mx.zeros(shape) for name, shape in shapes.items()} | weights
    try:
        found = _sanitized(model, given)
        names = {id(array): name for name, array in found.items()}
        paths = {path: names[id(weights[one])] for path, one in named.items() if id(weights[one]) in names}
        left = [path for path in codes if path not in paths]
        without = {name: array for name, array in given.items() if name not in {named[path] for path in left}}
        dropped = not left or _sanitized(model, without).keys() == found.keys()
    except Exception:  # a model that finds fewer tensors than it expects raises any error: `fill` will say which
        return {path: path for path in codes}
    if not dropped:
        raise ArtifactError(
            f"{left[0]}: mlx-lm splits, joins or permutes this weight as it loads it, and codes stay as they are: leave the "
            "layer in float"
        )
    return {path: outward(name.removesuffix("weight").rstrip("."), model) for path, name in paths.items()}


def _sanitized(model: Any, arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """`arrays` under the names of `model`, which keeps its modules: some models drop their output head where files have none."""
    before = [(module, dict(module)) for module in model.modules()]
    try:
        return dict(model.sanitize(dict(arrays)))
    finally:
        for module, children in before:
            dict.update(module, children)  # Module's own `update` takes parameters alone


def _weight(path: str) -> str:
    return f"{path}.weight" if path else "weight"
