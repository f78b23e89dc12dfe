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
    """The names of a configuration's groups by their targets.

    Attributes:
        named: by path of a layer, by its end, or by a class of layers.
        patterns: by regular expression, in their order.
    """

    named: Mapping[str, str]
    patterns: Sequence[tuple[re.Pattern[str], str]]

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Targets":
        """Those of a `quantization_config`.

        Raises:
            ArtifactError: it is not readable, or has more than `PATTERNS` patterns.
        """
        named: dict[str, str] = {}
        patterns: list[tuple[re.Pattern[str], str]] = []
        with readable():
            for name, group in config["config_groups"].items():
                for target in filter(None, group["targets"]):
                    if not target.startswith("re:"):
                        named.setdefault(target, name)
                    elif len(patterns) < PATTERNS:
                        patterns.append((re.compile(target[3:]), name))
                    else:
                        raise ArtifactError(f"the quantization_config has more than {PATTERNS:,} patterns: name layers")
        return cls(named, patterns)

    def group_of(self, path: str, *, kind: str) -> str:
        """The name of the group that speaks of the layer at `path`: by its path or its end, a pattern, or its class `kind`.

        Raises:
            ArtifactError: there is none, or a pattern takes longer than `SECONDS`.
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
            raise ArtifactError("no group of the quantization_config speaks of it")
        return self.named[kind]


@contextmanager
def patterns_limit() -> Iterator[None]:
    """Stops regular expressions that do not end.

    Raises:
        ArtifactError: the code inside takes longer than `SECONDS`.
    """
    slow = ArtifactError(f"the patterns of the quantization_config take more than {SECONDS} seconds: name layers")
    with time_limit(SECONDS, slow):
        yield


@contextmanager
def readable() -> Iterator[None]:
    """Says that the configuration is at fault where work on its values alone fails."""
    try:
        yield
    except (ArtifactError, GridError):
        raise
    except (KeyError, TypeError, AttributeError, ValueError, re.error, RecursionError, OverflowError) as error:
        raise ArtifactError(f"the quantization_config is not readable ({error!r})") from None
