"""The quantization settings of a config.json: qkit carries out a key, knows it as harmless, or refuses it by name.

Read off compressed-tensors 0.20 (`QuantizationConfig`, `QuantizationScheme`, `QuantizationArgs`, `TransformConfig`),
transformers 5.23 (`CompressedTensorsConfig`), mlx-lm 0.32.2 (`utils.load_model`) and NVIDIA ModelOpt's hf_quant_config.json.
"""

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Final

from qkit.errors import ArtifactError

QUANTIZATION: Final = ("quantization_config", "quantization")  #: keys of config.json that readers look for
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
    """Whether a pruned model stores whole tensors, with zeros among the codes."""
    return _empty(value) or value == "dense" or (isinstance(value, Mapping) and value.get("format") == "dense")


#: Top level of compressed-tensors' `quantization_config`: a test for each key's value. Any other key has to be null.
CONFIG: Final[Mapping[str, Callable[[Any], bool]]] = {
    "config_groups": _anything,  # carried out: `compressed_tensors.grids`
    "quant_method": _anything,  # carried out: it chooses the reader
    "format": _anything,  # carried out
    "ignore": _anything,  # carried out: `check_ignored`
    #: with another status `weight` is float, and is quantized at every call; of the old `frozen`, tensors tell
    "quantization_status": _one_of(None, "compressed", "frozen"),
    "kv_cache_scheme": _anything,  # left out, and said: `sources.source.quantized_caches`
    "provider": _anything,  # harmless: the program that wrote it
    "moe_sparsity_config": _nothing,
    "sparsity_config": _dense,
    "transform_config": _without_transforms,
    "global_compression_ratio": _anything,  # harmless: a figure for people
    "version": _anything,  # harmless: version of the program that wrote it
    "run_compressed": _anything,  # harmless, as the next two: choices of a reader, with the same values
    "dequantize": _anything,
    "use_optimized_inference": _anything,
}

#: One of the `config_groups`.
GROUP: Final[Mapping[str, Callable[[Any], bool]]] = {
    "targets": _anything,  # carried out
    "weights": _anything,  # carried out: `WEIGHTS`
    "input_activations": _anything,  # marks the layer as quantizing its inputs; see `write_model.check_weights_only`
    "output_activations": _anything,
    "format": _anything,  # carried out
}

#: The `weights` of a group.
WEIGHTS: Final[Mapping[str, Callable[[Any], bool]]] = {
    "num_bits": _anything,  # carried out, as the next four
    "type": _anything,
    "symmetric": _anything,
    "strategy": _anything,
    "group_size": _anything,
    "dynamic": _one_of(None, False),  # weights that change at every call have no codes
    "block_structure": _anything,  # carried out: `sources.compressed`, as the next
    "actorder": _one_of(None, False, True, "weight", "static", "group"),
    "scale_dtype": _one_of(
        *(None, "torch.uint8", "torch.float8_e4m3fn", "torch.float8_e8m0fnu"),
        *("torch.float32", "torch.bfloat16", "torch.float16"),
    ),  # harmless: the stored tensor has it, and `contents` compares that
    "zp_dtype": _one_of(None, "torch.int8", "torch.float8_e4m3fn"),  # harmless: likewise
    "observer": _anything,  # harmless, as the next: the way in which the stored scales were found
    "observer_kwargs": _anything,
}

#: The activations of a group: `check_weights_only` refuses them all, and an unknown key is refused here.
ACTIVATIONS: Final = dict.fromkeys(WEIGHTS, _anything)

#: MLX's `quantization`, at the top and for one layer.
MLX: Final[Mapping[str, Callable[[Any], bool]]] = {
    "group_size": _anything,  # carried out, as the next two
    "bits": _anything,
    "mode": _anything,
    "global_scale": _one_of(None, False),
    "quantize_input": _one_of(None, False),
}

#: Last parts of the names of tensors that only quantized weights have, in the layouts of compressed-tensors, GPTQ and AWQ.
PARTS: Final = frozenset(
    (
        "weight_packed",
        "weight_scale",
        "weight_scale_inv",
        "weight_zero_point",
        "weight_global_scale",
        "weight_g_idx",
        "qweight",
        "qzeros",
    )
)

#: Other keys of config.json, besides `QUANTIZATION`, that change the results of a model.
BESIDE: Final[Mapping[str, Callable[[Any], bool]]] = {
    "sparsity_config": _dense,
    "transform_config": _without_transforms,
    "kv_cache_scheme": _nothing,
    "quantize_activations": _one_of(None, False),  # mlx-lm
}


def quantization_of(config: Mapping[str, Any] | None) -> dict[str, dict[str, Any]]:
    """The tables of `config.json` under each of `QUANTIZATION`; {} where a key is missing.

    Raises:
        ArtifactError: a value is no object, or another key has quantization settings.
    """
    config, found = config or {}, {}
    for key in QUANTIZATION:
        found[key] = config.get(key) or {}
        if not isinstance(found[key], dict):
            raise ArtifactError(f"config.json: {key} is {shown(found[key])}: want an object")
    check_beside(config)
    for name, part in config.items():
        if name not in QUANTIZATION and isinstance(part, Mapping) and part.get("quantization_config"):
            table = shown(part["quantization_config"])
            raise ArtifactError(
                f"config.json: {name} has a quantization_config, {table}, which qkit does not carry out: {WAY_OUT}"
            )
    return found


