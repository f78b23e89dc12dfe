"""A training run as a value: every key of a run file, checked once. Runs are the same on every engine."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from qkit.adapters.adapter import Adapter, adapter_from_table
from qkit.engines.trainer import OFFSET_RATE, Distillation
from qkit.engines.tuning import METHODS, Method
from qkit.errors import QkitError, RunError
from qkit.intake import check_values, read_text
from qkit.training.rates import SHAPES, Shape
from qkit.training.records import LossOn
from qkit.training.schedule import Schedule, schedule_from_table, schedule_table

FLOAT = "float"  #: the name, in place of a recipe, of training without one


RATES = {False: 1e-5, True: 2e-4}  #: default learning rates: of all weights, and of adapters
UNSET: Any = None  #: stands for the default until a run knows whether it has an adapter


@dataclass(frozen=True, slots=True)
class Teaching:
    """The source of a teacher's logits, a model's directory or a file of `teach`, and their part in the loss."""

    teacher: Path
    loss: Distillation


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One training run.

    Attributes:
        model: a Hugging Face directory, float or quantized. Training of a quantized one starts from its values.
        out: the directory of the artifact. Checkpoints and the log go beside it, into `OUT.run`.
        init: a quantized directory of `model`, fitted or not, with whose very codes and scales training begins.
        method: `sft`, `dpo` or `orpo`: TRL carries out the steps on torch, mlx-lm-lora on MLX. None: qkit, on the next token.
        beta: of `dpo` and `orpo`, as in these libraries.
        data, held_out: files, shell patterns and folders with a dataset. Without `held_out`, one sequence in twenty of `data`, at
            most 64.
        loss_on: `completions` learns completions and the assistant's turns alone; None does so for prompts with completions only.
        chat: whether prompts and completions that are texts are turns of a conversation, as in mlx-lm.
        packing: whether sequences are cut from rows one after another; else each row is a sequence, filled up to `length`.
        recipe: a name or a TOML file; `float` trains without one; None takes the rules of a quantized `model`.
        ignore: shell patterns of layers that stay in float whatever the recipe says.
        skip_indivisible: whether layers that do not divide into groups stay in float, too.
        freeze_codes: whether codes stay as they are, so that scales train alone, beside the tensors that stay in float.
        backend, device: None: the first engine that is ready, and its default device.
        steps: optimizer steps. None: once over the data.
        batch, length, accumulation: sequences in a micro-batch, tokens in each, micro-batches in a step.
        learning_rate, schedule, warmup: the peak, by default 2e-4 for adapters and 1e-5 else; its shape; a share of the steps
            (0.03) or a number of them (20).
        offset_learning_rate: the peak for learned zero points and exponent offsets, whose unit is a whole code or power of two;
            it rises and falls with `learning_rate`. 0 leaves them at the values of the grid's own rule.
        weight_decay: of matrices. The default is 0: decay of master weights also shrinks the scales of their groups.
        betas, clip: AdamW's; the largest norm of a gradient.
        seed: of the order of the data, and of dropout.
        dtype: of the master weights. In bfloat16, a step of 1e-5 is mostly rounded away. The artifact has the type of `model`.
        autocast: float32 master weights with bfloat16 products, if the engine offers this.
        checkpoint_every, evaluate_every: numbers of steps. None: evaluates before the first and after the last step.
        load_best_model_at_end: whether the artifact has the weights of the evaluation with the lowest loss, not the last ones.
            Evaluations are on the recipe's grid, and the one before the first step counts.
        early_stopping_patience: how many evaluations in a row without a better one end it, from the first on the own grid.
        early_stopping_threshold: how much lower than the best loss before, in nats, an evaluation must be to count as better.
        gradient_checkpointing, compile: see `qkit.engines.trainer.TrainerOptions`.
        replace: whether an artifact of qkit's in `out` may be replaced.
        adapter: trains in place of the weights, and is merged at the end. Without `recipe`, a quantized `model` stays packed.
        quantization: the schedule of quantization.
        distillation: a teacher, if any.

    Raises:
        RunError: a value is of the wrong type or out of range; the message names its key.
    """

    model: Path
    out: Path
    data: tuple[str, ...]
    init: Path | None = None
    held_out: tuple[str, ...] = ()
    method: Method | None = None
    beta: float = 0.1
    loss_on: LossOn | None = None
    chat: bool = False
    packing: bool = True
    recipe: str | None = None
    ignore: tuple[str, ...] = ()
    skip_indivisible: bool = False
    freeze_codes: bool = False
    backend: str | None = None
    device: str | None = None
    steps: int | None = None
    batch: int = 8
    length: int = 512
    accumulation: int = 1
    learning_rate: float = UNSET
    schedule: Shape = "linear"
    warmup: float | int = 0.03
    offset_learning_rate: float = OFFSET_RATE
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 1.0
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    autocast: bool = False
    checkpoint_every: int = 200
    evaluate_every: int | None = None
    load_best_model_at_end: bool = False
    early_stopping_patience: int | None = None
    early_stopping_threshold: float = 0.0
    gradient_checkpointing: bool = False
    compile: bool | None = None
    replace: bool = False
    adapter: Adapter | None = None
    quantization: Schedule = field(default_factory=Schedule)
    distillation: Teaching | None = None

    def __post_init__(self) -> None:
        if self.learning_rate is UNSET:
            object.__setattr__(self, "learning_rate", RATES[self.adapter is not None])
        for key, wanted in (("data", "file names"), ("held_out", "file names"), ("ignore", "patterns")):
            files = getattr(self, key)
            _want(key, files, isinstance(files, tuple) and all(isinstance(f, str) and f for f in files), wanted)
        _want("data", self.data, bool(self.data), "at least one file")
        for key in ("recipe", "backend", "device"):
            text = getattr(self, key)
            _want(key, text, text is None or (isinstance(text, str) and bool(text)), "a name")
        for key in ("batch", "length", "accumulation", "checkpoint_every"):
            _want(key, getattr(self, key), _whole(getattr(self, key), 1), "a whole number from 1 on")
        for key in ("steps", "evaluate_every", "early_stopping_patience"):
            number = getattr(self, key)
            _want(key, number, number is None or _whole(number, 1), "a whole number from 1 on")
        _want("seed", self.seed, _whole(self.seed, 0), "a whole number from 0 on")
        for key in ("learning_rate", "clip"):
            _want(key, getattr(self, key), _number(getattr(self, key)) and getattr(self, key) > 0, "a number above 0")
        _want("learning_rate", self.learning_rate, math.isfinite(self.learning_rate), "a finite number")
        _want("schedule", self.schedule, self.schedule in SHAPES, f"one of {', '.join(SHAPES)}")
        share = isinstance(self.warmup, float) and 0 <= self.warmup < 1
        _want("warmup", self.warmup, share or _whole(self.warmup, 0), "a share below 1, or a whole number of steps")
        for key in ("weight_decay", "offset_learning_rate", "early_stopping_threshold"):
            number = getattr(self, key)
            _want(key, number, _number(number) and 0 <= number < math.inf, "a number from 0 on")
        _want("method", self.method, self.method in (None, *METHODS), f"one of {', '.join(METHODS)}")
        _want("beta", self.beta, _number(self.beta) and 0 < self.beta < math.inf, "a number above 0")
        if self.method and self.distillation:
            raise RunError(f"method = {self.method!r} takes no teacher: leave one of them out")
        _want("loss_on", self.loss_on, self.loss_on in (None, "all", "completions"), "all or completions")
        pair = self.betas if isinstance(self.betas, tuple) and len(self.betas) == 2 else (None,)
        _want("betas", self.betas, all(_number(b) and 0 <= b < 1 for b in pair), "two numbers from 0 to below 1")
        _want("dtype", self.dtype, self.dtype in ("float32", "bfloat16"), "float32 or bfloat16")
        flags = ("autocast", "gradient_checkpointing", "replace", "skip_indivisible", "freeze_codes", "chat", "packing")
        for key in (*flags, "load_best_model_at_end"):
            _want(key, getattr(self, key), isinstance(getattr(self, key), bool), "true or false")
        _want("compile", self.compile, self.compile is None or isinstance(self.compile, bool), "true or false")
        self._check_evaluations()
        _want_multiple("checkpoint_every", self.checkpoint_every, self.quantization.interval)
        ramp = self.quantization.ramp
        if ramp and self.steps is not None and ramp[-1][0] >= self.steps:
            raise RunError(
                f"quantization.ramp ends at step {ramp[-1][0]}, and steps is {self.steps}: leave steps to the recipe"
            )
        if self.autocast and self.dtype != "float32":
            raise RunError(f"autocast is for float32 master weights, and dtype is {self.dtype!r}: leave one out")
        needs = {"init": "codes are on", "freeze_codes": "codes are on", "adapter": "an adapter is trained on"}
        for key, what in needs.items():
            if getattr(self, key) and self.recipe == FLOAT:
                raise RunError(f"{key}: {what} a grid, and recipe is {FLOAT!r}: name another recipe")
        if self.freeze_codes and self.adapter:
            raise RunError("freeze_codes: an adapter changes codes: leave one of them out")

    def _check_evaluations(self) -> None:
        """Refuses a best evaluation, or an end by evaluations, without evaluations to choose from."""
        best, patience = self.load_best_model_at_end, self.early_stopping_patience
        key = "load_best_model_at_end" if best else "early_stopping_patience" if patience else None
        if self.method and bool(self.held_out) != bool(self.evaluate_every):
            raise RunError(
                f"method = {self.method!r} evaluates on held_out, each evaluate_every steps: give both, or none"
            )
        if key and self.evaluate_every is None:
            raise RunError(f"{key} needs evaluations to choose from: give evaluate_every, a number of steps")
        if self.early_stopping_threshold and patience is None:
            raise RunError("early_stopping_threshold is for early_stopping_patience: give both, or leave it out")
        if self.evaluate_every and (best or self.quantization.ramp):  # both touch the frozen values between refreshes
            _want_multiple("evaluate_every", self.evaluate_every, self.quantization.interval)


