"""The second moments of a layer's inputs on a torch device, as `solve` uses them: `qkit.reference.moments`, in the same bits."""

from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from qkit.errors import GridError
from qkit.reference.moments import DAMPING, SYMMETRY, want_moments
from qkit.reference.products import BITS
from qkit_torchao.arithmetic import exact_products


@dataclass(frozen=True, slots=True)
class DeviceMoments:
    """`qkit.reference.moments.Moments` on a device; `source` is as it was given.

    Attributes:
        digits: of correlations, see `kernels.cuda_digits`; None where no kernel takes them.
    """

    source: Tensor
    diagonal: Tensor
    damping: float
    sizes: Tensor
    correlations: Tensor
    digits: Tensor | None
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
        given, diagonal = given.contiguous(), given.diagonal().double()
        passes = fits.moments(given)
        infinite, lopsided = passes.faults(given, diagonal.clamp_min(0).sqrt(), SYMMETRY)
        want_moments(not infinite, diagonal.cpu().numpy(), not lopsided)
        damping = DAMPING * float(exact_products.total(diagonal)) / len(given)
        order = torch.argsort(-diagonal, stable=True)
        upper = passes.factor(given, order, damping)
        sizes = exact_products.power(torch.frexp(diagonal + damping).exponent // 2)
        numbers, digits = passes.correlations(given, sizes)
        return cls(given, diagonal, damping, sizes, numbers, digits, order, upper)

    def times(self, d: Tensor, rows: slice = slice(None), inputs: slice = slice(None)) -> Tensor:
        """See `qkit.reference.moments.Moments.times`."""
        found = exact_products.product(self.correlations[rows, inputs], self.sizes[inputs, None] * d)
        return found.mul_(self.sizes[rows, None])

    def blocks(self, group: int) -> Tensor:
        """The moments of the inputs of each group, [groups, group, group], to 2^-20."""
        places = torch.arange(len(self.source), device=self.source.device).reshape(-1, group)
        found = self.source[places[:, :, None], places[:, None, :]].double()
        return exact_products.shortened((found + found.transpose(1, 2)) / 2, 2)


def faults(h: Tensor, roots: Tensor, bound: float) -> tuple[bool, bool]:
    """Whether any of `h` [n, n] is not finite; and whether h_ij and h_ji differ by more than `bound` times both `roots` [n]."""
    apart = (h - h.T).abs().double() > bound * roots[:, None] * roots
    return not bool(h.isfinite().all()), bool(apart.any())


def factor(h: Tensor, order: Tensor, damping: float) -> Tensor:
    """`exact_products.unit_upper` of `h` and the damping, inputs in `order`.

    Raises:
        RangeError: as that.
    """
    damped = _mean(h)[order][:, order]
    damped.diagonal().add_(damping)
    return exact_products.unit_upper(damped)


def correlations(h: Tensor, sizes: Tensor) -> tuple[Tensor, None]:
    """See `qkit.reference.moments.correlations`; and no digits of these."""
    unit = 2.0 ** (1 - BITS)
    numbers = _mean(h).div_(sizes[:, None] * unit).div_(sizes).round_().clamp_(-(2**BITS), 2**BITS)
    return numbers.mul_(unit), None


def _mean(h: Tensor) -> Tensor:
    h = h.double()
    return (h + h.T).div_(2)
