"""Values of experts as transformers' files have them: stacked, in types of models whose files hold no single experts."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qkit.artifact.snapshot import StoredWeight
from qkit.errors import ArtifactError
from qkit.experts import DOWN, GATE_UP, INTERLEAVED, STACK_NAMES, STACKED, TRANSPOSED, blocks_of, types_of
from qkit.formats import dense
from qkit.storage.layout import TYPE_NAMES, Slot
from qkit.storage.write import Stream

STACKING = {*STACKED, *STACK_NAMES, "llama4", "llama4_text"}
BLOCK = "experts"  #: the last part of the path of a block, whatever the names of its stacks are
Weights = Mapping[str, StoredWeight]


def dense_stacks(weights: Weights, config: Mapping[str, Any]) -> tuple[list[Stream], set[str]]:
    """The stacks of experts, and the paths of the weights in them, whose values are computed when they are written.

    Both are empty for a model whose files have experts one by one.

    Raises:
        ArtifactError: an expert of a block is missing, or experts differ in shape or type.
    """
    streams, inside = [], set()
    for block, members in blocks_of(weights).items() if types_of(config) & STACKING else ():
        count = 1 + max(number for number, _ in members)
        gated = any(name == "gate_proj" for _, name in members)
        for names, stack in ((("gate_proj", "up_proj") if gated else ("up_proj",), GATE_UP), (("down_proj",), DOWN)):
            for number, name in ((i, name) for i in range(count) for name in names if (i, name) not in members):
                raise ArtifactError(f"{block}.{number}.{name} is missing, and files stack it: fetch the model again")
            paths = [[members[i, name] for name in names] for i in range(count)]
            inside |= {path for each in paths for path in each}
            if len({(weights[path].shape, weights[path].dtype) for each in paths for path in each}) > 1:
                raise ArtifactError(f"{block}: the experts differ in shape or type, and files stack them")
            streams.append(_stream(_name(block, stack, config, gated=gated), paths, weights, config))
    return streams, inside


def _stream(name: str, paths: list[list[str]], weights: Weights, config: Mapping[str, Any]) -> Stream:
    types, first = types_of(config), weights[paths[0][0]]
    outputs, inputs = first.shape
    turned, in_turn = bool(types & set(TRANSPOSED)), bool(types & set(INTERLEAVED)) and len(paths[0]) > 1
    shape = (outputs * len(paths[0]), inputs)

    def blocks() -> Iterable[memoryview]:
        for each in paths:
            parts = [dense.store(weights[path].read())["weight"] for path in each]
            rows = np.stack(parts, axis=1).reshape(shape) if in_turn else np.concatenate(parts)
            yield _bytes(rows.T if turned else rows)

    whole = (len(paths), *(reversed(shape) if turned else shape))
    return Stream(Slot(name, TYPE_NAMES[first.dtype], whole), blocks)


def _name(block: str, stack: str, config: Mapping[str, Any], *, gated: bool) -> str:
    """The name of a stack in files."""
    for kind in types_of(config) & STACK_NAMES.keys():
        stack = next((name for name, ours in STACK_NAMES[kind].items() if ours == stack), stack)
    return block.removesuffix(BLOCK) + (stack if gated else stack.replace("gate_up_proj", "up_proj"))


def _bytes(array: NDArray[Any]) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
