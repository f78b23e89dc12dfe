"""What a config.json may say of quantization: every key is honoured, harmless, or refused by name. Never ignored.

Read off compressed-tensors 0.20 (`QuantizationConfig`, `QuantizationScheme`, `QuantizationArgs`, `TransformConfig`),
transformers 5.23 (`CompressedTensorsConfig`), mlx-lm 0.32.2 (`utils.load_model`) and NVIDIA ModelOpt's hf_quant_config.json.
"""

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Final

from qkit.errors import ArtifactError

QUANTIZATION: Final = ("quantization_config", "quantization")  #: what readers are told in config.json
WAY_OUT: Final = "open the model with the program that wrote it, or quantize the float model"
SHOWN: Final = 120  #: most characters of a value in a message


def _nothing(value: Any) -> bool:
    return value is None


def _anything(value: Any) -> bool:
    return True


def _empty(value: Any) -> bool:
    return value is None or value in ({}, [])


def _one_of(*allowed: Any) -> Callable[[Any], bool]:
    return lambda value: any(type(value) is type(one) and value == one for one in allowed)


def _without_transforms(value: Any) -> bool:
    return _empty(value) or (isinstance(value, Mapping) and set(value) == {"config_groups"} and _empty(*value.values()))


def _dense(value: Any) -> bool:
    """Tensors of a pruned model that are stored whole: the zeros are among the codes."""
    return _empty(value) or value == "dense" or (isinstance(value, Mapping) and value.get("format") == "dense")


#: Top level of compressed-tensors' `quantization_config`: what each key may say. A key that is not here has to be null.
CONFIG: Final[Mapping[str, Callable[[Any], bool]]] = {
    "config_groups": _anything,  # honoured: `compressed_tensors.grids`
    "quant_method": _anything,  # honoured: it chooses the reader
    "format": _anything,  # honoured
    "ignore": _anything,  # honoured: `check_ignored`
    "quantization_status": _one_of(None, "compressed"),  # before that, `weight` is float and is quantized at every call
    "kv_cache_scheme": _nothing,  # {} is int8 there, and not nothing
    "moe_sparsity_config": _nothing,
    "sparsity_config": _dense,
    "transform_config": _without_transforms,
    "global_compression_ratio": _anything,  # harmless: a figure for people
    "version": _anything,  # harmless: of the program that wrote it
    "run_compressed": _anything,  # harmless, as the next two: how a reader of transformers holds the same values
    "dequantize": _anything,
    "use_optimized_inference": _anything,
}

#: One of the `config_groups`.
GROUP: Final[Mapping[str, Callable[[Any], bool]]] = {
    "targets": _anything,  # honoured
    "weights": _anything,  # honoured: `WEIGHTS`
    "input_activations": _anything,  # known as what a layer quantizes besides: `transfer.check_moving`
    "output_activations": _anything,
    "format": _anything,  # honoured
}

#: The `weights` of a group.
WEIGHTS: Final[Mapping[str, Callable[[Any], bool]]] = {
    "num_bits": _anything,  # honoured, as the next four
    "type": _anything,
    "symmetric": _anything,
    "strategy": _anything,
    "group_size": _anything,
    "dynamic": _one_of(None, False),  # weights that change at every call have no codes
    "block_structure": _nothing,
    "actorder": _one_of(None, False, "weight", "static"),  # harmless: the order of calibration, not that of the groups
    "scale_dtype": _one_of(
        None, "torch.uint8", "torch.float8_e4m3fn", "torch.float32", "torch.bfloat16", "torch.float16"
    ),  # harmless: the stored tensor has it, and `contents` compares that
    "zp_dtype": _one_of(None, "torch.int8", "torch.float8_e4m3fn"),  # harmless: likewise
    "observer": _anything,  # harmless, as the next: how the scales that are stored were found
    "observer_kwargs": _anything,
}

#: The activations of a group: qkit carries none of them out, and `check_moving` says so; but an unknown key is unknown.
ACTIVATIONS: Final = dict.fromkeys(WEIGHTS, _anything)

#: MLX's `quantization`, at the top and for one layer.
MLX: Final[Mapping[str, Callable[[Any], bool]]] = {
    "group_size": _anything,  # honoured, as the next two
    "bits": _anything,
    "mode": _anything,
    "global_scale": _one_of(None, False),
    "quantize_input": _one_of(None, False),
}

#: Keys of config.json beside the two of `QUANTIZATION` that change what is computed.
BESIDE: Final[Mapping[str, Callable[[Any], bool]]] = {
    "compression_config": _empty,  # compressed-tensors' name for its own until 0.5
    "sparsity_config": _dense,
    "transform_config": _without_transforms,
    "kv_cache_scheme": _nothing,
    "quantize_activations": _one_of(None, False),  # mlx-lm
}


