"""The inputs of a run: its engine, its text and its teacher; and a file of a teacher's logits for later runs."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qkit.artifact.config import read_config
from qkit.artifact.load import load
from qkit.artifact.snapshot import Snapshot
from qkit.engines.abilities import require
from qkit.engines.protocol import Builds, Trains
from qkit.engines.registry import backend as choose
from qkit.errors import CutWarning, RunError
from qkit.exchange.import_model import read_model
from qkit.training.data import Sequences, padded, sequences, split
from qkit.training.run import Run
from qkit.training.teacher import Tick, check_absent, write_top
from qkit.training.text import Text, find, read_text

Tell = Callable[[Mapping[str, Any]], None]  #: takes each event of the log, as plain values


def check_files(run: Run) -> None:
    """Refuses missing text files, before any slow work.

    Raises:
        RunError: see `find`.
    """
    find(run.data)
    find(run.held_out)


def engine_of(run: Run) -> Trains:
    """The engine that trains, on the run's device.

    Raises:
        BackendError: the engine cannot train, or has no such device.
    """
    engine = require(choose(run.backend), Trains)
    return engine.on(run.device) if run.device else engine


def text_of(run: Run, source: Snapshot) -> tuple[Sequences, Sequences, str]:
    """The training set, the held-out set, and the kind of tokens (`tokenizer.json` or `bytes`) for the model in `source`.

    Raises:
        RunError: the text or the length does not fit the model.
    """
    config = source.config or {}
    longest = config.get("max_position_embeddings")
    if isinstance(longest, int) and run.length > longest:
        raise RunError(f"length is {run.length}, and the model has positions for {longest}: make it shorter")
    text = _read(run, run.data, config, "train")
    data = _cut(run, text)
    if not run.held_out:
        return *split(data), text.kind
    return data, _cut(run, _read(run, run.held_out, config, "held_out")), text.kind


def _read(run: Run, patterns: Sequence[str], config: Mapping[str, Any], purpose: str) -> Text:
    return read_text(patterns, folder=run.model, config=config, loss_on=run.loss_on, chat=run.chat, purpose=purpose)


def _cut(run: Run, text: Text) -> Sequences:
    """The sequences of a text: rows one after another, or each in a sequence of its own. Warns of rows that lose their ends."""
    if run.packing:
        return sequences(text.tokens, length=run.length, name=text.name, learned=text.learned)
    sizes = np.diff(text.ends, prepend=0)
    cut, whole = int((sizes > run.length).sum()), len(sizes)
    made = padded(text.tokens, text.ends, length=run.length, name=text.name, learned=text.learned)
    if cut:
        lost = whole - len(made)
        message = f"{cut:,} of {whole:,} rows of {text.name} are longer than length {run.length} and lose their ends"
        warnings.warn(message + f"; {lost:,} of them lose all that is learned" * (lost > 0), CutWarning, stacklevel=2)
    return made


def teacher_of(engine: Builds, folder: Path, source: Snapshot) -> Any:
    """The teacher in `folder`, with numbers of its own type.

    Raises:
        RunError: its vocabulary is not that of `source`.
    """
    theirs, ours = ((config or {}).get("vocab_size") for config in (read_config(folder), source.config))
    if theirs != ours:
        raise RunError(
            f"the teacher {folder} has a vocabulary of {theirs}, and {source.folder} one of {ours}: take one with "
            "the same tokenizer"
        )
    return load(folder, backend=engine)


def teach(run: Run, file: Path, *, top: int, tick: Tick = lambda done, of: None) -> None:
    """Writes into `file` the `top` largest logits of the run's teacher, a directory, on the whole training set of the run.

    The same run with `file` as its teacher then learns from them. See `write_top`.

    Raises:
        RunError: the run has no such teacher; or see `text_of` and `teacher_of`.
    """
    check_absent(file)
    named = run.distillation.teacher if run.distillation else None
    if named is None or not named.is_dir():
        raise RunError(f"distillation.teacher is {named or 'not there'}: name the directory of a model")
    engine, source = engine_of(run), read_model(run.model)
    data, _, _ = text_of(run, source)
    write_top(engine, teacher_of(engine, named, source), data, file, k=top, tick=tick)
