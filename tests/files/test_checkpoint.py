"""Whole checkpoints without a model: the same bytes as convert and save, planned to the byte, on hostile input too."""

import json

import numpy as np
import pytest
from alike import contents
from safetensors.numpy import save_file
from tables import DTYPES, INTEGERS

import qkit
from qkit import Grid, Recipe, Rule, reference
from qkit.formats import compressed_tensors, row_blocks
from qkit.native import library
from qkit.storage.arrays import read_folder
from qkit.streaming import fast_reference
from qkit.streaming.carry_out import quantize_directory
from qkit.streaming.plan import make_plan
from qkit.testing.hard_tensors import all_grids, tensors

GRIDS = [
    *(Grid(name, 32, scale) for name in INTEGERS for scale in ("signed", "minmax")),
    *(Grid("int4", group, scale) for group in (96, "row", "tensor") for scale in ("absmax", "midmax", "minmax")),
    Grid("e2m1", 32, "even"),
    Grid("e4m3", 32, "floor"),
    Grid("e4m3", "row"),
    Grid("e4m3", "tensor"),
    Grid("e2m1", 16, "nvfp4"),
]


def run(source, out, recipe, *, engine="numpy", workers=2, **options):
    plan = make_plan(source, qkit.recipe(recipe), **options)
    quantize_directory(plan, out, engine=qkit.backend(engine), workers=workers, tick=lambda name, done: None)
    return plan


def directory(folder, tensors, config=None):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_blocks_of_rows_have_the_codes_of_the_whole(grid, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(row_blocks, "ELEMENTS", 96 * 40)
    random = np.random.default_rng(1)
    tall = (random.standard_normal((131, 96)) * random.uniform(0.001, 9, (131, 1))).astype(DTYPES[dtype])
    short = random.standard_normal((3, 96)).astype(DTYPES[dtype])
    source = directory(tmp_path / "in", {"tall.weight": tall, "short.weight": short})
    run(source, tmp_path / "out", Recipe("test", (Rule(("*",), weight=grid),)))
    written, _ = read_folder(tmp_path / "out")
    want = {
        f"{path}.{name}": part
        for path, w in (("tall", tall), ("short", short))
        for name, part in compressed_tensors.to_tensors(reference.quantize(w, grid)).items()
    }
    assert written.keys() == want.keys()
    for name, part in want.items():
        assert (written[name].dtype, written[name].shape) == (part.dtype, part.shape), name
        assert written[name].tobytes() == part.tobytes(), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid", all_grids(), ids=str)
def test_the_fast_path_is_the_reference(grid, dtype):
    for name, w in tensors(grid, dtype).items():
        ours, law = fast_reference.quantize(w, grid), reference.quantize(w, grid)
        assert ours.parts().keys() == law.parts().keys()
        for part, array in law.parts().items():
            assert (ours.parts()[part].dtype, ours.parts()[part].shape) == (array.dtype, array.shape), (name, part)
            assert ours.parts()[part].tobytes() == array.tobytes(), (name, part)


@pytest.mark.parametrize("n", [512, 520, 1024, 1030])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_fast_path_on_long_and_odd_rows(n, dtype):
    w = np.random.default_rng(2).standard_normal((33, n)).astype(DTYPES[dtype])
    for grid in (
        Grid("int4", "row"),
        Grid("int8", "row", "minmax"),
        Grid("int5", n // 2),
        Grid("int4", 5 if n % 5 == 0 else 2),
    ):
        ours, law = fast_reference.quantize(w, grid), reference.quantize(w, grid)
        for part, array in law.parts().items():
            assert ours.parts()[part].tobytes() == array.tobytes(), (grid, part)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_directory_made_without_kernels_is_the_same(dtype, tmp_path, monkeypatch):
    w = np.random.default_rng(3).standard_normal((70, 96)).astype(DTYPES[dtype])
    source = directory(tmp_path / "in", {"a.weight": w, "b.weight": w[:32] * 3, "norm": w[0]})
    grids = Grid("int3", 32, "minmax"), Grid("int4", 96)
    recipe = Recipe("test", tuple(Rule((path,), weight=grid) for path, grid in zip("ab", grids, strict=True)))
    run(source, tmp_path / "with", recipe)
    monkeypatch.setattr(library, "_library", lambda: None)
    run(source, tmp_path / "without", recipe)
    assert contents(tmp_path / "with") == contents(tmp_path / "without")
