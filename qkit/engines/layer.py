"""`Layer`: the description of one layer of a model, by which engines and the core talk about it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from qkit.errors import StageError
from qkit.rules import Kind, Rule

Stage = Literal["float", "prepared", "converted"]
Mode = Literal["on", "off", "calibrating"]
#: First parts of the paths of output heads: of language models, and of those that classify, reward or answer.
HEAD_PARTS = (
    "classifier",
    "cls",
    "embed_out",
    "generator_lm_head",
    "head",
    "lm_head",
    "output",
    "pre_classifier",
    "proj_out",
    "qa_outputs",
    "score",
    "v_head",
    "vocab_projector",
)


LANGUAGE = "language_model."  #: begins the paths of language models beside towers of pictures, their heads' too


def is_head_path(path: str) -> bool:
    """Whether a linear layer at `path` of a model is an output head, or in one, by its name."""
    return path.removeprefix(LANGUAGE).split(".")[0] in HEAD_PARTS


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of a model.

    Attributes:
        path: dotted path of the module; its first path, where it is registered more than once. For `other`, a tensor's name. For
            `experts` the path of the block, by transformers' names (`model.layers.0.mlp.experts`): artifacts have it.
        kind: `linear`, `embedding` or `experts`. `other` is a weight that no rule can match; it is listed so that coverage is
            complete.
        shape: the shape of the weight, (outputs, inputs). For `experts` (experts, outputs, inputs), where all projections
            count as outputs of the inputs of the block.
        module: the framework's module itself.
        stage: `float`, `prepared` or `converted`.
        rule: the rule by which it was prepared or converted; None in a float layer.
        mode: the mode that `Modules.switch_mode` set last, in a prepared layer.
        native: whether a converted layer runs on the engine's own quantized tensor or layer, without decoding the weight first.
        execution: the name of that tensor or layer; or the reason why the weight is decoded first.
        tied: path of the layer before it that has the same weight; empty where there is none.
        obstacle: why a layer cannot be quantized although it has a weight; for `other`, why no rule can match it.
        adapter: kind and rank of its adapter, if any; see `qkit.adapters`.
        sharded: whether this process stores only a part of the weight, even if a forward gathers the whole.
        bare: the path in the model without wrappers of other libraries, as peft's, which put parts into `path`. Empty where the
            two are the same.
        wrapper: the class of the module of another library that wraps it, if any.
        unknown: whether qkit does not know that class, or cannot merge it, since it leaves the grid out.
        head: whether it is an output head of the model, by its role. A rule for `lm_head` is a rule for it.
        lost: whether the layer was quantized once and is a plain float layer now, since another program replaced it.
        projections: of `experts`, the shape (experts, outputs, inputs) of each projection, by its name in `qkit.experts`.
        interleaved: of `experts`, whether transformers has the outputs of gate and up in turn in one parameter.
        dtype: NumPy's name of the type of the values of a weight on a grid; empty where the engine does not say.
        stored: of `experts`, the names in `Modules.tensors` of the tensors that hold the weights while they are float.
    """

    path: str
    kind: Kind | Literal["other"]
    shape: tuple[int, ...]
    module: Any
    stage: Stage = "float"
    rule: Rule | None = None
    mode: Mode = "on"
    native: bool = False
    execution: str = ""
    tied: str = ""
    obstacle: str = ""
    adapter: str = ""
    sharded: bool = False
    bare: str = ""
    wrapper: str = ""
    unknown: bool = False
    head: bool = False
    lost: bool = False
    projections: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)
    stored: tuple[str, ...] = ()
    interleaved: bool = False
    dtype: str = ""

    @property
    def weights(self) -> dict[str, tuple[int, ...]]:
        """The shape of each of its weights: `shape` under the name `weight`, or those of the projections of experts."""
        return dict(self.projections) if self.kind == "experts" else {"weight": self.shape}

    @property
    def name(self) -> str:
        """The path by which recipes know the layer, whatever wraps it."""
        return self.bare or self.path


FIT = "qkit_fit"  #: attribute of a converted module whose codes were fitted: how, as JSON


def grids_of(rule: Rule) -> str:
    """The grids of a rule as text, for the `repr` of a layer: of weight, input and output, and whether scales are learned."""
    weight = f"{rule.weight} {rule.scales}" if rule.scales != "rule" else str(rule.weight or "float")
    text = " @ ".join(filter(None, (weight, str(rule.activation or ""))))
    return f"grid={text} -> {rule.output}" if rule.output else f"grid={text}"


def want_merged(layers: Iterable[Layer], verb: str) -> None:
    """Refuses layers with adapters: their own weights do not contain the adapter."""
    for layer in layers:
        if layer.adapter:
            raise StageError(
                f"cannot {verb}: {layer.path} has an adapter ({layer.adapter}); call qkit.merge(model) first"
            )


def want_whole(layers: Iterable[Layer], verb: str) -> None:
    """Refuses layers whose weights are spread over processes."""
    for layer in layers:
        if layer.sharded:
            way_out = (
                f"{verb} the model first and shard it then"
                if layer.stage == "float" or verb == "adapt"
                else "call whole = qkit.gather(model) in every process, and go on with the whole model in the one that gets it"
            )
            raise StageError(f"cannot {verb}: {layer.path} is sharded over processes; {way_out}")


def want_bare(layers: Iterable[Layer], verb: str) -> None:
    """Refuses layers inside of modules of other libraries, which compute more than the layer does."""
    for layer in layers:
        if layer.wrapper:
            way_out = (
                f"qkit cannot see past {layer.wrapper}, or it leaves the grid out: take it off, or use another adapter"
                if layer.unknown
                else "call model = qkit.merge(model) first"
            )
            raise StageError(f"cannot {verb}: {layer.path} is inside of a {layer.wrapper}; {way_out}")


def want_known(layers: Iterable[Layer], verb: str) -> None:
    """Refuses layers inside of modules that qkit cannot see past."""
    want_bare((layer for layer in layers if layer.unknown), verb)


def want_none_lost(layers: Iterable[Layer], verb: str) -> None:
    """Refuses models with layers that were on a grid once and are plain float layers now."""
    if lost := [layer.path for layer in layers if layer.lost]:
        raise StageError(
            f"cannot {verb}: {lost[0]} was on a grid, and is a plain float layer now{_and_others(lost)}: merge adapters by "
            "qkit.merge(model), not by their library; or call qkit.unprepare(model, match) to leave these layers in float"
        )


def _and_others(paths: list[str]) -> str:
    return f", like {len(paths) - 1} others" if len(paths) > 1 else ""
