"""The directory of a run that gathers statistics: states between blocks, a file for each block that is done, and the end.

The states lie in files, so that memory has a batch of them. The file of a block comes after everything before it: a run that
stops goes on behind the last one, and ends with the same bytes.
"""

import json
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qkit.engines.blocks import Blocks, Hidden
from qkit.errors import FewTokensWarning, PlanError, RangeError, RunError
from qkit.fitting.statistics import AIM, HEAD, LEARNED, NOTE, file_digest, write_note

FEW = 20  #: tokens for each input of a block; fewer are too few for the codes to be as good as they can be
NAME = "run.json"
NO_NAMES: Mapping[str, str] = {}


class Run:
    """A run for `out`, in a directory beside it.

    Attributes:
        done: how many blocks an earlier run has done.
    """

    def __init__(
        self,
        out: Path,
        about: Mapping[str, Any],
        settings: Mapping[str, Any],
        *,
        batch: int,
        names: Mapping[str, str] = NO_NAMES,
    ) -> None:
        """Begins a run, or takes up that of the same `about`, `settings` and `batch`.

        Args:
            names: paths of layers in the model's files, by their paths in the model, where these are other ones.

        Raises:
            PlanError: `out`, or another directory in the place of the run, is there already.
        """
        text = json.dumps({**about, **settings, "batch": batch}, sort_keys=True)
        ended = _reads(out / NAME) == text  # but for the last step of `finish`
        if out.exists() and not ended:
            raise PlanError(f"{out} is there already: remove it, or choose another place")
        self._out, self._about, self._batch, self.done, self._names = out, about, batch, 0, names
        self._aside = out if ended else out.with_name(f"{out.name}.part")
        mine = self._aside / NAME
        self._aside.mkdir(parents=True, exist_ok=True)
        others = [file for file in self._aside.iterdir() if file != mine]
        if others and not mine.is_file():
            raise PlanError(f"{self._aside} is there already, and is no run of calibrate: move it away")
        if _reads(mine) != text:
            for file in others:  # of another model, text or engine; their note goes last
                file.unlink()
            mine.write_text(text, encoding="utf-8")
        while self._file(self.done).exists():
            self.done += 1

    def enter(self, blocks: Blocks, rows: NDArray[np.int32], *names: str) -> None:
        """Writes the states before the first block, under each of `names`.

        Raises:
            RunError: there are less tokens than the states are wide.
        """
        for start in range(0, len(rows), self._batch):
            part = blocks.enter(rows[start : start + self._batch])
            if not start:
                _want_tokens(rows.size, part.shape[-1])
            for name in names:
                self.put(name, 0, start, part, shape=(*rows.shape, part.shape[-1]))

    def states(self, name: str, number: int) -> Iterator[Hidden]:
        """Batches of the states before block `number`."""
        found = np.load(self._states(name, number), mmap_mode="r")
        return (found[start : start + self._batch] for start in range(0, len(found), self._batch))

    def whole(self, name: str, number: int) -> Hidden:
        """All states before block `number`, mapped."""
        found: Hidden = np.load(self._states(name, number), mmap_mode="r")
        return found

    def put(self, name: str, number: int, start: int, part: Hidden, *, shape: tuple[int, ...] | None = None) -> None:
        """Writes states before block `number`, from row `start` on; with the first row, a new file of the shape of the last."""
        file = self._states(name, number)
        if not start:
            shape = shape or np.load(self._states(name, number - 1), mmap_mode="r").shape
            np.lib.format.open_memmap(file, mode="w+", dtype=np.float32, shape=shape)
        states = np.lib.format.open_memmap(file, mode="r+")
        states[start : start + len(part)] = part
        states.flush()

    def drop(self, name: str) -> None:
        """Removes states of that name before all blocks."""
        for number in (0, 1):
            self._states(name, number).unlink(missing_ok=True)

    def save(self, name: str, tensors: Mapping[str, NDArray[Any]]) -> None:
        """Writes tensors that the run alone needs, whole or not at all."""
        from safetensors.numpy import save_file

        aside = self._own(name).with_suffix(".new")
        save_file({key: np.ascontiguousarray(array) for key, array in tensors.items()}, aside)
        aside.rename(self._own(name))

    def has(self, name: str) -> bool:
        """Whether `save` has written them."""
        return self._own(name).exists()

    def load(self, name: str) -> dict[str, NDArray[Any]]:
        """The tensors that `save` has written."""
        from safetensors.numpy import load_file

        return load_file(self._own(name))

    def write(self, number: int, tensors: Mapping[str, NDArray[Any]], layers: Mapping[str, Mapping[str, Any]]) -> None:
        """Writes the file of a block: its tensors, and what `statistics` wants to know of its layers.

        Raises:
            RangeError: a tensor is not finite.
        """
        from safetensors.numpy import save_file

        for name, array in tensors.items():
            if array.dtype == np.float32 and not np.isfinite(array).all():
                raise RangeError(
                    f"{name}: its inputs hold NaN or infinity, or numbers whose squares do: find their origin"
                )
        file, names = self._file(number), self._names
        told = {
            names.get(path, path): {**one, "like": names.get(one["like"], one["like"])}
            | ({"module": path} if path in names else {})
            for path, one in layers.items()
        }
        file.with_suffix(".json").write_text(json.dumps(told, sort_keys=True), encoding="utf-8")
        aside = file.with_suffix(".new")
        save_file({renamed(name, names): np.ascontiguousarray(array) for name, array in tensors.items()}, aside)
        with aside.open("rb") as stream:
            os.fsync(stream.fileno())
        aside.rename(file)

    def finish(self, count: int) -> Path:
        """Makes the run of `count` blocks the output, and returns it. The note comes before anything is removed, whole."""
        if not (self._aside / NOTE).exists():
            files, layers = dict[str, str](), dict[str, Any]()
            for file in map(self._file, range(count)):
                files[file.name] = file_digest(file)
                told = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
                layers |= {path: {**one, "file": file.name} for path, one in told.items()}
            write_note(self._aside, {**self._about, "files": files, "layers": layers})
        for pattern in ("*.npy", "block-*.json", "*.new", "*.own"):
            for rest in self._aside.glob(pattern):
                rest.unlink()
        if self._aside != self._out:
            self._aside.rename(self._out)
        (self._out / NAME).unlink()
        return self._out

    def _file(self, number: int) -> Path:
        return self._aside / f"block-{number:05}.safetensors"

    def _own(self, name: str) -> Path:
        return self._aside / f"{name}.own"

    def _states(self, name: str, number: int) -> Path:
        return self._aside / f"{name}-{number % 2}.npy"


def renamed(name: str, names: Mapping[str, str]) -> str:
    """The name of a tensor that begins with the path of a layer, which `names` may call otherwise."""
    for end in (AIM, HEAD, LEARNED):
        path, found, rest = name.partition(end)
        if found and path in names:
            return f"{names[path]}{found}{rest}"
    return names.get(name, name)


def _reads(file: Path) -> str | None:
    """The text of a file, if there is one."""
    return file.read_text(encoding="utf-8") if file.is_file() else None


def _want_tokens(tokens: int, width: int) -> None:
    if tokens < width:
        raise RunError(
            f"{tokens:,} tokens are too few for blocks of {width:,} inputs: give more text, or more windows, of at least "
            f"{FEW * width:,} tokens"
        )
    if tokens < FEW * width:
        warnings.warn(
            f"{tokens:,} tokens are few for blocks of {width:,} inputs: from {FEW * width:,} on, more change little",
            FewTokensWarning,
            stacklevel=2,
        )
