"""`qkit train MODEL OUT --recipe R --data FILES`, or `qkit train run.toml`, with progress. The work is in `qkit.training`."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from qkit.cli.completing import recipe_names
from qkit.cli.console import console, errors
from qkit.cli.eval import Device, Engine
from qkit.cli.quantize import Ignore, SkipIndivisible
from qkit.cli.stopping import Stopping

if TYPE_CHECKING:
    from qkit.training import Outcome

PICTURE = "loss.png"  #: in the run folder


def train(
    model: Annotated[
        Path,
        typer.Argument(metavar="MODEL", help="A Hugging Face directory, float or quantized; or a run file, run.toml."),
    ],
    out: Annotated[
        Path | None, typer.Argument(metavar="OUT", help="The directory of the artifact. Checkpoints go to OUT.run.")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            "-r",
            help="A recipe, an alias or a TOML file; 'float' for none. Left out: MODEL's own.",
            autocompletion=recipe_names,
        ),
    ] = None,
    init: Annotated[
        Path | None,
        typer.Option(
            help="A quantized directory of MODEL, such as a fitted one: training begins with its very codes and scales."
        ),
    ] = None,
    freeze_codes: Annotated[
        bool | None,
        typer.Option(
            "--freeze-codes", help="Keep the codes as they are: their scales train, beside the float tensors."
        ),
    ] = None,
    ignore: Ignore = None,
    skip_indivisible: SkipIndivisible = False,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="A file of text, of JSON Lines or of Parquet; a shell pattern; or a folder with a dataset. Rows have text, "
            "messages, or a prompt and a completion."
        ),
    ] = None,
    held_out: Annotated[list[str] | None, typer.Option(help="Data to measure on. Left out: some of the data.")] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="sft, dpo or orpo: by TRL on torch, and by mlx-lm-lora on MLX. Left out: the next token, by qkit."
        ),
    ] = None,
    loss_on: Annotated[
        str | None,
        typer.Option(help="completions or all. Left out: completions for rows with prompts, else all."),
    ] = None,
    chat: Annotated[
        bool | None, typer.Option("--chat", help="Prompts and completions are turns of a conversation, as in mlx-lm.")
    ] = None,
    packing: Annotated[
        bool | None, typer.Option("--packing/--no-packing", help="Cut sequences from rows in a row [yes].")
    ] = None,
    backend: Engine = None,
    device: Device = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps. Left out: once over the data.")] = None,
    batch: Annotated[int | None, typer.Option(help="Sequences in a micro-batch [8].")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens in a sequence [512].")] = None,
    accumulation: Annotated[int | None, typer.Option(help="Micro-batches in a step [1].")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="The peak learning rate [1e-5; adapters 2e-4].")] = None,
    schedule: Annotated[str | None, typer.Option(help="linear, cosine or constant [linear].")] = None,
    warmup: Annotated[str | None, typer.Option(help="A share of the steps, or a number of steps [0.03].")] = None,
    offset_learning_rate: Annotated[
        float | None, typer.Option(help="The peak learning rate of learned zero points and exponent offsets [0.03].")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="The seed of the order of the data, and of dropout [0].")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="The type of the master weights: float32 or bfloat16 [float32].")
    ] = None,
    checkpoint_every: Annotated[int | None, typer.Option(help="Steps between checkpoints [200].")] = None,
    evaluate_every: Annotated[
        int | None, typer.Option(help="Steps between evaluations. Left out: first and last.")
    ] = None,
    load_best_model_at_end: Annotated[
        bool | None,
        typer.Option(
            "--load-best-model-at-end", help="Ship the weights of the lowest held-out loss, not the last ones."
        ),
    ] = None,
    early_stopping_patience: Annotated[
        int | None, typer.Option(help="Evaluations in a row without a better one that end the run. Left out: none do.")
    ] = None,
    early_stopping_threshold: Annotated[
        float | None, typer.Option(help="How much lower a loss must be to count as better, in nats [0].")
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None, typer.Option(help="Recompute activations: less memory, more time.")
    ] = None,
    replace: Annotated[bool | None, typer.Option(help="Replace an artifact of qkit's in OUT.")] = None,
    key: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any key of a run file, as TOML: --set adapter.rank=8"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines, a line for each event.")] = False,
) -> None:
    """Train a model on the grid that it will be shipped on. After an interruption, the same command resumes."""
    from qkit.training import read_run, run_from_table, train_model  # here, so that other commands start fast
    from qkit.training.curve import draw_log
    from qkit.training.folder import LOG, run_folder_of

    given = {
        "out": out,
        "recipe": recipe,
        "init": init,
        "freeze_codes": freeze_codes,
        "ignore": ignore or None,
        "skip_indivisible": skip_indivisible or None,
        "data": data,
        "held_out": held_out,
        "method": method,
        "loss_on": loss_on,
        "chat": chat,
        "packing": packing,
        "backend": backend,
        "device": device,
        "steps": steps,
        "batch": batch,
        "length": length,
        "accumulation": accumulation,
        "learning_rate": learning_rate,
        "schedule": schedule,
        "warmup": warmup and _value("warmup", warmup),
        "offset_learning_rate": offset_learning_rate,
        "seed": seed,
        "dtype": dtype,
        "checkpoint_every": checkpoint_every,
        "evaluate_every": evaluate_every,
        "load_best_model_at_end": load_best_model_at_end,
        "early_stopping_patience": early_stopping_patience,
        "early_stopping_threshold": early_stopping_threshold,
        "gradient_checkpointing": gradient_checkpointing,
        "replace": replace,
    }
    table = read_run(model) if model.suffix == ".toml" else {"model": str(model)}
    table |= {
        name: str(value) if isinstance(value, Path) else value for name, value in given.items() if value is not None
    }
    for text in key or ():
        _put(table, text)
    run = run_from_table(table)
    if as_json:
        with Stopping(_print_json) as stopping:
            train_model(run, tell=stopping.tell, stop=stopping.asked)
        return
    folder = run_folder_of(run.out)

    def tell(event: Mapping[str, Any]) -> None:
        bar(event)
        drawable = find_spec("matplotlib") is not None
        if event["event"] == "end" and drawable:  # before the log has `end`: a run that is killed here resumes
            draw_log(folder / LOG, folder / PICTURE)

    with _Bar() as bar, Stopping(tell) as stopping:
        outcome = train_model(run, tell=stopping.tell, stop=stopping.asked)
    console.print(_table(outcome))
    console.print(f"{outcome.folder}: the artifact", highlight=False)
    if (folder / PICTURE).exists():
        console.print(f"{folder / PICTURE}: the loss curve", highlight=False)


def _put(table: dict[str, Any], text: str) -> None:
    """Puts `a.b=value` into `table`."""
    name, equals, value = text.partition("=")
    if not equals:
        raise typer.BadParameter(f"{text!r}: want KEY=VALUE")
    *outer, last = name.strip().split(".")
    for part in outer:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise typer.BadParameter(f"{text!r}: {part} has a value already, and is no table: leave one of them out")
    table[last] = _value(name, value)


def _value(name: str, text: str) -> Any:
    """`text` as TOML; text that is not TOML is a string, so that it needs no quotes."""
    import tomllib

    try:
        return tomllib.loads(f"x = {text}")["x"]
    except (ValueError, RecursionError):
        return text.strip()


def _print_json(event: Mapping[str, Any]) -> None:
    import json

    typer.echo(json.dumps(event))


class _Bar:
    """Progress on standard error where that is a terminal, else a line for each evaluation and checkpoint."""

    def __init__(self) -> None:
        columns = (BarColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
        self._bar = Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal)
        self._task = self._bar.add_task("reading", total=None)

    def __enter__(self) -> "_Bar":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Shows one event."""
        kind, step = event["event"], event["step"]
        if kind in ("start", "resume"):
            self._bar.update(self._task, total=event["steps"], completed=step)
            how = f"from step {step} on" if kind == "resume" else "from the beginning"
            errors.print(
                f"{event['steps']} steps on {event['backend']} {how}, tokens by {event['tokens']}, "
                f"{event['held_out']} sequences held out",
                highlight=False,
            )
        elif kind == "step":
            text = (
                f"step {step}  loss {event['loss']:.4f}  {event['tokens_per_second']:,.0f} tokens/s  "
                f"{event['seconds_left']:.0f} s left"
            )
            self._bar.update(self._task, completed=step, description=text)
        elif kind == "stop":
            errors.print(f"step {step}: a checkpoint is written; the same command goes on from here", highlight=False)
        elif kind == "early_stop":
            errors.print(f"step {step}: the held-out loss has not improved; training ends", highlight=False)
        elif kind == "evaluation":
            errors.print(f"step {step}: held-out loss {event['loss']:.4f}", highlight=False)


def _table(outcome: "Outcome") -> Table:
    table = Table("", "", show_header=False)
    held_out = (outcome.held_out_before, outcome.held_out_after, outcome.held_out_saved)
    before, after, saved = ("nothing held out" if loss is None else f"{loss:.4f}" for loss in held_out)
    difference = outcome.forward_difference
    for name, value in (
        ("loss, first steps", f"{outcome.first_loss:.4f} nats per token"),
        ("loss, last steps", f"{outcome.last_loss:.4f}"),
        ("held-out loss before", before),
        ("held-out loss after", after),
        ("held-out loss of the artifact, opened again", saved),
        (
            "largest logit difference, trained to converted",
            "not quantized" if difference is None else f"{difference:g}",
        ),
        ("layers with changed codes", f"{outcome.changed_layers:,} of {outcome.quantized_layers:,}"),
        ("steps", f"{outcome.steps:,}"),
        *(
            [("step of the artifact, the best evaluation", f"{outcome.best_step:,}")]
            if outcome.best_step is not None
            else []
        ),
        ("tokens", f"{outcome.tokens:,}"),
        ("seconds of training", f"{outcome.seconds:.0f}"),
    ):
        table.add_row(name, value)
    return table
