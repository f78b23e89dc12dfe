"""`docs/evidence/models.md` and README's sentence about models, made from the gate's table: `python tests/families/page.py`."""

import re
from pathlib import Path
from typing import Any

from gate import GOOD, READERS, RECIPES, WORDS, word

from qkit.artifact import known

ROOT = Path(__file__).parents[2]
PAGE, README = ROOT / "docs/evidence/models.md", ROOT / "README.md"
SIGNS = {
    "equal": "=",
    "none": "·",
    "refused": "×",
    "fails": "×",
    "warned": "≠",
    "differs in float": "f",
    "wrong": "wrong",
}
HEAD = """# Models

`make test-families` makes a small model of each family with transformers' own classes, with the tensor names and companions of
published checkpoints. It quantizes the directory with three recipes, opens the output in every reader, and compares the result
with the float model whose weights are the codes' values: every weight in torch, bit for bit, and logits or hidden states
everywhere, to a tolerance that `tests/families/gate.py` gives with its reason. `make test` runs a dozen of the rows.

The three signs of a cell are for `int4-g32`, for a recipe with 8 bits in the first block and 4 in the others, and for
`int4-g32-all`, which has embeddings and the output head on the grid. A sign is one or two words of the gate:

"""
TAIL = """
For each sign but `=` and `·`, `qkit plan` and `qkit quantize` refuse the model, or warn by the name of the reader, before any
work. A cell in which neither holds is `wrong`, and so is one in which qkit itself opens other values. One such cell fails the
gate.

- "dequantized" is transformers with `CompressedTensorsConfig(dequantize=True)`. In transformers 5.23, it reads every layer by the
  first grid of the configuration, and fails or gives other weights where a recipe has several. The default reads several grids
  right. It has no embeddings of codes, so a recipe that quantizes embeddings opens with `dequantize=True` alone.
- Some classes of transformers initialize weights that codes have replaced, and fail by default: T5, Mamba, ModernBERT and others.
  They open with `dequantize=True`.
- mlx-lm ignores the sliding windows of Mistral, Mixtral, Phi-3, Phi-MoE, Qwen2, Qwen3 and StarCoder2, and one form of gelu in
  GPT-NeoX, GPTBigCode, Gemma and StarCoder2. It ignores `truncate` of gpt-oss's rope, the short factors of Phi-3's long one, and
  that half of a head of GLM's does not turn; the groups of Mamba 2's and Granite 4's states, and the biases by which Ernie 4.5
  chooses experts. qkit's MLX engine computes all of these.
- A model type that is not in this table gets a warning: the names and shapes of its tensors alone say which of them are layers.

"""


def page() -> str:
    """The text of the page."""
    rows: dict[str, Any] = known.table()["rows"]
    lines = [f"| family | {' | '.join(READERS)} |", f"|---|{'---|' * len(READERS)}"]
    lines += [f"| {name} | {' | '.join(_cell(rows[name], reader) for reader in READERS)} |" for name in rows]
    return HEAD + words() + TAIL + wrapped(summary()) + "\n\n" + "\n".join(lines) + "\n"


def words() -> str:
    """A table of the words of the gate: sign, meaning, and the number of cells."""
    cells = [
        word(cell) for row in known.table()["rows"].values() for recipe in RECIPES for cell in row[recipe].values()
    ]
    lines = ["| sign | word | a cell says so when | cells |", "|---|---|---|---|"]
    lines += [f"| `{SIGNS[one]}` | {one} | {meaning} | {cells.count(one):,} |" for one, meaning in WORDS.items()]
    return "\n".join(lines) + "\n"


def summary() -> str:
    """The sentence that counts the families."""
    rows: dict[str, Any] = known.table()["rows"]
    own = sum(all(_good(row, reader, "int4") for reader in READERS[:2]) for row in rows.values())
    others = sum(all(_good(row, reader, "int4") for reader in READERS[2:]) for row in rows.values())
    counted = f"Of {len(rows)} checkpoints of {len(known.table()['types'])} model types"
    return (
        f"{counted}, {own} open equal on both of qkit's engines under `int4-g32`. In transformers, by default and dequantized, "
        f"and in mlx-lm, {others} do, counting those that the reader lacks."
    )


def _good(row: dict[str, Any], reader: str, recipe: str) -> bool:
    return row[recipe].get(reader) in GOOD


def _cell(row: dict[str, Any], reader: str) -> str:
    return " ".join(SIGNS[word(row[recipe].get(reader, "refused"))] for recipe in RECIPES)


def readme(text: str) -> str:
    """README's text with today's sentence between its marks."""
    between = r"(?<=<!-- models -->\n).*?(?=<!-- /models -->)"
    return re.sub(between, lambda _: wrapped(summary()) + "\n", text, flags=re.DOTALL)


def wrapped(text: str, width: int = 130) -> str:
    """`text` in lines of at most `width` characters."""
    lines = [""]
    for part in text.split():
        if len(lines[-1]) + len(part) + 1 > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {part}".strip()
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    README.write_text(readme(README.read_text(encoding="utf-8")), encoding="utf-8")
