"""The law of fitted codes: what each method promises, on every grid, and the same codes everywhere."""

import hashlib
import os
import subprocess
import sys
from itertools import product as every
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import qkit
from qkit import reference
from qkit.element import READ_RULES
from qkit.errors import GridError, RangeError
from qkit.grid import Grid
from qkit.reference.fitting import fit
from qkit.reference.moments import DAMPING, Moments

GRIDS = [
    *(Grid(element, 32) for element in ("int2", "int3", "int4", "int5", "int6", "int8", "e2m1", "e4m3", "e5m2")),
    *(Grid("int4", 16, rule) for rule in ("absmax", "midmax", "minmax")),
    *(Grid("e2m1", 32, rule) for rule in ("even", "floor")),
    Grid("e2m1", 16, "nvfp4"),
    Grid("int4", "row"),
    Grid("int4", "tensor"),
    Grid("int2", 32, "minmax"),
]
Wide = NDArray[np.float64]


def inputs(n: int, *, rank: int | None = None, seed: int = 0) -> NDArray[np.float32]:
    """Moments of correlated inputs with a few large ones, as activations have; of `rank` tokens, or many."""
    draw = np.random.default_rng(seed)
    mix = draw.standard_normal((n, n)) * np.exp(draw.standard_normal(n)) / n**0.5
    x = draw.standard_normal((rank or 8 * n, n)) @ mix + draw.standard_normal(n) / 2
    return (x.T @ x / len(x)).astype(np.float32)


def weight(rows: int, n: int, seed: int = 1) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_t(5, (rows, n)) * 0.02).astype(np.float32)


def errors(w: NDArray[Any], q: qkit.QTensor[Any], h: NDArray[Any], damping: float = 0.0) -> Wide:
    """Of each row, in H, in fp64."""
    d = w.astype(np.float64) - reference.dequantize(q).astype(np.float64)
    h = h.astype(np.float64)
    wide = h + np.eye(len(h)) * damping * h.diagonal().mean()
    return np.asarray(((d @ wide) * d).sum(axis=1))


def same(a: qkit.QTensor[Any], b: qkit.QTensor[Any]) -> bool:
    return all(x.tobytes() == y.tobytes() for x, y in zip(a.parts().values(), b.parts().values(), strict=True))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("known", [False, True])
def test_search_is_never_worse_than_the_rule(grid: Grid, known: bool) -> None:
    w, h = weight(24, 64), inputs(64) if known else np.eye(64, dtype=np.float32)
    weights = np.diag(h.diagonal())
    found, rule = fit(w, grid, h if known else None), reference.quantize(w, grid)
    of_rows = errors(w, found, weights), errors(w, rule, weights)
    if grid.by_rows:
        assert (of_rows[0] <= of_rows[1] * (1 + 1e-12)).all()
    assert of_rows[0].sum() <= of_rows[1].sum()


@pytest.mark.parametrize("grid", [grid for grid in GRIDS if grid.element.bits <= 4 and grid.group != "tensor"], ids=str)
def test_search_gains_on_narrow_grids(grid: Grid) -> None:
    w, h = weight(24, 64), inputs(64)
    weights = np.diag(h.diagonal())
    assert errors(w, fit(w, grid, h), weights).sum() < 0.99 * errors(w, reference.quantize(w, grid), weights).sum()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_solve_is_never_worse_than_search_row_by_row(grid: Grid) -> None:
    w, h = weight(24, 64), inputs(64)
    solved, searched = errors(w, fit(w, grid, h, method="solve"), h), errors(w, fit(w, grid, h), h)
    assert (solved <= searched * (1 + 1e-9)).all()  # products have 40 bits
    assert solved.sum() < 0.6 * searched.sum()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_round_of_descent_lowers_the_error(grid: Grid) -> None:
    w, h = weight(16, 64), inputs(64, rank=40)
    found = [errors(w, fit(w, grid, h, method="solve", rounds=n), h, DAMPING) for n in range(5)]
    searched = errors(w, fit(w, grid, h), h, DAMPING)
    for before, after in zip([searched, *found], found, strict=False):
        assert (after <= before * (1 + 1e-9)).all()
    assert found[4].sum() < found[0].sum()


