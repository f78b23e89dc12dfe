"""The numbers of peaks: weights that share a tensor scale raise the same one. Of tensors' addresses only."""

from torch import Tensor


def peak_numbers(weights: list[Tensor], partners: list[tuple[Tensor, ...]]) -> tuple[list[Tensor], list[int]]:
    """`weights` and then those of their partners that are not among them; and for each the number of the peak that it raises."""
    number = {w.data_ptr(): i for i, w in enumerate(weights)}
    more: dict[int, Tensor] = {}
    for w, others in zip(weights, partners, strict=True):
        for other in others:
            if other.data_ptr() not in number:
                more[other.data_ptr()] = other
            number[other.data_ptr()] = number[w.data_ptr()]
    looked_at = [*weights, *more.values()]
    return looked_at, [number[w.data_ptr()] for w in looked_at]
