"""The compiled kernels are the reference, bit for bit; without them NumPy does the same."""

import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import DTYPES

import qkit
from qkit import Grid, native, reference
from qkit.element import ELEMENTS, INTEGERS, LIMIT, SCALE_RULES
from qkit.engines.numpy import NumpyBackend
from qkit.errors import BackendError, DTypeError, GridError
from qkit.formats.packed import pack
from qkit.native import arrays, build, library
from qkit.reference import packing
from qkit.testing.hard_tensors import all_grids, tensors

PATTERNS = {"float32": np.uint32, "bfloat16": np.uint16, "float16": np.uint16}
ODD = [Grid("int4", 3), Grid("int3", 10, "minmax"), Grid("int8", 1), Grid("e4m3", 5), Grid("e2m1", 31, "even")]
needs_kernels = pytest.mark.skipif(not native.available(), reason="qkit was built without a C compiler")


def assert_same(made, law):
    assert made.parts().keys() == law.parts().keys()
    assert (made.grid, made.dtype) == (law.grid, law.dtype)
    for part, array in law.parts().items():
        one = made.parts()[part]
        assert (one.dtype, one.shape) == (array.dtype, array.shape), part
        assert one.tobytes() == array.tobytes(), part


def test_where_there_is_a_compiler_there_are_kernels():
    assert native.available() or build.compiler() is None


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid", all_grids(), ids=str)
def test_kernels_are_the_reference(grid, dtype):
    for w in tensors(grid, dtype).values():
        law = reference.quantize(w, grid)
        assert_same(native.quantize(w, grid), law)
        assert (native.fake_quantize(w, grid) == reference.fake_quantize(w, grid)).all()
        packed = native.quantize_packed(w, grid)
        assert (
            packed.words.tobytes()
            == packing.pack(packing.unsigned(law.codes, grid.element), law.grid.element.bits).tobytes()
        )
        assert packed.scales.tobytes() == law.scales.tobytes()


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_kernels_are_the_reference_on_any_patterns(dtype, data):
    """Every pattern there is: subnormals, NaN of any payload, infinities."""
    grid = data.draw(st.sampled_from([*all_grids(), *ODD]))
    size = grid.group if isinstance(grid.group, int) else data.draw(st.integers(1, 70))
    shape = (data.draw(st.integers(1, 5)), size * data.draw(st.integers(1, 3)))
    seed, spread = data.draw(st.integers(0, 2**32)), data.draw(st.booleans())
    random = np.random.default_rng(seed)
    bits = random.integers(0, 2 ** (8 * np.dtype(PATTERNS[dtype]).itemsize), shape).astype(PATTERNS[dtype])
    w = bits.view(DTYPES[dtype]) if spread else random.standard_normal(shape).astype(DTYPES[dtype])
    with np.errstate(all="ignore"):
        made, law = native.fake_quantize(w, grid), reference.fake_quantize(w, grid)
        wide, want = made.astype(np.float32), law.astype(np.float32)
        assert ((wide == want) | (np.isnan(wide) & np.isnan(want))).all()
        finite = np.where(np.abs(w.astype(np.float32)) < LIMIT, w, np.array(1, w.dtype))
    assert_same(native.quantize(finite, grid), reference.quantize(finite, grid))


@needs_kernels
@pytest.mark.parametrize("shape", [(64,), (2, 3, 64), (5, 128)])
def test_any_rank_and_any_strides(shape):
    for grid in (Grid("int4", 32), Grid("int4", "tensor", "minmax"), Grid("e2m1", 16, "nvfp4"), Grid("int8", "row")):
        w = np.random.default_rng(0).standard_normal((*shape, 2)).astype(np.float32)[..., 0]
        assert_same(native.quantize(w, grid), reference.quantize(w, grid))
        assert native.fake_quantize(w, grid).tobytes() == reference.dequantize(reference.quantize(w, grid)).tobytes()


@needs_kernels
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_patterns_of_other_frameworks_are_taken_as_they_are(dtype):
    w = np.random.default_rng(0).standard_normal((4, 64)).astype(DTYPES[dtype])
    grid = Grid("int4", 32)
    assert_same(native.quantize(w.view(np.int16), grid, dtype=dtype), reference.quantize(w, grid))
    out = np.empty((4, 64), np.int16)
    assert native.fake_quantize(w.view(np.int16), grid, dtype=dtype, out=out) is out
    assert out.tobytes() == reference.dequantize(reference.quantize(w, grid)).tobytes()


