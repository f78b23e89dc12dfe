"""Adapters in the files of peft and of mlx-lm, read and written: safetensors and JSON, untrusted. Nothing here needs a model.

The formats are those of peft 0.21 and mlx-lm 0.32; the tests run both.
"""

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from qkit.adapters import expert_files, extras
from qkit.errors import ArtifactError, QkitError
from qkit.intake import parse_json
from qkit.reference.merged import Update
from qkit.storage.destination import check_directory
from qkit.storage.read import inside, read_file, read_json
from qkit.storage.staging import write_files

Layout = Literal["peft", "mlx-lm"]
CONFIG = "adapter_config.json"
WEIGHTS: dict[Layout, str] = {"peft": "adapter_model.safetensors", "mlx-lm": "adapters.safetensors"}
KEY = "qkit"  #: metadata key of the weights
PREFIX = "base_model.model."  #: of peft's names

#: By layout, how the names of tensors end: those of `Update`, and whether the array is transposed.
ENDINGS: dict[Layout, dict[str, tuple[str, bool]]] = {
    "peft": {
        "lora_A.weight": ("a", False),
        "lora_B.weight": ("b", False),
        "lora_magnitude_vector": ("magnitude", False),
    },
    "mlx-lm": {"lora_a": ("a", True), "lora_b": ("b", True), "m": ("magnitude", False)},
}

#: Keys of peft's configuration that change the computation of an adapter. qkit reads adapters without them.
PLAIN = (
    *("alora_invocation_tokens", "arrow_config", "fan_in_fan_out", "kasa_config", "layer_replication", "lora_bias"),
    *(
        "modules_to_save",
        "monteclora_config",
        "trainable_token_indices",
        "use_bdlora",
        "use_qalora",
    ),
    "velora_config",
)
KEEPS_BASE = (True, False, "gaussian", "orthogonal", "eva")  #: initializations that leave the base's weights unchanged


@dataclass(frozen=True, slots=True)
class Found:
    """An adapter in a folder.

    Attributes:
        updates: by the path of their layer.
        base: the note on the base model, if qkit wrote the adapter.
        norms: those that trained beside the factors, by the names of tensors.
    """

    updates: dict[str, Update]
    base: dict[str, Any]
    norms: dict[str, NDArray[np.float32]]


def read(folder: Path) -> Found:
    """The adapter in `folder`, of either layout.

    Updates of experts have three axes. Their paths are those of the layout: of a parameter of transformers' module
    (`X.experts.gate_up_proj`, also of both projections at once), or of a stack of mlx-lm's (`X.switch_mlp.gate_proj`).

    Raises:
        ArtifactError: the layout is neither, a file is unsound, or qkit cannot compute such an adapter.
    """
    here = [layout for layout, name in WEIGHTS.items() if (folder / name).exists()]
    if len(here) != 1:
        names = " or ".join(WEIGHTS.values())
        raise ArtifactError(f"{folder} has {'both' if here else 'neither'} {names}: name a folder with one adapter")
    config = read_json(inside(folder, CONFIG))
    if config is None:
        raise ArtifactError(f"{folder} has no {CONFIG}: fetch it again")
    file = inside(folder, WEIGHTS[here[0]])
    stored, metadata = read_file(file)
    arrays: dict[str, dict[str, NDArray[Any]]] = {}
    for name, one in stored.items():
        path, part, turned = _named(name, here[0], file)
        array = one.mapped().astype(np.float32)
        arrays.setdefault(path, {})[part] = array.T.copy() if turned and array.ndim == 2 else array
    if not arrays:
        raise ArtifactError(f"{file} holds no adapter: name a folder that peft, mlx-lm or qkit wrote")
    if here[0] == "peft":
        arrays = expert_files.parted(arrays, config, file)
    scale = _peft_scales(config, folder) if here[0] == "peft" else _mlx_scales(config, folder)
    updates = {}
    for path, parts in arrays.items():
        if missing := [part for part in ("a", "b", *(["magnitude"] * scale.dora)) if part not in parts]:
            raise ArtifactError(f"{file}: {path} lacks its {', '.join(missing)}: fetch it again")
        if "magnitude" in parts and not scale.dora:
            raise ArtifactError(f"{file}: {path} has a magnitude, and {CONFIG} has no use_dora: fetch both again")
        try:
            factors: Any = parts
            updates[path] = Update(scale=scale(path, parts["a"].shape[-2]), **factors)
        except QkitError as error:
            raise ArtifactError(f"{file}: {path}: {error}") from None
    noted = _noted(metadata, file)
    updates = {path: extras.with_gains(folder, path, update, noted) for path, update in updates.items()}
    return Found(updates, {key: one for key, one in noted.items() if key != extras.KEY}, extras.norms(folder, noted))


