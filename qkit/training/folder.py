"""The folder beside an artifact that a run writes into: its lock, its log, and whether what is in it is the same run."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qkit.errors import ArtifactError, RunError
from qkit.storage import swap
from qkit.storage.write import check_replaceable
from qkit.training.checkpoint import Checkpoint

LOCK, LOG = "lock", "log.jsonl"

#: Keys of a run that may differ where it goes on: what they name is compared by its content, or changes nothing that is trained.
FREE = frozenset(
    ("model", "out", "data", "held_out", "recipe", "backend", "device", "checkpoint_every", "evaluate_every", "replace")
)
FREE |= {"gradient_checkpointing", "compile"}


def beside(out: Path) -> Path:
    """The run folder of the artifact `out`."""
    return out.absolute().with_name(f"{out.absolute().name}.run")


def check_out(out: Path, *, replace: bool) -> None:
    """Refuses to overwrite anything that nobody asked to be overwritten.

    Raises:
        ArtifactError: `out` holds a model, and `replace` is false, or one that is not qkit's.
    """
    if not out.absolute().name:
        raise ArtifactError(f"{out} is no name for a directory: choose one of its own")
    check_replaceable(out)
    if out.exists() and any(out.iterdir()) and not replace:
        raise ArtifactError(
            f"{out} holds a model already: choose another folder, or let it be replaced (replace = true)"
        )


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """`folder`, made if need be, for one run at a time; if that leaves nothing in it, it is removed.

    Raises:
        LockedError: another process trains in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = swap.lock(folder / LOCK)
    try:
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        os.close(descriptor)
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


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
    """Events as JSON lines, each on the disk's way before the next; a run that goes on drops those after its checkpoint."""

    def __init__(self, folder: Path, *, after: int) -> None:
        self.file = folder / LOG
        kept = [event for event in read_log(self.file) if event["step"] <= after]
        self.file.write_text("".join(json.dumps(event) + "\n" for event in kept), encoding="utf-8")

    def add(self, event: Mapping[str, Any]) -> None:
        """Appends one event."""
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(event) + "\n")


def read_log(file: Path) -> list[dict[str, Any]]:
    """The events of a log; a last line that a kill cut off is left out."""
    events = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            events.append(dict(json.loads(line)))
        except ValueError:
            continue
    return events