def run_from_table(table: Mapping[str, Any]) -> Run:
    """The run that a parsed TOML table describes.

    Raises:
        RunError: a key is unknown, missing or wrong. The message names it, and the closest known key.
    """
    known = [one.name for one in fields(Run)]
    _only(table, known, "")
    for key in ("model", "out", "data"):
        if key not in table:
            raise RunError(f"{key} is missing: a run needs model, out and data")
    made = dict(table)
    for key in sorted({"model", "out", "init"} & made.keys()):
        _want(key, made[key], isinstance(made[key], (str, Path)) and bool(str(made[key])), "a folder")
        made[key] = Path(made[key])
    for key in ("data", "held_out", "ignore", "betas"):
        if key in made:
            many = [made[key]] if isinstance(made[key], str) else made[key]
            _want(key, many, isinstance(many, Sequence), "a list")
            made[key] = tuple(many)
    for key in ("adapter", "quantization", "distillation"):
        if key in made:
            _want(key, made[key], isinstance(made[key], Mapping), "a table")
    if "adapter" in made:
        made["adapter"] = _adapter(made["adapter"])
    if "quantization" in made:
        made["quantization"] = schedule_from_table(made["quantization"])
    if "distillation" in made:
        made["distillation"] = _teaching(made["distillation"])
    return Run(**made)


