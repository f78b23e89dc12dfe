"""The foot of the page: all that a reader needs to repeat the report."""

from collections.abc import Mapping
from html import escape
from typing import Any

from qkit.report.about import About
from qkit.report.findings import Comparison
from qkit.rules import GRIDS


def footer(found: Comparison, source: About) -> str:
    """Command, text, recipes and versions."""
    recipes = "".join(_recipe(recipe) for recipe in found.recipes)
    versions = ", ".join(f"{name} {number}" for name, number in {**source.versions, **source.machine}.items())
    return f"""<h2>Made by</h2><pre>{escape(source.command)}</pre>
<p class="note">On {escape(source.backend)}, {escape(source.device)}. {escape(versions)}.</p>
<h2>Text</h2><pre>{escape(chr(10).join(source.files))}</pre>
<h2>Recipes</h2>{recipes}
<p class="note">A loss is the mean of next-token losses in nats, computed by qkit from logits in float64, on the same tokens
for every model. Intervals take the models as they are: they say nothing of other seeds.</p>"""


def _recipe(recipe: Mapping[str, Any]) -> str:
    lines = []
    for rule in recipe["rules"]:
        grids = [f"{slot} {'-'.join(map(str, rule[slot].values()))}" for slot in GRIDS if slot in rule]
        lines.append(f"{rule['kind']} {', '.join(rule['match'])}: {', '.join(grids) or 'left alone'}")
    return f"<pre>{escape(recipe['name'])}, version {recipe['version']}\n{escape(chr(10).join(lines))}</pre>"
