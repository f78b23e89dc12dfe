"""Values of parsed recipe files, checked one by one."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from qkit.errors import GridError, RecipeError


@contextmanager
def place(name: str) -> Iterator[None]:
    """Puts `name` before the message of an error inside the block."""
    try:
        yield
    except (RecipeError, GridError) as error:
        raise type(error)(f"{name}: {error}") from None


def value_of(table: Mapping[str, Any], key: str, kind: type, default: Any) -> Any:
    """The value of `key`, or `default`.

    Raises:
        RecipeError: it is not of `kind`.
    """
    value = table.get(key, default)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise RecipeError(f"{key} is {value!r}: want a {kind.__name__}")
    return value


def want_known(table: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    """Refuses a key of `table` that is not `known`.

    Raises:
        RecipeError: there is one.
    """
    for key in table:
        if key not in known:
            raise RecipeError(f"unknown key {key!r} in {where}: there is {', '.join(known)}")
