"""Files and directories that hold a model, or a part of one, in a way that qkit's commands do not open: a sentence for each."""

from pathlib import Path
from typing import Final

ADAPTERS: Final = ("adapter_config.json", "adapter_model.safetensors", "adapters.safetensors")
PICKLES: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
DIFFUSERS: Final = "model_index.json"
DIFFUSION: Final = "diffusion_pytorch_model"  #: beginning of the names of weights in one part of a diffusers model
GGUF: Final = ".gguf"
ONNX: Final = ".onnx"


def sentence(folder: Path) -> str:
    """A sentence about the model in `folder`, which has no `model.safetensors`, and about the command for it.

    Empty where nothing in the folder is known.
    """
    names = sorted(entry.name for entry in folder.iterdir())
    if any(name in ADAPTERS for name in names):
        return (
            f"{folder} is an adapter (LoRA), not a model: qkit merge BASE {folder} OUT merges it into its base, and "
            "qkit.adapters.load(model, FOLDER) puts it on a model"
        )
    if DIFFUSERS in names or any(name.startswith(DIFFUSION) for name in names):
        return (
            f"{folder} is a diffusers model: qkit has no command for it; open it with diffusers, then "
            "qkit.prepare(pipe.transformer, recipe) or qkit.convert takes its modules"
        )
    for name in names:
        if name.lower().endswith(GGUF):
            return gguf(folder / name)
    for name in (*names, *(f"onnx/{entry.name}" for entry in (folder / "onnx").glob(f"*{ONNX}"))):
        if name.lower().endswith(ONNX):
            return f"{folder} has its model in {name}, an ONNX graph: qkit takes the model that it was exported from"
    pickles = [name for name in names if is_pickle(name)]
    if pickles:
        return (
            f"{folder} has its weights in {pickles[0]}, a pickle, which can run code: qkit opens none; let the model's publisher "
            "or a machine that you can lose write it as safetensors, by AutoModel.from_pretrained(DIR).save_pretrained(OUT)"
        )
    return ""


def gguf(file: Path) -> str:
    """The sentence about a GGUF file."""
    return f"{file} is a GGUF file: qkit import {file} OUT makes a directory of it, which every command takes"


def is_pickle(name: str) -> bool:
    """Whether a file of this name is a pickle, which can run code when a program reads it."""
    return name.endswith(PICKLES)