def test_no_single_code_improves_a_solution() -> None:
    w, h, grid = weight(6, 32), inputs(32), Grid("int3", 32)
    q = fit(w, grid, h, method="solve", rounds=50)
    least = errors(w, q, h, DAMPING)
    for column, code in every(range(32), range(-4, 4)):
        codes = q.codes.copy()
        codes[:, column] = code
        other = qkit.QTensor(codes, q.scales, grid, "float32")
        assert (errors(w, other, h, DAMPING) >= least * (1 - 1e-6)).all()  # values are float32


def test_without_rounds_solve_is_gptq() -> None:
    w, h, grid = weight(12, 64), inputs(64), Grid("int8", 64)
    q = fit(w, grid, h, method="solve", rounds=0)
    order = np.argsort(-h.diagonal(), kind="stable")
    damped = h.astype(np.float64) + np.eye(64) * DAMPING * h.diagonal().astype(np.float64).mean()
    upper = np.linalg.cholesky(np.linalg.inv(damped[np.ix_(order, order)])).T  # the published form
    left, codes = w.astype(np.float64)[:, order], np.zeros(w.shape)
    for j in range(64):
        codes[:, j] = np.clip(np.rint(left[:, j] / q.scales[:, 0]), -128, 127)
        left[:, j:] -= ((left[:, j] - codes[:, j] * q.scales[:, 0]) / upper[j, j])[:, None] * upper[j, j:]
    back = np.empty_like(codes)
    back[:, order] = codes
    assert (q.codes == back).all()


@pytest.mark.parametrize("grid", [grid for grid in GRIDS if grid.by_rows], ids=str)
def test_no_row_sees_another(grid: Grid) -> None:
    w, h = weight(20, 64), inputs(64)
    for method in ("search", "solve"):
        whole, part = fit(w, grid, h, method=method), fit(w[5:9], grid, h, method=method)
        assert (whole.codes[5:9] == part.codes).all()
        assert (whole.scales[5:9] == part.scales).all()


def test_rows_are_fitted_in_shares_with_the_same_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    w, h = weight(37, 96), inputs(96)
    for grid in (Grid("int3", 32), Grid("e2m1", 16, "nvfp4"), Grid("int4", 32, "minmax")):
        whole = fit(w, grid, h, method="solve")
        monkeypatch.setattr("qkit.reference.fitting.SHARE", 96 * 5)
        assert same(whole, fit(w, grid, h, method="solve"))
        monkeypatch.undo()


def test_a_stack_is_fitted_as_its_rows() -> None:
    w, h = weight(24, 64), inputs(64)
    flat, stack = (fit(x, Grid("int4", 32), h, method="solve") for x in (w, w.reshape(2, 3, 4, 64)))
    assert stack.codes.shape == (2, 3, 4, 64)
    assert (stack.codes.reshape(24, 64) == flat.codes).all()


DIGESTED = """
import hashlib, sys, numpy as np
sys.path.insert(0, {here!r})
from test_fit import digest
print(digest())
"""


def digest() -> str:
    """Of the codes and scales of all methods on a weight of two shares, large enough for threads of a BLAS."""
    w, h = weight(150, 256), inputs(256).astype(np.float32)
    found = hashlib.sha256()
    for grid in (Grid("int2", 32), Grid("int4", 128, "minmax"), Grid("e2m1", 32, "even"), Grid("e2m1", 16, "nvfp4")):
        for part in fit(w, grid, np.round(h * 64) / 64 + np.eye(256) / 2, method="solve").parts().values():
            found.update(part.tobytes())
    return found.hexdigest()


def test_threads_do_not_change_codes() -> None:
    here, found = os.path.dirname(__file__), set()
    for threads in ("1", "4"):
        names = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), threads)
        command = [sys.executable, "-c", DIGESTED.format(here=here)]
        found.add(subprocess.run(command, env=os.environ | names, check=True, capture_output=True, text=True).stdout)
    assert len(found) == 1
    assert found == {digest() + "\n"}


