"""How a model directory is quantized, from its JSON files and the names and types of its tensors: one answer, or a refusal.

Nothing quantized is ever taken for float. Settings and tensors have to agree. Read off transformers 5.23 (`quantizers/auto.py`,
`quantization_config.py`), vLLM 0.32 (`get_quant_config`), AutoGPTQ, AutoAWQ, llm-compressor and ModelOpt's unified checkpoints.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from qkit.errors import ArtifactError
from qkit.formats.settings import QUANTIZATION, WAY_OUT, check_beside, shown
from qkit.sources.marks import TITLES, Types, marks
from qkit.sources.refused import REFUSED
from qkit.storage.read import inside, read_json

CONFIG: Final = "config.json"
FLOAT: Final = "float"  #: the method of a model that is not quantized
OLD: Final = "compression_config"  #: compressed-tensors' name for its table until 0.5
#: Other files with quantization settings: the method that they belong to, and a key that says so.
FILES: Final = {
    "hf_quant_config.json": ("modelopt", ("quant_algo", "kv_cache_quant_algo")),
    "quantize_config.json": ("gptq", ("bits",)),
    "quant_config.json": ("awq", ("w_bit",)),
}
#: The methods that qkit reads, and the signs that tensors of each show: at least one of them.
READ: Final = {
    "compressed-tensors": ("compressed-tensors", "scaled"),
    "mlx": ("mlx",),
    "gptq": ("gptq",),
    "awq": ("gptq",),
    "fp8": ("fp8", "scaled", "codes"),
    "mxfp4": ("mxfp4",),
    "modelopt": ("modelopt", "scaled"),
    "auto-round": ("compressed-tensors", "scaled", "fp8"),
    "quark": ("scaled",),
    "bitsandbytes": ("bitsandbytes",),
    "torchao": ("torchao",),
}
#: Signs that tensors of a method may show besides.
ALSO: Final = {
    **dict.fromkeys(
        ("compressed-tensors", "mlx", "mxfp4", "auto-round", "quark", "bitsandbytes", "torchao"), ("codes",)
    ),
    "modelopt": ("codes", "fp8"),
}
#: Other names of methods: ModelOpt's with and without the format, AutoRound's with the layout that it packs in.
ALIASES: Final = {
    "modelopt_fp4": "modelopt",
    "modelopt_mxfp8": "modelopt",
    "modelopt_mixed": "modelopt",
    "compressed_tensors": "compressed-tensors",
    "intel/auto-round": "auto-round",
    "gptq_marlin": "gptq",
    "awq_marlin": "awq",
    "fbgemm_fp8": "fp8",
    "auto_round": "auto-round",
}


#: Keys that two tables of settings may both have.
COMPARED: Final = ("bits", "group_size", "w_bit", "q_group_size", "format", "config_groups", "quant_algo", "desc_act")


@dataclass(frozen=True, slots=True)
class Detected:
    """How a model is quantized.

    Attributes:
        method: `float`, or one of `READ`.
        settings: the table that says how.
        place: of that table, for messages.
        config: `config.json` without anything about quantization; None where there is no file.
    """

    method: str
    settings: Mapping[str, Any]
    place: str
    config: dict[str, Any] | None


def detect(folder: Path, config: Mapping[str, Any] | None, types: Types) -> Detected:
    """How the model in `folder` is quantized.

    Args:
        config: content of its `config.json`; None where there is no file.
        types: types and shapes of its tensors, by name.

    Raises:
        ArtifactError: settings contradict each other or the tensors, tensors are quantized and no setting says how, or qkit does
            not read the method; the message names files, keys and tensors.
    """
    check_beside(config or {})
    found, signs = list(_settings(folder, config or {})), marks(types)
    rest = None if config is None else without_settings(config)
    if not found:
        if signs:
            layout, name = next(iter(signs.items()))
            raise ArtifactError(
                f"{name} is part of a quantized weight ({TITLES[layout]}), and config.json does not say of which kind: add the "
                f"settings that its program wrote, or fetch the directory again; {WAY_OUT}"
            )
        return Detected(FLOAT, {}, "", rest)
    method, settings, place = _agreed(found)
    if method in REFUSED:
        raise ArtifactError(f"{place}: the model is quantized by {method}, which qkit does not read: {REFUSED[method]}")
    if method not in READ:
        raise ArtifactError(
            f"{place}: quantized by {method}, which qkit does not read: it reads {', '.join(READ)}; {WAY_OUT}"
        )
    wanted = READ[method]
    if not any(sign in signs for sign in wanted):
        raise ArtifactError(
            f"{place} says that the model is quantized by {method}, and no tensor is part of a weight quantized so: fetch the "
            "files again, or remove the settings from a float model"
        )
    others = [sign for sign in signs if sign not in wanted and sign not in ALSO.get(method, ())]
    if others:
        raise ArtifactError(
            f"{place} says that the model is quantized by {method}, and {signs[others[0]]} is part of a weight quantized by "
            f"{TITLES[others[0]]}: fetch the files again"
        )
    return Detected(method, settings, place, rest)


def without_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` without its tables about quantization, at the top and in parts such as `text_config`."""
    rest = {name: value for name, value in config.items() if name not in (*QUANTIZATION, OLD)}
    return {
        name: {key: one for key, one in value.items() if key not in QUANTIZATION}
        if isinstance(value, Mapping) and any(key in value for key in QUANTIZATION)
        else value
        for name, value in rest.items()
    }


