"""Writes the recipe files: `python recipes/generate.py`. A test compares them with `files()`."""

import json
from pathlib import Path

from qkit.element import INTEGERS
from qkit.grid import Grid

FOLDER = Path(__file__).parent / "qkit_recipes"
HEAD = "the output head stays in float"
#: Of weights alone `even` loses less than `rceil`, which inputs need: it clips none. Version 3 of these recipes.
WEIGHT_ONLY, EVEN = "MXFP4 (e2m1, E8M0 per 32, even) weights, activations in 16 bits", Grid("e2m1", 32, "even")


def files() -> dict[str, str]:
    """File name -> text of every recipe."""
    return {
        f"{name}.toml": text
        for name, text in (*_integers(), *_torchao(), *_static(), *_floats(), *_learned(), *_whole())
    }


def write() -> None:
    """Writes `files()`, and removes recipe files that are not among them."""
    wanted = files()
    for stale in FOLDER.glob("*.toml"):
        if stale.name not in wanted:
            stale.unlink()
    for name, text in wanted.items():
        (FOLDER / name).write_text(text, encoding="utf-8")


def _integers() -> list[tuple[str, str]]:
    found = []
    for element in INTEGERS:
        for group in (32, 64, 128):
            found.append(_integer(f"{element}-g{group}", Grid(element, group)))
    for rule in ("absmax", "midmax", "minmax"):
        for group in (32, 64, 128):
            found.append(_integer(f"int4-g{group}-{rule}", Grid("int4", group, rule)))
    found.append(_integer("int8-g128-midmax", Grid("int8", 128, "midmax")))
    found.append(_integer("int8-row", Grid("int8", "row")))
    return found


def _integer(name: str, grid: Grid) -> tuple[str, str]:
    per = "one scale per row" if grid.group == "row" else f"one scale per {grid.group} inputs"
    origin = {
        "signed": "",
        "absmax": "" if grid.element.bits == 8 else " (absmax, as MLX-LoRA-Studio trains)",
        "midmax": " (midmax, as torchao and compressed-tensors quantize)",
        "minmax": " and an integer zero point (as GPTQ quantizes)",
    }[grid.scale]
    return name, _recipe(f"{grid.element} weights, {per}{origin}; {HEAD}", grid)


def _torchao() -> list[tuple[str, str]]:
    return [
        (
            "int4-weight-only",
            _recipe(f"int4 weights, groups of 128 as in torchao, on qkit's signed grid; {HEAD}", Grid("int4", 128)),
        ),
        (
            "int8-dynamic-act-int4-weight",
            _recipe(
                f"int4 weights in groups of 32, int8 activations per token with a zero point; {HEAD}",
                Grid("int4", 32),
                Grid("int8", "row", "minmax"),
            ),
        ),
        (
            "float8-dynamic-act-float8-weight",
            _recipe(
                f"e4m3 weights and activations, a power-of-two scale per row and per token; {HEAD}",
                Grid("e4m3", "row"),
                Grid("e4m3", "row"),
            ),
        ),
        (
            "int8-dynamic-act-int8-weight",
            _recipe(
                f"int8 weights per row, int8 activations per token; {HEAD}", Grid("int8", "row"), Grid("int8", "row")
            ),
        ),
    ]


def _static() -> list[tuple[str, str]]:
    found = []
    for kind, element in (("int8", "int8"), ("float8", "e4m3")):
        for range, how in (("calibrated", "calibrated"), ("average", "a running average of training")):
            name = f"{kind}-{'static' if range == 'calibrated' else 'average'}-act-{kind}-weight"
            summary = f"{element} weights per row, {element} activations on one scale, {how}; {HEAD}"
            found.append((name, _recipe(summary, Grid(element, "row"), Grid(element, "tensor"), range=range)))
    return found


