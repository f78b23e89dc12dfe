"""The layers of a checkpoint, from the names and shapes of its tensors. No module is built.

Read off transformers 5.23 on Llama, Qwen, Gemma, GPT-NeoX, GPT-2, Mixtral, Qwen-MoE, gpt-oss and Llama 4. Tests compare the
result with `layers()` of an engine. Most other families copy the same few names.
"""

import re
from collections.abc import Collection, Mapping
from math import prod
from typing import Any

from qkit.artifact.further import REASON, predicts_further
from qkit.artifact.known import facts, is_known, is_known_head, kind_of
from qkit.engines.layer import Layer, is_head_path
from qkit.errors import PlanError
from qkit.experts import Member, is_router, member_of, whole
from qkit.qtensor import DTYPES as FLOATS
from qkit.rules import Kind
from qkit.storage.layout import DTYPES, Slot

EMBEDDINGS = re.compile(
    r"(^|_)(embed|embeddings?|wte|wpe)(_tokens|_in|_positions|_per_layer|s)*$|^shared$|^relative_attention_bias$"
)
#: Embeddings that are never the output head too.
NO_TOKENS = re.compile(r"(wpe|per_layer)$|position|token_type|relative|(^|\.)rel_")
HEAD = "lm_head"
HEADS = (HEAD, "head", "embed_out", "proj_out")  #: last parts of the paths of output heads
WITH_HEAD = re.compile("ForCausalLM|LMHeadModel|ForMaskedLM|ForConditionalGeneration|ForPreTraining")
HIDDEN_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")

#: By model type: paths in the files, and their names in transformers, whose own renaming takes `weight` alone and no codes.
RENAMED = {
    "gpt_neox": {"embed_out": HEAD},
    "deepseek_v4": {"head": HEAD, "embed": "model.embed_tokens"},
    **{kind: {"model.llm.unembed": HEAD} for kind in ("inkling2", "inkling2_text", "inkling_mm_model", "inkling_text")},
}
#: By model type: layers with a transposed weight (transformers' Conv1D), which no engine quantizes.
TRANSPOSED = {"gpt2": ("c_attn", "c_proj", "c_fc", "q_attn")}


def output_name(name: str, config: Mapping[str, Any]) -> str:
    """The name of a tensor in the model: the file's name, except for `RENAMED`."""
    path, _, last = name.rpartition(".")
    return f"{RENAMED.get(_type(config), {}).get(path, path)}.{last}" if path else name


def layer_of(slot: Slot, config: Mapping[str, Any]) -> Layer | Member | str:
    """The layer whose weight is in `slot`; or its place among experts, of which `experts_layers` makes layers.

    Where no rule can apply to the tensor, the reason as text. The table of known families corrects what names and shapes
    suggest.
    """
    if predicts_further(slot.name, config):
        return REASON
    suggested = _suggested(slot, config)
    path = slot.name.rpartition(".")[0]
    known = kind_of(path, config) if slot.name.endswith(".weight") else None
    if known is None or len(slot.shape) != 2 or isinstance(suggested, Member):
        return suggested
    if known not in ("linear", "embedding"):
        return known
    return _layer(path, "embedding" if known == "embedding" else "linear", slot, config)


def _layer(path: str, kind: Kind, slot: Slot, config: Mapping[str, Any]) -> Layer:
    is_head = kind == "linear" and (is_head_path(path) or is_known_head(path, config))
    return Layer(path, kind, slot.shape, None, obstacle=_not_float(slot), head=is_head)


def _suggested(slot: Slot, config: Mapping[str, Any]) -> Layer | Member | str:
    path, _, last = slot.name.rpartition(".")
    own = path.rpartition(".")[2]
    if member := member_of(slot.name, slot.shape, config):
        return member
    if "expert" in slot.name and len(slot.shape) > 2:
        return f"stacked experts under a name that qkit does not know, {len(slot.shape)} axes"
    if last != "weight":
        return "no weight of a layer"
    if len(slot.shape) != 2:
        return f"{len(slot.shape)} {'axis' if len(slot.shape) == 1 else 'axes'}: a layer has two"
    if is_router(path):
        return "a router"
    if own in TRANSPOSED.get(_type(config), ()):
        return "transposed: a Conv1D holds it"
    kind: Kind = "embedding" if EMBEDDINGS.search(own) else "linear"
    return _layer(path, kind, slot, config)


