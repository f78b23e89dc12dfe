"""`qkit warmup DIR`: compiles the kernels that an artifact needs, once for each kind of layer. Compilers cache them on disk."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import typer

import qkit
from qkit.cli.console import Json, console, print_json
from qkit.cli.eval import Device, Engine
from qkit.engines.abilities import require
from qkit.engines.layer import Layer
from qkit.engines.protocol import Builds, Modules
from qkit.errors import ArtifactError
from qkit.qtensor import DType

#: Counts of rows whose kernels differ: few rows have kernels of their own, up to 64 are multiplied in eights, more are decoded.
ROWS = (1, 2, 4, 16, 32, 64, 65)
MANY = 2049  #: rows, besides, of layers that quantize their inputs: products of codes have another kernel for so many


def warmup(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A directory that `qkit quantize` or `qkit.save` wrote.")
    ],
    backend: Engine = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Run each kind of layer of an artifact once, so that no kernel is compiled while the model serves."""
    engine = require(qkit.backend(backend), Builds)
    engine = engine.on(device) if device else engine
    modules = require(engine, Modules)
    model = qkit.load(folder, backend=engine)
    kinds = list(_kinds(modules, model))
    if not kinds:
        raise ArtifactError(f"{folder} has no quantized layers, and so no kernels to compile: qkit quantize makes some")
    for layer, dtype in kinds:
        if not as_json:
            console.print(f"compiling for {_words(layer)}: {layer.execution}", highlight=False, soft_wrap=True)
        for rows in _rows(layer):
            modules.run_layer(layer.module, _input(layer, rows, dtype))
    if any(layer.kind == "experts" for layer, _ in kinds):  # their inputs are those that a router chose
        for rows in ROWS:
            engine.logits(model, np.zeros((1, rows), dtype=np.int32))
    if as_json:
        warm = [
            {"path": one.path, "shape": list(one.shape), "dtype": dtype, "runs": one.execution} for one, dtype in kinds
        ]
        print_json({"folder": str(folder), "kinds": warm})
        return
    console.print(f"{folder} is warm: {len(kinds)} kinds of layers", highlight=False, soft_wrap=True)


def _kinds(engine: Modules, model: Any) -> Iterator[tuple[Layer, DType]]:
    """The first converted layer of each kind, and the type of its values."""
    seen = set()
    for layer in engine.layers(model):
        if layer.stage == "converted":
            dtype = cast(DType, layer.dtype or engine.unpack(layer.module).dtype)
            key = layer.kind, layer.shape, str(layer.rule), dtype
            if key not in seen:
                seen.add(key)
                yield layer, dtype


def _rows(layer: Layer) -> tuple[int, ...]:
    """Counts of rows that `layer` runs by itself."""
    if layer.kind == "experts":
        return ()
    return (*ROWS, MANY) if layer.rule is not None and layer.rule.activation else ROWS


def _words(layer: Layer) -> str:
    return f"{layer.path} and its like, {' x '.join(map(str, layer.shape))}"


def _input(layer: Layer, rows: int, dtype: DType) -> Any:
    """Tokens, or rows of `dtype`."""
    if layer.kind == "embedding":
        return np.zeros(rows, dtype=np.int32)
    import ml_dtypes

    return np.ones((rows, layer.shape[1]), dtype=ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
