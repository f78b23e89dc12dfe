"""The commands `mlx_lm.lora` and `mlx_lm_lora.train` on a model of qkit's. Beside `huggingface`, the only module with mlx-lm."""

import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.nn as nn
import numpy as np
import yaml

from qkit.errors import BackendError, RunError
from qkit.installation import how_to_install
from qkit_mlx.training.tuning import any_device

QUANTIZERS = ("qat_enable", "load_in_4bits", "load_in_6bits", "load_in_8bits", "load_in_mxfp4")  #: of mlx-lm-lora


def run_command(
    model: Path, arguments: Sequence[str], place: Path, prepare: Callable[[nn.Module], nn.Module]
) -> nn.Module:
    """See `RunsCommands.run_command`."""
    try:
        if "--train-mode" in arguments or "--train-type" in arguments:
            from mlx_lm_lora import train as command
        else:
            from mlx_lm import lora as command
    except ImportError as error:
        extra = "mlx-lm-lora" if "--train-mode" in arguments else "mlx-lm"
        raise BackendError(f"this command needs {extra} ({error}): {how_to_install(extra)}") from None
    options = _options(command, ["--model", str(model), "--train", "--adapter-path", str(place), *arguments])
    for name in QUANTIZERS:
        if getattr(options, name, None):
            raise RunError(
                f"--{name.replace('_', '-')} quantizes the model, and so does the recipe: leave it out, and name its grid by "
                "--recipe, with --packed for one that is loaded in few bits"
            )
    np.random.seed(options.seed)
    with any_device():
        return _trained(command, options, prepare)


def _options(command: Any, arguments: list[str]) -> types.SimpleNamespace:
    """The options of a command line, of its file, and the command's own defaults, in this order."""
    try:
        found = vars(command.build_parser().parse_args(arguments))
    except SystemExit:
        raise RunError(f"{command.__name__} does not take these options: {' '.join(arguments)}") from None
    file = yaml.load(Path(found["config"]).read_text(encoding="utf-8"), command.yaml_loader) if found["config"] else {}
    for table in (file, command.CONFIG_DEFAULTS):
        found |= {key: value for key, value in table.items() if found.get(key) is None}
    return types.SimpleNamespace(**found)


def _trained(command: Any, options: Any, prepare: Callable[[nn.Module], nn.Module]) -> nn.Module:
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load

    model, tokenizer = load(options.model)[:2]
    if tokenizer.eos_token_id is None:
        raise RunError(
            f"{command.__name__} ends rows with eos_token, and {options.model} names none: see tokenizer_config.json"
        )
    if command.__name__.startswith("mlx_lm."):
        train, valid, _ = command.load_dataset(options, tokenizer)
        model = prepare(model)
        command.train_model(options, model, train, valid)
        return model
    train, valid, _ = command.load_dataset(options, tokenizer)
    reference = command.load_reference_model(options) if options.train_mode == "dpo" else None
    model = prepare(model)
    lora = command.build_lora_config(options)
    if lora:
        model.freeze()
        layers = len(model.layers) if lora["num_layers"] in (None, -1) else lora["num_layers"]
        linear_to_lora_layers(model, layers, lora, use_dora=lora["use_dora"])
    command.train_model(
        args=options,
        model=model,
        tokenizer=tokenizer,
        adapter_file=Path(options.adapter_path) / "adapters.safetensors",
        reference_model=reference,
        train_set=command.CacheDataset(train),
        valid_set=command.CacheDataset(valid),
    )
    return model