def run_table(run: Run) -> dict[str, Any]:
    """The inverse of `run_from_table`: every key that is not None, as plain values for files."""
    table = {key: value for key, value in asdict(run).items() if value is not None}
    table |= {key: str(table[key]) for key in ("model", "out", "init") if key in table}
    table |= {key: list(table[key]) for key in ("data", "held_out", "ignore", "betas")}
    table["quantization"] = schedule_table(run.quantization)
    if run.adapter:
        table["adapter"] = {**asdict(run.adapter), "match": list(run.adapter.match)}
    if run.distillation:
        table["distillation"] = {"teacher": str(run.distillation.teacher), **asdict(run.distillation.loss)}
    return table


def read_run(file: Path) -> dict[str, Any]:
    """The table in a run file.

    Raises:
        RunError: the file is missing, or not TOML.
    """
    import tomllib  # here, so that commands start fast

    try:
        table = tomllib.loads(read_text(file))
        check_values(table)
    except (OSError, ValueError) as error:
        raise RunError(f"{file}: {error}") from None
    except RecursionError:
        raise RunError(f"{file}: it is nested too deep: write flat tables") from None
    return table


def _adapter(table: Mapping[str, Any]) -> Adapter:
    try:
        return adapter_from_table(table)
    except QkitError as error:
        raise RunError(f"adapter: {error}") from None


def _teaching(table: Mapping[str, Any]) -> Teaching:
    _only(table, ("teacher", "temperature", "weight"), "distillation.")
    teacher, temperature, weight = table.get("teacher"), table.get("temperature", 1.0), table.get("weight", 1.0)
    if not isinstance(teacher, (str, Path)) or not str(teacher):
        raise RunError(f"distillation.teacher is {teacher!r}: want a model's directory, or a file of logits")
    _want("distillation.temperature", temperature, _number(temperature) and temperature > 0, "a number above 0")
    _want("distillation.weight", weight, _number(weight) and 0 < weight <= 1, "a number above 0, up to 1")
    return Teaching(Path(teacher), Distillation(float(temperature), float(weight)))


def _only(table: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in table:
        if key not in known:
            close = get_close_matches(key, known, n=1, cutoff=0.5)
            way_out = f"did you mean {where}{close[0]}?" if close else f"there is {', '.join(known)}"
            raise RunError(f"unknown key {where}{key}: {way_out}")


def _want(key: str, value: Any, good: bool, what: str) -> None:
    if not good:
        raise RunError(f"{key} is {value!r}: want {what}")


def _want_multiple(key: str, number: int, interval: int) -> None:
    """Refuses a number of steps that is between two refreshes of the quantized values."""
    if number % interval:
        near = max(1, number // interval) * interval
        raise RunError(
            f"{key} is {number}, and quantization.interval {interval}: a run goes on where values are refreshed, so make it a "
            f"multiple, such as {near}"
        )


def _whole(value: Any, least: int) -> bool:
    return type(value) is int and value >= least


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value
