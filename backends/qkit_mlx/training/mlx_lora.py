"""The commands `mlx_lm.lora` and `mlx_lm_lora.train` on a model of qkit's. Beside `huggingface`, the only module with mlx-lm."""

import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.nn as nn
import numpy as np
import yaml

from qkit.engines.tuning import Command, Quantizer
from qkit.errors import BackendError, RunError
from qkit.installation import how_to_install
from qkit.training.records import messages_of
from qkit.training.rows import read_rows
from qkit_mlx.training import resumed
from qkit_mlx.training.tuning import any_device

Prepare = Callable[[nn.Module], nn.Module]
Follow = Callable[[Any], Callable[[int], None]] | None

#: Options that mlx-lm-lora has, and mlx-lm has not.
OTHERS = ("--train-mode", "--train-type", "--qat-", "--load-in-", "--epochs", "--beta", "--sft-loss-type")
LOADS = {
    "load_in_4bits": 4,
    "load_in_6bits": 6,
    "load_in_8bits": 8,
    "load_in_mxfp4": 4,
}  #: and their bits, in its order
LOADED_GROUP = 128  #: of the integers that it loads
MESSAGES = {"messages", "prompt", "completion", "chosen", "rejected"}  #: keys of rows that may have lists of messages
REFERENCES = (
    "dpo",
    "ftpo",
    "grpo",
    "online_dpo",
    "ppo",
    "rlhf_reinforce",
    "xpo",
)  #: its modes that compare with a model
JUDGED = ("online_dpo", "ppo", "rlhf_reinforce", "xpo")  #: its modes with a judge


def read_command(arguments: Sequence[str]) -> Command:
    """See `RunsCommands.read_command`."""
    other = any(one.startswith(OTHERS) for one in arguments)
    try:
        if other:
            from mlx_lm_lora import train as command
        else:
            from mlx_lm import lora as command
    except ImportError as error:
        library, extra = ("mlx-lm-lora", "train-mlx") if other else ("mlx-lm", "mac")
        raise BackendError(f"this command needs {library} ({error}): {how_to_install(extra)}") from None
    options = _options(command, ["--train", *arguments])
    return Command(
        "mlx_lm_lora.train" if other else "mlx_lm.lora",
        Path(options.model),
        Path(options.adapter_path),
        _quantizer(options) if other else None,
        (command, options),
    )


def run_command(command: Command, model: Path, place: Path, prepare: Prepare, follow: Follow) -> nn.Module:
    """See `RunsCommands.run_command`."""
    tool, options = command.options
    ours = {"model": str(model), "adapter_path": str(place), **dict.fromkeys(("qat_enable", *LOADS), False)}
    options = types.SimpleNamespace(**vars(options) | ours)
    np.random.seed(options.seed)
    with any_device():
        train = _train_other if command.name == "mlx_lm_lora.train" else _train
        return train(tool, options, prepare, follow)


def _options(command: Any, arguments: list[str]) -> types.SimpleNamespace:
    """The options of a command line, of its file, and the command's own defaults, in this order."""
    try:
        found = vars(command.build_parser().parse_args(arguments))
    except SystemExit:
        raise RunError(f"{command.__name__} does not take these options: {' '.join(arguments)}") from None
    file = _file(Path(found["config"]), command.yaml_loader) if found["config"] else {}
    for table in (file, command.CONFIG_DEFAULTS):
        found |= {key: value for key, value in table.items() if found.get(key) is None}
    return types.SimpleNamespace(**found)


def _file(path: Path, loader: Any) -> Mapping[str, Any]:
    try:
        table = yaml.load(path.read_text(encoding="utf-8"), loader)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RunError(f"{path}: {str(error).splitlines()[0]}") from None
    if not isinstance(table, Mapping):
        raise RunError(f"{path} is no file of options: want `name: value` in each line")
    return table


def _quantizer(options: Any) -> Quantizer | None:
    """The quantizer of mlx-lm-lora's options.

    Raises:
        RunError: they ask for two.
    """
    asked = [f"--{name.replace('_', '-')}" for name in ("qat_enable", *LOADS) if getattr(options, name)]
    if len(asked) > 1:
        raise RunError(f"{asked[0]} and {asked[1]} quantize one model twice: leave one of them out")
    if options.qat_enable:
        bits, group = options.qat_bits, max(options.qat_group_size, 0)
        return Quantizer(asked[0], False, "affine", bits, group, options.qat_start_step, options.qat_interval)
    name = next((name for name in LOADS if getattr(options, name)), None)
    if name is None:
        return None
    if options.train_type == "full":
        raise RunError(f"{asked[0]} leaves no weight to train with --train-type full: take lora, or --qat-enable")
    kind, group = ("mxfp4", 32) if name == "load_in_mxfp4" else ("affine", LOADED_GROUP)
    return Quantizer(asked[0], True, kind, LOADS[name], group)  # type: ignore[arg-type]


def _load(options: Any, tool: str) -> tuple[nn.Module, Any]:
    from mlx_lm.utils import load

    model, tokenizer = load(options.model)[:2]
    if tokenizer.eos_token_id is None:
        raise RunError(f"{tool} ends rows with eos_token, and {options.model} names none: see tokenizer_config.json")
    return model, tokenizer


