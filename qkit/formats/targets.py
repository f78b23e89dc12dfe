"""The group of a `quantization_config` for a layer, found by path, by pattern, or by class."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from qkit.errors import ArtifactError, GridError
from qkit.experts import expert_of
from qkit.intake import time_limit
from qkit.rules import Kind

PATTERNS: Final = 1000  #: most regular expressions of a configuration
#: By kind of layer, the name in the targets of groups.
CLASSES: Final[Mapping[Kind, str]] = {"linear": "Linear", "embedding": "Embedding", "experts": "Linear"}
HEADS: Final = frozenset({"lm_head", "embed_out", "output"})  #: last names of output heads
SECONDS: Final = 20  #: most seconds of all patterns for one layer: some patterns never end


@dataclass(frozen=True, slots=True)
class Targets:
    """The names of a configuration's groups, by their targets.

    Attributes:
        named: groups by path of a layer, by end of a path, or by class of layers.
        patterns: regular expressions with their groups, in the configuration's order.
    """

    named: Mapping[str, str]
    patterns: Sequence[tuple[re.Pattern[str], str]]

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Targets":
        """The targets of a `quantization_config`.

        Raises:
            ArtifactError: the configuration is not readable, names a layer in two groups, or has more than `PATTERNS` patterns.
        """
        named: dict[str, str] = {}
        patterns: list[tuple[re.Pattern[str], str]] = []
        with readable():
            for name, group in config["config_groups"].items():
                for target in filter(None, group["targets"]):
                    if not target.startswith("re:"):
                        if named.setdefault(target, name) != name:
                            raise ArtifactError(
                                f"the quantization_config has two groups for {target!r}, {named[target]} and {name}, and readers "
                                "differ in which they take: remove one"
                            )
                    elif len(patterns) < PATTERNS:
                        patterns.append((re.compile(target[3:]), name))
                    else:
                        raise ArtifactError(f"the quantization_config has more than {PATTERNS:,} patterns: name layers")
        return cls(named, patterns)

    def group_of(self, path: str, *, kind: str) -> str:
        """The name of the group for the layer at `path`: by its path or an end of it, by a pattern, or by its class `kind`.

        Raises:
            ArtifactError: no group fits, or the patterns take longer than `SECONDS`.
        """
        parts = path.split(".")
        for end in (".".join(parts[i:]) for i in range(len(parts))):
            if end in self.named:
                return self.named[end]
        with patterns_limit():
            for pattern, name in self.patterns:
                if pattern.match(path):
                    return name
        if kind not in self.named:
            raise ArtifactError("no group of the quantization_config applies to it")
        return self.named[kind]


def targets_of(kind: Kind, paths: Sequence[str], *, beside: Sequence[Kind], earlier: bool) -> list[str]:
    """The layers of a group: by their class where no other group has layers of that class, else by their paths.

    vLLM 0.32 makes embeddings without a name, and knows an output head by its name only.

    Args:
        beside: the kinds of all groups, this one among them.
        earlier: as earlier versions of qkit wrote them.
    """
    if earlier:
        return ["Linear"] if len(beside) == 1 and kind != "embedding" else list(paths)
    if sum(CLASSES[one] == CLASSES[kind] for one in beside) == 1:
        return [CLASSES[kind], *(path for path in paths if path.rpartition(".")[2] in HEADS)]
    if kind == "experts":  # readers look for `experts` in a pattern
        blocks = sorted({expert[0] for path in paths if (expert := expert_of(path))})
        return [f"re:{re.escape(block)}[.].*" for block in blocks]
    return list(paths)


def ignored(paths: Iterable[str], *, but: Iterable[str]) -> list[str]:
    """Names and patterns for `ignore` that match `paths`, and no path of `but`: one for layers that differ in numbers only.

    A pattern begins at the name before the first number, if it can: servers know some models by other first names.
    """
    alike: dict[str, list[str]] = {}
    for path in dict.fromkeys(paths):
        alike.setdefault(_shape(path), []).append(path)
    others = {_shape(path) for path in but}
    found = []
    for shape, mine in alike.items():
        parts = shape.split(".")
        tail = ".".join(parts[max(parts.index("#") - 1, 0) :]) if "#" in parts else shape
        alone = len(mine) == 1 or shape in others or shape.startswith("re:")
        if alone:
            found += mine
        elif any(f".{other}".endswith(f".{tail}") for other in others):
            found.append(f"re:^{_pattern(shape)}$")
        else:
            found.append(rf"re:(.*\.)?{_pattern(tail)}$")
    return sorted(set(found))  # one pattern may stand for layers under two names


def _shape(path: str) -> str:
    return ".".join("#" if part.isdecimal() else part for part in path.split("."))


def _pattern(shape: str) -> str:
    return r"\.".join(r"\d+" if part == "#" else re.escape(part) for part in shape.split("."))


@contextmanager
def patterns_limit() -> Iterator[None]:
    """Stops a block of regular expressions that do not end.

    Raises:
        ArtifactError: the block takes longer than `SECONDS`.
    """
    slow = ArtifactError(f"the patterns of the quantization_config take more than {SECONDS} seconds: name layers")
    with time_limit(SECONDS, slow):
        yield


@contextmanager
def readable() -> Iterator[None]:
    """Turns a failure of code that reads the configuration's values into an error about the configuration.

    Raises:
        ArtifactError: the block failed on a value.
    """
    try:
        yield
    except (ArtifactError, GridError):
        raise
    except (KeyError, TypeError, AttributeError, ValueError, re.error, RecursionError, OverflowError) as error:
        raise ArtifactError(f"the quantization_config is not readable ({error!r})") from None
