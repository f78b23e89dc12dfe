"""Which group of a `quantization_config` speaks of a layer: by its path, by a pattern, or by its class."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from qkit.errors import ArtifactError, GridError
from qkit.intake import time_limit

PATTERNS: Final = 1000  #: most regular expressions of a configuration
SECONDS: Final = 20  #: that they may take for one layer: some never end


@dataclass(frozen=True, slots=True)
class Targets:
    """The groups of a configuration by their targets.

    Attributes:
        named: by path of a layer, or by its end.
        patterns: by regular expression, in their order.
        first: the first group with any target, for those that name classes; None where there is none.
    """

    named: Mapping[str, Mapping[str, Any]]
    patterns: Sequence[tuple[re.Pattern[str], Mapping[str, Any]]]
    first: Mapping[str, Any] | None

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Targets":
        """Those of a `quantization_config`.

        Raises:
            ArtifactError: it is not readable, or has more than `PATTERNS` patterns.
        """
        named: dict[str, Mapping[str, Any]] = {}
        patterns: list[tuple[re.Pattern[str], Mapping[str, Any]]] = []
        first: Mapping[str, Any] | None = None
        with readable():
            for group in map(dict, config["config_groups"].values()):
                for target in filter(None, group["targets"]):
                    first = first or group
                    if not target.startswith("re:"):
                        named.setdefault(target, group)
                    elif len(patterns) < PATTERNS:
                        patterns.append((re.compile(target[3:]), group))
                    else:
                        raise ArtifactError(f"the quantization_config has more than {PATTERNS:,} patterns: name layers")
        return cls(named, patterns, first)

    def group_of(self, path: str) -> Mapping[str, Any]:
        """The group that names the layer at `path`: its path or its end, a pattern, or its class.

        Raises:
            ArtifactError: there is none, or a pattern takes longer than `SECONDS`.
        """
        parts = path.split(".")
        for end in (".".join(parts[i:]) for i in range(len(parts))):
            if end in self.named:
                return self.named[end]
        slow = ArtifactError(f"the patterns of the quantization_config take more than {SECONDS} seconds: name layers")
        with time_limit(SECONDS, slow):
            for pattern, group in self.patterns:
                if pattern.match(path):
                    return group
        if self.first is None:
            raise ArtifactError("no group of the quantization_config speaks of it")
        return self.first


@contextmanager
def readable() -> Iterator[None]:
    """Says that the configuration is at fault where work on its values alone fails."""
    try:
        yield
    except (ArtifactError, GridError):
        raise
    except (KeyError, TypeError, AttributeError, ValueError, re.error, RecursionError, OverflowError) as error:
        raise ArtifactError(f"the quantization_config is not readable ({error!r})") from None
