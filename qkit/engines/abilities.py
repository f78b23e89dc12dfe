"""Which protocols an engine offers, and which recipe keys it honours. A class with every verb of a protocol offers it."""

from collections.abc import Iterable
from functools import cache
from typing import TypeGuard, TypeVar

from qkit.engines.blocks import Learns, Scores, Watches
from qkit.engines.elsewhere import Remembers, Restores
from qkit.engines.mixtures import Mixes, TrainsExperts
from qkit.engines.norms import TrainsNorms
from qkit.engines.protocol import Adapts, Arrays, Builds, Deploys, Fuses, Modules, Trains
from qkit.engines.solving import Solves
from qkit.engines.translation import Translates
from qkit.errors import BackendError
from qkit.installation import how_to_install
from qkit.rules import Rule

Ability = TypeVar("Ability", bound=Arrays)

ACTIONS: dict[type, str] = {
    Arrays: "quantize arrays",
    Modules: "prepare or convert models",
    Mixes: "quantize mixtures of experts",
    TrainsExperts: "train adapters or learned scales of experts",
    Fuses: "train layers that share a tensor scale",
    Adapts: "train adapters",
    TrainsNorms: "train norms beside adapters",
    Builds: "build and run language models",
    Trains: "train",
    Translates: "read files under other names than the model's",
    Deploys: "convert layers in one pass",
    Watches: "run the blocks of a model by themselves",
    Learns: "learn rounding",
    Scores: "score the weights of a model",
    Solves: "solve weights on their device",
    Restores: "give layers back to other programs",
    Remembers: "say where a model came from",
}


def require(engine: Arrays, protocol: type[Ability]) -> Ability:
    """`engine`, which offers `protocol`.

    Raises:
        BackendError: it does not; the message names the engine and the verbs that it lacks.
    """
    if offers(engine, protocol):
        return engine
    missing = _missing(type(engine), protocol)
    arrays_only = not offers(engine, Modules) and set(_verbs(Modules)) - set(_verbs(Arrays)) <= set(missing)
    reason = "it works on arrays only" if arrays_only else f"it lacks {', '.join(missing)}"
    raise BackendError(
        f"backend {engine.name!r} cannot {ACTIONS[protocol]}: {reason}; choose torchao, which comes with "
        f"{how_to_install('cuda')}, or mlx, which comes with {how_to_install('mac')}"
    )


def want_honored(engine: Modules, rules: Iterable[Rule], verb: str) -> None:
    """Refuses rules with a key that `engine` does not honour.

    Raises:
        BackendError: there is one; the message names the engine, the key and its value.
    """
    honored: frozenset[str] = getattr(engine, "recipe_keys", frozenset())
    if isinstance(honored, str):
        raise BackendError(f"backend {engine.name!r} has recipe_keys = {honored!r}: want a frozenset of names")
    for rule in rules:
        for key, value in rule.engine_keys.items():
            if key not in honored:
                raise BackendError(
                    f"cannot {verb}: backend {engine.name!r} does not honour {key} = {value!r} of the rule for "
                    f"{', '.join(rule.match)}; use a recipe without it, or another engine"
                )


def offers(engine: Arrays, protocol: type[Ability]) -> TypeGuard[Ability]:
    """Whether the class of `engine` has every verb of `protocol`."""
    return not _missing(type(engine), protocol)


@cache
def _missing(engine: type, protocol: type) -> tuple[str, ...]:
    return tuple(verb for verb in _verbs(protocol) if not hasattr(engine, verb))


@cache
def _verbs(protocol: type) -> tuple[str, ...]:
    """The verbs of `protocol` and of those that it extends, these first."""
    bases = reversed(protocol.__mro__)
    return tuple(name for base in bases for name, verb in vars(base).items() if callable(verb) and name[0] != "_")
