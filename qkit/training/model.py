"""Opens a directory as a model to train: float master weights on the grids of a recipe, or packed codes with adapters."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from qkit import reference
from qkit.adapters import adapt
from qkit.artifact.snapshot import Snapshot
from qkit.engines.abilities import offers
from qkit.engines.protocol import Builds
from qkit.engines.registry import recipe as find_recipe
from qkit.engines.translation import Translates
from qkit.errors import RunError
from qkit.exchange.load_any import load_any
from qkit.experts import paths_of
from qkit.formats.packed import join, unpack
from qkit.overrides import check_ignored, overridden
from qkit.pipeline import prepare
from qkit.qtensor import DTYPES, DType
from qkit.reference.ranges import static_contents
from qkit.rules import Recipe, Rule, rule_table
from qkit.sources.decoded import DecodedArray
from qkit.training.begin import take_codes
from qkit.training.run import FLOAT, Run

TYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def open_to_train(engine: Builds, source: Snapshot, run: Run) -> tuple[Any, Recipe | None]:
    """The model in `source`, ready for `run`, and its recipe; None without one.

    The master weights are in `run.dtype`, on the grids of the run's recipe, or of `source` if it has none. With an adapter and
    without a recipe, a quantized `source` stays packed, with numbers of its own type. With `run.init`, training begins with the
    codes of `source`, and so does one that freezes codes.

    Raises:
        RunError: see `build_float_model`, `prepare_model` and `take_codes`.
        StageError: the adapter does not fit a layer.
        ArtifactError, BackendError, RecipeError, GridError: as their causes.
    """
    if run.adapter and run.recipe is None and source.weights and run.init is None:
        model = load_any(source, engine)
        return adapt(model, run.adapter, backend=engine), _own(engine, model, source)
    model = build_float_model(engine, source, dtype=run.dtype)
    skip, ignore, freeze = run.skip_indivisible, run.ignore, run.freeze_codes
    model, chosen = prepare_model(
        engine, model, source, run.recipe, ignore=ignore, skip_indivisible=skip, freeze_codes=freeze
    )
    if run.init is not None or (run.freeze_codes and source.weights):
        take_codes(engine, model, source)
    return (adapt(model, run.adapter, backend=engine) if run.adapter else model), chosen


def build_float_model(engine: Builds, source: Snapshot, *, dtype: str) -> Any:
    """The float model in `source` on `engine`, with numbers in `dtype`. Dequantizes codes.

    Raises:
        RunError: there is no config.json.
        ArtifactError, BackendError: see `Modules.fill` and `Builds.build`.
    """
    if source.config is None:
        raise RunError(
            f"{source.folder} has no config.json: qkit train builds the model by it, so name a whole directory"
        )
    tensors = {name: array for name, array in source.tensors.items() if name not in _static(source)}
    for path, held in source.weights.items():
        q = replace(unpack(held.read()), dtype="float32")
        tensors[join(path, "weight")] = reference.dequantize(q)
    model = engine.build({**source.config, "dtype": dtype, "torch_dtype": dtype})
    if offers(engine, Translates):
        tensors, _ = engine.translate(model, tensors, {})
    engine.fill(model, {name: _cast(array, TYPES[dtype]) for name, array in tensors.items()})
    return model


def prepare_model(
    engine: Builds,
    model: Any,
    source: Snapshot,
    recipe: str | None,
    *,
    ignore: Sequence[str] = (),
    skip_indivisible: bool = False,
    freeze_codes: bool = False,
) -> tuple[Any, Recipe | None]:
    """`model` on the grids of `recipe`, or of `source` if `recipe` is None; and the recipe, None without one.

    Args:
        ignore, skip_indivisible, freeze_codes: see `overridden`.

    Raises:
        RunError: `source` is a float model, and `recipe` is None.
        RecipeError, GridError: the recipe is unknown or does not fit.
    """
    if recipe == FLOAT:
        return model, None
    chosen = _own(engine, model, source) if recipe is None else find_recipe(recipe)
    chosen = overridden(chosen, ignore=ignore, skip_indivisible=skip_indivisible, freeze_codes=freeze_codes)
    check_ignored(ignore, [layer.path for layer in engine.layers(model) if layer.kind != "other"])
    return prepare(model, chosen, backend=engine), chosen


def describe(recipe: Recipe | None) -> dict[str, Any]:
    """A recipe as plain values, which a run that resumes compares with its own."""
    if recipe is None:
        return {"name": FLOAT}
    return {"name": recipe.name, "version": recipe.version, "rules": [rule_table(rule) for rule in recipe.rules]}


def digest(source: Snapshot) -> str:
    """SHA-256 of the model: its configuration and the bytes of every tensor."""
    found = hashlib.sha256(json.dumps(source.config, sort_keys=True).encode())
    found.update(source.digest().encode())
    return found.hexdigest()


def dtype_of(source: Snapshot) -> DType:
    """The type of the model's numbers, by its configuration.

    Raises:
        RunError: qkit does not know this type.
    """
    config = source.config or {}
    said = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    for dtype in DTYPES:
        if said == dtype:
            return dtype
    raise RunError(f"{source.folder / 'config.json'}: dtype is {said!r}: want one of {', '.join(DTYPES)}")


def _own(engine: Builds, model: Any, source: Snapshot) -> Recipe:
    """The rules of the layers of `source` by path. Experts of a block have one; a tied head is on the grid of the embedding."""
    if not source.weights:
        decoded: list[Any] = [array for array in source.tensors.values() if isinstance(array, DecodedArray)]
        what = "is a float model"
        if decoded:
            form = decoded[0].encoded.form.name
            what = f"has {len(decoded)} quantized weights ({form}) that no grid of qkit holds, and is trained by their values"
        raise RunError(f"{source.folder} {what}: name a recipe, or {FLOAT!r} to train without one")
    layers = [layer for layer in engine.layers(model) if layer.kind == "experts"]
    blocks = {path: one.name for one in layers for path in paths_of(one.name, one.projections, source.config).values()}
    paths: dict[Rule, list[str]] = {}
    for path, held in source.weights.items():
        if held.unknown:
            raise RunError(
                f"{source.folder}: {path} quantizes {held.unknown} by a rule that is not qkit's: name a recipe"
            )
        mine = paths.setdefault(replace(held.rule, match=("*",)), [])
        if (name := blocks.get(path, path)) not in mine[-1:]:
            mine.append(name)
    for layer in engine.layers(model):
        if layer.tied in source.weights and layer.kind != "other":
            tied = Rule(("*",), kind=layer.kind, weight=source.weights[layer.tied].rule.weight)
            paths.setdefault(tied, []).append(layer.path)
    return Recipe(source.folder.name, tuple(replace(rule, match=tuple(mine)) for rule, mine in paths.items()))


def _static(source: Snapshot) -> set[str]:
    return {join(path, name) for path, held in source.weights.items() for name in static_contents(held.rule)}


def _cast(array: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    return array.astype(dtype) if array.dtype.name in DTYPES else array
