"""Mixtures of experts: the names of experts and routers in files and in models, and the codes of many experts at once.

Names read off `conversion_mapping.py` of transformers 5.23. In files an expert is a layer of its own, `X.experts.7.gate_proj`, or
one tensor stacks all of them. In models the experts of a block are one layer of kind `experts`, at the path `X.experts`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from numpy.typing import NDArray

from qkit.fused import shares
from qkit.grid import Grid
from qkit.qtensor import QTensor

#: Projections of an expert, in the order in which models stack and fuse them. Experts without a gate have the last two.
PROJECTIONS: Final = ("gate_proj", "up_proj", "down_proj")
#: Paths of routers: they choose the experts of a token, are small, and no rule matches them.
ROUTER: Final = re.compile(r"(?:^|\.)(?:router(?:_mlp|_gate)?(?:\..+)?|gate(?:\.wg)?|shared_expert_gate)$")

#: Names of the projections in files, where they are not those of `PROJECTIONS`.
NUMBERED: Final = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
EXPERT: Final = re.compile(rf"(.+\.)?experts\.(\d+)\.({'|'.join((*PROJECTIONS, *NUMBERED))})")
STACK: Final = re.compile(rf"(?:(.+)\.)?experts\.(gate_up_proj|{'|'.join(PROJECTIONS)})(?:\.weight)?")

#: Types of models whose files name projections as in `NUMBERED`.
WITH_NUMBERS: Final = ("mixtral", "minimax", "minimax_m2", "phimoe", "lfm2_moe")
#: Types of models whose files call a block `block_sparse_moe`, and transformers' modules `mlp`.
SPARSE_BLOCKS: Final = ("mixtral", "minimax", "minimax_m2", "phimoe")
#: Types of models whose stacks are [experts, inputs, outputs].
TRANSPOSED: Final = ("gpt_oss", "llama4", "llama4_text", "aria", "aria_text", "openai_privacy_filter")
#: Types of models whose stacks have the outputs of gate and up in turn.
INTERLEAVED: Final = ("gpt_oss",)
GATE_UP, DOWN = "experts.gate_up_proj", "experts.down_proj"
#: By model type: names of stacks in files, and those of `STACK` that they stand for.
STACK_NAMES: Final[Mapping[str, Mapping[str, str]]] = {
    "granitemoe": (GRANITE := {"input_linear.weight": GATE_UP, "output_linear.weight": DOWN}),
    "granitemoeshared": GRANITE,
    "granitemoehybrid": GRANITE,
    "granitemoe_swa": GRANITE,
    "aria": (ARIA := {"experts.fc1.weight": GATE_UP, "experts.fc2.weight": DOWN}),
    "aria_text": ARIA,
}

#: Other types of models whose files stack experts. Llama 4's transformers takes apart for compressed-tensors.
STACKED: Final = (
    *(
        "gpt_oss",
        "openai_privacy_filter",
        "qwen3_vl_moe",
        "qwen3_vl_moe_text",
        "minimax_m3_vl_text",
        "gemma4",
        "gemma4_text",
        "hy_v4",
        "mistral4",
    ),
    *(
        "diffusion_gemma",
        "diffusion_gemma_text",
        "inkling_mm_model",
        "inkling_text",
        "inkling2",
        "inkling2_text",
        "step3p7",
    ),
    *("muse_spark", "muse_spark_text", "zaya"),
)

Shape = tuple[int, ...]
Weights = Mapping[str, Any]  #: by projection, the weights of all experts, [experts, outputs, inputs]
Codes = dict[str, list[QTensor[Any]]]  #: by projection, the quantized weight [outputs, inputs] of each expert


@dataclass(frozen=True, slots=True)
class Member:
    """The place of a stored tensor among the experts of a block.

    Attributes:
        block: path of the experts, such as `model.layers.0.mlp.experts`.
        projections: those in the tensor: one, or gate and up.
        expert: number of the expert whose weight it is; None where the tensor stacks all experts.
        count: experts in a stack; 1 for a single one.
        shape: of the weight of one expert's projection, [outputs, inputs].
        transposed: whether a stack is [experts, inputs, outputs].
        interleaved: whether the outputs of gate and up stand in turn, not one after the other.
        written: names of the projections in files.
    """

    block: str
    projections: tuple[str, ...]
    expert: int | None
    count: int
    shape: tuple[int, int]
    transposed: bool = False
    interleaved: bool = False
    written: tuple[str, ...] = ()

    @property
    def paths(self) -> dict[tuple[int, str], str]:
        """The path in files of every weight [outputs, inputs] in the tensor, by the number of its expert and its projection."""
        numbers = range(self.count) if self.expert is None else (self.expert,)
        names = self.written or self.projections
        return {
            (number, projection): f"{self.block}.{number}.{name}"
            for number in numbers
            for projection, name in zip(self.projections, names, strict=True)
        }

    def matrix(self, stored: NDArray[Any], expert: int, projection: str) -> NDArray[Any]:
        """The weight [outputs, inputs] of one expert: a view of `stored`, the whole tensor."""
        if self.expert is not None:
            return stored
        one: NDArray[Any] = stored[expert].T if self.transposed else stored[expert]
        place, parts = self.projections.index(projection), len(self.projections)
        return one[place::parts] if self.interleaved else one[place * self.shape[0] : (place + 1) * self.shape[0]]


def is_router(path: str) -> bool:
    """Whether the layer at `path` chooses experts, or weighs those that every token reaches."""
    return ROUTER.search(path) is not None


def expert_of(path: str) -> tuple[str, int, str] | None:
    """Path of the block, number of the expert, and projection, of the layer at `path` in files; None for other layers."""
    if (found := EXPERT.fullmatch(path)) is None:
        return None
    return f"{found[1] or ''}experts", int(found[2]), NUMBERED.get(found[3], found[3])


def member_of(name: str, shape: Shape, config: Mapping[str, Any]) -> Member | None:
    """The place of the tensor `name` of `shape` among experts; None where it is no weight of experts.

    Args:
        config: of the model; its type and its hidden size tell how a stack lies where its shape does not.
    """
    path, _, last = name.rpartition(".")
    if last == "weight" and len(shape) == 2 and (found := expert_of(path)):
        block, number, projection = found
        return Member(block, (projection,), number, 1, (shape[0], shape[1]), written=(path.rpartition(".")[2],))
    stack = STACK.fullmatch(_usual(name, config))
    if stack is None or len(shape) != 3:
        return None
    block = f"{stack[1]}.experts" if stack[1] else "experts"
    fused = stack[2] == "gate_up_proj"
    projections = ("gate_proj", "up_proj") if fused else (stack[2],)
    transposed = _is_transposed(shape, stack[2], config)
    outputs, inputs = shape[:0:-1] if transposed else shape[1:]
    if outputs % len(projections):
        return None
    written = tuple(file_projection(one, config) for one in projections)
    return Member(
        block,
        projections,
        None,
        shape[0],
        (outputs // len(projections), inputs),
        transposed,
        fused and bool(types_of(config) & set(INTERLEAVED)),
        written,
    )


def is_stacked(config: Mapping[str, Any]) -> bool:
    """Whether files of such a model stack experts, so that transformers has no name for single ones."""
    return bool(types_of(config) & {*STACKED, *STACK_NAMES})


def file_projection(projection: str, config: Mapping[str, Any]) -> str:
    """The name of a projection in the files of such a model."""
    if not types_of(config) & set(WITH_NUMBERS):
        return projection
    return next(name for name, known in NUMBERED.items() if known == projection)


def file_name(name: str, config: Mapping[str, Any] | None) -> str:
    """The name in files of a tensor or a layer that a model calls `name`: other for the blocks of some types of models."""
    if not config or not types_of(config) & set(SPARSE_BLOCKS):
        return name
    gate = "gate" if config.get("model_type") == "phimoe" else "router"
    return re.sub(r"\.mlp\.", ".block_sparse_moe.", name).replace(
        ".block_sparse_moe.router.", f".block_sparse_moe.{gate}."
    )


def module_name(name: str, config: Mapping[str, Any] | None) -> str:
    """The inverse of `file_name`; a name that is the model's own already does not change."""
    if not config or not types_of(config) & set(SPARSE_BLOCKS):
        return name
    name = name.replace(".block_sparse_moe.", ".mlp.")
    return name.replace(".mlp.gate.", ".mlp.router.") if config.get("model_type") == "phimoe" else name


