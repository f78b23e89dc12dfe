"""Many dotted paths as few patterns with ranges of numbers, `layers.{0-31}.mlp`, and back: both exact.

A pattern lists its paths in full, so that nobody needs the model to expand it. `{0-3,7}` stands for one whole number of a path.
Braces of a name itself are doubled.
"""

import re
from collections.abc import Iterable, Iterator
from itertools import chain, product
from math import prod
from typing import Final

NUMBER: Final = re.compile(
    r"0|[1-9][0-9]{0,8}"
)  #: a part of a path that may vary: at most nine digits, no leading zeros
TOKEN: Final = re.compile(r"(\{\{|\}\})|\{([0-9,-]+)\}|([{}])")
RANGE: Final = re.compile(rf"({NUMBER.pattern})(?:-({NUMBER.pattern}))?")


def collapse(paths: Iterable[str]) -> dict[str, int]:
    """Patterns whose paths are `paths`, each once, with the number of their paths. Takes linear time.

    >>> collapse(["h.0.up", "h.1.up", "h.0.down", "h.3.up", "head"])
    {'h.{0-1,3}.up': 3, 'h.0.down': 1, 'head': 1}
    """
    found: dict[tuple[str | None, ...], set[tuple[int, ...]]] = {}
    for path in paths:
        parts = path.split(".")
        numbers = tuple(int(part) for part in parts if NUMBER.fullmatch(part))
        shape = tuple(None if NUMBER.fullmatch(part) else part.replace("{", "{{").replace("}", "}}") for part in parts)
        found.setdefault(shape, set()).add(numbers)
    return {_fill(shape, one): count for shape, numbers in found.items() for one, count in _products(numbers)}


def expand(patterns: Iterable[str], *, most: int) -> list[str]:
    """The paths of `patterns`: the inverse of `collapse`.

    >>> expand(["h.{0-1,3}.up"], most=100)
    ['h.0.up', 'h.1.up', 'h.3.up']

    Raises:
        ValueError: a text is no pattern, or there are more than `most` paths.
    """
    out: list[str] = []
    for pattern in patterns:
        texts, numbers = _read(pattern)
        if prod(sum(map(len, one)) for one in numbers) > most - len(out):
            raise ValueError(f"{pattern!r:.200}: the patterns have more than {most:,} paths")
        for chosen in product(*(chain(*one) for one in numbers)):
            out.append(texts[0] + "".join(f"{number}{text}" for number, text in zip(chosen, texts[1:], strict=True)))
    return out


def _products(rows: set[tuple[int, ...]]) -> Iterator[tuple[list[str], int]]:
    """`rows` as disjoint products of lists of numbers: each list as text, and the number of rows in the product."""
    if rows == {()}:
        yield [], 1
        return
    rest: dict[int, set[tuple[int, ...]]] = {}
    for first, *others in rows:
        rest.setdefault(first, set()).add(tuple(others))
    firsts: dict[frozenset[tuple[int, ...]], list[int]] = {}
    for first in sorted(rest):
        firsts.setdefault(frozenset(rest[first]), []).append(first)
    for common, alike in firsts.items():
        for ranges, count in _products(set(common)):
            yield [_text(alike), *ranges], len(alike) * count


def _text(numbers: list[int]) -> str:
    """Ascending numbers as text: `{0-3,7}`, or `7` where there is one."""
    breaks = [i for i in range(1, len(numbers)) if numbers[i] != numbers[i - 1] + 1]
    runs = [numbers[begin:end] for begin, end in zip([0, *breaks], [*breaks, len(numbers)], strict=True)]
    text = ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return text if len(numbers) == 1 else f"{{{text}}}"


def _fill(shape: tuple[str | None, ...], ranges: list[str]) -> str:
    left = iter(ranges)
    return ".".join(next(left) if part is None else part for part in shape)


def _read(pattern: str) -> tuple[list[str], list[list[range]]]:
    """The texts of a pattern, and the numbers between them."""
    texts, numbers, end = [""], list[list[range]](), 0
    for token in TOKEN.finditer(pattern):
        doubled, ranges, single = token.groups()
        texts[-1] += pattern[end : token.start()] + (doubled or " ")[0].strip()
        end = token.end()
        if single:
            raise ValueError(f"{pattern!r:.200} is no pattern of paths: a brace stands alone")
        if ranges:
            numbers.append([_range(one, pattern) for one in ranges.split(",")])
            texts.append("")
    texts[-1] += pattern[end:]
    return texts, numbers


def _range(text: str, pattern: str) -> range:
    match = RANGE.fullmatch(text)
    low, high = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if low > high:
        raise ValueError(f"{pattern!r:.200} is no pattern of paths: {text!r:.50} is no range of numbers")
    return range(low, high + 1)