def test_engines_fit_the_same_codes() -> None:
    w, h = weight(24, 64), inputs(64)
    for grid, method in every(
        (Grid("int3", 32), Grid("e2m1", 16, "nvfp4"), Grid("int4", 32, "minmax")), ("search", "solve")
    ):
        law = fit(w, grid, h, method=method)
        for name in ("numpy", "torchao", "mlx"):
            engine = qkit.backend(name)
            found = qkit.fit(engine.from_numpy(w), grid, engine.from_numpy(h), method=method)
            assert type(found.codes).__module__.partition(".")[0] == engine.framework
            assert same(found.map(engine.to_numpy), law)
            assert (engine.to_numpy(qkit.dequantize(found)) == reference.dequantize(law)).all()


def test_moments_that_differ_in_their_last_bits_may_give_other_codes() -> None:
    """Engines sum a text in other orders: the same text does not promise the same codes, and the error stays the same."""
    w, h, grid = weight(512, 128), inputs(128), Grid("int2", 32)
    last = (
        np.random.default_rng(2).integers(-128, 129, h.shape).astype(np.int32)
    )  # as sums of fp32 in two orders differ
    other = (h.view(np.int32) + np.triu(last) + np.triu(last, 1).T).view(np.float32)
    one, two = (fit(w, grid, moments, method="solve") for moments in (h, other))
    flips = (one.codes != two.codes).sum(axis=1)
    assert flips.max() > 1  # one flip changes those that make up for it
    assert errors(w, two, h).sum() == pytest.approx(errors(w, one, h).sum(), rel=1e-2)
    assert same(fit(w, grid, h.copy(), method="solve"), one)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_types_of_16_bits_are_fitted_as_their_values(dtype: str) -> None:
    w = weight(8, 64).astype(reference.rounding.DTYPE[dtype])
    q = fit(w, Grid("int4", 32), inputs(64), method="solve")
    assert q.dtype == dtype
    assert (q.codes == fit(w.astype(np.float32), Grid("int4", 32), inputs(64), method="solve").codes).all()


