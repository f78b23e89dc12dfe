"""The group of a `quantization_config` for a layer, found by path, by pattern, or by class."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from qkit.errors import ArtifactError, GridError
from qkit.intake import time_limit

PATTERNS: Final = 1000  #: most regular expressions of a configuration
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
