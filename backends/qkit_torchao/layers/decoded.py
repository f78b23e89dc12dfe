"""The values of codes as a tensor that refuses to be written: a write would be lost, since the codes would not change."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qkit.errors import StageError
from qkit_torchao.torch_private import without_subclasses

READS = (Tensor.data.__get__, Tensor.detach)  # type: ignore[attr-defined]  #: give the same memory
SETS_DATA = Tensor.data.__set__  # type: ignore[attr-defined]


class Decoded(Tensor):
    """A tensor that is read only. Functions of it return plain tensors."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """As any tensor, but refuses functions that write.

        Raises:
            StageError: such a function.
        """
        written = isinstance(args[0], cls) if args else False
        if written and _writes(func):
            raise StageError(
                "this weight is codes, and the values that would be written are only decoded from them: to merge an adapter, "
                "call qkit.merge(model)"
            )
        with without_subclasses():
            out = func(*args, **(kwargs or {}))
        return out.as_subclass(cls) if func in READS else out


def decoded(values: Tensor) -> Tensor:
    """`values`, read only; as they are in compiled code, which writes to no weights."""
    return values if torch.compiler.is_compiling() else values.as_subclass(Decoded)


def _writes(func: Callable[..., Any]) -> bool:
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
    return in_place or name in ("__iadd__", "__isub__", "__imul__", "__itruediv__", "__setitem__") or func == SETS_DATA
