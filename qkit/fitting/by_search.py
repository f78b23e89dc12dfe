"""Sentences on the layers that are fitted by search although the model has statistics."""

from collections.abc import Iterable

from qkit.fitting.fits import Fit


def summary(without: Iterable[str], fit: Fit) -> str:
    """A sentence on layers without statistics, and one on experts with too few tokens; or nothing."""
    if fit.statistics is None:
        return ""
    paths, few, folder = list(without), fit.statistics.few, fit.statistics.folder
    unknown, scarce = [path for path in paths if path not in few], [path for path in paths if path in few]
    found = []
    if unknown:
        found.append(f"fitted by search, since {folder} has no statistics of them: {_first(unknown)}")
    if scarce:
        found.append(
            f"fitted by search, since fewer tokens than inputs reached them in {folder} ({few[scarce[0]]:,} the first): "
            f"{_first(scarce)}"
        )
    return "\n".join(found)


def _first(paths: list[str]) -> str:
    return paths[0] + (f" and {len(paths) - 1:,} more" if len(paths) > 1 else "")