def write(
    folder: Path,
    updates: Mapping[str, Update],
    *,
    layout: Layout,
    base: Mapping[str, Any],
    name: str | None,
    norms: Mapping[str, NDArray[Any]],
) -> None:
    """Writes an adapter that peft or mlx-lm opens.

    Args:
        base: the note on the weights that it was trained on.
        name: the name of the base model, for readers that load it themselves.
        norms: those that trained beside the factors.

    Raises:
        ArtifactError: the layout cannot hold such an adapter, or the folder holds anything that qkit did not write.
        PlanError, LockedError: see `write_files`.
    """
    if layout not in WEIGHTS:
        raise ArtifactError(f"unknown layout {layout!r}: choose one of {', '.join(WEIGHTS)}")
    other = next(file for one, file in WEIGHTS.items() if one != layout)
    if os.path.exists(folder / other):
        raise ArtifactError(f"{folder} holds an adapter in {other}: choose another folder")
    check_directory(folder)
    table = (_peft_config if layout == "peft" else _mlx_config)(updates, name)
    tensors = {}
    for path, update in updates.items():
        for ending, (part, turned) in ENDINGS[layout].items():
            if part in update.parts():
                array = update.parts()[part]
                if layout == "peft":
                    place, array = expert_files.as_in_peft(path, part, array, updates)
                    tensors[f"{PREFIX}{place}.{ending}"] = np.ascontiguousarray(array)
                else:
                    tensors[f"{path}.{ending}"] = np.ascontiguousarray(array.T if turned and array.ndim == 2 else array)
    from safetensors.numpy import save

    config = (json.dumps(table, indent=2, sort_keys=True) + "\n").encode()
    weights = save(tensors, metadata={KEY: json.dumps({**base, **extras.noted(norms)}, sort_keys=True)})
    write_files(folder, {CONFIG: config, WEIGHTS[layout]: weights, **extras.files(updates, norms)})


def _named(name: str, layout: Layout, file: Path) -> tuple[str, str, bool]:
    """Path of the layer, name of the part in `Update`, and whether it is transposed."""
    prefix = PREFIX if layout == "peft" else ""
    for ending, (part, turned) in ENDINGS[layout].items():
        if name.startswith(prefix) and name.endswith(f".{ending}"):
            return name[len(prefix) : -len(ending) - 1], part, turned
    raise ArtifactError(f"{file}: {name} is no part of LoRA or DoRA on a linear layer: qkit knows no other adapters")


def _noted(metadata: Mapping[str, str], file: Path) -> dict[str, Any]:
    try:
        noted = parse_json(metadata.get(KEY, "{}"))
    except ValueError as error:
        raise ArtifactError(f"{file}: the {KEY} metadata is not readable ({error})") from None
    if not isinstance(noted, dict) or not all(isinstance(one, dict) for one in noted.values()):
        raise ArtifactError(f"{file}: the {KEY} metadata is not readable: want a table for each layer")
    return noted


@dataclass(frozen=True, slots=True)
class _Scales:
    """The factor of each layer's product: alpha over the rank or over its root, or one number for all layers."""

    dora: bool
    fixed: float | None = None
    alpha: float = 0.0
    alphas: Mapping[str, float] | None = None
    rooted: bool = False

    def __call__(self, path: str, rank: int) -> float:
        if self.fixed is not None:
            return self.fixed
        alpha = next((own for key, own in (self.alphas or {}).items() if f".{path}".endswith(f".{key}")), self.alpha)
        return alpha / (math.sqrt(rank) if self.rooted else max(rank, 1))


