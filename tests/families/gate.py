"""One row of the gate: a family's checkpoint, quantized and opened everywhere, against the model with the codes' values."""

import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openings
from catalogue import FAMILIES, Family, make
from safetensors.numpy import load_file, save_file

import qkit
from qkit.artifact import known
from qkit.experts import TRANSPOSED
from qkit.streaming.carry_out import quantize_directory
from qkit.streaming.plan import Plan, make_plan

TABLE = Path(known.__file__).with_name(known.FILE)
GRIDS = {4: qkit.Grid("int4", 32), 8: qkit.Grid("int8", 32)}
#: Every linear layer of a first block in 8 bits, the others in 4, the output head in float.
MIXED = qkit.Recipe(
    "mixed",
    (
        qkit.Rule(("lm_head", "*.lm_head")),
        qkit.Rule(("*.0.*",), weight=GRIDS[8], indivisible="skip"),
        qkit.Rule(("*",), weight=GRIDS[4], indivisible="skip"),
    ),
)
RECIPES = {"int4": "int4-g32", "mixed": MIXED, "all": "int4-g32-all"}
READERS = ("qkit, torch", "qkit, MLX", "transformers", "transformers, dequantized", "mlx-lm")
#: Largest difference over the largest logit. In torch every weight is compared, too, and is equal; its float32 kernels sum in an
#: order that depends on where a weight lies in memory, and CLIP's logits of one picture cancel. MLX's sum in another order,
#: through some ten layers.
TOLERANCE = {
    "transformers": 5e-5,
    "transformers, dequantized": 5e-5,
    "qkit, torch": 5e-5,
    "qkit, MLX": 2e-4,
    "mlx-lm": 2e-4,
}
HALF = 6e-2  #: of models in bfloat16: products and sums of 8 significant bits, in another order on each engine


def said(name: str, recipe: str) -> set[str]:
    """The readers that the plan of a row warns of; every reader where the plan refuses."""
    with tempfile.TemporaryDirectory() as place:
        make(FAMILIES[name], Path(place))
        try:
            return {one.reader for one in make_plan(Path(place), _recipe(recipe)).caveats}
        except qkit.QkitError:
            return set(READERS)


def row(name: str, recipe: str) -> dict[str, str]:
    """By reader: `equal`, `refused: why`, `none` where the reader has no such model, or how it fails."""
    family = FAMILIES[name]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make(family, folder / "in")
        config = json.loads((folder / "in/config.json").read_text())
        try:
            plan = make_plan(folder / "in", _recipe(recipe))
        except qkit.QkitError as error:
            return dict.fromkeys(READERS[:1], f"refused: {error}")
        quantize_directory(plan, folder / "out", engine=qkit.backend("numpy"), workers=1, tick=lambda *_: None)
        _expected(plan, folder / "values")
        model = openings.in_transformers(folder / "values")
        want = openings.run(model), openings.weights(model)
        cells = {reader: _verdict(reader, family, folder / "out", config, want) for reader in READERS}
        return {reader: cell.replace(f"{folder}/out: ", "") for reader, cell in cells.items()}


def _recipe(name: str) -> qkit.Recipe:
    recipe = RECIPES[name]
    found = recipe if isinstance(recipe, qkit.Recipe) else qkit.recipe(recipe)
    return replace(found, rules=tuple(replace(rule, indivisible="skip") for rule in found.rules))


def _expected(plan: Plan, folder: Path) -> None:
    """The source with every quantized weight as the law's values."""
    shutil.copytree(plan.folder, folder)
    turned = json.loads((folder / "config.json").read_text())["model_type"] in TRANSPOSED
    for file in {one.stored.file for one in plan.rows}:
        arrays = load_file(file)
        for one in plan.rows:
            if not one.slots:  # a copy of a tied weight
                arrays.pop(one.stored.slot.name, None)
            if one.rule and one.stored.file == file:
                arrays[one.stored.slot.name] = _values(arrays[one.stored.slot.name], one.rule.weight, turned=turned)
        save_file(arrays, folder / file.name, metadata={"format": "pt"})


def _values(w: Any, grid: qkit.Grid, *, turned: bool) -> Any:
    """`w` as its codes have it; groups lie along the inputs, which come before the outputs in some stacks of experts."""
    if turned and w.ndim == 3:
        return np.ascontiguousarray(_values(w.swapaxes(1, 2), grid, turned=False).swapaxes(1, 2))
    w = np.ascontiguousarray(w)
    return qkit.dequantize(qkit.quantize(w, grid)).astype(w.dtype)


def _verdict(reader: str, family: Family, folder: Path, config: dict[str, Any], want: tuple[Any, Any]) -> str:
    logits, weights = want
    if "mlx" in reader.lower() and not openings.in_mlx_lm_at_all(config):
        return "none"
    try:
        if reader == "qkit, MLX":
            got = openings.on_mlx(folder)
        elif reader == "mlx-lm":
            got = openings.in_mlx_lm(folder)
        else:
            opened = {
                "qkit, torch": openings.in_qkit,
                "transformers": openings.by_default,
                "transformers, dequantized": openings.dequantized,
            }[reader](folder)
            got = openings.run(opened)
            found = openings.weights(opened)
            for name, array in weights.items():
                if name not in found or not np.array_equal(found[name], array):
                    off = "missing" if name not in found else f"{np.abs(found[name] - array).max():.2g} off"
                    return f"wrong: {name} is {off}"
    except Exception as error:
        return f"{'refused' if isinstance(error, qkit.QkitError) else 'fails'}: {type(error).__name__}: {error!s:.300}"
    if got.shape != logits.shape:
        return f"wrong: shape {got.shape}, not {logits.shape}"
    off = float(np.abs(got - logits).max() / np.abs(logits).max())
    most = TOLERANCE[reader] if family.dtype == "float32" else HALF
    return "equal" if off <= most else f"wrong: {off:.2g} off"