@needs_kernels
def test_values_may_take_the_place_of_the_weights():
    w = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    want = native.fake_quantize(w, Grid("int4", 32))
    native.fake_quantize(w, Grid("int4", 32), out=w)
    assert w.tobytes() == want.tobytes()


@needs_kernels
@pytest.mark.parametrize(
    "grid", [Grid("int4", 64), Grid("int4", "tensor"), Grid("e2m1", 16, "nvfp4"), Grid("int8", "row")], ids=str
)
def test_threads_change_nothing(grid, monkeypatch):
    w = np.random.default_rng(0).standard_normal((37, 192)).astype(np.float32)
    monkeypatch.setattr(arrays, "SHARE", 500)
    monkeypatch.setattr(arrays, "_most", [5])
    assert_same(native.quantize(w, grid), reference.quantize(w, grid))
    assert native.fake_quantize(w, grid).tobytes() == reference.dequantize(reference.quantize(w, grid)).tobytes()
    assert (
        native.quantize_packed(w, grid).words.tobytes() == packing.packed_codes(reference.quantize(w, grid)).tobytes()
    )


@needs_kernels
@pytest.mark.parametrize("element", INTEGERS, ids=str)
def test_packing_is_the_canonical_stream(element):
    bits = element.bits
    for n in range(1, 68):
        codes = np.random.default_rng(n).integers(element.lowest, element.highest + 1, (3, n), dtype=np.int8)
        unsigned = packing.unsigned(codes, element)
        assert native.pack(codes, element).tobytes() == packing.pack(unsigned, bits).tobytes(), n
        assert native.pack(unsigned, element).tobytes() == packing.pack(unsigned, bits).tobytes(), n


@needs_kernels
def test_extremes_have_zero_among_them_and_show_a_nan():
    assert native.extremes(np.array([[3, -2], [1, 0]], np.float32)) == (3, -2)
    assert native.extremes(np.array([3, 2], np.float16)) == (3, 0)
    assert native.extremes(np.array([-3, -2], ml_dtypes.bfloat16)) == (0, -3)
    assert any(np.isnan(native.extremes(np.array([1, np.nan, -1], np.float32))))


@needs_kernels
def test_what_has_no_codes_is_refused_as_the_reference_refuses_it():
    for make in (native.quantize, native.fake_quantize):
        for shape in ((), (0,), (3, 0)):
            for grid in (Grid("int4", 32), Grid("int4", "tensor")):
                with pytest.raises(GridError):
                    make(np.zeros(shape, np.float32), grid)
        with pytest.raises(GridError, match="do not divide"):
            make(np.zeros((2, 33), np.float32), Grid("int4", 32))
        with pytest.raises(DTypeError):
            make(np.zeros((2, 32)), Grid("int4", 32))


@needs_kernels
@pytest.mark.parametrize(
    "out", [np.empty((2, 31), np.float32), np.empty((2, 32), np.float16), np.empty((32, 2), np.float32).T]
)
def test_an_array_that_does_not_fit_is_not_written(out):
    with pytest.raises(ValueError, match="contiguous float32"):
        native.fake_quantize(np.zeros((2, 32), np.float32), Grid("int4", 32), out=out)


@pytest.mark.parametrize("grid", [Grid("int4", 64), Grid("int3", 32, "minmax"), Grid("e2m1", 16, "nvfp4")], ids=str)
def test_without_kernels_numpy_gives_the_same(grid, monkeypatch):
    w = np.random.default_rng(0).standard_normal((4, 192)).astype(np.float32)
    engine = NumpyBackend()
    codes, values = engine.quantize(w, grid), engine.fake_quantize(w, grid)
    words = pack(codes).words
    monkeypatch.setattr(library, "_library", lambda: None)
    assert not native.available()
    assert_same(engine.quantize(w, grid), codes)
    assert (engine.fake_quantize(w, grid) == values).all()
    assert pack(codes).words.tobytes() == words.tobytes()
    with pytest.raises(BackendError, match="was not built"):
        native.quantize(w, grid)


