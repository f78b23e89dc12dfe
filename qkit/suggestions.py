"""Recipes for a machine, a memory and a size of model: the ones that fit, most bits first."""

import re
from dataclasses import dataclass
from typing import Final

from qkit.engines.registry import recipe as find_recipe
from qkit.engines.registry import recipes
from qkit.errors import PlanError, QkitError
from qkit.rules import Recipe
from qkit.runs_on import LLAMA_CPP, MLX_LM, runs_on

#: By machine, the program that serves there. CUDA includes all that vLLM opens.
MACHINES: Final = {
    "cuda": "vLLM",
    "mac": MLX_LM,
    "cpu": LLAMA_CPP,
    "vllm": "vLLM",
    "mlx-lm": MLX_LM,
    "llama.cpp": LLAMA_CPP,
}
BYTES: Final = {"kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
NUMBERS: Final = {"k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
SHARE: Final = 0.8  #: of the memory: the rest is for the cache and activations
TYPICAL: Final = (4096, 4096)  #: shape of the weight for which bits are counted
ENDS: Final = (
    2 * 128_000 * 4096 / 8e9 ** (1 / 3)
)  #: numbers of an embedding and a head by the cube root of a model's: Llama 3
FLOAT: Final = 16  #: bits of a weight that stays in float
WANTED: Final = 'write a machine, a memory and a size of model, such as "cuda, 24 GB, 8B"'


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine of `--for`.

    Attributes:
        name: a key of `MACHINES`.
        memory: bytes.
        parameters: of the model.
    """

    name: str
    memory: float
    parameters: float


@dataclass(frozen=True, slots=True)
class Suggestion:
    """A recipe that fits. `nbytes` is estimated, and `left` bytes of memory are beside it."""

    recipe: str
    bits: float
    nbytes: float
    left: float


def read_machine(text: str) -> Machine:
    """The machine that text such as `cuda, 24 GB, 8B` describes, in any order.

    Raises:
        QkitError: a part is unknown, twice or missing; the message names it.
    """
    found: dict[str, str | float] = {}
    for part in (part.strip() for part in text.split(",")):
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]+)", part)
        unit = match[2].lower() if match else ""
        number = float(match[1]) if match else 0.0
        key: str
        value: str | float
        if part.lower() in MACHINES:
            key, value = "machine", part.lower()
        elif unit in BYTES:
            key, value = "memory", number * BYTES[unit]
        elif unit in NUMBERS:
            key, value = "size", number * NUMBERS[unit]
        else:
            raise QkitError(f"{part!r} is no machine ({', '.join(MACHINES)}), memory or size: {WANTED}")
        if key in found or not value:
            raise QkitError(f"{part!r}: the {key} is {'zero' if not value else 'there twice'}: {WANTED}")
        found[key] = value
    for key in ("machine", "memory", "size"):
        if key not in found:
            raise QkitError(f"{text!r} names no {key}: {WANTED}")
    return Machine(str(found["machine"]), float(found["memory"]), float(found["size"]))


def suggest(machine: Machine) -> list[Suggestion]:
    """The recipes for weights that run on `machine` and fit its memory: of each element the largest, most bytes first.

    Raises:
        PlanError: none fits; the message names the smallest.
    """
    program = MACHINES[machine.name]
    found: list[tuple[str, Suggestion]] = []
    for one in map(find_recipe, recipes()):
        if program in runs_on(one) and _is_plain(one):
            bits, nbytes = bits_of(one), _nbytes(one, machine.parameters)
            found.append((_element(one), Suggestion(one.name, bits, nbytes, machine.memory - nbytes)))
    least = min((one for _, one in found), key=lambda one: one.nbytes)
    fits = [one for one in found if one[1].nbytes <= SHARE * machine.memory]
    fits.sort(key=lambda one: (one[1].nbytes, -len(one[1].recipe)))  # of two equal ones the shorter name comes last
    if not fits:
        raise PlanError(
            f"no recipe fits {SHARE:.0%} of {machine.memory / 1e9:g} GB: the smallest, {least.recipe}, takes about "
            f"{least.nbytes / 1e9:.1f} GB: take more memory or a smaller model"
        )
    return sorted(dict(fits).values(), key=lambda one: -one.nbytes)  # the last of an element is its largest


def bits_of(recipe: Recipe) -> float:
    """Stored bits per weight of most layers, those that the last rule quantizes."""
    grid = [rule.weight for rule in recipe.rules if rule.weight][-1]
    return grid.bits_per_weight(TYPICAL)


def _element(recipe: Recipe) -> str:
    return next(str(rule.weight.element) for rule in reversed(recipe.rules) if rule.weight)


def _is_plain(recipe: Recipe) -> bool:
    """Whether it needs no training and no data: symmetric scales by a rule, and inputs as they are."""
    return all(
        rule.scales == "rule" and not rule.slots and (rule.weight is None or rule.weight.scale != "minmax")
        for rule in recipe.rules
    )


def _nbytes(recipe: Recipe, parameters: float) -> float:
    """Bytes of a model; where the recipe leaves embedding and head alone, those of a usual vocabulary stay in float."""
    whole = any(rule.kind == "embedding" and rule.weight for rule in recipe.rules)
    ends = 0.0 if whole else min(ENDS * parameters ** (1 / 3), parameters / 2)
    return ((parameters - ends) * bits_of(recipe) + ends * FLOAT) / 8
