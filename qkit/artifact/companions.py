"""The files beside the weights: the configuration, and the tokenizer and generation files of the original model."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final

from qkit.artifact.config import CONFIG
from qkit.errors import ArtifactError
from qkit.intake import parse_json, read_text
from qkit.sources.detect import FILES
from qkit.storage.marks import SEAL
from qkit.storage.other_models import is_pickle
from qkit.storage.read import INDEX_BYTES, checked_link, inside

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
#: Directories of companions that transformers reads beside the modules of `modules.json`.
FOLDERS: Final = ("additional_chat_templates", "feature_extractor", "image_processor", "processor", "tokenizer")
MODULES = "modules.json"  #: the layers that sentence-transformers adds to a model, and their directories
#: Files that the output has of its own, or that speak of other codes.
OWN: Final = (CONFIG, SEAL, *FILES)


def companions(origin: Path | None, *, config: Mapping[str, Any] | None) -> dict[str, bytes | Path]:
    """Files to write beside the weights, by name: bytes, or a file to copy. No code, no pickle and no hidden file is among them.

    Everything else that lies in the directory itself is copied: tokenizers, processors, chat templates, `modules.json`, licences.
    So are the directories of processors and chat templates, and those of sentence-transformers' modules with their float weights,
    to any depth. Files in a directory have names such as `1_Pooling/config.json`. Other directories, such as `original` and
    `onnx`, hold the model in another form, and are left behind.

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
    for folder in _folders(origin) if origin else ():
        assert origin is not None
        for file in _below(folder):
            weights = file.name.endswith(".safetensors")
            if file.is_file() and file.name != SEAL and (weights or file.name == CONFIG or _is_companion(file.name)):
                files[file.relative_to(origin).as_posix()] = checked_link(file, root=origin)
    return files


def left_behind(origin: Path, used: Collection[str]) -> tuple[str, ...]:
    """Names of files and directories of `origin` that are not among `used`; those in a directory of companions one by one."""
    found = []
    for entry in origin.iterdir():
        if any(name.startswith(f"{entry.name}/") for name in used):
            found += [name for one in _below(entry) if (name := one.relative_to(origin).as_posix()) not in used]
        elif entry.name not in used:
            found.append(entry.name)
    return tuple(sorted(found))


def _below(folder: Path) -> list[Path]:
    """The entries of `folder` and of the directories in it, but for hidden directories and links to directories."""
    found = []
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and not entry.is_symlink():
            found += [] if entry.name.startswith(".") else _below(entry)
        else:
            found.append(entry)
    return found


def _folders(origin: Path) -> list[Path]:
    """Directories in `origin` whose files are companions."""
    try:
        modules = parse_json(read_text(origin / MODULES, most=INDEX_BYTES)) if (origin / MODULES).is_file() else []
    except ValueError as error:
        raise ArtifactError(f"{origin / MODULES}: no JSON ({error}): fetch it again") from None
    named = [str(module["path"]) for module in modules if isinstance(module, dict) and module.get("path")]
    names = sorted({name for name in (*named, *FOLDERS) if _leads_down(name)})
    found: list[Path] = []
    for folder in (origin / name for name in names):
        links = any(one.is_symlink() for one in (folder, *folder.parents) if origin in one.parents)
        if folder.is_dir() and not links and not any(one in folder.parents for one in found):
            found.append(folder)
    return found


def _leads_down(name: str) -> bool:
    """Whether `name` is that of a directory below, and none of its parts is hidden."""
    parts = name.split("/")
    return all(part == Path(part).name and part and not part.startswith(".") for part in parts)


def _is_companion(name: str) -> bool:
    return not (name.startswith(".") or name in OWN or is_pickle(name) or name.lower().endswith((*WEIGHTS, *CODE)))