def whole(block: str, members: Iterable[Member]) -> dict[str, tuple[int, int, int]]:
    """The shape [experts, outputs, inputs] of each projection of the block whose tensors are `members`.

    Raises:
        ValueError: an expert or a projection is missing, or shapes differ; the message says which.
    """
    found: dict[str, dict[int, tuple[int, int]]] = {}
    for member in members:
        for number, projection in member.paths:
            found.setdefault(projection, {})[number] = member.shape
    if not {"up_proj", "down_proj"} <= found.keys():
        missing = " and ".join({"up_proj", "down_proj"} - found.keys())
        raise ValueError(f"{block} has no {missing}: a shard is missing, or fetch the model again")
    count = 1 + max(number for numbers in found.values() for number in numbers)
    for projection, numbers in found.items():
        for absent in set(range(count)) - numbers.keys():
            raise ValueError(
                f"{block}.{absent}.{projection} is missing, and the block has {count} experts: fetch it again"
            )
        if len(set(numbers.values())) > 1:
            raise ValueError(f"the experts of {block} have a {projection} of several shapes: fetch the model again")
    return {name: (count, *found[name][0]) for name in PROJECTIONS if name in found}


class Quantizes(Protocol):
    """The verbs of `engines.protocol.Arrays` that experts need."""

    def quantize(self, w: Any, grid: Grid, *, peak: float | None = None) -> QTensor[Any]: ...  # noqa: D102
    def magnitude(self, x: Any) -> float: ...  # noqa: D102


