"""The verbs of `qkit.engines.elsewhere`, for the torch engine."""

from typing import Any, cast

from torch import nn

from qkit.engines.protocol import Modules
from qkit.reference.merged import Update
from qkit_torchao.arithmetic.solving import Solving
from qkit_torchao.layers import learned
from qkit_torchao.layers.learned_experts import restore_experts
from qkit_torchao.layers.prepared_experts import FakeExperts
from qkit_torchao.models import wrappers
from qkit_torchao.models.blocks import Watching
from qkit_torchao.models.learning import Learning
from qkit_torchao.models.scoring import Scoring


class Elsewhere(Watching, Learning, Scoring, Solving):
    """Models that other programs have opened or wrapped, or get back."""

    def save_as_artifact(self, model: nn.Module) -> nn.Module:
        """`model`; one of transformers' writes an artifact in `save_pretrained` while layers of it are converted."""
        if self.knows(model) and hasattr(model, "save_pretrained"):
            from qkit_torchao.models import huggingface

            huggingface.save_as_artifact(model, cast(Modules, self))
        return model

    def restore_layer(self, module: Any) -> nn.Module:
        """See `qkit.engines.elsewhere.Restores.restore_layer`."""
        restored: nn.Module = (
            restore_experts(module) if isinstance(module, FakeExperts) else learned.restore_layer(module)
        )
        return restored

    def unwrap(self, model: nn.Module) -> tuple[nn.Module, dict[str, Update]]:
        """See `qkit.engines.elsewhere.Restores.unwrap`; what peft has put around layers."""
        return wrappers.unwrap(model)

    def obstacle_to_merge(self, model: nn.Module) -> str:
        """See `qkit.engines.elsewhere.Restores.obstacle_to_merge`; by a trial on a copy."""
        return wrappers.obstacle_to_merge(model)

    def knows(self, model: nn.Module) -> bool:
        """See `qkit.engines.elsewhere.Remembers.knows`; transformers' models."""
        return hasattr(getattr(model, "config", None), "to_json_string")

    def doubts(self, model: nn.Module) -> str:
        """See `qkit.engines.elsewhere.Remembers.doubts`; transformers' own modules leave none."""
        return ""

    def origin(self, model: nn.Module) -> str | None:
        """See `qkit.engines.elsewhere.Remembers.origin`; transformers remembers it."""
        return getattr(model, "name_or_path", None) or None

    def remember_origin(self, model: nn.Module, folder: str) -> None:
        """See `qkit.engines.elsewhere.Remembers.remember_origin`."""
        setattr(model, "name_or_path", folder)  # noqa: B010  the name of transformers' own note
