"""The layers of a checkpoint, from the names and shapes of its tensors. No module is built.

Read off transformers 5.23 on Llama, Qwen, Gemma, GPT-NeoX, GPT-2, Mixtral, Qwen-MoE, gpt-oss and Llama 4. Tests compare the
result with `layers()` of an engine. Most other families copy the same few names.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

from qkit.engines.layer import HEADS, Layer
from qkit.errors import PlanError
from qkit.qtensor import DTYPES as FLOATS
from qkit.storage.layout import DTYPES, Slot

EMBEDDINGS = re.compile(r"(^|_)(embed|embeddings?|wte|wpe)(_tokens|_in|_positions|_per_layer|s)*$")
NO_TOKENS = re.compile(r"(wpe|positions|per_layer)$")  #: embeddings that are never the output head too
ROUTERS = ("gate", "router")
EXPERT = re.compile(r"\.experts\.\d+\.")
HEAD = "lm_head"
HIDDEN_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")

#: By model type: paths in the files, and their names in transformers.
RENAMED = {"gpt_neox": {"embed_out": HEAD}}
#: By model type: layers with a transposed weight (transformers' Conv1D), which no engine quantizes.
TRANSPOSED = {"gpt2": ("c_attn", "c_proj", "c_fc", "q_attn")}


def output_name(name: str, config: Mapping[str, Any]) -> str:
    """The name of a tensor in the model: the file's name, except for `RENAMED`."""
    path, _, last = name.rpartition(".")
    return f"{RENAMED.get(_type(config), {}).get(path, path)}.{last}" if path else name


def layer_of(slot: Slot, config: Mapping[str, Any]) -> Layer | str:
    """The layer whose weight is in `slot`; or, where no rule can apply to the tensor, the reason as text."""
    path, _, last = slot.name.rpartition(".")
    own = path.rpartition(".")[2]
    if "expert" in slot.name and len(slot.shape) > 2:
        return f"stacked experts, {len(slot.shape)} axes: no engine has a layer for them"
    if last != "weight":
        return "no weight of a layer"
    if len(slot.shape) != 2:
        return f"{len(slot.shape)} {'axis' if len(slot.shape) == 1 else 'axes'}: a layer has two"
    if EXPERT.search(slot.name):
        return "one expert of many: models stack them in one tensor, and no engine has a layer for it"
    if own in ROUTERS:
        return "a router"
    if own in TRANSPOSED.get(_type(config), ()):
        return "transposed: a Conv1D holds it"
    obstacle = ""
    if DTYPES[slot.dtype][0] not in FLOATS:
        obstacle = f"its weight is {DTYPES[slot.dtype][0]}: only {', '.join(FLOATS)} are quantized"
    if not EMBEDDINGS.search(own):
        return Layer(path, "linear", slot.shape, None, obstacle=obstacle, head=path.split(".")[0] in HEADS)
    if _type(config).startswith("gemma") and not obstacle:
        obstacle = "it scales its outputs, and is a subclass of embedding that qkit does not know"
    return Layer(path, "embedding", slot.shape, None, obstacle=obstacle)


def tied_head(layers: Collection[Layer], config: Mapping[str, Any]) -> Layer | None:
    """The embedding that is also the output head; None where there is none.

    Raises:
        PlanError: the configuration says tied and the files have a head, or it says untied and they have none.
    """
    heads = [layer for layer in layers if layer.path == HEAD or layer.path.endswith(f".{HEAD}")]
    embedding = next(
        (layer for layer in layers if layer.kind == "embedding" and not NO_TOKENS.search(layer.path)), None
    )
    inner = config.get("text_config")
    inner = inner if isinstance(inner, Mapping) else {}
    says = config.get("tie_word_embeddings", inner.get("tie_word_embeddings"))
    if heads and says:
        raise PlanError(
            f"{heads[0].path}.weight is stored, and config.json says that it is tied to the embedding (tie_word_embeddings): "
            "make one of them true"
        )
    wants_head = "ForCausalLM" in str(config.get("architectures")) or "LMHeadModel" in str(config.get("architectures"))
    if heads or embedding is None or not (wants_head or says):
        return None
    if says is False:
        raise PlanError(
            f"{HEAD}.weight is missing, and config.json does not tie it to {embedding.path}: fetch it again"
        )
    return embedding


def check_whole(names: Collection[str], config: Mapping[str, Any]) -> None:
    """Checks that the files have every hidden layer that the configuration counts.

    Raises:
        PlanError: a hidden layer is missing.
    """
    count = config.get("num_hidden_layers")
    found = {int(match[1]) for name in names if (match := HIDDEN_LAYER.search(name))}
    if not isinstance(count, int) or not found:
        return
    for number in range(min(count, max(found) + 2)):
        if number not in found:
            raise PlanError(
                f"no tensor of hidden layer {number} is here, and config.json counts {count}: a shard is missing, or fetch the "
                "model again"
            )


def _type(config: Mapping[str, Any]) -> str:
    return str(config.get("model_type", ""))
