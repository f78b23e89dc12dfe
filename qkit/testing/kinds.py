"""The laws of embeddings, and of layers that share one weight. Part of `Conformance`."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qkit
from qkit import reference
from qkit.errors import BackendError, RecipeError
from qkit.grid import Grid
from qkit.rules import Recipe, Rule
from qkit.testing.hard_tensors import random
from qkit.testing.surgery import Surgery, common_grid, same


class Kinds(Surgery):
    """Laws on kinds of layers. A subclass overrides `tied_model` if its framework shares a weight between layers."""

    def tied_model(self) -> Any:
        """A new small float32 model of an embedding and an output head with one weight, whose rows are multiples of 128."""
        pytest.skip(f"{self.backend} gives no model with a tied head")

    @common_grid
    def test_an_embedding_gives_the_values_of_its_codes(self, grid: Grid) -> None:
        engine, w = self.engine, random((16, 256), 31)
        tokens, rule = np.array([[3, 0, 15], [3, 7, 1]], np.int32), Rule(("*",), kind="embedding", weight=grid)
        try:
            prepared = engine.prepare_layer(engine.make_layer("embedding", w), rule)
        except BackendError as error:
            pytest.skip(str(error))
        packed = engine.pack(prepared, engine.quantize(engine.weight(prepared), grid), rule)
        want = reference.fake_quantize(w, grid)[tokens]
        assert (engine.run_layer(prepared, tokens) == want).all()
        assert (engine.run_layer(packed, tokens) == want).all()

    @common_grid
    def test_a_tied_head_stays_tied(self, grid: Grid, tmp_path: Path) -> None:
        engine, model = self.engine, self.tied_model()
        tokens = np.arange(12, dtype=np.int32).reshape(2, 6)
        count = len(self._tensors(model))
        model = qkit.prepare(model, _recipe(grid, grid))
        first, head = engine.layers(model)
        assert (first.tied, head.tied) == ("", first.path)
        assert len(self._tensors(model)) == count
        prepared = engine.run_layer(model, tokens)
        model = qkit.convert(model)
        assert [layer.tied for layer in engine.layers(model)] == ["", first.path]
        one, other = (self._parts(layer.module) for layer in engine.layers(model))
        assert same(one, other)
        coverage = qkit.coverage(model)
        assert replace(coverage, rest=0, rest_bits=0).bits_per_weight == coverage.rows[0].bits
        qkit.save(model, tmp_path / "saved")
        loaded = qkit.load(tmp_path / "saved", into=self.tied_model())
        assert [layer.tied for layer in engine.layers(loaded)] == ["", first.path]
        converted, again = engine.run_layer(model, tokens), engine.run_layer(loaded, tokens)
        assert np.abs(prepared - converted).max() <= self.tolerance * np.abs(prepared).max()
        assert (converted == again).all()

    def test_one_weight_on_two_grids_is_refused_and_the_model_stays(self) -> None:
        for grids in ((Grid("int4", 64), Grid("int8", 64)), (Grid("int4", 64), None), (None, Grid("int4", 64))):
            model = self.tied_model()
            with self._unchanged(model, "float"), pytest.raises(RecipeError, match="is tied to that of"):
                qkit.prepare(model, _recipe(*grids))

    def test_a_tied_weight_left_alone_stays_as_it_was(self) -> None:
        model = self.tied_model()
        before = self._tensors(model)
        rules = (Rule(("*",)), Rule(("*",), kind="embedding"), Rule(("other",), weight=Grid("int4", 64)))
        with pytest.raises(RecipeError, match="is first for no layer"):
            qkit.prepare(model, Recipe("none", rules))
        assert same(before, self._tensors(model))


def _recipe(embedding: Grid | None, head: Grid | None) -> Recipe:
    return Recipe("tied", (Rule(("*",), kind="embedding", weight=embedding), Rule(("*",), weight=head)))
