"""Numbers and sentences for people: the same in the table, the picture and the page."""

from qkit.report.findings import Comparison, Measured
from qkit.report.intervals import Estimate


def nats(one: Estimate) -> str:
    """A loss, or a difference of two."""
    return minus(f"{one.value:.4f}")


def nats_between(one: Estimate) -> str:
    """The interval of a loss."""
    return minus(f"{one.low:.4f} to {one.high:.4f}")


def share(one: Estimate | None) -> str:
    """A share in per cent, or `no clear cost` where there is none."""
    return "no clear cost" if one is None else minus(f"{one.value:.0%}")


def share_between(one: Estimate | None) -> str:
    """The interval of a share."""
    return "" if one is None else minus(f"{one.low:.0%} to {one.high:.0%}")


def minus(text: str) -> str:
    """`text` with minus signs in place of hyphens before digits."""
    return "".join("−" if a == "-" and b.isdigit() else a for a, b in zip(text, text[1:] + " ", strict=True))


def tone(row: Measured, found: Comparison) -> str:
    """The class of a row's color: `float`, `ptq`, `longer`, `qat`, or `moved` for a trained model on another grid."""
    if row.name.startswith("QAT"):
        return "qat" if row.grid == found.recipe else "moved"
    if not row.grid:
        return "float"
    return "longer" if row.name.startswith("longer") else "ptq"


def summary(found: Comparison) -> str:
    """The main results, in a sentence or two."""
    if not found.premiums:
        return f"{found.recipe} without training; losses are counted from {found.baseline}."
    home, *others = found.premiums
    if home.recovered is None:
        text = f"On {found.recipe}, quantizing costs nothing that can be told from zero on this text"
    else:
        text = (
            f"Training on {found.recipe} won back {share(home.recovered)} ({share_between(home.recovered)}) of the cost of "
            "quantizing without training"
        )
    for other in others:
        if other.deployment is not None:
            verb = "adds" if other.deployment.value >= 0 else "takes"
            text += (
                f"; deploying the same weights on {other.grid} {verb} {abs(other.deployment.value):.4f} nats per token"
            )
    return text + "."
