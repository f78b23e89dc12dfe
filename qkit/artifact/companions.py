"""The files beside the weights: the configuration, and the tokenizer and generation files of the original model."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from qkit.artifact.config import CONFIG
from qkit.storage.read import inside, is_pickle

PATTERNS: Final = (
    "generation_config.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "chat_template*",
    "added_tokens.json",
    "preprocessor_config.json",
    "processor_config.json",
)
CODE: Final = (".py", ".so", ".sh", ".ipynb")


def companions(origin: Path | None, *, config: Mapping[str, Any] | None) -> dict[str, bytes | Path]:
    """Files to write beside the weights, by name: bytes, or a file to copy. No code and no pickle is among them.

    Args:
        origin: the Hugging Face directory of the original model; None where only the configuration is known.
        config: content of the `config.json` to write; None writes none.

    Raises:
        ArtifactError: one of the files is a link out of `origin`.
    """
    files: dict[str, bytes | Path] = {}
    if config is not None:
        files[CONFIG] = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    for pattern in PATTERNS:
        for file in origin.glob(pattern) if origin else ():
            if file.is_file() and not is_pickle(file.name) and not file.name.endswith(CODE):
                files[file.name] = inside(file.parent, file.name)
    return files