@needs_kernels
@pytest.mark.parametrize("width", [0, 1, 7, 9, 64])
def test_a_width_that_c_does_not_know_is_refused_and_nothing_is_written(width):
    codes, out = np.zeros((2, 64), np.uint8), np.full(1024, 0xAB, np.uint8)
    with pytest.raises(BackendError, match=r"qkit_pack .* does not know its arguments"):
        library.function("qkit_pack")(codes.ctypes.data, 2, 64, width, 0, out.ctypes.data, 64)
    assert (out == 0xAB).all()


@needs_kernels
@pytest.mark.parametrize("change", [{"rule": 7}, {"rule": -1}, {"bits": 7}, {"bits": 9}, {"rule": 3, "mantissa": 5}])
def test_a_grid_that_c_does_not_know_is_refused_and_nothing_is_written(change):
    w, out = np.ones((1, 32), np.float32), np.full(32, 3.0, np.float32)
    made = library.Struct.from_buffer_copy(library.struct(Grid("int4", 32)))
    for name, value in change.items():
        setattr(made, name, value)
    with pytest.raises(BackendError, match=r"qkit_fake_quantize .* does not know its arguments"):
        library.function("qkit_fake_quantize")(made, w.ctypes.data, 1, 32, 0, None, 0.0, out.ctypes.data)
    codes, scales = np.full(32, 0xAB, np.uint8), np.full(1, 3.0, np.float32)
    addresses = codes.ctypes.data, scales.ctypes.data, None, None, 0
    with pytest.raises(BackendError, match=r"qkit_quantize .* does not know its arguments"):
        library.function("qkit_quantize")(made, w.ctypes.data, 1, 1, 32, 0, None, 0.0, *addresses)
    with pytest.raises(BackendError, match=r"qkit_extremes .* does not know its arguments"):
        library.function("qkit_extremes")(w.ctypes.data, 32, 3, out.ctypes.data)
    assert (out == 3).all()
    assert (codes == 0xAB).all()
    assert scales[0] == 3


@needs_kernels
@pytest.mark.parametrize("grid", [Grid("int4", 32), Grid("int8", "row", "minmax"), Grid("e2m1", 16, "nvfp4")], ids=str)
@pytest.mark.parametrize("undeclared", ["TAKES", "RULES"])
def test_the_law_computes_what_the_kernels_do_not_declare(grid, undeclared, monkeypatch):
    monkeypatch.setattr(library, undeclared, {})
    library.struct.cache_clear()
    with pytest.raises(BackendError, match=f"the compiled kernels do not compute {grid}"):
        library.struct(grid)
    for dtype in DTYPES:
        w = np.random.default_rng(0).standard_normal((4, 64)).astype(DTYPES[dtype])
        law = reference.quantize(w, grid)
        patterns = w.view(PATTERNS[dtype])
        out = np.empty_like(patterns)
        assert_same(native.quantize(patterns, grid, dtype=dtype), law)
        assert native.fake_quantize(patterns, grid, dtype=dtype, out=out) is out
        assert (out.view(DTYPES[dtype]) == reference.fake_quantize(w, grid)).all()
        assert native.pack(law.codes, grid.element).tobytes() == packing.packed_codes(law).tobytes()
        assert native.quantize_packed(w, grid).words.tobytes() == packing.packed_codes(law).tobytes()


def test_the_kernels_declare_elements_and_rules_that_exist():
    assert set(ELEMENTS) >= library.TAKES
    assert SCALE_RULES.keys() >= library.RULES.keys()


@needs_kernels
def test_a_library_of_another_version_is_not_used(monkeypatch):
    monkeypatch.setattr(library, "digest", lambda: "of another source")
    library._library.cache_clear()  # noqa: SLF001  what it holds is under test
    try:
        assert not native.available()
    finally:
        monkeypatch.undo()
        library._library.cache_clear()  # noqa: SLF001  what it holds is under test
    assert native.available()


def test_a_compiler_that_fails_or_is_missing_says_why(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "LIBRARY", tmp_path / "kernels.compiled")
    monkeypatch.setenv("CC", "false")
    assert "false failed" in build.build()
    monkeypatch.setenv("CC", "no-such-compiler")
    assert "no C compiler" in build.build()
    assert not list(tmp_path.iterdir())


