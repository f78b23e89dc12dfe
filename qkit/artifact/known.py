"""Facts about families of models that the names and shapes of tensors do not tell, from `families.json`.

`make test-families` writes that file: it opens a small model of each family in every reader.
"""

import json
import re
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from qkit.engines.layer import is_head_path

FILE = "families.json"


@cache
def table() -> dict[str, Any]:
    """The content of the file: `types`, facts by model type; `rows`, results by family."""
    found: dict[str, Any] = json.loads(files("qkit.artifact").joinpath(FILE).read_text(encoding="utf-8"))
    return found


def facts(config: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The facts about the type of model that `config` names; {} for a type that is not in the table.

    `prefixes`: beginnings of paths in published files, and the same in transformers' model. `apart`: patterns of transformers'
    layers whose weights have no tensor of their own in the files. `kinds`: see `kind_of`, by pattern. `read`: patterns of
    layers whose weights other modules read. `heads`: patterns of linear layers of output heads, by their role. `fp32`: parts of
    names of tensors that stay float32 in models of half precision. `tied`: whether embedding and output head are one weight
    where the configuration does not say. `base`: the name of the base model in a model with a head.
    """
    found: Mapping[str, Any] = table()["types"].get(str((config or {}).get("model_type")), {})
    return found


def is_known(config: Mapping[str, Any] | None) -> bool:
    """Whether the table has the type of model that `config` names."""
    return str((config or {}).get("model_type")) in table()["types"]


def kind_of(path: str, config: Mapping[str, Any] | None) -> str | None:
    """`linear` or `embedding`, or why no rule can match it, of a layer whose name tells otherwise; None where it does not."""
    known = facts(config)
    names = [path, *_other_base(path, config)]
    for name in names:
        if why := why_not(model_path(name, config), known):
            return why
    kinds: Mapping[str, str] = known.get("kinds", {})
    return next((kinds[pattern] for name in names if (pattern := pattern_of(name)) in kinds), None)


def stays_float32(name: str, config: Mapping[str, Any] | None) -> bool:
    """Whether transformers leaves the tensor `name` in float32 in a model of half precision; of pictures and text, too."""
    inner = (config or {}).get("text_config")
    parts = [
        part for one in (config, inner if isinstance(inner, Mapping) else None) for part in facts(one).get("fp32", ())
    ]
    return any(re.search(rf"(?:^|\.){re.escape(part)}(?:\.|$)", name) for part in parts)


def is_known_head(path: str, config: Mapping[str, Any] | None) -> bool:
    """Whether the linear layer at `path` in files is an output head, or in one, although its name does not say so."""
    return pattern_of(model_path(path, config)) in facts(config).get("heads", ())


def why_not(path: str, known: Mapping[str, Any]) -> str:
    """Why the layer at `path` of transformers' model takes no codes, by the facts about its type; empty where it does."""
    read = known.get("read")
    return "another module reads its weight, or changes it" if read and pattern_of(path) in read else ""


def pattern_of(path: str) -> str:
    """`path` with a star for each number."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", path)


def model_path(path: str, config: Mapping[str, Any] | None) -> str:
    """The path in transformers' model of the layer at `path` in files; `path` itself where both are the same."""
    prefixes: Mapping[str, str] = facts(config).get("prefixes", {})
    starts = {source: target for source, target in prefixes.items() if _begins(path, source)}
    if not starts:
        return path
    source = max(starts, key=_length)
    if any(_begins(path, target) and _length(target) > _length(source) for target in prefixes.values()):
        return path  # the name is the model's own already
    numbers = iter(re.findall(r"(?:^|(?<=\.))\d+(?=\.|$)", path))
    rest = path.split(".")[_length(source) :]
    target = [next(numbers) if part == "*" else part for part in filter(None, starts[source].split("."))]
    return ".".join((*target, *rest))


def both_names(paths: Iterable[str], config: Mapping[str, Any] | None) -> list[str]:
    """`paths` in files, each followed by its path in transformers' model where that is another one.

    Files of a base model name its layers `layers.0`, and those of a model with a head `model.layers.0`. transformers opens either
    in a class of the other.
    """
    paths = list(paths)
    base = facts(config).get("base")
    with_base = any(_begins(path, base) for path in paths) if base else True
    found: dict[str, None] = {}
    for path in paths:
        found[path] = found[model_path(path, config)] = None
        if with_base == _is_base(config) and model_path(path, config) == path:
            found.update(dict.fromkeys(_other_base(path, config)))
    return list(found)


def missing_base(names: Iterable[str], config: Mapping[str, Any] | None) -> str:
    """`model.` where the tensors `names` of files lack it, and the class of the configuration has it; else empty."""
    known = facts(config)
    lacks = known.get("base") == "model" and not known.get("prefixes") and not _is_base(config)
    return "model." if lacks and not any(name.startswith("model.") for name in names) else ""


def based(name: str, base: str) -> str:
    """The tensor or layer `name` with `base` in front, which output heads do not have."""
    return name if is_head_path(name) else base + name


def _is_base(config: Mapping[str, Any] | None) -> bool:
    architectures = (config or {}).get("architectures") or []
    return any(re.search(r"(?<!LMHead)Model$", str(one)) for one in architectures)


def _other_base(path: str, config: Mapping[str, Any] | None) -> list[str]:
    """`path` without the name of the base model in front, or with it where it lacks it."""
    base: str | None = facts(config).get("base")
    if not base or is_head_path(path):
        return []
    return [path[len(base) + 1 :]] if path.startswith(f"{base}.") else [f"{base}.{path}"]


def apart(quantized: Iterable[str], config: Mapping[str, Any] | None) -> list[str]:
    """Names of transformers' layers that no tensor of the files is for, as compressed-tensors' `ignore` takes them.

    Args:
        quantized: paths of the layers that the files hold as codes.
    """
    taken = {model_path(path, config) for path in quantized}
    found = []
    for name in facts(config).get("apart", ()):
        pattern = "^" + re.escape(name).replace(r"\*", r"\d+") + "$"
        if not any(re.match(pattern, path) for path in taken):
            found.append(f"re:{pattern}" if "*" in name else name)
    return found


def _length(path: str) -> int:
    return len(path.split(".")) if path else 0


def _begins(path: str, start: str) -> bool:
    parts, wanted = path.split("."), start.split(".") if start else []
    return len(parts) >= len(wanted) and all(
        mine == want or (want == "*" and mine.isdecimal()) for mine, want in zip(parts, wanted, strict=False)
    )
