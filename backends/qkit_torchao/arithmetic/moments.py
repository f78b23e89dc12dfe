"""The second moments of a layer's inputs on a torch device, as `solve` uses them: `qkit.reference.moments`, in the same bits."""

from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from qkit.errors import GridError
from qkit.reference.moments import DAMPING, SYMMETRY, want_moments
from qkit_torchao.arithmetic import exact_products
from qkit_torchao.arithmetic.exact_products import Halves


@dataclass(frozen=True, slots=True)
class DeviceMoments:
    """`qkit.reference.moments.Moments` on a device; `source` is H itself."""

    source: Tensor
    diagonal: Tensor
    damping: float
    parts: Halves
    order: Tensor
    upper: Tensor

    @classmethod
    def of(cls, moments: NDArray[Any] | Tensor, device: torch.device) -> "DeviceMoments":
        """Those of `moments` [n, n].

        Raises:
            GridError, RangeError: as `qkit.fit`.
        """
        from qkit_torchao.kernels import fits  # here: it imports this package

        given = torch.as_tensor(moments, device=device)
        if given.dim() != 2 or given.shape[0] != given.shape[1]:
            raise GridError(f"moments of shape {tuple(given.shape)} are not E[x x'] of inputs: want [inputs, inputs]")
        diagonal = given.diagonal().double()
        root = diagonal.clamp_min(0).sqrt()
        apart = (given - given.T).abs().double() > SYMMETRY * root[:, None] * root
        want_moments(bool(given.isfinite().all()), diagonal.cpu().numpy(), not bool(apart.any()))
        del apart
        h = given.double()
        h = (h + h.T) / 2
        damping = DAMPING * float(exact_products.total(diagonal)) / len(h)
        order = torch.argsort(-diagonal, stable=True)
        damped = h[order][:, order]
        damped.diagonal().add_(damping)
        return cls(h, diagonal, damping, exact_products.halves(h, 1), order, fits.unit_upper(damped))

    def blocks(self, group: int) -> Halves:
        """The halves of the moments of the inputs of each group, [groups, group, group]."""
        places = torch.arange(len(self.source), device=self.source.device).reshape(-1, group)
        return exact_products.halves(self.source[places[:, :, None], places[:, None, :]], 2)
