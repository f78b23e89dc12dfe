"""The plugin for axolotl: `plugins: [qkit.integrations.axolotl.QkitPlugin]`, and a block `qkit:` in its configuration."""

from importlib import import_module
from pathlib import Path
from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, ConfigDict, field_validator

import qkit
from qkit.errors import QkitError, RecipeError
from qkit.pipeline import surgeon
from qkit.training.schedule import Schedule

OTHERS = ("qat", "quantization", "llmcompressor", "load_in_4bit", "load_in_8bit", "gptq")  #: quantize the model, too


class Settings(BaseModel):
    """The block `qkit:`.

    Attributes:
        recipe: a name or a TOML file.
        start, interval, windows, ramp, match: as in `qkit_torchao.QatCallback`.
        out: the folder of the artifact, which is written after training; `OUTPUT_DIR/qkit` without it.
    """

    model_config = ConfigDict(extra="forbid")

    recipe: str
    start: int = 0
    interval: int = 1
    windows: list[tuple[int, int]] = []
    ramp: list[tuple[int, str]] = []
    match: str = "*"
    out: str | None = None

    @field_validator("recipe")
    @classmethod
    def _known(cls, recipe: str) -> str:
        try:
            qkit.recipe(recipe)
        except QkitError as error:
            raise ValueError(str(error)) from None
        return recipe

    def model_post_init(self, context: Any, /) -> None:
        """Refuses a schedule that makes no sense."""
        Schedule(self.start + 1, tuple(self.windows), self.match, self.interval, tuple(self.ramp))


class QkitArgs(BaseModel):
    """The part of axolotl's configuration that this plugin adds."""

    qkit: Settings


class QkitPlugin(BasePlugin):
    """Trains on the grids of a recipe, and writes the artifact of the trained model."""

    def get_input_args(self) -> str:
        """Where axolotl finds the block that it validates."""
        return f"{__name__}.QkitArgs"

    def pre_model_load(self, cfg: Any) -> None:
        """Refuses a second quantizer on one model, before the model is loaded.

        Raises:
            RecipeError: the configuration names one.
        """
        for name in OTHERS:
            if cfg.get(name):
                raise RecipeError(f"{name} quantizes the model, and so does qkit: leave one of them out")

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[Any]:
        """The callback that prepares the model and follows the schedule."""
        mine = _settings(cfg)
        schedule = mine.model_dump(exclude={"recipe", "out"})
        return [import_module("qkit_torchao").QatCallback(mine.recipe, **schedule)]

    def post_train(self, cfg: Any, model: Any) -> None:
        """Merges adapters, converts the model and writes the artifact."""
        out = Path(_settings(cfg).out or Path(cfg["output_dir"]) / "qkit")
        if any(layer.wrapper for layer in surgeon(model, None).layers(model)):
            model = qkit.merge(model)
        qkit.save(qkit.convert(model), out)


def _settings(cfg: Any) -> Settings:
    block = cfg["qkit"]
    return (
        block
        if isinstance(block, Settings)
        else Settings(**{key: x for key, x in dict(block).items() if x is not None})
    )
