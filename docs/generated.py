"""Parts of pages that follow from the code: commands, keys of a run file, recipes with their grids, messages of errors."""

import ast
import inspect
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Final, get_args

import typer

import qkit
from qkit.adapters import Adapter
from qkit.cli.application import application
from qkit.cli.boundary import exit_code
from qkit.grid import Grid
from qkit.training.run import Distillation, Run
from qkit.training.schedule import Schedule

ROOT: Final = Path(__file__).parents[1]
PICTURES: Final = "../pictures/grids"


TEACHER: Final = "| `teacher` | `Path` | `required` | a model's directory, or the file that `qkit teach` wrote |\n"


def commands() -> str:
    """Every command with its usage, arguments and options, as the parser has them."""
    found = typer.main.get_command(application).commands  # type: ignore[attr-defined]
    return "\n".join(_command(name, command) for name, command in sorted(found.items()))


def _command(name: str, command: Any) -> str:
    usage = " ".join(["qkit", name, *(_argument(one) for one in command.params if one.param_type_name == "argument")])
    lines = [
        f"## qkit {name}\n",
        f"{_cell(command.help)}\n",
        f"```text\n{usage} [OPTIONS]\n```\n",
        "| argument or option | meaning |",
        "|---|---|",
    ]
    for one in command.params:
        names = _argument(one) if one.param_type_name == "argument" else ", ".join([*one.opts, *one.secondary_opts])
        lines.append(f"| `{names}` | {_cell(one.help or '')}{_default(one)} |")
    return "\n".join(lines) + "\n"


def _argument(one: Any) -> str:
    name = one.metavar or one.name.upper()
    return name if one.required else f"[{name}]"


def _default(one: Any) -> str:
    shown = one.default if isinstance(one.default, str | int | float) and not isinstance(one.default, bool) else None
    return f" Default: `{shown}`." if getattr(one, "show_default", False) and shown not in (None, "") else ""


def run_file() -> str:
    """Every key of a run file: its type, its default and its meaning, from the classes that read it."""
    parts = {"Keys": Run, "adapter": Adapter, "quantization": Schedule, "distillation": Distillation}
    return "\n".join(_table(name, kind) for name, kind in parts.items()) + TEACHER


def _table(name: str, kind: type) -> str:
    meanings = attributes(kind)
    lines = [f"## {name}\n", "| key | type | default | meaning |", "|---|---|---|---|"]
    for one in fields(kind):
        default = one.default_factory() if one.default_factory is not MISSING else one.default
        default = "required" if default is MISSING else default
        cells = (f"`{one.name}`", f"`{_type(one.type)}`", f"`{_plain(default)}`", meanings.get(one.name, ""))
        lines.append(f"| {' | '.join(map(_cell, cells))} |")
    return "\n".join(lines) + "\n"


def _type(kind: Any) -> str:
    if isinstance(kind, str):
        return kind
    plain = isinstance(kind, type) and not get_args(kind)
    return kind.__name__ if plain else re.sub(r"\w+\.(?=\w)", "", str(kind)).replace("NoneType", "None")


def _plain(value: Any) -> str:
    return (
        {None: "left out", True: "true", False: "false"}[value]
        if value is None or isinstance(value, bool)
        else str(value)
    )


def attributes(kind: type) -> dict[str, str]:
    """The meaning of each attribute, from the docstring of a class."""
    text = inspect.getdoc(kind) or ""
    block = text.partition("Attributes:\n")[2].partition("\n\n")[0]
    found: dict[str, str] = {}
    for entry in re.split(r"\n    (?=\S)", "\n" + block):
        names, colon, meaning = entry.partition(": ")
        if colon:
            found |= {name.strip(): " ".join(meaning.split()) for name in names.split(",")}
    return found


