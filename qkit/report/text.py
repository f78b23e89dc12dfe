"""Numbers and sentences for people: the same in the table, the picture and the page."""

from qkit.report.estimates import LONGER
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


def size(nbytes: int) -> str:
    """Bytes in powers of ten."""
    for unit, many in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= many:
            return f"{nbytes / many:.2f} {unit}"
    return f"{nbytes} bytes"


def verdict(cost: Estimate) -> str:
    """A difference of two losses in words: `costs 0.0123`, or `saves 0.0123` where the loss is lower."""
    return f"{'saves' if cost.value < 0 else 'costs'} {abs(cost.value):.4f}"


def verdict_between(cost: Estimate) -> str:
    """The interval of `verdict`, with its sign."""
    ends = (-cost.high, -cost.low) if cost.value < 0 else (cost.low, cost.high)
    return minus(f"{ends[0]:.4f} to {ends[1]:.4f}") + (", not clear of zero" if cost.low <= 0 <= cost.high else "")


def turned(gain: Estimate) -> Estimate:
    """A gain as a cost."""
    return Estimate(-gain.value, -gain.high, -gain.low)


def summary(found: Comparison) -> str:
    """The main results, a sentence each."""
    said = _longer(found)
    if not found.premiums:
        return f"{found.recipe} without training; losses are counted from {found.baseline}.{said}"
    home, *others = found.premiums
    gains = " and ".join(f"{verdict(turned(gain))} over {name}" for name, gain in home.training.items())
    text = f"Training on {found.recipe} {gains}, in nats per token. "
    shares = {name: one for name, one in home.recovered.items() if one is not None}
    if shares:
        won = " and ".join(f"{share(one)} ({share_between(one)}) over {name}" for name, one in shares.items())
        text += f"Of the cost of quantizing, counted from {found.baseline}, it wins back {won}."
    else:
        text += f"Quantizing costs nothing over {found.baseline} that can be told from zero on this text."
    for other in others:
        if other.deployment is not None:
            text += f" Deploying the trained weights on {other.grid} {verdict(other.deployment)} over {found.recipe}."
    return text + said


def _longer(found: Comparison) -> str:
    """A sentence on the float model that was trained longer, where it got worse by that."""
    for row in found.rows:
        if row.name == LONGER and found.baseline != LONGER:
            worse = verdict(row.above).removeprefix("costs ")
            return f" {LONGER} is worse than float by {worse}: the additional training overfitted, and is no baseline."
    return ""
