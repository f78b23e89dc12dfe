"""The verbs of `qkit.engines.norms` for the torch engine, which inherits them."""

from collections.abc import Collection, Iterator

from torch import nn

PARTS = ("weight", "bias")


class Norms:
    """Norms that train beside adapters."""

    def norms(self, model: nn.Module) -> dict[str, bool]:
        """See `TrainsNorms.norms`."""
        return {name: one.requires_grad for name, one in _of_norms(model)}

    def train_norms(self, model: nn.Module, names: Collection[str]) -> None:
        """See `TrainsNorms.train_norms`."""
        for name, one in _of_norms(model):
            if name in names:
                one.requires_grad_(True)


def _of_norms(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters of norms, known by the names of their classes: each architecture of transformers has a class of its own."""
    for path, module in model.named_modules():
        kind = type(module).__name__
        if "Norm" not in kind or "BatchNorm" in kind:
            continue
        for name, one in module.named_parameters(recurse=False):
            if name in PARTS and one.dim() == 1:
                yield f"{path}.{name}" if path else name, one
