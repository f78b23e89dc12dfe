"""One row of the gate: a family's checkpoint, quantized and opened everywhere, against the model with the codes' values."""

import json
import shutil
import tempfile
from collections.abc import Sequence
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
from qkit.streaming.caveats import Caveat
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
Result = tuple[Any, dict[str, Any]]  #: logits, and weights by name where the reader has them by name
OWN = ("qkit, torch", "qkit, MLX")
READERS = (*OWN, "transformers", "transformers, dequantized", "mlx-lm")
#: The outcomes of a reader. For all but two, the plan of the row warns of the reader by its name, before any work.
WORDS = {
    "equal": "the reader has the codes' values, and computes with them as the float model does",
    "none": "the reader has no such model",
    "refused": "qkit refuses to open or to export the output",
    "fails": "the reader stops with an error of its own",
    "warned": "the reader opens the output with other values; a rule of qkit, which names the cause, has the plan say so",
    "differs in float": "the reader opens the float checkpoint as another model, too; the cell has both differences",
    "wrong": "the output opens otherwise, and the plan does not say so, or qkit itself opens it so: a fault",
}
GOOD = ("equal", "none")
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


def row(name: str, recipe: str) -> dict[str, str]:
    """By reader, one of `WORDS`, for most with a colon and the reason or the figures."""
    family = FAMILIES[name]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        source = make(family, folder / "in")
        config = json.loads((folder / "in/config.json").read_text())
        try:
            plan = make_plan(folder / "in", _recipe(recipe))
        except qkit.QkitError as error:
            return dict.fromkeys(READERS[:1], f"refused: {error}")
        quantize_directory(plan, folder / "out", engine=qkit.backend("numpy"), workers=1, tick=lambda *_: None)
        _expected(plan, folder / "values")
        model = openings.in_transformers(folder / "values")
        want = openings.run(model), openings.weights(model)
        cells = {}
        for reader in READERS:
            found = _opened(reader, family, folder / "out", config, want)
            if found.startswith("off"):
                floats = _float_differs(reader, family, folder / "in", source)
                found = f"differs in float: {found}; {floats}" if floats else found
            cells[reader] = judged(reader, found, plan.caveats).replace(f"{folder}/out: ", "")
        return cells


def word(cell: str) -> str:
    """The word of `WORDS` that a cell begins with."""
    return cell.partition(":")[0]


def judged(reader: str, found: str, caveats: Sequence[Caveat]) -> str:
    """`found` as a word of `WORDS`: `wrong` unless the plan warned of it by the reader's name."""
    mine = [one for one in caveats if one.reader == reader]
    if found in GOOD:
        return found
    if found.startswith(
        "off"
    ):  # other values than the codes': a cause in the rules of `caveats`, not a result of an earlier run
        known = reader not in OWN and any(not one.tabled for one in mine)
        return f"warned: {found}" if known else f"wrong: {found}"
    if found.startswith("differs") and reader in OWN:
        return f"wrong: {found}"
    return found if mine else f"wrong: the plan does not say that it {found}"


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


def _opened(reader: str, family: Family, folder: Path, config: dict[str, Any], want: Result) -> str:
    """`equal`, `none`, `refused` or `fails` with the error, or `off` with how far and where."""
    if "mlx" in reader.lower() and not openings.in_mlx_lm_at_all(config):
        return "none"
    try:
        if reader == "qkit, MLX":
            got = openings.on_mlx(folder), {}
        elif reader == "mlx-lm":
            got = openings.in_mlx_lm(folder), {}
        else:
            opened = {
                "qkit, torch": openings.in_qkit,
                "transformers": openings.by_default,
                "transformers, dequantized": openings.dequantized,
            }[reader](folder)
            got = openings.run(opened), openings.weights(opened)
    except Exception as error:
        return f"{'refused' if isinstance(error, qkit.QkitError) else 'fails'}: {type(error).__name__}: {error!s:.300}"
    return _off(reader, family, got, want) or "equal"


def _off(reader: str, family: Family, got: Result, want: Result) -> str:
    """How far `got` is from `want`: the first weight that differs, else the logits; empty where they are equal."""
    (logits, weights), (wanted, values) = got, want
    for name, array in values.items() if weights else ():
        if name not in weights or not np.array_equal(weights[name], array):
            return f"off: {name} {'is missing' if name not in weights else f'by {np.abs(weights[name] - array).max():.2g}'}"
    if logits.shape != wanted.shape:
        return f"off: shape {logits.shape}, not {wanted.shape}"
    off = float(np.abs(logits - wanted).max() / np.abs(wanted).max())
    return "" if off <= (TOLERANCE[reader] if family.dtype == "float32" else HALF) else f"off by {off:.2g}"


def _float_differs(reader: str, family: Family, folder: Path, source: Any) -> str:
    """How far the reader's own opening of the float checkpoint is from the model; empty where it is equal, or does not open."""
    want = openings.run(source), openings.weights(source)
    try:
        if reader == "mlx-lm":
            got: Result = openings.float_in_mlx_lm(folder), {}
        elif reader.startswith("transformers"):
            opened = openings.in_transformers(folder)
            got = openings.run(opened), openings.weights(opened)
        else:
            return ""
    except Exception:  # of another program, for a checkpoint as published: the artifact alone is judged
        return ""
    found = _off(reader, family, got, want)
    return f"its float model is {found}" if found else ""
