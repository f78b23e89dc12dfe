"""The experts of a snapshot as GGUF has them: those of a block in one tensor [experts, outputs, inputs] for each projection."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qkit.artifact.snapshot import Snapshot, StoredWeight
from qkit.errors import ArtifactError
from qkit.exchange.gguf_tensors import NUMBERS, Tensor, half_values
from qkit.experts import INTERLEAVED, expert_of, member_of, types_of
from qkit.formats import gguf as gguf_layout
from qkit.formats.gguf import FLOATS
from qkit.formats.gguf_config import BIASES, Architecture, architecture_of

WAY_OUT = "export --to dense"
SINKS = ".self_attn.sinks"  #: end of the name of attention sinks, which are a weight in GGUF
Blocks = Callable[[], Iterable[NDArray[Any]]]


def stack_tensors(source: Snapshot, config: Mapping[str, Any], *, fallback: str | None) -> dict[str, Tensor]:
    """The experts of every block, by the name that one tensor of all of them would have in files.

    Args:
        config: of the model.
        fallback: `f16` stores a stack that no type of GGUF holds as its values in float16; None refuses it.

    Raises:
        ArtifactError: an expert is missing; the experts of a stack differ; or no type holds them, and there is no fallback.
    """
    quantized: dict[str, dict[int, StoredWeight]] = {}
    for path, weight in source.weights.items():
        if found := expert_of(path):
            quantized.setdefault(f"{found[0]}.{path.rpartition('.')[2]}.weight", {})[found[1]] = weight
    floats = _floats(source, config)
    for name in quantized.keys() & floats.keys():
        raise ArtifactError(
            f"{name}: some experts are quantized and some are not, and GGUF has all in one tensor: {WAY_OUT}"
        )
    architecture = architecture_of(config)
    out = {
        name: _quantized(name, _in_order(name, experts), architecture, fallback) for name, experts in quantized.items()
    }
    for name, parts in floats.items():
        ordered = _in_order(name, parts)
        kind, shape, _ = ordered[0]
        if any(one[:2] != (kind, shape) for one in ordered):
            raise ArtifactError(
                f"{name}: the experts differ in shape or type, and GGUF has all in one tensor: {WAY_OUT}"
            )
        out[name] = Tensor(kind, (len(ordered), *shape), _joined([blocks for _, _, blocks in ordered]))
    return out | _vectors(source, config)


def is_expert(source: Snapshot, name: str, config: Mapping[str, Any]) -> bool:
    """Whether the tensor or quantized weight `name` is in one of `stack_tensors`."""
    if name.removesuffix(".weight") in source.weights:
        return expert_of(name.removesuffix(".weight")) is not None
    if name.endswith(SINKS) or BIASES.fullmatch(name):
        return True
    return member_of(name, source.tensors[name].shape, config) is not None


def _quantized(name: str, experts: list[StoredWeight], architecture: Architecture, fallback: str | None) -> Tensor:
    first = experts[0]
    grid = first.rule.weight
    assert grid is not None
    if len({(one.rule.weight, one.dtype, one.shape) for one in experts}) > 1:
        raise ArtifactError(f"{name}: the experts are on several grids, and GGUF has all in one tensor: {WAY_OUT}")
    kind, reason = "F16", ""
    try:
        held = gguf_layout.layout(grid, first.shape[-1])  # before anything is read
        if grid.has_tensor_scale and (no_scale := architecture.why_no_scale(first.rule.kind)):
            raise ArtifactError(f"{no_scale}: {gguf_layout.WAY_OUT}")
        kinds = {gguf_layout.kind_of(one.read()) for one in experts}
        kind = kinds.pop() if len(kinds) == 1 else held
    except ArtifactError as error:
        if fallback is None:
            raise ArtifactError(f"{name}: {error}") from None
        reason = str(error).partition(": ")[0]

    def of_expert(weight: StoredWeight) -> Blocks:
        def blocks() -> Iterable[NDArray[Any]]:
            try:
                memory = np.empty(2 * max(NUMBERS, weight.shape[-1]), np.uint8)
                for block in weight.read().blocks(NUMBERS):
                    yield half_values(block) if reason else gguf_layout.store(block, kind, out=memory)
            except ArtifactError as error:
                raise ArtifactError(f"{name}: {error}") from None

        return blocks

    shape = (len(experts), *first.shape)
    return Tensor(kind, shape, _joined([of_expert(one) for one in experts]), fallback=reason)


def _floats(source: Snapshot, config: Mapping[str, Any]) -> dict[str, dict[int, tuple[str, tuple[int, int], Blocks]]]:
    """Type, shape and content of each float expert, by its stack and number."""
    out: dict[str, dict[int, tuple[str, tuple[int, int], Blocks]]] = {}
    for name, array in source.tensors.items():
        member = member_of(name, array.shape, config)
        for (number, projection), path in member.paths.items() if member else ():
            assert member is not None
            if array.dtype.name not in FLOATS:
                raise ArtifactError(f"{name} is {array.dtype.name}: qkit puts {', '.join(FLOATS)} into GGUF")
            stack = f"{member.block}.{path.rpartition('.')[2]}.weight"
            matrix = member.matrix(array, number, projection)
            content = FLOATS[array.dtype.name], member.shape, _one(matrix)
            out.setdefault(stack, {})[number] = content
    return out


def _vectors(source: Snapshot, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The biases of stacked experts [experts, outputs], and attention sinks, under names that GGUF's program knows."""
    out = {}
    for name, array in source.tensors.items():
        if name.endswith(SINKS):
            out[f"{name}.weight"] = _floats32(array)
        elif found := BIASES.fullmatch(name):
            block, stack = found.groups()
            if stack == "down_proj":
                out[f"{block}.down_proj.bias"] = _floats32(array)
                continue
            whole = np.asarray(array)
            in_turn = types_of(config) & set(INTERLEAVED)
            gate, up = (whole[:, ::2], whole[:, 1::2]) if in_turn else np.split(whole, 2, axis=-1)
            out[f"{block}.gate_proj.bias"], out[f"{block}.up_proj.bias"] = _floats32(gate), _floats32(up)
    return out


def _floats32(array: NDArray[Any]) -> Tensor:
    return Tensor("F32", array.shape, lambda: [np.ascontiguousarray(array, np.float32)])


def _one(matrix: NDArray[Any]) -> Blocks:
    return lambda: [matrix]


def _joined(parts: list[Blocks]) -> Blocks:
    return lambda: (block for part in parts for block in part())


def _in_order(name: str, experts: dict[int, Any]) -> list[Any]:
    if missing := set(range(1 + max(experts))) - experts.keys():
        raise ArtifactError(
            f"{name}: expert {min(missing)} is missing, and GGUF has all experts in one tensor: fetch the model again"
        )
    return [experts[number] for number in sorted(experts)]
