"""Layers that servers run as one layer, such as queries, keys and values: the names by which they are known.

Servers keep one tensor scale for such a layer, so that weights on `nvfp4` grids share theirs (R9 of numerics.md). No other grid
stores anything by tensor that a server would have to share.
"""

from collections.abc import Iterable
from typing import Final

from qkit.grid import Grid

#: Last names of layers that vLLM 0.32 fuses, of its `packed_modules_mapping`, where they lie beside one another. Linear attention
#: of OLMo and of Bailing has a gate in the first group; models of pictures have the last of the fourth, and the sixth.
FUSED: Final = (
    ("q_proj", "k_proj", "v_proj", "g_proj", "b_proj"),
    ("query", "key", "value"),
    ("wq", "wk", "wv"),
    ("gate_proj", "up_proj", "dense_h_to_4h"),
    ("w1", "w3"),
    ("fc1", "fc3"),
    ("c_fc_0", "c_fc_1"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
)
_PLACES: Final = {name: number for number, names in enumerate(FUSED) for name in names}


def shares(grid: Grid | None) -> bool:
    """Whether weights on `grid` have a scale of the tensor that fused layers share."""
    return grid is not None and grid.scale == "nvfp4"


def groups(paths: Iterable[str]) -> list[tuple[str, ...]]:
    """The paths of layers that servers fuse, two or more in each group; layers that are fused with no other are in none.

    >>> groups(["a.q_proj", "a.k_proj", "a.o_proj", "b.q_proj"])
    [('a.q_proj', 'a.k_proj')]
    """
    found: dict[tuple[str, int], list[str]] = {}
    for path in paths:
        parent, _, name = path.rpartition(".")
        if name in _PLACES:
            found.setdefault((parent, _PLACES[name]), []).append(path)
    return [tuple(group) for group in found.values() if len(group) > 1]
