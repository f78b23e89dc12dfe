"""What a model directory holds, whatever its layout: quantized weights by path, every other tensor by name. All mapped."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qkit.artifact.directory import KEY, described, read_config
from qkit.artifact.tensors import read_folder
from qkit.errors import ArtifactError, GridError
from qkit.interop import compressed_tensors, mlx_lm
from qkit.interop.packed import Packed, Tensors
from qkit.qtensor import DTYPES, DType
from qkit.recipe import Rule

CHUNK = 1 << 24  #: bytes that are looked at together


@dataclass(frozen=True, slots=True)
class Held:
    """A quantized weight in a directory: what it is, and how to get it.

    Attributes:
        rule: its grids; those of a layer's inputs and outputs too.
        dtype, shape: as in `Packed`.
        read: gives it, codes as views of the mapped file; raises `ArtifactError` where the tensors are not sound.
    """

    rule: Rule
    dtype: DType
    shape: tuple[int, ...]
    read: Callable[[], Packed]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The content of a directory.

    Attributes:
        folder: where it is.
        layout: `compressed-tensors`, `mlx`, or `float` where nothing is quantized.
        foreign: whether another tool than qkit quantized it.
        config: `config.json` as transformers has it, without a word on quantization; None where there is none.
        weights: by the path of their layer.
        tensors: the others, by name.
    """

    folder: Path
    layout: str
    foreign: bool
    config: dict[str, Any] | None
    weights: dict[str, Held]
    tensors: Tensors

    @property
    def tied(self) -> bool:
        """Whether the output head is the embedding."""
        names = {*self.weights, *(name.removesuffix(".weight") for name in self.tensors)}
        headless = not any(name.rpartition(".")[2] in ("lm_head", "embed_out", "output") for name in names)
        return bool((self.config or {}).get("tie_word_embeddings", headless))

    def digests(self) -> dict[str, str]:
        """SHA-256 of every tensor's logical content, by its float name; the same in every layout that holds the same.

        Of a quantized weight that is: shape, dtype, element, groups, kind of scale and zero point, canonical words, scales.
        Of any other: shape, dtype, bytes. Not the name of the scale rule, which decoding does not ask for.
        """
        out = {join(path, "weight"): _digest_packed(held.read()) for path, held in self.weights.items()}
        return {**out, **{name: _digest_array(array) for name, array in self.tensors.items()}}

    def digest(self) -> str:
        """SHA-256 over all of `digests`."""
        lines = "".join(f"{name} {digest}\n" for name, digest in sorted(self.digests().items()))
        return hashlib.sha256(lines.encode()).hexdigest()


def read(folder: str | Path) -> Snapshot:
    """The content of `folder`: a model of qkit's, as saved or exported; of compressed-tensors; of mlx-lm; or a float one.

    Raises:
        ArtifactError: it is unsound, quantized in another way, or holds a quantized weight that is on none of qkit's grids.
    """
    folder = Path(folder)
    tensors, metadata = read_folder(folder)
    config = read_config(folder)
    quantization = (config or {}).get("quantization_config") or {}
    if KEY in metadata:
        return _own(folder, tensors, metadata[KEY], config)
    if (config or {}).get("quantization"):
        return _mlx(folder, tensors, dict(config or {}))
    if quantization.get("quant_method") == "compressed-tensors":
        return _compressed(folder, tensors, dict(config or {}))
    if quantization:
        method = quantization.get("quant_method", "an unknown tool")
        raise ArtifactError(f"{folder} is quantized by {method}: qkit reads compressed-tensors' layout and mlx-lm's")
    return Snapshot(folder, "float", False, config, {}, tensors)


def join(path: str, name: str) -> str:
    """The name of a tensor of the layer at `path`, which is empty where the model is one layer."""
    return f"{path}.{name}" if path else name


def _own(folder: Path, tensors: Tensors, text: str, config: dict[str, Any] | None) -> Snapshot:
    """What qkit wrote says in its metadata what it is."""
    description = described(folder, text)
    module: Any = mlx_lm if description.layout == "mlx" else compressed_tensors
    weights = {}
    for entry in description.entries:
        for path in entry.paths:
            grid = entry.rule.weight
            assert grid is not None
            mine = _take(tensors, path)
            shape = module.shape_of(mine, grid) if description.layout == "mlx" else module.shape_of(mine)
            weights[path] = Held(entry.rule, entry.dtype, shape, _reader(folder, path, module, mine, entry.rule, entry.dtype, shape))
    return Snapshot(folder, description.layout if weights else "float", False, config, weights, tensors)