def check_beside(config: Mapping[str, Any]) -> None:
    """Checks the keys of `config.json`, other than `QUANTIZATION`, that change the results of a model.

    Raises:
        ArtifactError: qkit does not carry one of them out.
    """
    check_keys({key: value for key, value in config.items() if key in BESIDE}, BESIDE, "config.json")


def check_compressed_tensors(stated: Mapping[str, Any]) -> None:
    """Checks that qkit carries out every setting of a `quantization_config` of compressed-tensors.

    Raises:
        ArtifactError: a key is unknown and not null, or has a value that changes numbers; the message names both.
    """
    where = "quantization_config"
    check_keys(stated, CONFIG, where)
    groups = stated.get("config_groups")
    for name, group in (groups if isinstance(groups, Mapping) else {}).items():
        place = f"{where}: config_groups.{name}"
        if not isinstance(group, Mapping):
            raise ArtifactError(f"{place} is {shown(group)}, and not written out: {WAY_OUT}")
        check_keys(group, GROUP, place)
        for part, allowed in (
            ("weights", WEIGHTS),
            ("input_activations", ACTIVATIONS),
            ("output_activations", ACTIVATIONS),
        ):
            if isinstance(arguments := group.get(part), Mapping):
                check_keys(arguments, allowed, f"{place}.{part}")


def check_remaining(types: Mapping[str, str]) -> None:
    """Checks that no tensor is a part of a quantized weight, since no setting says how that weight is quantized.

    Args:
        types: NumPy types of the tensors that are taken for float ones, by name; empty to compare names only.

    Raises:
        ArtifactError: the name of a tensor is one of such a part, or a weight holds integers.
    """
    for name, kind in types.items():
        end = name.rpartition(".")[2]
        if end in PARTS or (end == "weight" and kind.startswith(("int", "uint"))):
            raise ArtifactError(
                f"{name} is part of a quantized weight, and config.json does not say of which kind: {WAY_OUT}"
            )


def check_ignored(path: str, ignore: Any) -> None:
    """Checks that the configuration does not tell readers to leave the layer at `path`, which has scales, in float.

    Raises:
        ArtifactError: a name or pattern of `ignore` matches `path`.
    """
    for pattern in ignore if isinstance(ignore, list) else []:
        if pattern == path or (isinstance(pattern, str) and pattern[:3] == "re:" and re.match(pattern[3:], path)):
            raise ArtifactError(f"the quantization_config ignores it by {pattern!r}, and yet it has scales: {WAY_OUT}")


def check_unused(groups: Mapping[str, Any], used: Collection[str]) -> None:
    """Checks that no unused group quantizes inputs or outputs: of layers with float weights, or of attention.

    Args:
        used: names of the groups that quantize a stored weight.

    Raises:
        ArtifactError: there is such a group.
    """
    for name, group in groups.items():
        for part in ("input_activations", "output_activations"):
            if name not in used and group.get(part):
                targets = shown(group.get("targets"))
                raise ArtifactError(
                    f"quantization_config: config_groups.{name}.{part} is {shown(group[part])}, for "
                    f"{targets}, none of which has a quantized weight, and qkit does not carry that out: {WAY_OUT}"
                )


def check_mlx(stated: Mapping[str, Any], quantized: Iterable[str]) -> None:
    """Checks that qkit carries out every setting of MLX's `quantization`.

    Args:
        quantized: paths of the layers that have scales.

    Raises:
        ArtifactError: a key is unknown and not null, or a layer's table and its tensors contradict each other.
    """
    paths = set(quantized)
    layers = {path: table for path, table in stated.items() if path in paths or isinstance(table, (Mapping, bool))}
    layers = {path: table for path, table in layers.items() if path not in MLX}
    check_keys({key: value for key, value in stated.items() if key not in layers}, MLX, "quantization")
    for path, table in layers.items():
        if isinstance(table, Mapping):
            check_keys(table, MLX, f"quantization: {path}")
        if bool(table) != (path in paths):
            has = "has scales" if path in paths else "has no scales"
            raise ArtifactError(f"quantization: {path} is {shown(table)}, and yet the layer {has}: {WAY_OUT}")


def check_alike(stated: Mapping[str, Mapping[str, Any]]) -> None:
    """Checks that the two tables of MLX's quantization in a config.json are equal, since readers take either one.

    Raises:
        ArtifactError: the tables differ.
    """
    first, second = (stated[key] for key in QUANTIZATION)
    if first and second and first != second:
        raise ArtifactError(
            f"config.json: quantization is {shown(second)}, and quantization_config is {shown(first)}: remove one of them"
        )


def check_keys(stated: Mapping[str, Any], allowed: Mapping[str, Callable[[Any], bool]], where: str) -> None:
    """Checks each value of `stated` by the test for its key in `allowed`; a key without a test has to be null.

    Args:
        where: place of the table, for the message.

    Raises:
        ArtifactError: a value fails; the message names key and value.
    """
    for key, value in stated.items():
        if not allowed.get(key, _nothing)(value):
            raise ArtifactError(f"{where}: {key} is {shown(value)}, which qkit does not carry out: {WAY_OUT}")


def shown(value: Any) -> str:
    """A value of a configuration as JSON, for messages, at most about `SHOWN` characters."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
