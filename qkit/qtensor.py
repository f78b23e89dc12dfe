"""The quantized value: codes, scales and the grid they are on. Holds arrays of any framework and computes nothing."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, Generic, Literal, TypeVar, cast

from qkit.errors import DTypeError, GridError
from qkit.grid import Grid, want_grid

Array = TypeVar("Array")
Other = TypeVar("Other")
DType = Literal["float32", "bfloat16", "float16"]
DTYPES: tuple[DType, ...] = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True, eq=False)
class QTensor(Generic[Array]):
    """A quantized tensor. Everything downstream (packing, layers, files) starts from one, never from floats.

    Attributes:
        codes: [..., n]. Symmetric integers: int8, -2^(bits-1) .. 2^(bits-1)-1. Asymmetric (`minmax`, `stored-zeros`,
            `affine`): uint8, 0 .. 2^bits-1. Floats: uint8, the bits of one element each.
        scales: [..., groups], see `Grid.scale_shape`. Integers: float32 on the bfloat16 grid, possibly negative under
            `signed`. Floats: uint8, an E8M0 code c that means 2^(c-127), or the bits of an e4m3 under `nvfp4`. Read grids:
            finite float32, bfloat16 or float16 as the file has them, or uint8; see `Grid.stored_scales`.
        grid: the element, group and scale rule of codes and scales.
        dtype: of the tensor that was quantized, and of its values: `float32`, `bfloat16` or `float16`.
        zeros: `Grid.has_zeros` only: uint8 zero points, shaped like `scales`. A value is (code - zero) * scale.
        tensor_scale: `Grid.has_tensor_scale` only: float32, shape (); a power of two under `nvfp4`. A value is
            code * (scale * tensor_scale), or code * (scale / tensor_scale) under `stored-nvfp4-inverse`.
        biases: `affine` only: floats of the type of `scales`, shaped like them. A value is code * scale + bias.

    Raises:
        GridError: shapes do not fit the grid, or a part is missing or does not belong.
    """

    codes: Array
    scales: Array
    grid: Grid
    dtype: DType
    zeros: Array | None = None
    tensor_scale: Array | None = None
    biases: Array | None = None

    def __post_init__(self) -> None:
        want_grid(self.grid)
        want = self.grid.scale_shape(self.shape)
        if shape_of(self.scales) != want:
            raise GridError(
                f"scales of shape {shape_of(self.scales)} do not fit {self.grid} of {self.shape}: want {want}"
            )
        for name, there, wanted in (
            ("zero points", self.zeros, self.grid.has_zeros),
            ("a tensor scale", self.tensor_scale, self.grid.has_tensor_scale),
            ("biases", self.biases, self.grid.has_biases),
        ):
            if (there is not None) != wanted:
                raise GridError(f"{self.grid} {'needs' if wanted else 'has no'} {name}: {_why(name)}")
        for part in (self.zeros, self.biases):
            if part is not None and shape_of(part) != want:
                raise GridError(
                    f"zero points or biases of shape {shape_of(part)} do not fit scales of {want}: give one for each scale"
                )

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor that was quantized."""
        return shape_of(self.codes)

    def parts(self) -> dict[str, Array]:
        """The arrays by name; those that are None are left out."""
        named = {
            "codes": self.codes,
            "scales": self.scales,
            "zeros": self.zeros,
            "tensor_scale": self.tensor_scale,
            "biases": self.biases,
        }
        return {name: array for name, array in named.items() if array is not None}

    def map(self, function: Callable[[Array], Other]) -> "QTensor[Other]":
        """The same value with `function` applied to each array: to another framework, or to another device."""
        return QTensor(grid=self.grid, dtype=self.dtype, **{n: function(a) for n, a in self.parts().items()})

    def _repr_html_(self) -> str:
        from qkit.notebook import table  # here, so that `import qkit` stays cheap

        bits = self.grid.bits_per_weight(self.shape)
        caption = f"{self.grid}, {self.dtype} {list(self.shape)}, {bits:.2f} bits per weight"
        rows = (
            (name, str(array.dtype).rpartition(".")[2], str(list(shape_of(array))), f"{prod(shape_of(array)):,}")
            for name, array in cast("dict[str, Any]", self.parts()).items()
        )
        return table(caption, ("part", "type", "shape", "numbers"), rows)


def _why(name: str) -> str:
    owners = {
        "zero points": "they belong to minmax and stored-zeros",
        "a tensor scale": "it belongs to nvfp4, stored-nvfp4 and stored-nvfp4-inverse",
        "biases": "they belong to affine",
    }
    return owners[name]


def shape_of(array: Any) -> tuple[int, ...]:
    """The shape of any framework's array, as a tuple."""
    return tuple(array.shape)


def dtype_of(array: Any) -> DType:
    """The float type of any framework's array.

    Raises:
        DTypeError: it is none of float32, bfloat16 and float16.
    """
    name = str(array.dtype).rpartition(".")[2]
    for dtype in DTYPES:
        if name == dtype:
            return dtype
    raise DTypeError(f"cannot quantize an array of {name}: cast it to one of {', '.join(DTYPES)} first")
