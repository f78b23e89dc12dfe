"""`Fit`: how the codes of a model are chosen, and the fitted codes of one weight of it."""

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from qkit.engines.protocol import Arrays
from qkit.errors import ArtifactError, GridError, PlanError, RangeError
from qkit.fitting.inputs import Inputs, solves
from qkit.fitting.statistics import Statistics, open_statistics
from qkit.grid import Grid
from qkit.qtensor import QTensor, dtype_of
from qkit.reference.fitting import ROUNDS, fit
from qkit.reference.moments import DAMPING
from qkit.reference.products import product, shortened
from qkit.reference.steps import want_fitted
from qkit.rules import Rule
from qkit.storage.read import Stored

Method = Literal["search", "solve", "round"]
NOT_LEARNED = (
    'its rounding is to be "learned", which needs a text: run qkit calibrate --learn with the recipe, and quantize with --fit '
    "round --stats STATS"
)
KEPT = 1  #: prepared moments in memory at once: those of a wide layer take several times their matrix


@dataclass(frozen=True, slots=True)
class Fit:
    """How codes are chosen instead of by the rule of their grid.

    Attributes:
        method: `search` or `solve`, see `qkit.fit`; or `round`: codes whose rounding `qkit calibrate --learn` has learned. Layers
            without statistics are fitted by search, all inputs alike.
        statistics: those of the model, an opened directory of `qkit calibrate`, or its path; only `search` goes without.
        engine: one that may solve on its device, with the same codes; see `on`.

    Raises:
        PlanError: no such method; or `solve` or `round` without statistics, or `round` with those that learned nothing.
        ArtifactError: the directory is unsound.
    """

    method: Method
    statistics: Statistics | None
    engine: Arrays | None

    def __init__(
        self, method: Method, statistics: Statistics | str | Path | None = None, engine: Arrays | None = None
    ) -> None:
        if method not in get_args(Method):
            raise PlanError(f"no method {method!r} of fitting: choose one of {', '.join(get_args(Method))}")
        if method != "search" and statistics is None:
            raise PlanError(f"{method} needs statistics of the model: run qkit calibrate first, or fit by search")
        opened = open_statistics(statistics) if isinstance(statistics, (str, Path)) else statistics
        if method == "round" and opened and not opened.lesson:
            raise PlanError(
                f"{opened.folder} has no learned rounding: run qkit calibrate with --learn and a recipe, or fit by solve"
            )
        object.__setattr__(self, "method", method)
        object.__setattr__(self, "statistics", opened)
        object.__setattr__(self, "engine", engine)

    def on(self, engine: Arrays) -> "Fit":
        """This fit, solved by `engine` where it can."""
        return Fit(self.method, self.statistics, engine)

    def solves(self, grid: Grid) -> bool:
        """Whether the engine, rather than the law on the host, solves weights on `grid`."""
        return self.method == "solve" and solves(self.engine, grid)

    def describe(self) -> dict[str, Any]:
        """The metadata of an artifact with such codes."""
        about: dict[str, Any] = {"method": self.method}
        if self.method != "search":
            about |= {"damping": DAMPING, "rounds": ROUNDS}
        if self.statistics:
            about |= {"lesson": self.statistics.lesson} if self.method == "round" else {}
            about |= {"statistics": self.statistics.digest}
            about |= {"drift": "corrected"} if self.statistics.corrected else {}
            about |= {"heads": self.statistics.heads} if self.statistics.heads else {}
            about |= {"rows": "coupled"} if self.statistics.about.get("rows") else {}
        return about

    def check(self, rules: Mapping[str, Rule]) -> list[str]:
        """Checks the statistics against the rules of layers, by path; returns the layers that they have nothing of.

        Raises:
            PlanError: they have nothing of any layer, or are of another grid than the rule's, of inputs or weights; or the
                rounding of a layer should be learned and is not.
        """
        self._check_learned(rules)
        if self.statistics is None:
            return []
        known = {path for path in rules if self.statistics.has(path)}
        if rules and not known:
            raise PlanError(
                f"{self.statistics.folder} has statistics of none of the layers to quantize, such as {min(rules)}: they are "
                f"those of another architecture, such as {min(self.statistics.paths, default='none')}"
            )
        for path in sorted(known):
            seen, wanted = self.statistics.activation(path), rules[path].activation
            if seen != (None if wanted is None else str(wanted)):
                raise PlanError(
                    f"{path}: statistics are of inputs {f'on {seen}' if seen else 'as they are'}, and the recipe "
                    f"{f'rounds them to {wanted}' if wanted else 'does not round them'}: calibrate with --recipe"
                )
            grid = self.statistics.grid(path)
            under = "round" if self.statistics.lesson else "solve"
            if grid is not None and (self.method != under or grid != str(rules[path].weight)):
                raise PlanError(
                    f"{path}: these statistics correct the drift of {grid} under {under}, not of {rules[path].weight} under "
                    f"{self.method}: calibrate for this recipe, or without --drift and --learn"
                )
        self._check_one_recipe(self.statistics, rules)
        return sorted(rules.keys() - known)

    def _check_one_recipe(self, known: Statistics, rules: Mapping[str, Rule]) -> None:
        paths = {known.named(path) for path in rules}
        for path in sorted(path for path in known.paths - paths if known.grid(path)):
            raise PlanError(
                f"{path}: these statistics correct the drift of {known.grid(path)}, and the recipe leaves it in float: calibrate "
                "for this recipe"
            )
        for path in (path for path in known.heads if path in paths):
            raise PlanError(
                f"{path}: these statistics correct it in float, and the recipe quantizes it: calibrate for this recipe"
            )

    def _check_learned(self, rules: Mapping[str, Rule]) -> None:
        for path, rule in rules.items():
            there = self.statistics is not None and self.statistics.has(path) and self.statistics.learned(path)
            if rule.rounding == "learned" and not there:
                raise PlanError(f"{path}: {NOT_LEARNED}")

    def corrects(self, path: str) -> bool:
        """Whether the output head at `path`, which stays in float, is corrected."""
        return self.statistics is not None and self.statistics.named(path) in self.statistics.heads

    def head(self, w: NDArray[Any], path: str) -> NDArray[Any]:
        """Rows `w` [rows, n] of the float weight of an output head that is corrected; the same bits whatever the rows are.

        Raises:
            ArtifactError: the correction is of another shape, or its file is unsound.
        """
        assert self.statistics is not None
        correction = self.statistics.correction(path)
        if len(correction) != w.shape[-1]:
            raise ArtifactError(
                f"{path}: statistics correct {len(correction)} inputs, not {w.shape[-1]}: calibrate again"
            )
        wide = w.astype(np.float64)
        return (
            (wide + product(shortened(wide, axis=1), correction.astype(np.float64))).astype(np.float32).astype(w.dtype)
        )

    def quantize(
        self,
        w: NDArray[Any],
        grid: Grid,
        *,
        path: str,
        peak: float | None,
        first: int = 0,
    ) -> QTensor[NDArray[Any]]:
        """Fitted codes and scales of rows `w` of the weight of the layer at `path`, or of its aim where drift is corrected.

        Args:
            peak: as for `reference.quantize`.
            first: the number of the first of these rows in the weight.

        Raises:
            GridError, RangeError, ArtifactError: see `reference.fit` and `Statistics.moments`.
        """
        if self.statistics is None or not self.statistics.has(path):
            return fit(w, grid, peak=peak)
        try:
            return self._by_statistics(w, grid, self.statistics, path, peak, first)
        except RangeError as error:
            raise RangeError(f"{path}: {error}") from None

    def _by_statistics(
        self, w: NDArray[Any], grid: Grid, known: Statistics, path: str, peak: float | None, first: int
    ) -> QTensor[NDArray[Any]]:
        if self.method == "search":
            return fit(w, grid, known.moments(path), peak=peak)
        learned = known.codes(path)
        if learned is not None:
            return _rows_of(learned, grid, w, first, path)
        inputs, aim = _inputs(known, known.like(path), self.engine), known.aim(path)
        if aim is None:
            return inputs.solve(w, grid, peak=peak)
        aimed = aim[first : first + len(w)]
        if aimed.shape != w.shape:
            raise ArtifactError(
                f"{path}: the statistics aim at {list(aim.shape)}, which is another shape: calibrate again"
            )
        return replace(inputs.solve(aimed, grid, peak=known.peak(path)), dtype=dtype_of(w))


