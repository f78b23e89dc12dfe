"""Products and factors whose bits depend on no order of addition."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qkit.reference import products
from qkit.reference.products import fine_product, product, shortened, total, unit_upper


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 90), st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_a_product_has_the_same_bits_in_every_order(k: int, m: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    a, b = (draw.standard_normal(shape) * 2.0 ** draw.integers(-30, 30, shape) for shape in ((m, k), (k, 7)))
    order = draw.permutation(k)
    bound = np.abs(a).max(axis=1)[:, None] * np.abs(b).max(axis=0) * k
    for multiply, bits in ((lambda a, b: product(shortened(a, axis=1), b), 18), (fine_product, 38)):
        found = multiply(a, b)
        assert (multiply(a[:, order], b[order]) == found).all()
        assert (found == multiply(b.T.copy(), a.T.copy()).T).all()
        assert (np.abs(found - a @ b) <= bound * 2.0**-bits).all()  # each factor has two bits more


def test_long_products_are_exact_in_parts() -> None:
    draw = np.random.default_rng(0)
    a, b = shortened(draw.uniform(1, 2, (3, 9000)), axis=1), draw.uniform(1, 2, (9000, 2))
    order = np.concatenate([draw.permutation(4096), np.arange(4096, 9000)])
    assert (product(a[:, order], b[order]) == product(a, b)).all()


def test_totals_and_factors() -> None:
    assert [float(total(np.arange(1.0, n + 1))) for n in range(1, 9)] == [1, 3, 6, 10, 15, 21, 28, 36]
    h = _moments(150)
    upper = unit_upper(h)
    assert (np.tril(upper, -1) == 0).all()
    assert (upper.diagonal() == 1).all()
    inverse = np.linalg.inv(upper)
    rest = inverse @ h @ inverse.T
    assert np.abs(rest - np.diag(rest.diagonal())).max() < 1e-9 * h.diagonal().max()
    with pytest.raises(ArithmeticError, match="positive definite"):
        unit_upper(np.array([[1.0, 2.0], [2.0, 1.0]]))


def test_a_factor_of_several_panels_is_that_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    h = _moments(150)
    whole = unit_upper(h)
    monkeypatch.setattr(products, "PANEL", 64)
    assert np.abs(unit_upper(h) - whole).max() < 1e-9


def _moments(n: int) -> np.ndarray:
    x = np.random.default_rng(0).standard_normal((2 * n, n))
    return x.T @ x / len(x) + np.eye(n) / 100