# Hard moments


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_dead_inputs_keep_their_nearest_codes(grid: Grid) -> None:
    w, h = weight(8, 64), inputs(64)
    dead = [0, 3, 40]
    h[dead] = 0
    h[:, dead] = 0
    q = fit(w, grid, h, method="solve")
    assert (errors(w, q, h) <= errors(w, fit(w, grid, h), h) * (1 + 1e-9)).all()
    steps = np.abs(np.repeat(reference.scale_values(q), 64 // q.scales.shape[-1], axis=-1)[:, dead])
    apart = np.abs(reference.dequantize(q)[:, dead] - w[:, dead])
    clipped = np.abs(w[:, dead]) > steps * (
        grid.element.largest if grid.element.kind == "float" else grid.element.highest
    )
    assert ((apart <= steps * (grid.element.largest / 4 + 1)) | clipped).all()


def test_a_group_of_dead_inputs_keeps_the_rule_s_scale() -> None:
    w, h = weight(8, 64), inputs(64)
    h[:32] = 0
    h[:, :32] = 0
    q, rule = fit(w, Grid("int4", 32), h), reference.quantize(w, Grid("int4", 32))
    assert (q.scales[:, 0] == rule.scales[:, 0]).all()
    assert (q.codes[:, :32] == rule.codes[:, :32]).all()


@pytest.mark.parametrize("rank", [1, 5, 63])
def test_fewer_tokens_than_inputs_are_fitted(rank: int) -> None:
    w, h = weight(8, 64), inputs(64, rank=rank)
    q = fit(w, Grid("int4", 32), h, method="solve")
    assert (errors(w, q, h) <= errors(w, fit(w, Grid("int4", 32), h), h) * (1 + 1e-9)).all()
    assert np.abs(reference.dequantize(q) - w).max() < 1


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("value", [0.0, 1.5, -1e-38, 1.6e38, 1e-30])
def test_constant_weights_have_finite_codes(grid: Grid, value: float) -> None:
    w = np.full((2, 64), value, np.float32)
    for method in ("search", "solve"):
        q = fit(w, grid, inputs(64), method=method)
        assert np.isfinite(reference.scale_values(q)).all()
        assert np.isfinite(reference.dequantize(q).astype(np.float64)).all()
        if value == 1.5 and grid.element.bits > 2:
            assert np.abs(reference.dequantize(q) - w).max() < 0.2


def test_scales_are_those_that_readers_take() -> None:
    w, h = weight(16, 64), inputs(64)
    for grid in GRIDS:
        for method in ("search", "solve"):
            q = fit(w, grid, h, method=method)
            s = reference.scale_values(q)
            if grid.element.kind == "integer":
                assert (reference.scale_rules.round_to_bfloat16(s) == s).all()
                assert (np.abs(s) >= 2.0**-96).all()
                if grid.scale != "signed":
                    assert (s > 0).all()


@pytest.mark.parametrize(
    ("moments", "method", "error", "message"),
    [
        (None, "solve", GridError, "solve needs the moments"),
        (np.ones(64), "solve", GridError, "solve needs the moments"),
        (
            np.eye(32),
            "solve",
            GridError,
            "of shape \\(32, 32\\) do not fit a weight of 64 inputs|of 32 inputs do not fit",
        ),
        (np.ones(63), "search", GridError, "of shape \\(63,\\) do not fit a weight of 64 inputs"),
        (np.ones((64, 1)), "search", GridError, "do not fit"),
        (np.full((64, 64), np.nan), "solve", RangeError, "hold NaN or infinity"),
        (np.full((64, 64), np.inf), "search", RangeError, "hold NaN or infinity"),
        (np.zeros((64, 64)), "solve", RangeError, "no token has reached the layer"),
        (np.zeros(64), "search", RangeError, "no token has reached the layer"),
        (-np.eye(64), "solve", RangeError, "a square is not negative"),
        (np.eye(64) + np.eye(64, k=1) / 2, "solve", RangeError, "not symmetric"),
        (np.eye(64) + 3 * (np.ones((64, 64)) - np.eye(64)), "solve", RangeError, "negative direction"),
        (np.eye(64), "guess", GridError, "no method 'guess'"),
    ],
)
def test_moments_that_no_inputs_have_are_refused(
    moments: Any, method: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        qkit.fit(weight(4, 64), Grid("int4", 32), moments, method=method)


@pytest.mark.parametrize("rule", READ_RULES)
def test_scales_that_follow_from_no_rule_are_refused(rule: str) -> None:
    element, group = READ_RULES[rule].only or ("int4" if "integer" in READ_RULES[rule].kinds else "e2m1", 32)
    with pytest.raises(
        GridError, match=rf"cannot fit {element}-g{group}-{rule}: its scales .* fit on one of absmax, even"
    ):
        fit(weight(4, 64), Grid(element, group, rule))


def test_moments_are_prepared_once_for_layers_with_the_same_inputs() -> None:
    w, h = weight(8, 64), inputs(64)
    known = Moments.of(h)
    for method in ("search", "solve"):
        assert same(fit(w, Grid("int4", 32), known, method=method), fit(w, Grid("int4", 32), h, method=method))


def test_golden_codes_of_a_fit() -> None:
    """Worked out by hand: the outer inputs keep s = 1. Each 3.4 rounds to 3, but their inputs are alike: 6.8 is nearest to 7."""
    w, grid = np.array([[-8, 3.4, 3.4, 7]], np.float32), Grid("int4", 4)
    h = np.array([[100, 0, 0, 0], [0, 1, 0.999, 0], [0, 0.999, 1, 0], [0, 0, 0, 100]])
    assert reference.quantize(w, grid).codes.tolist() == fit(w, grid, h).codes.tolist() == [[-8, 3, 3, 7]]
    q = fit(w, grid, h, method="solve")
    assert q.scales.tolist() == [[1]]
    assert sorted(q.codes[0].tolist()) == [-8, 3, 4, 7]


@pytest.mark.parametrize(
    ("element", "known", "least"), [("int2", False, 0.92), ("int2", True, 0.88), ("int3", False, 0.97)]
)
def test_groups_do_not_shrink_together(element: str, known: bool, least: float) -> None:
    """By squares alone the parts along the weight were 0.86, 0.84 and 0.96, and layers as much too small."""
    w, h = weight(64, 256), inputs(256) if known else None
    values = reference.dequantize(fit(w, Grid(element, 32), h)).astype(np.float64)
    assert (values * w).sum() > least * (w.astype(np.float64) ** 2).sum()
