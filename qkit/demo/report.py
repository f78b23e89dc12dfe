"""The report at the demo's end: what `qkit compare` would write, with another tool's grid to deploy on."""

from dataclasses import replace
from pathlib import Path

from qkit import report
from qkit.engines.protocol import Builds
from qkit.report.masters import newest_checkpoint
from qkit.rules import Recipe
from qkit.training.data import Tokens

#: The scale rule of another tool, by the rule. Zero points and nvfp4 have no other.
ELSEWHERE = {
    "signed": "absmax",
    "absmax": "signed",
    "midmax": "absmax",
    "rceil": "floor",
    "even": "rceil",
    "floor": "rceil",
}


def write_report(engine: Builds, folder: Path, recipe: Recipe, unseen: Tokens) -> report.Comparison:
    """Compares what was trained as `qkit compare` does, and leaves its page in `folder`."""
    sources = report.Sources(
        folder / "float",
        recipe,
        deploy=another(recipe),
        qat=folder / "quantized",
        masters=newest_checkpoint(folder / "quantized"),
        longer=folder / "longer",
    )
    found = report.compare(engine, sources, unseen, progress=lambda row: None)
    source = report.about(
        f"qkit demo --backend {engine.name} --recipe {recipe.name}",
        backend=engine.name,
        device="the default device",
        files=["every tenth file of Python's own source, held out, and of these some windows at even distances"],
        tokens_per_byte=1.0,
    )
    report.write(folder, found, source, title=f"A small Llama on {recipe.name}")
    return found


def another(recipe: Recipe) -> tuple[Recipe, ...]:
    """`recipe` with the scale rule that some other tool takes for a grid of the same name, if there is such a tool."""
    scales = {rule.weight.scale for rule in recipe.rules if rule.weight}
    if not scales <= ELSEWHERE.keys():
        return ()
    rules = [
        replace(rule, weight=replace(rule.weight, scale=ELSEWHERE[rule.weight.scale])) if rule.weight else rule
        for rule in recipe.rules
    ]
    names = "-".join(sorted({ELSEWHERE[scale] for scale in scales}))
    return (replace(recipe, name=f"{recipe.name}-{names}", rules=tuple(rules)),)