def gallery() -> str:
    """Every recipe with its bits per weight, and every pair of an element and a scale rule with a picture of its levels."""
    found = [qkit.recipe(name) for name in qkit.recipes()]
    assert found, "no recipes: install qkit, so that its plugins are known"
    lines = ["| recipe | weight | input | bits per weight |", "|---|---|---|---|"]
    grids: dict[tuple[str, str], list[str]] = {}
    for recipe in found:
        rule = next(rule for rule in recipe.rules if rule.weight)
        assert rule.weight is not None
        bits = rule.weight.bits_per_weight((4096, 4096))
        lines.append(f"| `{recipe.name}` | {rule.weight} | {rule.activation or ''} | {bits:.2f} |")
        grids.setdefault((rule.weight.element.name, str(rule.weight.scale)), []).append(recipe.name)
    parts = ["\n".join(lines)]
    for (element, scale), names in sorted(grids.items()):
        parts.append(f"## {element}, {scale}\n\n![Levels of {element} under {scale}]({PICTURES}/{element}-{scale}.svg)")
        parts.append("In " + ", ".join(f"`{name}`" for name in names) + ".")
    return "\n\n".join(parts)


def pictured() -> set[tuple[str, str]]:
    """The element and the scale rule of every weight grid of a recipe."""
    grids = {rule.weight for name in qkit.recipes() for rule in qkit.recipe(name).rules if rule.weight}
    return {(grid.element.name, str(grid.scale)) for grid in grids if isinstance(grid, Grid)}


def messages() -> str:
    """Every message of an error of qkit's, by class; capitals stand for values."""
    found: dict[str, set[str]] = {}
    for name, text in raised():
        found.setdefault(name, set()).add(text)
    parts = []
    for name in sorted(found):
        kind = getattr(qkit, name)
        lines = "\n".join(f"- {_escaped(text)}" for text in sorted(found[name]))
        parts.append(
            f"## {name}\n\n{_cell((kind.__doc__ or '').splitlines()[0])} Exit code {exit_code(kind(''))}.\n\n{lines}\n"
        )
    return "\n".join(parts)


def results() -> str:
    """Every result file of the benchmarks with the command that made it, and its machine."""
    lines = ["| result | command | machine |", "|---|---|---|"]
    for file in sorted((ROOT / "benchmarks" / "results").rglob("*.json")):
        made = json.loads(file.read_text(encoding="utf-8"))
        machine = made["machine"]
        name = str(machine.get("gpu") or machine.get("processor") or file.parent.name)
        lines.append(
            f"| `{file.relative_to(ROOT / 'benchmarks' / 'results')}` | `{_cell(made['command'])}` | {_cell(name)} |"
        )
    return "\n".join(lines)


def raised() -> Iterator[tuple[str, str]]:
    """Class and message of each error that the code raises with a message of its own; names stand in capitals for values."""
    errors = {name for name in qkit.__all__ if name.endswith("Error")}
    for folder in ("qkit", "backends"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if (
                    isinstance(node, ast.Call)
                    and isinstance(node.func, ast.Name)
                    and node.func.id in errors
                    and node.args
                ):
                    text = " ".join(_words(node.args[0]).split())
                    if re.search("[a-z]{3}", text):
                        yield node.func.id, text


def _words(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_words(part) for part in node.values)
    if isinstance(node, ast.BinOp):
        return _words(node.left) + _words(node.right)
    if isinstance(node, ast.FormattedValue):
        return _value(node.value)
    return _value(node)


def _value(node: ast.expr) -> str:
    parts = [one for one in ast.walk(node) if isinstance(one, ast.Attribute | ast.Name)]
    names = [one.attr if isinstance(one, ast.Attribute) else one.id for one in parts]
    return names[0].strip("_").upper() if names else "..."


def _escaped(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", text)


def _cell(text: str) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")


#: The generated parts, by the line that stands for them in a page: `<!-- made: NAME -->`.
PARTS: Final[dict[str, Callable[[], str]]] = {
    "commands": commands,
    "run file": run_file,
    "gallery": gallery,
    "messages": messages,
    "results": results,
}
