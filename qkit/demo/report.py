"""The report at the end of the demo: that of `qkit compare`, with another tool's grid to deploy on."""

from dataclasses import replace
from pathlib import Path

from qkit import report
from qkit.engines.protocol import Builds
from qkit.report.master_weights import newest_checkpoint
from qkit.rules import Recipe
from qkit.training.data import Tokens

#: By scale rule, the rule that another tool takes in its place. Zero points and nvfp4 have no other.
OTHER_RULE = {
    "signed": "absmax",
    "absmax": "signed",
    "midmax": "absmax",
    "rceil": "floor",
    "even": "rceil",
    "floor": "rceil",
}


def write_report(engine: Builds, folder: Path, recipe: Recipe, unseen: Tokens) -> report.Comparison:
    """Compares the demo's models as `qkit compare` does, and writes the page into `folder`."""
    sources = report.Sources(
        folder / "float",
        recipe,
        deploy=another(recipe),
        qat=folder / "quantized",
        master_weights=newest_checkpoint(folder / "quantized"),
        longer=folder / "longer",
    )
    found = report.compare(engine, sources, unseen, progress=lambda row, windows: None)
    source = report.describe_source(
        f"qkit demo --backend {engine.name} --recipe {recipe.name}",
        backend=engine.name,
        device="the default device",
        files=["every tenth file of Python's own source, held out, and of these some windows at even distances"],
        tokens_per_byte=1.0,
    )
    report.write(folder, found, source, title=f"A small Llama on {recipe.name}")
    return found


def another(recipe: Recipe) -> tuple[Recipe, ...]:
    """`recipe` with the scale rule of another tool, in a tuple; empty if no other tool has a rule for one of its grids."""
    scales = {rule.weight.scale for rule in recipe.rules if rule.weight}
    if not scales <= OTHER_RULE.keys():
        return ()
    rules = [
        replace(rule, weight=replace(rule.weight, scale=OTHER_RULE[rule.weight.scale])) if rule.weight else rule
        for rule in recipe.rules
    ]
    names = "-".join(sorted({OTHER_RULE[scale] for scale in scales}))
    return (replace(recipe, name=f"{recipe.name}-{names}", rules=tuple(rules)),)