def _train(tool: Any, options: Any, prepare: Prepare, follow: Follow) -> nn.Module:
    """The model, trained by mlx-lm, whose command puts its adapters on by itself."""
    model, tokenizer = _load(options, "mlx_lm.lora")
    train, valid, _ = _data(tool, options, tokenizer)
    base = options.qkit_base = resumed.digest(model)  # the command writes its options beside the adapters
    if options.resume_adapter_file:
        resumed.check_base(options.resume_adapter_file, base, digest_of=_digest_of)
        resumed.check_shapes(options.resume_adapter_file, _adapters(options))
    model = prepare(model)
    tool.train_model(options, model, train, valid)
    return model


def _train_other(tool: Any, options: Any, prepare: Prepare, follow: Follow) -> nn.Module:
    """The model, trained by mlx-lm-lora as its `run` does."""
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model, tokenizer = _load(options, "mlx_lm_lora.train")
    tool.ensure_chat_template(tokenizer)
    train, valid, _ = _data(tool, options, tokenizer)
    mode = options.train_mode
    compares = mode in REFERENCES or (mode == "dsla" and options.dsla_loss == "dpo")
    reference = tool.load_reference_model(options) if compares else None
    judge, words = tool.load_judge_model(options, reference) if mode in JUDGED else (None, None)
    base = resumed.digest(model)
    if options.resume_adapter_file:
        resumed.check_base(options.resume_adapter_file, base, digest_of=_digest_of)
    model = prepare(model)
    lora = tool.build_lora_config(options)
    if lora:
        model.freeze()
        layers = len(model.layers) if lora["num_layers"] in (None, -1) else lora["num_layers"]
        linear_to_lora_layers(model, layers, lora, use_dora=lora["use_dora"])
    if options.resume_adapter_file:
        resumed.check_shapes(options.resume_adapter_file, model)
    resumed.note_base(Path(options.adapter_path), base)
    callback = None
    if follow:
        callback = _Follower(follow(model), options.gradient_accumulation_steps)
        options.steps_per_report = options.gradient_accumulation_steps  # the callback comes with reports
    tool.train_model(
        args=options,
        model=model,
        tokenizer=tokenizer,
        adapter_file=Path(options.adapter_path) / "adapters.safetensors",
        reference_model=reference,
        judge_model=judge,
        judge_tokenizer=words,
        train_set=tool.CacheDataset(train),
        valid_set=tool.CacheDataset(valid),
        training_callback=callback,
    )
    return model


def _data(tool: Any, options: Any, tokenizer: Any) -> Any:
    """The tool's data sets, each row of them read once, so that a bad one is named before the first step.

    Raises:
        RunError: a row cannot be read, or has nothing to learn.
    """
    _check_rows(Path(options.data))
    try:
        sets = tool.load_dataset(options, tokenizer)
    except (ValueError, KeyError) as error:
        raise _unreadable(options, "the data", error) from None
    for name, rows in zip(("train", "valid"), sets, strict=False):
        for number in range(len(rows)):
            where = f"row {number + 1} of {name}"
            try:
                made = rows.process(rows[number])
            except Exception as error:  # of the data, of the template, or of the tokenizer
                raise _unreadable(options, where, error) from None
            if (
                isinstance(made, tuple)
                and isinstance(made[1], int)
                and made[1] >= min(len(made[0]), options.max_seq_length)
            ):
                raise RunError(
                    f"--data {options.data}: {where} has no token to learn after its prompt: leave it out, or make "
                    "--max-seq-length longer"
                )
    return sets


def _check_rows(folder: Path) -> None:
    """Refuses messages without roles, which many templates write without a word, and empty completions.

    Raises:
        RunError: a message has no role or no content, or a completion is empty.
    """
    for path in (folder / "train.jsonl", folder / "valid.jsonl"):
        for number, row in enumerate(read_rows(path) if path.is_file() else (), start=1):
            if row.get("completion", "x") in ("", []):
                raise RunError(f"data: row {number} of {path} has an empty completion: leave it out, or fill it")
            for key in MESSAGES & row.keys():
                if isinstance(row[key], list):
                    messages_of(f"row {number} of {path}", row[key])


def _unreadable(options: Any, where: str, error: Exception) -> RunError:
    return RunError(
        f"--data {options.data}: {where} cannot be read ({type(error).__name__}: {error!s:.150}): give rows with text, with "
        "messages that have roles, or with a prompt and its answers; and a chat template beside the model"
    )


def _digest_of(folder: str) -> str:
    from mlx_lm.utils import load

    return resumed.digest(load(folder, lazy=True)[0])


def _adapters(options: Any) -> nn.Module:
    """The float model with the adapters that mlx-lm's command would put on, whose arrays nobody computes."""
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load

    model: nn.Module = load(options.model, lazy=True)[0]
    if options.fine_tune_type != "full":
        model.freeze()
        dora = options.fine_tune_type == "dora"
        linear_to_lora_layers(model, options.num_layers, options.lora_parameters, use_dora=dora)
    return model


class _Follower:
    """Calls the schedule before each step: before the first at once, and then with the report of the step before."""

    def __init__(self, before: Callable[[int], None], iterations: int) -> None:
        self._before, self._iterations = before, iterations
        before(1)

    def on_train_loss_report(self, report: Mapping[str, Any]) -> None:
        """Begins the next step."""
        self._before(report["iteration"] // self._iterations + 1)

    def on_val_loss_report(self, report: Mapping[str, Any]) -> None:
        """Changes nothing."""