def _learned() -> list[tuple[str, str]]:
    learned = f"learned in training beside the weights; {HEAD}"
    return [
        (f"{name}-learned", _recipe(f"{text} {learned}", grid, scales="learned", version=_version(name)))
        for name, text, grid in (
            ("int4-g64", "int4 weights, one scale per 64 inputs,", Grid("int4", 64)),
            ("int2-g64", "int2 weights, one scale per 64 inputs,", Grid("int2", 64)),
            ("mxfp4-a16", f"{WEIGHT_ONLY}, exponents", EVEN),
        )
    ]


def _whole() -> list[tuple[str, str]]:
    """Recipes for all layers, the embedding and the head included, tied or not."""
    layers = "embeddings and output head too, tied or not"
    return [
        (f"{name}-all", _recipe(f"{text}; {layers}", grid, whole=True, version=_version(name)))
        for name, text, grid in (
            ("int4-g32", "int4 weights, one scale per 32 inputs", Grid("int4", 32)),
            ("int4-g64", "int4 weights, one scale per 64 inputs", Grid("int4", 64)),
            ("int8-g64", "int8 weights, one scale per 64 inputs", Grid("int8", 64)),
            ("mxfp4-a16", WEIGHT_ONLY, EVEN),
        )
    ]


def _floats() -> list[tuple[str, str]]:
    found = [("fp8", _recipe(f"e4m3 weights, a power-of-two scale per row; {HEAD}", Grid("e4m3", "row")))]
    for name, grid, text in (
        ("mxfp4", Grid("e2m1", 32), "MXFP4 (e2m1, E8M0 per 32)"),
        ("mxfp8", Grid("e4m3", 32), "MXFP8 (e4m3, E8M0 per 32)"),
        ("nvfp4", Grid("e2m1", 16, "nvfp4"), "NVFP4 (e2m1, e4m3 per 16, a power of two per tensor)"),
    ):
        found.append((name, _recipe(f"{text} weights and activations; {HEAD}", grid, grid)))
        if name != "mxfp4":
            found.append((f"{name}-a16", _recipe(f"{text} weights, activations in 16 bits; {HEAD}", grid)))
    found.append(("mxfp4-a16", _recipe(f"{WEIGHT_ONLY}; {HEAD}", EVEN, version=3)))
    for name, element, whose in (("mxfp4", "e2m1", " of compressed-tensors and vLLM"), ("mxfp8", "e4m3", "")):
        summary = f"{name.upper()} weights with the even scale rule{whose}; {HEAD}"
        found.append((f"{name}-a16-even", _recipe(summary, Grid(element, 32, "even"))))
    return found


def _version(name: str) -> int:
    return 3 if name == "mxfp4-a16" else 2


def _recipe(
    summary: str,
    weight: Grid,
    activation: Grid | None = None,
    *,
    range: str = "dynamic",
    scales: str = "rule",
    whole: bool = False,
    version: int = 2,
) -> str:
    grids = {"w": weight} | ({"a": activation} if activation else {})
    lines = ["schema  = 1", f"version = {version}", f'summary = "{summary}"', ""]
    for key, grid in grids.items():
        group = grid.group if isinstance(grid.group, int) else f'"{grid.group}"'
        lines += [
            f"[grids.{key}]",
            f'element = "{grid.element}"',
            f"group   = {group}",
            f'scale   = "{grid.scale}"',
            "",
        ]
    rule = {"match": "*", "weight": "w"}
    if activation:
        rule["activation"] = "a"
    if range != "dynamic":
        rule["range"] = range
    if scales != "rule":
        rule["scales"] = scales
    rules: list[dict[str, str | list[str]]] = [{**rule}]
    experts = {"match": "*", "kind": "experts", **{key: value for key, value in rule.items() if key != "scales"}}
    rules.insert(0, experts)
    rules.insert(
        0, {"match": "*", "kind": "embedding", "weight": "w"} if whole else {"match": ["lm_head", "*.lm_head"]}
    )
    for table in rules:
        if "weight" in table:
            table["part"] = "language"
        width = max(map(len, table))
        lines += ["[[rules]]", *(f"{key:{width}} = {json.dumps(value)}" for key, value in table.items()), ""]
    return "\n".join(lines[:-1]) + "\n"


if __name__ == "__main__":
    write()