def check_fit(
    fit: Fit | None, chosen: Iterable[tuple[Rule, Iterable[str]]], tensors: Mapping[str, Stored], folder: Path
) -> tuple[str, ...]:
    """The layers that are fitted by search although the model has statistics, since these have nothing of them.

    Args:
        chosen: rules, each with the paths of its layers.
        tensors: of the model in `folder`.

    Raises:
        PlanError: the scales of a grid follow from no rule; or see `Fit.check`.
        ArtifactError: the statistics are of another model.
    """
    rules = {path: rule for rule, paths in chosen for path in paths}
    if fit is None:
        want_none_learned(rules)
        return ()
    if fit.statistics is not None:
        fit.statistics.check_model(tensors, folder)
    try:
        want_all_fitted(rules.values())
    except GridError as error:
        raise PlanError(str(error)) from None
    return tuple(fit.check(rules))


def open_fit(fit: Fit | Method, rules: Mapping[str, Rule]) -> Fit:
    """`fit`, or the one of a method without statistics, after a check that it fits the `rules` of layers, by path.

    Raises:
        GridError: see `want_all_fitted`.
        PlanError: see `Fit` and `Fit.check`.
    """
    opened = fit if isinstance(fit, Fit) else Fit(fit)
    want_all_fitted(rules.values())
    opened.check(rules)
    return opened


def want_none_learned(rules: Mapping[str, Rule]) -> None:
    """Refuses layers, by path, whose rounding should be learned, where nothing is fitted.

    Raises:
        PlanError: there is one.
    """
    for path, rule in rules.items():
        if rule.rounding == "learned":
            raise PlanError(f"{path}: {NOT_LEARNED}")


def want_all_fitted(rules: Iterable[Rule]) -> None:
    """Refuses rules with a weight grid whose scales follow from no rule.

    Raises:
        GridError: there is one.
    """
    for rule in rules:
        if rule.weight is not None:
            want_fitted(rule.weight)


def _rows_of(
    learned: Mapping[str, NDArray[Any]], grid: Grid, w: NDArray[Any], first: int, path: str
) -> QTensor[NDArray[Any]]:
    """The learned codes of rows `w` of a weight, from row `first` on."""
    parts = {name: part[first : first + len(w)] if part.ndim else part for name, part in learned.items()}
    if parts["codes"].shape != w.shape:
        raise ArtifactError(
            f"{path}: its learned codes are of shape {list(learned['codes'].shape)}, which is another: calibrate again"
        )
    return QTensor(grid=grid, dtype=dtype_of(w), **parts)


_prepared: OrderedDict[tuple[str, str, Arrays | None], Inputs] = (
    OrderedDict()
)  # by digest and layer; the last of equal inputs


def _inputs(statistics: Statistics, path: str, engine: Arrays | None) -> Inputs:
    key = statistics.digest, path, engine
    if key not in _prepared:
        while len(_prepared) >= KEPT:
            _prepared.popitem(last=False)
        _prepared[key] = Inputs(statistics.moments(path), engine)
    return _prepared[key]