def experts_layers(members: Mapping[str, tuple[Slot, Member]]) -> dict[str, Layer]:
    """The experts of every block as one layer, by the path of the block.

    Args:
        members: the tensors of experts and their places, by name.

    Raises:
        PlanError: an expert is missing, or experts of one block differ.
    """
    blocks: dict[str, list[tuple[Slot, Member]]] = {}
    for slot, member in members.values():
        blocks.setdefault(member.block, []).append((slot, member))
    layers = {}
    for block, mine in blocks.items():
        try:
            shapes = whole(block, [member for _, member in mine])
        except ValueError as error:
            raise PlanError(f"{error}: a shard is missing, or fetch the model again") from None
        count, _, inputs = shapes["up_proj"]
        outputs = sum(prod(shape) for shape in shapes.values()) // (count * inputs)
        obstacle = next(filter(None, (_not_float(slot) for slot, _ in mine)), "")
        layers[block] = Layer(block, "experts", (count, outputs, inputs), None, obstacle=obstacle, projections=shapes)
    return layers


def tied_head(layers: Collection[Layer], config: Mapping[str, Any]) -> Layer | None:
    """The embedding that is also the output head; None where there is none.

    Raises:
        PlanError: the configuration says that the head has a weight of its own, and the files have none.
    """
    heads = [layer for layer in layers if layer.path.rpartition(".")[2] in HEADS]
    embedding = token_embedding(layers)
    says = _says_tied(config)
    if heads or embedding is None or not (WITH_HEAD.search(str(config.get("architectures"))) or says):
        return None
    if says is None:
        says = facts(config).get("tied", not is_known(config))
    if not says:
        if any(layer.head and layer.shape[0] == embedding.shape[0] for layer in layers):
            return None  # under a name of its own
        raise PlanError(
            f"{HEAD}.weight is missing, and config.json does not tie it to {embedding.path}: fetch it again"
        )
    return embedding


def token_embedding(layers: Collection[Layer]) -> Layer | None:
    """The embedding of tokens; None where there is none."""
    found = [layer for layer in layers if layer.kind == "embedding" and not NO_TOKENS.search(layer.path)]
    return min(found, key=lambda layer: layer.path.rpartition(".")[2] != "shared", default=None)


def says_tied(config: Mapping[str, Any]) -> bool:
    """Whether embedding and output head are one weight: as the configuration says, or as its type has it."""
    says = _says_tied(config)
    return bool(facts(config).get("tied")) if says is None else says


def _says_tied(config: Mapping[str, Any]) -> bool | None:
    inner = config.get("text_config")
    found: bool | None = config.get("tie_word_embeddings", (inner or {}).get("tie_word_embeddings"))
    return found


def check_whole(names: Collection[str], config: Mapping[str, Any]) -> None:
    """Checks that the files have every hidden layer that the configuration counts.

    Raises:
        PlanError: a hidden layer is missing.
    """
    count = config.get("num_layers_per_stack") or config.get(
        "num_hidden_layers"
    )  # HRM's models use layers several times
    found = {int(match[1]) for name in names if (match := HIDDEN_LAYER.search(name))}
    if not isinstance(count, int) or not found:
        return
    for number in range(min(count, max(found) + 2)):
        if number not in found:
            raise PlanError(
                f"no tensor of hidden layer {number} is here, and config.json counts {count}: a shard is missing, or fetch the "
                "model again"
            )


def _not_float(slot: Slot) -> str:
    kind = DTYPES[slot.dtype][0]
    return "" if kind in FLOATS else f"its weight is {kind}: only {', '.join(FLOATS)} are quantized"


def _type(config: Mapping[str, Any]) -> str:
    return str(config.get("model_type", ""))