def _peft_scales(config: Mapping[str, Any], folder: Path) -> _Scales:
    file = folder / CONFIG
    if config.get("peft_type") != "LORA":
        raise ArtifactError(
            f"{file}: peft_type is {config.get('peft_type')!r}: qkit knows LORA, with or without use_dora: "
            "merge it with peft first"
        )
    for key in PLAIN:
        if config.get(key):
            raise ArtifactError(f"{file}: {key} = {config[key]!r} is more than LoRA or DoRA: merge it with peft first")
    if config.get("bias", "none") != "none":
        raise ArtifactError(
            f"{file}: bias = {config['bias']!r}, and qkit's adapters leave biases alone: merge it with peft first"
        )
    if config.get("init_lora_weights", True) not in KEEPS_BASE:
        raise ArtifactError(
            f"{file}: init_lora_weights = {config['init_lora_weights']!r} changed the base's weights before training: let peft "
            "save it as plain LoRA (path_initial_model_for_weight_conversion)"
        )
    alphas = {}
    for key, alpha in _table(config, "alpha_pattern", file).items():
        plain = key.removeprefix("^").replace("\\.", ".")
        if not re.fullmatch(r"[\w.]+", plain):
            raise ArtifactError(
                f"{file}: alpha_pattern has {key!r}: qkit reads names of layers there, and no other patterns"
            )
        alphas[plain] = _number(alpha, "alpha_pattern", file)
    return _Scales(
        dora=bool(config.get("use_dora")),
        alpha=_number(config.get("lora_alpha"), "lora_alpha", file),
        alphas=alphas,
        rooted=bool(config.get("use_rslora")),
    )


def _mlx_scales(config: Mapping[str, Any], folder: Path) -> _Scales:
    file = folder / CONFIG
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise ArtifactError(f"{file}: fine_tune_type is {kind!r}: qkit knows lora and dora: fuse it with mlx-lm first")
    scale = _table(config, "lora_parameters", file).get("scale")
    return _Scales(dora=kind == "dora", fixed=_number(scale, "lora_parameters.scale", file))


def _table(config: Mapping[str, Any], key: str, file: Path) -> dict[str, Any]:
    table = config.get(key) or {}
    if not isinstance(table, dict):
        raise ArtifactError(f"{file}: {key} is {table!r}: want a table")
    return table


def _number(value: Any, key: str, file: Path) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ArtifactError(f"{file}: {key} is {value!r}: want a number")
    return float(value)


def _peft_config(updates: Mapping[str, Update], name: str | None) -> dict[str, Any]:
    _same("kind", (update.kind for update in updates.values()), "peft")
    stacks = sorted(path for path, one in updates.items() if one.a.ndim == 3)
    first = updates[stacks[0]] if stacks else next(iter(updates.values()))
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": name,
        "r": first.rank,
        "lora_alpha": _alpha(first),
        "rank_pattern": {f"^{path}": one.rank for path, one in updates.items() if one.rank != first.rank},
        "alpha_pattern": {f"^{path}": _alpha(one) for path, one in updates.items() if _alpha(one) != _alpha(first)},
        "target_modules": sorted(path for path, one in updates.items() if one.a.ndim == 2),
        **({"target_parameters": stacks} if stacks else {}),
        "use_dora": first.kind == "dora",
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }


def _mlx_config(updates: Mapping[str, Update], name: str | None) -> dict[str, Any]:
    """Names layers by their whole path, which mlx-lm accepts as it does names within a block."""
    first = next(iter(updates.values()))
    for what in ("kind", "rank", "scale"):
        _same(what, (getattr(update, what) for update in updates.values()), "mlx-lm")
    parameters = {"rank": first.rank, "scale": first.scale, "dropout": 0.0, "keys": sorted(updates)}
    return {"fine_tune_type": first.kind, "num_layers": 0, "lora_parameters": parameters, "model": name}


def _same(what: str, values: Iterable[Any], layout: Layout) -> None:
    if len(found := sorted(set(values))) > 1:
        raise ArtifactError(
            f"{layout} has one {what} for all layers, and these have {', '.join(map(str, found))}: save them apart"
        )


def _alpha(update: Update) -> float | int:
    alpha = update.scale * update.rank
    return int(alpha) if alpha == int(alpha) else alpha
