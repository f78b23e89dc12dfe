"""The files beside the weights: the configuration, and the tokenizer and generation files of the original model."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from qkit.artifact.config import CONFIG, MODELOPT
from qkit.storage.marks import SEAL
from qkit.storage.read import inside, is_pickle

#: Weights in any format, which the output replaces.
WEIGHTS: Final = (
    ".safetensors",
    ".gguf",
    ".ggml",
    ".h5",
    ".msgpack",
    ".onnx",
    ".ot",
    ".npz",
    ".tflite",
    ".pth.tar",
    ".index.json",
)
CODE: Final = (".py", ".pyc", ".so", ".dll", ".dylib", ".sh", ".bat", ".ipynb", ".exe")
#: Files that the output has of its own, or that speak of other codes.
OWN: Final = (CONFIG, SEAL, MODELOPT, "quantize_config.json", "quant_config.json")


def companions(origin: Path | None, *, config: Mapping[str, Any] | None) -> dict[str, bytes | Path]:
    """Files to write beside the weights, by name: bytes, or a file to copy. No code, no pickle and no hidden file is among them.

    Everything else that lies in the directory itself is copied: tokenizers, processors, chat templates, `modules.json`, licences.

    Args:
        origin: the Hugging Face directory of the original model; None where only the configuration is known.
        config: content of the `config.json` to write; None writes none.

    Raises:
        ArtifactError: one of the files is a link out of `origin`.
    """
    files: dict[str, bytes | Path] = {}
    if config is not None:
        files[CONFIG] = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    for file in sorted(origin.iterdir()) if origin else ():
        if file.is_file() and _is_companion(file.name):
            files[file.name] = inside(file.parent, file.name)
    return files


def _is_companion(name: str) -> bool:
    return not (name.startswith(".") or name in OWN or is_pickle(name) or name.lower().endswith((*WEIGHTS, *CODE)))
