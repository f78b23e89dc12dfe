"""Tensors of files under the names of a transformers model, by transformers' own table of conversions."""

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from typing import Any

import ml_dtypes  # noqa: F401  teaches NumPy the name bfloat16
import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from qkit.errors import ArtifactError

#: Buffers that old files hold under every layer, and that transformers leaves out wherever a model has one of that name.
COMPUTED = ("inv_freq", "position_ids")


Arrays = dict[str, NDArray[Any]]


def translate(
    model: nn.Module,
    stored: Mapping[str, NDArray[Any]],
    codes: Iterable[str],
    *,
    to_tensor: Callable[[NDArray[Any]], Tensor],
    to_array: Callable[[Tensor], NDArray[Any]],
) -> tuple[Arrays, dict[str, str]]:
    """See `Translates.translate`; other models than those of transformers have the names of their files."""
    if not _is_of_transformers(model):
        return dict(stored), {path: path for path in codes}
    names = _Names(model)
    paths = {path: names.layer(path) for path in codes}
    found, joined = names.sort(stored)
    for name, converter, sources in joined:
        for source, pattern in sources:
            converter.add_tensor(name, source, pattern, to_tensor(stored[source]))
        made = converter.convert(name, model=model, config=names.model.config)
        found.update((key, to_array(one[0] if isinstance(one, list) else one)) for key, one in made.items())
    for name, tensor in names.own.items():
        if name not in found and names.may_miss(name):
            found[name] = to_array(tensor)
    return {name: _cast(array, names.own.get(name)) for name, array in found.items()}, paths


class _Names:
    """The names of one model, and the transforms from those of files."""

    def __init__(self, model: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter

        self.model = model
        self.own: dict[str, Tensor] = model.state_dict()
        transforms = get_model_conversion_mapping(model)
        self.converters = [one for one in transforms if isinstance(one, WeightConverter)]
        self.renamings: Any = [one for one in transforms if not isinstance(one, WeightConverter)]
        self.computed = {name for name, _ in model.named_buffers()} - self.own.keys()

    def layer(self, path: str) -> str:
        """Path in the model of the layer with codes at `path` in the files.

        Raises:
            ArtifactError: the model has its weight in another shape or order.
        """
        name, pattern = self._rename(f"{path}.weight" if path else "weight")
        if pattern is not None:
            raise ArtifactError(
                f"{path}: transformers splits, joins or permutes this weight as it loads it, and codes stay as they are: leave "
                "the layer in float"
            )
        return name.rpartition(".")[0]

    def sort(self, stored: Mapping[str, NDArray[Any]]) -> tuple[Arrays, list[tuple[str, Any, list[tuple[str, str]]]]]:
        """The tensors that only change their names; and of each other group the first name, the converter and the sources."""
        from transformers.core_model_loading import dot_natural_key

        found: Arrays = {}
        groups: dict[str, tuple[Any, list[tuple[str, str]]]] = {}
        for name in sorted(stored, key=dot_natural_key):
            mine, pattern = self._rename(name)
            if pattern is not None:
                converter = next(one for one in self.converters if pattern in one.source_patterns)
                groups.setdefault(mine, (deepcopy(converter), []))[1].append((name, pattern))
            elif mine in self.own or not self._is_dropped(mine):
                found[mine] = stored[name]
        return found, [(name, converter, sources) for name, (converter, sources) in groups.items()]

    def may_miss(self, name: str) -> bool:
        """Whether a file need not have the tensor."""
        return _matches(name, self.model._keys_to_ignore_on_load_missing)  # noqa: SLF001  no public name

    def _rename(self, name: str) -> tuple[str, str | None]:
        from transformers.core_model_loading import rename_source_key

        prefix = self.model.base_model_prefix
        mine, pattern = rename_source_key(name, self.renamings, self.converters, prefix, self.own)
        return (name, None) if mine not in self.own and name in self.own else (mine, pattern)

    def _is_dropped(self, name: str) -> bool:
        """Whether transformers leaves a tensor out that has no place in the model."""
        last = name.rpartition(".")[2]
        common = last in COMPUTED and any(one.endswith(last) for one in self.computed)
        ignored = self.model._keys_to_ignore_on_load_unexpected  # noqa: SLF001  no public name
        return name in self.computed or common or _matches(name, ignored)


def _is_of_transformers(model: nn.Module) -> bool:
    transformers = sys.modules.get("transformers")  # a model of its own has it loaded
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)


def _matches(name: str, patterns: Iterable[str] | None) -> bool:
    return any(re.search(pattern, name) for pattern in patterns or ())


def _cast(array: NDArray[Any], own: Tensor | None) -> NDArray[Any]:
    """`array` in the type of the model's own where that is shorter, as transformers casts it."""
    if own is None or not own.is_floating_point() or array.dtype.name != "float32" or own.itemsize >= 4:
        return array
    return array.astype(np.dtype(str(own.dtype).rpartition(".")[2]))
