"""A model directory that any program wrote, as float tensors: stored ones, and those that its codes decode to."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from qkit.errors import ArtifactError
from qkit.formats.settings import shown
from qkit.qtensor import DType
from qkit.sources.autoround import auto_round
from qkit.sources.bitsandbytes import bitsandbytes
from qkit.sources.compressed import compressed
from qkit.sources.detect import FLOAT, Detected, detect
from qkit.sources.encoded import Encoded
from qkit.sources.fp8 import fp8, mxfp4
from qkit.sources.gptq import awq, gptq
from qkit.sources.marks import Types, parts_of
from qkit.sources.mlx import mlx
from qkit.sources.mlx_names import renamed
from qkit.sources.modelopt import modelopt
from qkit.sources.parts import MOVING, Tensors, float_type, kind_of
from qkit.sources.quark import quark
from qkit.sources.torchao import torchao
from qkit.storage.read import Stored

#: By method, the readers of whole directories that need settings and the type of the model only.
READERS: Final[Mapping[str, Callable[[Tensors, Mapping[str, Any], DType | None], dict[str, Encoded]]]] = {
    "gptq": gptq,
    "awq": awq,
    "fp8": fp8,
    "mxfp4": mxfp4,
    "modelopt": modelopt,
    "auto-round": auto_round,
    "quark": quark,
    "bitsandbytes": bitsandbytes,
    "torchao": torchao,
}


@dataclass(frozen=True, slots=True)
class Source:
    """A model directory.

    Attributes:
        folder: the directory.
        detected: how it is quantized.
        tensors: all tensors of the float model, by name, in transformers' names; `Encoded` those that are stored as codes.
        dropped: names of scales that belong to inputs, outputs or caches, which the weights do not need.
        files: contents of files that belong beside the weights and do not lie in the directory, by name.
        said: sentences for whoever reads the model, besides those that `notes` finds.
    """

    folder: Path
    detected: Detected
    tensors: Mapping[str, Stored]
    dropped: tuple[str, ...]
    files: Mapping[str, bytes] = field(default_factory=dict)
    said: tuple[str, ...] = ()

    @property
    def encoded(self) -> dict[str, Encoded]:
        """The tensors that are stored as codes."""
        return {name: stored for name, stored in self.tensors.items() if isinstance(stored, Encoded)}

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences for whoever decodes the weights of a quantized model: which, and about scales that are left out."""
        forms = Counter(stored.form.name for stored in self.encoded.values())
        found = [f"{count:,} weights are decoded: {name}" for name, count in forms.items()]
        if caches := quantized_caches(self.detected.settings):
            found.append(
                f"caches are quantized too by its settings ({caches}), which is left out: the weights are the same"
            )
        if self.dropped:
            found.append(
                f"{len(self.dropped):,} scales of inputs, outputs or caches are left out, such as {self.dropped[0]}: the weights "
                "are the same, and other logits"
            )
        return (*found, *self.said)


def open_source(
    folder: Path, stored: Mapping[str, Stored], config: Mapping[str, Any] | None, *, kind_of_path: Any
) -> Source:
    """The model in `folder`, whose files hold the tensors `stored`. Reads headers, and small tensors of indices.

    Args:
        config: content of its `config.json`.
        kind_of_path: returns the kind of the layer at a path in files.

    Raises:
        ArtifactError: see `detect`; or a part of a quantized weight is missing, or is not that of a layout that qkit reads.
    """
    try:
        detected = detect(folder, config, stored_types(stored))
        if detected.method == FLOAT:
            return Source(folder, detected, stored, ())
        return _decoded(folder, detected, dict(stored), kind_of_path)
    except ArtifactError as error:
        raise ArtifactError(f"{folder}: {error}") from None


def quantized_caches(settings: Mapping[str, Any]) -> str:
    """The key and the value with which settings quantize the caches of attention; empty where there is none."""
    inner = settings.get("quantization")
    for table in (settings, inner if isinstance(inner, Mapping) else {}):
        for key in ("kv_cache_scheme", "kv_cache_quant_algo"):
            if table.get(key) is not None:
                return f"{key} is {shown(table[key])}"
    return ""


def stored_types(stored: Mapping[str, Stored]) -> Types:
    """Types and shapes of stored tensors, by name."""
    return {name: (kind_of(one), one.slot.shape) for name, one in stored.items()}


def _decoded(folder: Path, detected: Detected, tensors: dict[str, Stored], kind_of_path: Any) -> Source:
    if detected.method == "mlx":
        tensors, settings, config = renamed(tensors, detected.settings, detected.config or {})
        detected = replace(detected, settings=settings, config=config)
    settings, dtype = detected.settings, float_type(detected.config, tensors)
    if detected.method == "compressed-tensors":
        found = compressed(tensors, settings, dtype, kind_of_path=kind_of_path)
    elif detected.method == "mlx":
        found = mlx(tensors, settings, dtype, config=detected.config or {})
    else:
        found = READERS[detected.method](tensors, settings, dtype)
    dropped = tuple(sorted(name for name in tensors if name.rpartition(".")[2] in MOVING))
    for name in dropped:
        del tensors[name]
    if rest := sorted(parts_of(stored_types(tensors))):
        raise ArtifactError(
            f"{rest[0]} is part of a quantized weight too, and {detected.place} does not say of which kind: fetch the directory "
            "again"
        )
    if twice := sorted(found.keys() & tensors.keys()):
        raise ArtifactError(f"{twice[0]} is there as floats and as codes: remove one of them")
    detected = replace(detected, config=_with_type(detected.config, dtype))
    return Source(folder, detected, {**tensors, **found}, dropped)


def _with_type(config: dict[str, Any] | None, dtype: DType | None) -> dict[str, Any] | None:
    """`config`, which says `dtype`: some programs leave the type of the float model there, and write another one."""
    if config is None or dtype is None:
        return config
    old = {key: value for key in ("dtype", "torch_dtype") if (value := config.get(key)) not in (None, dtype)}
    return {**config, **dict.fromkeys(old, dtype)}
