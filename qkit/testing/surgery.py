"""The laws of an engine that has modules: prepare, convert, pack, save. Part of `Conformance`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

import qkit
from qkit import reference
from qkit.engines.layer import Stage
from qkit.engines.protocol import Modules
from qkit.errors import ArtifactError, BackendError, GridError, QkitError, RangeError, RecipeError, StageError
from qkit.grid import Grid
from qkit.rules import Recipe, Rule
from qkit.testing.hard_tensors import all_grids, random

COMMON = [
    Grid("int4", 64),
    Grid("int2", 32),
    Grid("int8", "row"),
    Grid("int4", 32, "minmax"),
    Grid("e2m1", 32),
]

#: Grids that compressed-tensors has a layout for.
PORTABLE = [grid for grid in all_grids() if str(grid).rpartition("-")[0] not in ("e5m2-g32", "e5m2-row", "e2m1-row")]

#: A rule for every key that an engine may honour.
KEYED = {
    "activation": Rule(("*",), weight=Grid("int4", 64), activation=Grid("int8", "row")),
    "output": Rule(("*",), weight=Grid("int4", 64), output=Grid("int8", "row")),
    "range": Rule(("*",), weight=Grid("int4", 64), activation=Grid("int8", "tensor"), range="average"),
    "ste": Rule(("*",), weight=Grid("int4", 64), ste="masked"),
    "scales": Rule(("*",), weight=Grid("int4", 64), scales="learned"),
}

each_grid = pytest.mark.parametrize("grid", all_grids(), ids=str)
common_grid = pytest.mark.parametrize("grid", COMMON, ids=str)


class Surgery:
    """Laws on models.

    A subclass overrides `model` and `forward`, and `shared_model` if a module can be registered twice.

    Attributes:
        tolerance: how far a converted forward may be from a prepared one, relative to its largest output. Say
            why it is not zero: usually that the engine's quantized matmul adds in another order.
    """

    backend: ClassVar[str]
    tolerance: ClassVar[float] = 0.0
    pytestmark = pytest.mark.filterwarnings(
        "ignore::qkit.errors.ServerWarning"
    )  # the laws save grids that no server has

    @property
    def engine(self) -> Modules:
        """The backend under test."""
        raise NotImplementedError

    def model(self) -> Any:
        """A new small float32 model: two or more linear layers whose inputs are multiples of 128."""
        raise NotImplementedError

    def forward(self, model: Any, x: Any) -> Any:
        """The output [batch, outputs] of `model` for an array of the engine [batch, first layer's inputs]."""
        raise NotImplementedError

    def shared_model(self) -> Any:
        """A new model in which one linear layer is registered under two paths."""
        pytest.skip(f"{self.backend} gives no model with a shared module")

    @each_grid
    def test_a_prepared_forward_equals_the_converted_one(self, grid: Grid) -> None:
        model = qkit.prepare(self.model(), recipe_of(grid))
        x = self._inputs(model)
        prepared = self._run(model, x)
        converted = self._run(qkit.convert(model), x)
        assert np.isfinite(prepared).all()
        assert np.abs(prepared - converted).max() <= self.tolerance * np.abs(prepared).max()

    @common_grid
    def test_a_prepared_forward_uses_the_quantized_weights(self, grid: Grid) -> None:
        model = self.model()
        x = self._inputs(model)
        before = self._run(model, x)
        assert (self._run(qkit.prepare(model, recipe_of(grid)), x) != before).any()

    @common_grid
    def test_prepare_keeps_the_names_and_values_of_parameters(self, grid: Grid) -> None:
        model = self.model()
        before = self._tensors(model)
        assert same(before, self._tensors(qkit.prepare(model, recipe_of(grid))))

    @each_grid
    def test_convert_stores_the_reference_codes_of_the_masters(self, grid: Grid) -> None:
        engine, model = self.engine, self.model()
        masters = [engine.to_numpy(engine.weight(layer.module)) for layer in engine.layers(model)]
        converted = qkit.convert(qkit.prepare(model, recipe_of(grid)))
        layers = list(engine.layers(converted))
        assert [layer.stage for layer in layers] == ["converted"] * len(masters)
        for layer, w in zip(layers, masters, strict=True):
            assert same(self._parts(layer.module), reference.quantize(w, grid).parts()), layer.path

    @each_grid
    def test_converting_directly_gives_the_codes_of_preparing_first(self, grid: Grid) -> None:
        directly = qkit.convert(self.model(), recipe_of(grid))
        prepared = qkit.convert(qkit.prepare(self.model(), recipe_of(grid)))
        for one, other in zip(self.engine.layers(directly), self.engine.layers(prepared), strict=True):
            assert same(self._parts(one.module), self._parts(other.module)), one.path

    @pytest.mark.parametrize("from_numpy", [False, True], ids=["own arrays", "NumPy arrays"])
    @each_grid
    def test_unpack_gives_back_what_pack_was_given(self, grid: Grid, from_numpy: bool) -> None:
        engine, model = self.engine, self.model()
        layer = next(iter(engine.layers(model)))
        q = reference.quantize(random(layer.shape, 8), grid)
        given = q if from_numpy else q.map(engine.from_numpy)
        packed = engine.pack(layer.module, given, Rule(match=("*",), weight=grid))
        unpacked = engine.unpack(packed)
        assert unpacked.grid == grid
        assert same({name: engine.to_numpy(part) for name, part in unpacked.parts().items()}, q.parts())

    @common_grid
    def test_a_module_registered_twice_stays_shared(self, grid: Grid) -> None:
        engine, model = self.engine, self.shared_model()
        count = len(list(engine.layers(model)))
        x = self._inputs(model)
        prepare: Callable[[Any], Any] = partial(qkit.prepare, recipe=recipe_of(grid))
        for step in (prepare, qkit.convert):
            model = step(model)
            assert len(list(engine.layers(model))) == count  # each module once: a second copy would be counted
            assert {layer.stage for layer in engine.layers(model)} != {"float"}
            assert np.isfinite(self._run(model, x)).all()

    @pytest.mark.parametrize("key", KEYED)
    def test_a_recipe_key_is_honoured_or_refused_by_name(self, key: str) -> None:
        """A key that the engine does not declare is never ignored: that would deploy another model than was asked for."""
        model, rule, wanted = self.model(), KEYED[key], Recipe(f"conformance {key}", (KEYED[key],))
        if rule.engine_keys.keys() <= getattr(self.engine, "recipe_keys", frozenset()):
            assert {layer.rule for layer in self.engine.layers(qkit.prepare(model, wanted))} == {rule}
            return
        for verb in (qkit.prepare, qkit.convert):
            with self._unchanged(model, "float"), pytest.raises(BackendError, match="does not honour"):
                verb(model, wanted)

    @common_grid
    def test_coverage_names_every_layer_and_its_grid(self, grid: Grid) -> None:
        model = qkit.prepare(self.model(), recipe_of(grid))
        paths = [layer.path for layer in self.engine.layers(model)]
        for covered in (qkit.coverage(model), qkit.coverage(qkit.convert(model))):
            assert [row.path for row in covered.rows] == paths
            assert {row.weight for row in covered.rows} == {str(grid)}
            assert all(row.state for row in covered.rows)

    @pytest.mark.parametrize("grid", PORTABLE, ids=str)
    def test_a_saved_model_loads_with_equal_codes(self, grid: Grid, tmp_path: Path) -> None:
        engine, model = self.engine, qkit.convert(self.model(), recipe_of(grid))
        x = self._inputs(model)
        qkit.save(model, tmp_path / "saved")
        loaded = qkit.load(tmp_path / "saved", into=self.model())
        for one, other in zip(engine.layers(model), engine.layers(loaded), strict=True):
            assert same(self._parts(one.module), self._parts(other.module)), one.path
        assert same(self._tensors(model), self._tensors(loaded))
        assert (self._run(model, x) == self._run(loaded, x)).all()

    def test_a_weight_with_nan_is_refused_and_the_model_stays(self) -> None:
        engine, model = self.engine, self.model()
        tensors = {name: array.copy() for name, array in self._tensors(model).items()}
        last = list(engine.layers(model))[-1]
        poisoned = next(name for name in tensors if name.startswith(last.path) and tensors[name].shape == last.shape)
        tensors[poisoned][-1, -1] = np.nan
        engine.fill(model, tensors)
        with self._unchanged(model, "float"), pytest.raises(RangeError, match="NaN"):
            qkit.convert(model, recipe_of(Grid("int4", 64)))

    def test_a_group_that_does_not_divide_is_refused_and_the_model_stays(self) -> None:
        model = self.model()
        with (
            self._unchanged(model, "float"),
            pytest.raises(GridError, match="do not divide into groups of 100"),
        ):
            qkit.prepare(model, recipe_of(Grid("int4", 100)))

    def test_a_rule_that_matches_nothing_is_refused_and_the_model_stays(self) -> None:
        model = self.model()
        grid = Grid("int4", 64)
        recipe = Recipe("typo", (Rule(("no.such.layer",), weight=grid), Rule(("*",), weight=grid)))
        with self._unchanged(model, "float"), pytest.raises(RecipeError, match=r"no\.such\.layer"):
            qkit.prepare(model, recipe)

    def test_preparing_twice_is_refused_and_the_model_stays(self) -> None:
        model = qkit.prepare(self.model(), recipe_of(Grid("int4", 64)))
        with self._unchanged(model, "prepared"), pytest.raises(StageError, match="prepared already"):
            qkit.prepare(model, recipe_of(Grid("int8", 64)))

    def test_converting_an_unprepared_model_without_a_recipe_is_refused(self) -> None:
        model = self.model()
        with self._unchanged(model, "float"), pytest.raises(StageError, match="no layer"):
            qkit.convert(model)

    def test_an_artifact_is_not_loaded_into_a_prepared_model(self, tmp_path: Path) -> None:
        qkit.save(qkit.convert(self.model(), recipe_of(Grid("int4", 64))), tmp_path / "saved")
        model = qkit.prepare(self.model(), recipe_of(Grid("int8", 64)))
        with self._unchanged(model, "prepared"), pytest.raises(ArtifactError, match="is prepared already"):
            qkit.load(tmp_path / "saved", into=model)

    def test_filling_with_a_tensor_missing_is_refused(self) -> None:
        engine, model = self.engine, self.model()
        tensors = self._tensors(model)
        del tensors[next(iter(tensors))]
        with self._unchanged(model, "float"), pytest.raises(QkitError):
            engine.fill(model, tensors)

    @contextmanager
    def _unchanged(self, model: Any, stage: Stage) -> Iterator[None]:
        before = self._tensors(model)
        yield
        assert {layer.stage for layer in self.engine.layers(model)} == {stage}
        assert same(before, self._tensors(model))

    def _inputs(self, model: Any) -> Any:
        layer = next(iter(self.engine.layers(model)))
        return self.engine.from_numpy(random((3, layer.shape[1]), 9))

    def _run(self, model: Any, x: Any) -> NDArray[Any]:
        return self.engine.to_numpy(self.forward(model, x))

    def _tensors(self, model: Any) -> dict[str, NDArray[Any]]:
        return {name: self.engine.to_numpy(array) for name, array in self.engine.tensors(model).items()}

    def _parts(self, module: Any) -> dict[str, NDArray[Any]]:
        return {name: self.engine.to_numpy(part) for name, part in self.engine.unpack(module).parts().items()}


def recipe_of(grid: Grid) -> Recipe:
    """Every linear layer's weight on `grid`."""
    return Recipe(f"conformance {grid}", (Rule(("*",), weight=grid),))


def same(one: dict[str, NDArray[Any]], other: dict[str, NDArray[Any]]) -> bool:
    """Whether both hold the same names, types, shapes and bytes."""
    return {name: _exactly(array) for name, array in one.items()} == {
        name: _exactly(array) for name, array in other.items()
    }


def _exactly(array: NDArray[Any]) -> tuple[str, tuple[int, ...], bytes]:
    return str(array.dtype), array.shape, array.tobytes()
