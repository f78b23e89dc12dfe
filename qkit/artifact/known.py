"""Facts about families of models that the names and shapes of tensors do not tell, from `families.json`.

`make test-families` writes that file: it opens a small model of each family in every reader.
"""

import json
import re
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.resources import files
from typing import Any

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
    where the configuration does not say.
    """
    found: Mapping[str, Any] = table()["types"].get(str((config or {}).get("model_type")), {})
    return found


def is_known(config: Mapping[str, Any] | None) -> bool:
    """Whether the table has the type of model that `config` names."""
    return str((config or {}).get("model_type")) in table()["types"]


def kind_of(path: str, config: Mapping[str, Any] | None) -> str | None:
    """`linear` or `embedding`, or why no rule can match it, of a layer whose name tells otherwise; None where it does not."""
    known = facts(config)
    if why := why_not(model_path(path, config), known):
        return why
    found: str | None = known.get("kinds", {}).get(pattern_of(path))
    return found


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
    """`paths` in files, each followed by its path in transformers' model where that is another one."""
    return list(dict.fromkeys(name for path in paths for name in (path, model_path(path, config))))


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
