"""The run folder beside an artifact: its lock, its log, and the check that its checkpoint belongs to the same run."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qkit.errors import ArtifactError, RunError
from qkit.storage import swap
from qkit.storage.destination import check_directory, check_writable, destination
from qkit.storage.marks import MARK, SEAL, check_own, mark
from qkit.storage.staging import make_parents, remove_empty, replaced_file
from qkit.training.checkpoint import Checkpoint

LOCK, LOG = "lock", "log.jsonl"

#: Keys of a run that may change when it resumes. They do not affect training, or `check_same` compares the content they name.
FREE = frozenset(
    ("model", "out", "data", "held_out", "recipe", "backend", "device", "checkpoint_every", "evaluate_every", "replace")
)
FREE |= {"gradient_checkpointing", "compile", "early_stopping_patience", "early_stopping_threshold"}


def run_folder_of(out: Path) -> Path:
    """The run folder of the artifact `out`: `OUT.run`, beside the real place of `out` if that is a link."""
    path = destination(out).path
    return path.with_name(f"{path.name}.run")


def check_out(out: Path, *, replace: bool) -> None:
    """Refuses, before any work, an `out` that cannot be written, or that holds a model which must not be replaced.

    Accepts a model in `out` if its run was killed after its last step. `check_saved` then tells whether it is the model of
    that run.

    Raises:
        ArtifactError: `out` holds a model and `replace` is false, or a model that qkit did not write; or it is a mount point,
            and checkpoints cannot go beside it; or see `check_directory`.
        PlanError: the disk is read-only.
    """
    place, folder = check_directory(out), run_folder_of(out)
    if place.mounted:
        raise ArtifactError(
            f"{out} is a mount point, and checkpoints go beside the model: choose a directory inside it, such as {out / 'model'}"
        )
    run = destination(folder).path  # a link may lead to another disk
    _check_run_folder(run)
    check_writable(run / LOCK)
    if place.path.exists() and any(place.path.iterdir()) and not replace and not _was_ending(folder):
        raise _holds_a_model(out)


def _was_ending(folder: Path) -> bool:
    """Whether the run in `folder` took its last step but was killed before it ended."""
    events = read_log(folder / LOG)
    steps = next((event["steps"] for event in reversed(events) if event["event"] in ("start", "resume")), None)
    done = steps is not None and any(
        event["event"] == "early_stop" or (event["event"] == "checkpoint" and event["step"] == steps)
        for event in events
    )
    return done and events[-1]["event"] != "end"


def _check_run_folder(folder: Path) -> None:
    """`check_own`, but accepts a folder with nothing but an empty lock file: no data can be lost."""
    if folder.is_dir() and os.listdir(folder) == [LOCK] and not (folder / LOCK).stat().st_size:
        return
    check_own(folder, folders=True)


def check_saved(out: Path, again: Path) -> None:
    """For a run that resumes after its last step: checks that `out` holds the same model as `again`, which the run just wrote.

    Raises:
        ArtifactError: `out` holds another model.
    """
    if (out / SEAL).read_bytes() != (again / SEAL).read_bytes():
        raise _holds_a_model(out)


def _holds_a_model(out: Path) -> ArtifactError:
    return ArtifactError(f"{out} holds a model already: choose another folder, or let it be replaced (replace = true)")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Locks `folder` for one run at a time. Creates and marks it if needed, and removes it at the end if it is empty.

    Raises:
        LockedError: another process trains in it.
        ArtifactError: qkit did not create the folder.
    """
    real = destination(folder).path
    _check_run_folder(real)
    made, descriptor = make_parents(real), None
    try:
        real.mkdir(exist_ok=True)
        mark(real)
        descriptor = swap.lock(real / LOCK)
        yield
    finally:
        if descriptor is not None:
            (real / LOCK).unlink(missing_ok=True)
            os.close(descriptor)
            if real.is_dir() and {*os.listdir(real)} <= {MARK}:
                (real / MARK).unlink(missing_ok=True)
                os.rmdir(real)
        remove_empty(made)


def check_same(found: Checkpoint, about: Mapping[str, Any]) -> None:
    """Refuses to go on from a checkpoint of another run.

    Raises:
        RunError: the model, the recipe, the text or a key of the run is another; the message names both.
    """
    before, folder = found.about, found.file.parent
    way_out = f"repeat that run to finish it, or remove {folder} to begin anew"
    if before["model"] != about["model"]:
        raise RunError(
            f"{found.file} is of the model {before['run']['model']}, and {about['run']['model']} is another now: {way_out}"
        )
    if before["recipe"] != about["recipe"]:
        names = [f"{one['recipe']['name']!r}" for one in (before, about)]
        same = ", whose rules are others now" if names[0] == names[1] else ""
        raise RunError(f"{found.file} is of the recipe {names[0]}, and this run is for {names[1]}{same}: {way_out}")
    if before["text"] != about["text"]:
        raise RunError(
            f"{found.file} is of another text than {', '.join(about['run']['data'])} at this length: {way_out}"
        )
    if about["run"].get("adapter") and before.get("engine") != about["engine"]:
        raise RunError(
            f"{found.file} has adapters of backend {before.get('engine')}, and this is {about['engine']}, which has other names "
            f"for them: {way_out}"
        )
    for key in sorted({*before["run"], *about["run"]} - FREE):
        then, now = before["run"].get(key), about["run"].get(key)
        if then != now:
            raise RunError(f"{found.file} is of a run with {key} = {then}, and now it is {now}: {way_out}")


class Log:
    """Events as JSON lines, each written out before the next. A run that resumes drops the events after its checkpoint."""

    def __init__(self, folder: Path, *, after: int) -> None:
        self.file = folder / LOG
        kept = [event for event in read_log(self.file) if event["step"] <= after]
        text = "".join(json.dumps(event) + "\n" for event in kept)
        if not self.file.exists() or self.file.read_text(encoding="utf-8", errors="replace") != text:
            with replaced_file(self.file) as aside:  # a full disk leaves the old log
                aside.write_text(text, encoding="utf-8")

    def add(self, event: Mapping[str, Any]) -> None:
        """Appends one event."""
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(event) + "\n")


def read_log(file: Path) -> list[dict[str, Any]]:
    """The events of a log, without a last line that a kill cut off."""
    events = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else ():
        try:
            events.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            continue
    return events
