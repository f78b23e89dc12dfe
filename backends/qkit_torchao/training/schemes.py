"""The schemes of other trainers as recipes, and the arguments of a TRL script."""

from dataclasses import dataclass, field
from typing import Any

from torch import nn

import qkit
from qkit.errors import RecipeError
from qkit_torchao.training.transformers import QatCallback

#: Names of unsloth's `qat_scheme`, and the recipes with their grids.
SCHEMES = {
    "int4": "int4-weight-only",
    "int8": "int8-row",
    "int8-int4": "int8-dynamic-act-int4-weight",
    "phone-deployment": "int8-dynamic-act-int4-weight",
    "fp8-fp8": "float8-dynamic-act-float8-weight",
}


def qat_scheme(model: nn.Module, scheme: str) -> Any:
    """`model`, with or without adapters of peft's, on the grids of unsloth's scheme, or of a recipe of this name.

    Raises:
        RecipeError: there is no such scheme or recipe.
        StageError, GridError: see `qkit.prepare`.
    """
    if scheme not in SCHEMES and scheme not in qkit.recipes():
        raise RecipeError(f"no scheme {scheme!r}: there is {', '.join(SCHEMES)}, and every recipe")
    return qkit.prepare(model, SCHEMES.get(scheme, scheme))


@dataclass
class QatArguments:
    """Arguments of a training script: `TrlParser((ScriptArguments, SFTConfig, ModelConfig, QatArguments))`."""

    qat_recipe: str | None = field(default=None, metadata={"help": "A recipe of qkit's; none trains in float."})
    qat_start: int = field(default=0, metadata={"help": "Steps in float before the first on the grid."})
    qat_interval: int = field(default=1, metadata={"help": "Steps in a row with the same quantized values."})
    qat_match: str = field(default="*", metadata={"help": "The layers that the schedule switches."})

    def callbacks(self) -> list[QatCallback]:
        """The callback, in a list for the trainer; empty without a recipe."""
        if self.qat_recipe is None:
            return []
        return [QatCallback(self.qat_recipe, start=self.qat_start, interval=self.qat_interval, match=self.qat_match)]