def quantization_of(config: Mapping[str, Any] | None) -> dict[str, dict[str, Any]]:
    """What `config.json` says under each of `QUANTIZATION`; {} where it says nothing.

    Raises:
        ArtifactError: it says something that is no object, or speaks of quantization in another place.
    """
    config, found = config or {}, {}
    for key in QUANTIZATION:
        found[key] = config.get(key) or {}
        if not isinstance(found[key], dict):
            raise ArtifactError(f"config.json: {key} is {_shown(found[key])}: want an object")
    check_keys({key: value for key, value in config.items() if key in BESIDE}, BESIDE, "config.json")
    for name, part in config.items():
        if name not in QUANTIZATION and isinstance(part, Mapping) and part.get("quantization_config"):
            table = _shown(part["quantization_config"])
            raise ArtifactError(
                f"config.json: {name} has a quantization_config, {table}, which qkit does not carry out: {WAY_OUT}"
            )
    return found


def check_compressed_tensors(said: Mapping[str, Any]) -> None:
    """Refuses a `quantization_config` of compressed-tensors that asks for what qkit does not carry out.

    Raises:
        ArtifactError: a key is unknown and not null, or has a value that changes numbers; the message names both.
    """
    where = "quantization_config"
    check_keys(said, CONFIG, where)
    groups = said.get("config_groups")
    for name, group in (groups if isinstance(groups, Mapping) else {}).items():
        place = f"{where}: config_groups.{name}"
        if not isinstance(group, Mapping):
            raise ArtifactError(f"{place} is {_shown(group)}, and not written out: {WAY_OUT}")
        check_keys(group, GROUP, place)
        for part, allowed in (
            ("weights", WEIGHTS),
            ("input_activations", ACTIVATIONS),
            ("output_activations", ACTIVATIONS),
        ):
            if isinstance(arguments := group.get(part), Mapping):
                check_keys(arguments, allowed, f"{place}.{part}")


def check_ignored(path: str, ignore: Any) -> None:
    """Refuses scales of a layer that readers are told to leave float.

    Raises:
        ArtifactError: one of the names or patterns of `ignore` is that of `path`.
    """
    for pattern in ignore if isinstance(ignore, list) else []:
        if pattern == path or (isinstance(pattern, str) and pattern[:3] == "re:" and re.match(pattern[3:], path)):
            raise ArtifactError(f"the quantization_config ignores it by {pattern!r}, and yet it has scales: {WAY_OUT}")


def check_unused(groups: Mapping[str, Any], used: Collection[str]) -> None:
    """Refuses groups that quantize the inputs or outputs of layers whose weights stay float, or of attention.

    Args:
        used: names of the groups that quantize a stored weight.

    Raises:
        ArtifactError: there is such a group.
    """
    for name, group in groups.items():
        for part in ("input_activations", "output_activations"):
            if name not in used and group.get(part):
                targets = _shown(group.get("targets"))
                raise ArtifactError(
                    f"quantization_config: config_groups.{name}.{part} is {_shown(group[part])}, for "
                    f"{targets}, none of which has a quantized weight, and qkit does not carry that out: {WAY_OUT}"
                )


def check_mlx(said: Mapping[str, Any], quantized: Iterable[str]) -> None:
    """Refuses a `quantization` of MLX's that asks for what qkit does not carry out.

    Args:
        quantized: paths of the layers that have scales.

    Raises:
        ArtifactError: a key is unknown and not null, or a layer's table and its tensors contradict each other.
    """
    paths = set(quantized)
    layers = {path: table for path, table in said.items() if path in paths or isinstance(table, (Mapping, bool))}
    layers = {path: table for path, table in layers.items() if path not in MLX}
    check_keys({key: value for key, value in said.items() if key not in layers}, MLX, "quantization")
    for path, table in layers.items():
        if isinstance(table, Mapping):
            check_keys(table, MLX, f"quantization: {path}")
        if bool(table) != (path in paths):
            has = "has scales" if path in paths else "has no scales"
            raise ArtifactError(f"quantization: {path} is {_shown(table)}, and yet the layer {has}: {WAY_OUT}")


def check_alike(said: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuses a config.json whose two accounts of MLX's quantization differ: readers differ in which they take.

    Raises:
        ArtifactError: they do.
    """
    first, second = (said[key] for key in QUANTIZATION)
    if first and second and first != second:
        raise ArtifactError(
            f"config.json: quantization is {_shown(second)}, and quantization_config is {_shown(first)}: remove one of them"
        )


def check_keys(said: Mapping[str, Any], allowed: Mapping[str, Callable[[Any], bool]], where: str) -> None:
    """Raises:
    ArtifactError: a key of `said` is not `allowed` to say what it says; the message names key and value.
    """
    for key, value in said.items():
        if not allowed.get(key, _nothing)(value):
            raise ArtifactError(f"{where}: {key} is {_shown(value)}, which qkit does not carry out: {WAY_OUT}")


def _shown(value: Any) -> str:
    text = json.dumps(value, default=repr)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