def quantize_experts(weights: Weights, grid: Grid, engine: Quantizes) -> Codes:
    """The codes of each expert's projections, the law of experts: those of every matrix [outputs, inputs] by itself.

    Under `nvfp4` the gate and the up projection of an expert share a tensor scale, as fused layers do.

    Args:
        weights: by projection, [experts, outputs, inputs].
    """
    out: Codes = {}
    if shares(grid) and "gate_proj" in weights:
        pair = {name: weights[name] for name in ("gate_proj", "up_proj")}
        peaks = [max(map(engine.magnitude, both)) for both in zip(*pair.values(), strict=True)]
        for name, weight in pair.items():
            out[name] = [engine.quantize(one, grid, peak=peak) for one, peak in zip(weight, peaks, strict=True)]
    for name, weight in weights.items():
        if name not in out:
            out[name] = [engine.quantize(one, grid) for one in weight]
    return out


def blocks_of(paths: Iterable[str]) -> dict[str, dict[tuple[int, str], str]]:
    """The paths of single experts in files, by the path of their block, then by number and projection."""
    out: dict[str, dict[tuple[int, str], str]] = {}
    for path in paths:
        if found := expert_of(path):
            block, number, projection = found
            out.setdefault(block, {})[number, projection] = path
    return out


def paths_of(
    block: str, shapes: Mapping[str, Sequence[int]], config: Mapping[str, Any] | None
) -> dict[tuple[int, str], str]:
    """The path in files of each expert's projections, by number and projection, for the block that a model calls `block`."""
    place = file_name(f"{block}.", config)[:-1]
    return {
        (number, name): f"{place}.{number}.{file_projection(name, config or {})}"
        for name, shape in shapes.items()
        for number in range(shape[0])
    }


def types_of(config: Mapping[str, Any]) -> set[str]:
    """The type of the model, and that of its language part."""
    inner = config.get("text_config")
    return {str(one.get("model_type", "")) for one in (config, inner) if isinstance(one, Mapping)}


def _usual(name: str, config: Mapping[str, Any]) -> str:
    for kind in types_of(config) & STACK_NAMES.keys():
        for theirs, ours in STACK_NAMES[kind].items():
            if name.endswith(f".{theirs}"):
                return name.removesuffix(theirs) + ours
    return name


def _is_transposed(shape: Shape, name: str, config: Mapping[str, Any]) -> bool:
    inner = config.get("text_config")
    hidden = (inner if isinstance(inner, Mapping) else config).get("hidden_size")
    inputs_last = (shape[1] if name == "down_proj" else shape[2]) == hidden
    outputs_last = (shape[2] if name == "down_proj" else shape[1]) == hidden
    if inputs_last != outputs_last:
        return outputs_last
    return bool(types_of(config) & set(TRANSPOSED))
