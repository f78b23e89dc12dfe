"""The verbs of `qkit.engines.elsewhere`, for the MLX engine."""

from typing import Any

import mlx.nn as nn

from qkit.formats.mlx_families import FAMILIES
from qkit.formats.mlx_types import OTHERWISE, WRONG
from qkit.reference.merged import Update
from qkit_mlx.layers import latent, learned
from qkit_mlx.layers.experts import parts, restore_experts
from qkit_mlx.models import surgery
from qkit_mlx.models.blocks import Watching
from qkit_mlx.models.names import config_of


class Elsewhere(Watching):
    """Models that other programs have opened or wrapped, or get back."""

    def restore_layer(self, module: Any) -> Any:
        """See `qkit.engines.elsewhere.Restores.restore_layer`."""
        if parts(module):
            return restore_experts(module)
        if isinstance(module, latent.Halves):
            return latent.restore_halves(module)
        return learned.restore_layer(module)

    def unwrap(self, model: nn.Module) -> tuple[nn.Module, dict[str, Update]]:
        """See `qkit.engines.elsewhere.Restores.unwrap`; what mlx-lm has put around layers."""
        return surgery.unwrap(model)

    def obstacle_to_merge(self, model: nn.Module) -> str:
        """See `qkit.engines.elsewhere.Restores.obstacle_to_merge`; all adapters of mlx-lm have a merge."""
        return ""

    def knows(self, model: nn.Module) -> bool:
        """See `qkit.engines.elsewhere.Remembers.knows`; mlx-lm's models."""
        return type(model).__module__.startswith("mlx_lm.")

    def doubts(self, model: nn.Module) -> str:
        """See `qkit.engines.elsewhere.Remembers.doubts`; by the type of mlx-lm's model."""
        kind = config_of(model).get("model_type")
        if kind is None or not self.knows(model):
            return ""
        mended = hasattr(model, "qkit_config")
        if why := WRONG.get(kind, "" if mended else OTHERWISE.get(kind, "")):
            return f"mlx-lm computes another {kind!r} than transformers: {why}"
        if kind in FAMILIES:
            return ""
        return (
            f"no model of type {kind!r} is among those whose mlx-lm computes as transformers does, under the names that qkit "
            "gives: compare logits before you use its files in another program"
        )

    def origin(self, model: nn.Module) -> str | None:
        """See `qkit.engines.elsewhere.Remembers.origin`; only `qkit.load` notes it, and mlx-lm does not."""
        return getattr(model, "qkit_origin", None)

    def remember_origin(self, model: nn.Module, folder: str) -> None:
        """See `qkit.engines.elsewhere.Remembers.remember_origin`."""
        model.qkit_origin = folder
