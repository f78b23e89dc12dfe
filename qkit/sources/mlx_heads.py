"""DeepSeek's `kv_b_proj` in mlx-lm's files, which have it as two stacks of heads: as the values of the whole weight.

`embed_q` has the rows of keys, transposed, [heads, latent, nope]; `unembed_out` has those of values, [heads, rows, latent]. Each
may be codes or floats. Groups of `embed_q` run across rows of `kv_b_proj`, so that no grid holds it. Read off mlx-lm 0.32
(`models/deepseek_v3.py`, `models/mla.py`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Final

import numpy as np
from numpy.typing import NDArray

from qkit.errors import ArtifactError
from qkit.formats.packed import Tensors as Arrays
from qkit.formats.packed import join
from qkit.qtensor import DType
from qkit.sources.encoded import Encoded
from qkit.sources.law import values
from qkit.sources.mlx_form import PARTS, Mlx
from qkit.sources.parts import FLOATS, Tensors, check_part, encoded, take, want_type

WHOLE: Final = "kv_b_proj"
KEYS, VALUES = "embed_q", "unembed_out"


@dataclass(frozen=True, slots=True)
class Heads:
    """Both stacks of one layer.

    Attributes:
        keys, values_in: the layouts of the stacks; None of floats.
        nope: rows of keys of a head.
        rows: rows of values of a head.
        latent: inputs.
    """

    keys: Mlx | None
    values_in: Mlx | None
    nope: int
    rows: int
    latent: int

    @property
    def name(self) -> str:
        """See `Valued`."""
        names = dict.fromkeys("floats" if form is None else form.name for form in (self.keys, self.values_in))
        return f"{' and '.join(names)}, in stacks of heads"

    def values(self, parts: Arrays, rows: slice) -> NDArray[np.float32]:
        """See `Valued`."""
        each = self.nope + self.rows
        begin, stop, _ = rows.indices(parts[f"{KEYS}.weight"].shape[0] * each)
        some = slice(begin // each, -(-stop // each))
        keys = _matrix(self.keys, parts, KEYS, some).reshape(-1, self.latent, self.nope)
        found = _matrix(self.values_in, parts, VALUES, some).reshape(-1, self.rows, self.latent)
        whole = np.concatenate([keys.swapaxes(1, 2), found], axis=1).reshape(-1, self.latent)
        return whole[begin - some.start * each : stop - some.start * each]


def is_stack(path: str) -> bool:
    """Whether the stack at `path` is one of heads."""
    return path.rpartition(".")[2] in (KEYS, VALUES)


def join_heads(
    tensors: Tensors, forms: Mapping[str, tuple[Mlx, tuple[int, ...]]], dtype: DType | None
) -> dict[str, Encoded]:
    """Each `kv_b_proj` whose stacks of heads are in `tensors`, by name. Removes their parts from `tensors`.

    Args:
        forms: layout and shape [heads, rows, inputs] of each stack of codes, by path.
        dtype: that of the model, where its settings say it.

    Raises:
        ArtifactError: one stack is missing, a part is, or the shapes do not fit each other.
    """
    found = {}
    for path in sorted(name.removesuffix(f".{KEYS}.weight") for name in tensors if name.endswith(f".{KEYS}.weight")):
        try:
            made = _joined(tensors, path, forms, dtype)
        except ArtifactError as error:
            raise ArtifactError(f"{path}: {error}") from None
        found[made.slot.name] = made
    return found


def _joined(
    tensors: Tensors, path: str, forms: Mapping[str, tuple[Mlx, tuple[int, ...]]], dtype: DType | None
) -> Encoded:
    shapes: dict[str, tuple[int, ...]] = {}
    mine: dict[str, Mlx | None] = {}
    parts: Tensors = {}
    for half in (KEYS, VALUES):
        place = join(path, half)
        form, shape = forms.get(place, (None, ()))
        held = take(tensors, place, PARTS)
        if form:
            form.check(held)
        else:
            shape = check_part(held, "weight", FLOATS).slot.shape
        mine[half], shapes[half] = form, shape
        parts |= {f"{half}.{name}": one for name, one in held.items()}
    keys, rest = shapes[KEYS], shapes[VALUES]
    if len(keys) != 3 or len(rest) != 3 or (keys[0], keys[1]) != (rest[0], rest[2]) or 0 in (*keys, *rest):
        raise ArtifactError(
            f"{KEYS} is {list(keys)} and {VALUES} {list(rest)}: want [heads, latent, keys] and [heads, values, latent]"
        )
    heads, latent, nope = keys
    layout = Heads(mine[KEYS], mine[VALUES], nope, rest[1], latent)
    kind = parts[f"{VALUES}.scales" if mine[VALUES] else f"{VALUES}.weight"]
    return encoded(
        join(path, f"{WHOLE}.weight"),
        (heads * (nope + rest[1]), latent),
        dtype=want_type(kind, dtype),
        form=layout,
        parts=parts,
        codes=f"{KEYS}.weight",
    )


def _matrix(form: Mlx | None, parts: Arrays, half: str, some: slice) -> NDArray[np.float32]:
    """The values of some heads of a stack, with the rows of all of them along one axis."""
    held = {name: parts[f"{half}.{name}"][some] for name in PARTS if f"{half}.{name}" in parts}
    flat = {name: array.reshape(prod(array.shape[:-1]), array.shape[-1]) for name, array in held.items()}
    return flat["weight"].astype(np.float32) if form is None else values(form.codes(flat, slice(None), 0))
