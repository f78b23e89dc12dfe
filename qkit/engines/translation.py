"""The protocol of engines whose models have other names than their files; the other protocols are in `protocol`."""

from collections.abc import Mapping
from typing import Any, Protocol

from numpy.typing import NDArray

from qkit.engines.protocol import Modules


class Translates(Modules, Protocol):
    """Models whose files have other names than their modules have, as many of transformers and of mlx-lm do."""

    def translate(
        self, model: Any, stored: Mapping[str, NDArray[Any]], codes: Mapping[str, tuple[int, ...]]
    ) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
        """The tensors of files by the model's own names, in its own shapes and types; and the path of each layer with codes.

        Tensors that the model computes itself are left out, such as rotary frequencies. Tensors that fit no name stay, for
        `fill` to refuse. The result has no path for a layer that the model leaves out, such as one of a vision tower.

        Args:
            stored: the tensors by their names in the files, without those of codes.
            codes: shape of each weight that the files hold as codes, by the path of its layer in the files.

        Raises:
            ArtifactError: the model splits, joins or permutes a weight that the files hold as codes.
        """
        ...