def test_a_forked_process_quantizes_after_its_parent_used_threads():
    code = """
import os, numpy, qkit
w = numpy.random.default_rng(0).standard_normal((1024, 1024)).astype(numpy.float32)
want = qkit.quantize(w, qkit.Grid("int4", 64)).codes
if not (child := os.fork()):
    os._exit(int((qkit.quantize(w, qkit.Grid("int4", 64)).codes != want).any()))
assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=60)


def test_numpy_arrays_take_the_kernels(monkeypatch):
    calls = []
    monkeypatch.setattr(native, "available", lambda: bool(calls.append(1)))
    qkit.quantize(np.ones((2, 32), np.float32), Grid("int4", 32))
    assert calls


def test_the_source_is_beside_the_library():
    assert build.SOURCE.exists()
    assert Path(library.LIBRARY).parent == build.SOURCE.parent


@needs_kernels
@pytest.mark.parametrize(("head", "runs", "run"), [(2, 1, 32), (4, 1, 32), (1, 1, 32), (4, 4, 16)])
def test_codes_of_four_bits_move_into_the_halves_of_their_run(head, runs, run):
    random = np.random.default_rng(0)
    codes = random.integers(0, 16, (3, 5, runs, run), np.uint8)
    heads = random.integers(0, 256, (3, 5, head), np.uint8)
    made = native.interleave(packing.pack(codes.reshape(3, -1), 4), heads, bits=4, run=run)
    body = codes[..., : run // 2] | codes[..., run // 2 :] << 4
    assert np.array_equal(made.reshape(3, 5, -1), np.concatenate([heads, body.reshape(3, 5, -1)], axis=-1))


@needs_kernels
def test_codes_of_eight_bits_are_flipped_into_signed_ones():
    codes = np.arange(256, dtype=np.uint8).reshape(2, 128)
    heads = np.arange(16, dtype=np.uint8).reshape(2, 4, 2)
    made = native.interleave(codes.view(np.uint32), heads, bits=8, run=32, flip=0x80).reshape(2, 4, 34)
    assert np.array_equal(made[..., :2], heads)
    assert np.array_equal(made[..., 2:].reshape(2, 128).view(np.int8), codes.astype(np.int16) - 128)


@needs_kernels
def test_blocks_may_begin_in_memory_that_is_there_and_never_go_beyond_it():
    codes, heads = np.arange(64, dtype=np.uint8).reshape(2, 32), np.zeros((2, 1, 2), np.uint8)
    memory = np.full(70, 255, np.uint8)
    made = native.interleave(codes.view(np.uint32), heads, bits=8, run=32, out=memory)
    assert np.shares_memory(made, memory)
    assert np.array_equal(made, native.interleave(codes.view(np.uint32), heads, bits=8, run=32))
    assert (memory[68:] == 255).all()
    with pytest.raises(ValueError, match="has 67 bytes: 68"):
        native.interleave(codes.view(np.uint32), heads, bits=8, run=32, out=memory[:67])


@needs_kernels
@pytest.mark.parametrize("repeat", [1, 2, 4])
def test_halves_of_scales_are_those_of_numpy(repeat):
    patterns = np.random.default_rng(0).integers(0, 1 << 32, (64, 1024), np.uint64).astype(np.uint32)
    near = (np.arange(0x3300_0000, 0x4800_0000, 4099, dtype=np.uint32)[:81920] | 0x8000_0000).reshape(64, -1)
    for scales in (
        patterns.view(np.float32),
        near.view(np.float32),
        np.array([[0.0, -0.0, np.inf, 65520.0]], np.float32),
    ):
        sound = np.where(np.isnan(scales), np.float32(0), scales)
        with np.errstate(over="ignore"):
            wanted = np.repeat(sound.astype(np.float16), repeat, axis=1)
        assert np.array_equal(native.halves(sound, repeat=repeat).view(np.uint16), wanted.view(np.uint16))


@needs_kernels
def test_widths_that_no_kernel_moves_are_refused():
    with pytest.raises(BackendError, match="qkit_interleave"):
        native.interleave(np.zeros((1, 5), np.uint32), np.zeros((1, 1, 2), np.uint8), bits=5, run=32)