def _settings(folder: Path, config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any], str]]:
    """Every table of settings, with its method and its place."""
    for key in (*QUANTIZATION, OLD):
        if table := _table(config.get(key), f"{CONFIG}: {key}"):
            yield _method(key, table), table, f"{CONFIG}: {key}"
    for part, inner in config.items():
        if part in (*QUANTIZATION, OLD) or not isinstance(inner, Mapping):
            continue
        for key in QUANTIZATION:
            if table := _table(inner.get(key), f"{CONFIG}: {part}.{key}"):
                yield _method(key, table), table, f"{CONFIG}: {part} has a {key}"
    for name, (method, keys) in FILES.items():
        beside = read_json(inside(folder, name)) if (folder / name).exists() else None
        if beside and any(_inner(beside).get(key) for key in keys):
            yield method, beside, name


def _table(value: Any, place: str) -> Mapping[str, Any]:
    if value is None or value == {}:
        return {}
    if not isinstance(value, Mapping):
        raise ArtifactError(f"{place} is {shown(value)}: want an object")
    return value


def _method(key: str, table: Mapping[str, Any]) -> str:
    """The method that a table belongs to."""
    said = str(table.get("quant_method") or "").lower()
    if said:
        said = ALIASES.get(said, said)
        if said == "auto-round":
            packing = str(table.get("packing_format") or table.get("backend") or "")
            return next((name for name in ("gptq", "awq") if name in packing), said)
        return said
    if key == OLD or "config_groups" in table:
        return "compressed-tensors"
    if key == "quantization" or {"bits", "group_size"} <= table.keys():
        return "mlx"
    if "load_in_4bit" in table or "load_in_8bit" in table:
        return "bitsandbytes"
    return "modelopt" if "quant_algo" in table else "an unknown tool"


def _inner(table: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings in the table of a file: ModelOpt's stand a level deeper."""
    inner = table.get("quantization")
    return inner if isinstance(inner, Mapping) else table


def _agreed(found: list[tuple[str, Mapping[str, Any], str]]) -> tuple[str, Mapping[str, Any], str]:
    """The first table, after a comparison with the others.

    Raises:
        ArtifactError: two tables name other methods or settings.
    """
    method, settings, place = found[0]
    for other, table, where in found[1:]:
        mine, theirs = _inner(settings), _inner(table)
        if place in FILES or where in FILES:  # programs write fewer keys into one of the two
            differs = any(key in mine and key in theirs and mine[key] != theirs[key] for key in COMPARED)
        else:
            differs = mine != theirs
        if other != method or differs:
            raise ArtifactError(
                f"{place} is {shown(settings)}, and {where} is {shown(theirs)}: they contradict each other; remove one of them"
            )
    return method, settings, place
