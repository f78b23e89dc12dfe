"""Runs the gate and writes its table: `qkit/artifact/families.json`, from which docs and README take theirs.

`python tests/families/write.py [NAME ...]` runs all rows, or those of some families.
"""

import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from catalogue import FAMILIES, make
from facts import facts
from gate import RECIPES, TABLE, row
from more import VARIANTS


def types() -> dict[str, Any]:
    """Facts by model type, of all families of the type together."""
    found: dict[str, Any] = {}
    for family in FAMILIES.values():
        with tempfile.TemporaryDirectory() as place:
            model = make(family, Path(place))
            mine = found.setdefault(
                model.config.model_type,
                {"prefixes": {}, "apart": [], "kinds": {}, "read": [], "heads": [], "fp32": [], "tied": False},
            )
            try:
                more = facts(model, Path(place))
            except Exception as error:
                print(family.architecture, "has no facts:", repr(error)[:200])
                continue
        mine["prefixes"].update(more.get("prefixes", {}))
        for key in ("apart", "read", "heads", "fp32"):
            mine[key] = sorted({*mine[key], *more.get(key, [])})
        mine["kinds"].update(more.get("kinds", {}))
        mine["tied"] = more.get("tied", False)
        mine["base"] = more.get("base") or mine.get("base", "")
    return {name: {key: value for key, value in one.items() if value} for name, one in sorted(found.items())}


def results(name: str) -> dict[str, Any]:
    """The row of the family `name`, by recipe."""
    family = FAMILIES[name]
    return {
        "architecture": family.architecture,
        "type": getattr(transformers, family.architecture).config_class.model_type,
        **({"variant": True} if name in VARIANTS else {}),
        **{recipe: {reader: _short(cell) for reader, cell in row(name, recipe).items()} for recipe in RECIPES},
    }


def _short(cell: str) -> str:
    return cell.partition(":")[0] if cell.startswith(("equal", "none")) else cell


def write(**content: Any) -> None:
    """Writes the table, its keys sorted."""
    TABLE.write_text(json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    before = json.loads(TABLE.read_text(encoding="utf-8"))["rows"]
    known = {"types": types(), "rows": {name: one for name, one in before.items() if name in FAMILIES}}
    write(**known)  # the gate reads the types
    for name in sys.argv[1:] or FAMILIES:
        known["rows"][name] = results(name)
        write(**known)
