"""The switch between products of codes and the bits of prepared layers, where an engine has both. Engines read it."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_exact: ContextVar[bool] = ContextVar("exact", default=False)


@contextmanager
def exact() -> Iterator[None]:
    """Inside, converted layers of torch decode their codes at every call, and so compute the bits of prepared layers.

    Outside, one token on the CPU, and up to 64 on CUDA, are multiplied by the codes themselves. That is faster, and sums in
    another order: outputs are within 1e-3 of abs(x) @ abs(w) in bfloat16, 1e-6 in float32. More tokens are multiplied exactly.

    >>> with exact():
    ...     is_exact()
    True
    """
    token = _exact.set(True)
    try:
        yield
    finally:
        _exact.reset(token)


def is_exact() -> bool:
    """Whether the caller is inside of `exact`."""
    return _exact.get()
