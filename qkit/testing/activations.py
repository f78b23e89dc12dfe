"""The laws of activations, outputs, static ranges and switches. Part of `Conformance`."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qkit
from qkit import reference
from qkit.element import AVERAGE
from qkit.errors import BackendError, GridError, StageError
from qkit.grid import Grid
from qkit.reference.ranges import static_scales
from qkit.rules import Recipe, Rule
from qkit.testing.hard_tensors import random
from qkit.testing.surgery import Surgery, same

WEIGHT = Grid("int4", 64)
DYNAMIC = [
    Rule(("*",), weight=WEIGHT, activation=Grid("int8", "row", "absmax")),
    Rule(("*",), weight=WEIGHT, activation=Grid("int8", "row", "minmax")),
    Rule(("*",), weight=Grid("int8", "row"), activation=Grid("int8", "row"), output=Grid("int8", "row")),
    Rule(("*",), weight=Grid("e4m3", "row"), activation=Grid("e4m3", "row")),
    Rule(("*",), weight=Grid("e2m1", 32), activation=Grid("e2m1", 32), ste="masked"),
    Rule(("*",), weight=Grid("e4m3", 32), activation=Grid("e4m3", 32)),
    Rule(("*",), weight=Grid("e2m1", 16, "nvfp4"), activation=Grid("e2m1", 16, "nvfp4")),
]
STATIC = [
    Rule(("*",), weight=Grid("int8", "row"), activation=Grid("int8", "tensor"), range="calibrated"),
    Rule(("*",), weight=WEIGHT, activation=Grid("int8", "tensor", "minmax"), range="average", ste="masked"),
    Rule(("*",), weight=Grid("e4m3", "row"), activation=Grid("e4m3", "tensor"), range="calibrated"),
    Rule(("*",), weight=WEIGHT, output=Grid("int8", "tensor", "minmax"), range="calibrated"),
]


def _name(rule: Rule) -> str:
    slots = [f"{slot}={grid}" for slot, grid in rule.slots.items()]
    return " ".join([str(rule.weight), *slots, rule.range])


each_rule = pytest.mark.parametrize("rule", [*DYNAMIC, *STATIC], ids=_name)
static_rule = pytest.mark.parametrize("rule", STATIC, ids=_name)


class Activations(Surgery):
    """Laws on the inputs and outputs of layers. A rule that the engine refuses by `BackendError` is skipped."""

    @each_rule
    def test_prepared_and_converted_agree_with_activations(self, rule: Rule) -> None:
        model, x = self._prepared(rule)
        prepared = self._run(model, x)
        converted = self._run(qkit.convert(model), x)
        assert np.isfinite(prepared).all()
        assert np.abs(prepared - converted).max() <= self.tolerance * np.abs(prepared).max()

    @each_rule
    def test_activations_are_quantized(self, rule: Rule) -> None:
        model, x = self._prepared(rule)
        assert (
            self._run(model, x) != self._run(qkit.prepare(self.model(), recipe(Rule(("*",), weight=rule.weight))), x)
        ).any()

    @each_rule
    def test_nan_in_an_input_comes_out_as_nan(self, rule: Rule) -> None:
        model, x = self._prepared(rule)
        poisoned = self.engine.to_numpy(x).copy()
        poisoned[1, 5] = np.nan
        for _ in range(2):
            made = self._run(model, self.engine.from_numpy(poisoned))
            assert np.isnan(made[1]).all()
            if rule.activation is None or rule.activation.scale != "nvfp4":  # whose scale looks at all rows
                assert np.isfinite(np.delete(made, 1, axis=0)).all()
            model = qkit.convert(model) if self._stages(model) == {"prepared"} else model

    @each_rule
    def test_no_rows_go_in_and_none_come_out(self, rule: Rule) -> None:
        """As at an expert that no token reaches."""
        model, x = self._prepared(rule)
        none = self.engine.from_numpy(self.engine.to_numpy(x)[:0])
        want = (0, self._run(model, x).shape[1])
        for mode in ("train", "eval"):
            if hasattr(model, mode):
                getattr(model, mode)()
            before = self._tensors(model)
            assert self._run(model, none).shape == want
            assert same(before, self._tensors(model))  # ranges have seen nothing
        with qkit.disabled(model):
            assert self._run(model, none).shape == want
        assert self._run(qkit.convert(model), none).shape == want

    def test_an_output_is_on_its_grid(self) -> None:
        grid, x = Grid("int8", "row", "minmax"), random((5, 256), 3)
        for make in (qkit.prepare, qkit.convert):
            plain, on_grid = (
                self.engine.run_layer(self._single(make, Rule(("*",), weight=WEIGHT, output=output)), x)
                for output in (None, grid)
            )
            assert (on_grid == reference.fake_quantize(plain, grid)).all()

    def test_an_activation_whose_group_does_not_divide_is_refused_and_the_model_stays(self) -> None:
        model = self.model()
        rule = Rule(("*",), weight=Grid("e4m3", "row"), activation=Grid("e4m3", 96))
        with self._unchanged(model, "float"), pytest.raises(GridError, match="do not divide into groups of 96"):
            qkit.prepare(model, recipe(rule))

    # switches

    @each_rule
    def test_switched_off_is_the_float_model(self, rule: Rule) -> None:
        model, x = self._prepared(rule)
        on = self._run(model, x)
        with qkit.disabled(model):
            assert (self._run(model, x) == self._run(self.model(), x)).all()
            assert {row.state for row in qkit.coverage(model).rows} == {"prepared, switched off"}
        assert (self._run(model, x) == on).all()

    def test_one_layer_is_switched_alone(self) -> None:
        model, x = self._prepared(DYNAMIC[0])
        first, *rest = [layer.path for layer in self.engine.layers(model)]
        on = self._run(model, x)
        qkit.disable(model, first)
        states = {row.path: row.state for row in qkit.coverage(model).rows}
        assert states == {first: "prepared, switched off"} | dict.fromkeys(rest, "prepared")
        partly = self._run(model, x)
        assert (partly != on).any()
        assert (partly != self._run(self.model(), x)).any()
        qkit.enable(model)
        assert (self._run(model, x) == on).all()

    def test_a_layer_that_is_switched_off_is_converted_all_the_same(self) -> None:
        model, _ = self._prepared(DYNAMIC[0])
        qkit.disable(model)
        assert self._stages(qkit.convert(model)) == {"converted"}

    def test_switching_layers_that_do_not_exist_is_refused(self) -> None:
        with pytest.raises(StageError, match="no layer of this model is prepared"):
            qkit.disable(self.model())
        model, _ = self._prepared(DYNAMIC[0])
        with pytest.raises(StageError, match="no prepared layer matches 'nothing"):
            qkit.enable(model, "nothing.*")
        with pytest.raises(StageError, match="has a static range to calibrate"), qkit.calibrating(model):
            pass

    # static ranges

    @static_rule
    def test_a_range_is_the_lowest_and_highest_value_of_calibration(self, rule: Rule) -> None:
        model, x = self._prepared(rule)
        if rule.activation is None:
            return
        path, tensors = next(iter(self.engine.layers(model))).path, self._tensors(model)
        seen = self.engine.to_numpy(x)
        assert tensors[f"{path}.input_range"].tolist() == [seen.min(), seen.max()]
        with qkit.calibrating(model):  # clears the ranges of before
            self._run(model, self.engine.from_numpy(np.array(seen / 2)))
            self._run(model, self.engine.from_numpy(np.array(seen / 4)))
        assert self._tensors(model)[f"{path}.input_range"].tolist() == [seen.min() / 2, seen.max() / 2]

    @static_rule
    def test_calibration_goes_on_after_a_block_of_float(self, rule: Rule) -> None:
        model = self._allowed(rule)
        x = self._inputs(model)
        with qkit.calibrating(model):
            self._run(model, x)
            seen = self._tensors(model)
            with qkit.disabled(model):
                self._run(model, self.engine.from_numpy(np.array(self.engine.to_numpy(x) * 3)))
            assert same(seen, self._tensors(model))
            with pytest.raises(StageError, match="is being calibrated"):
                qkit.enable(model)
            with pytest.raises(StageError, match="is being calibrated already"), qkit.calibrating(model):
                pass
            assert same(seen, self._tensors(model))
        assert {row.state for row in qkit.coverage(model).rows} == {"prepared"}

    @static_rule
    def test_static_scales_are_those_of_the_range(self, rule: Rule) -> None:
        model, _ = self._prepared(rule)
        path, before = next(iter(self.engine.layers(model))).path, self._tensors(model)
        ranges = {
            name: before[f"{path}.{name}_range"] for name in ("input", "output") if f"{path}.{name}_range" in before
        }
        after = self._tensors(qkit.convert(model))
        for name, array in static_scales(rule, ranges, path=path).items():
            assert after[f"{path}.{name}"].dtype == array.dtype
            assert (after[f"{path}.{name}"] == array).all()

    @static_rule
    def test_an_unknown_range_gives_nan_and_is_not_converted(self, rule: Rule) -> None:
        model = self._allowed(rule)
        x = self._inputs(model)
        assert np.isnan(self._run(model, x)).all()
        with self._unchanged(model, "prepared"), pytest.raises(StageError, match="is not known yet"):
            qkit.convert(model)
        model = self.model()
        with self._unchanged(model, "float"), pytest.raises(StageError, match="scales come from data"):
            qkit.convert(model, recipe(rule))

    def test_a_running_average_follows_training_and_only_training(self) -> None:
        rule = Rule(("*",), weight=WEIGHT, activation=Grid("int8", "tensor"), range="average")
        model = self._allowed(rule)
        path = next(iter(self.engine.layers(model))).path
        one, two = (random((3, self._inputs(model).shape[1]), seed) for seed in (21, 22))
        if not hasattr(model, "train"):
            pytest.skip(f"{self.backend} has no training mode")
        model.train()
        ranges = []
        for x in (one, two):
            self._run(model, self.engine.from_numpy(x))
            ranges.append(self._tensors(model)[f"{path}.input_range"].astype(np.float64))
        assert ranges[0].tolist() == [one.min(), one.max()]
        want = ranges[0] + AVERAGE * (np.array([two.min(), two.max()]) - ranges[0])
        assert np.abs(ranges[1] - want).max() < 1e-6
        model.eval()
        self._run(model, self.engine.from_numpy(one))
        assert (self._tensors(model)[f"{path}.input_range"] == ranges[1]).all()

    @each_rule
    def test_activations_are_saved_and_loaded(self, rule: Rule, tmp_path: Path) -> None:
        model, x = self._prepared(rule)
        model = qkit.convert(model)
        qkit.save(model, tmp_path / "saved")
        loaded = qkit.load(tmp_path / "saved", into=self.model())
        assert same(self._tensors(model), self._tensors(loaded))
        assert (self._run(model, x) == self._run(loaded, x)).all()
        assert qkit.coverage(model).rows == qkit.coverage(loaded).rows

    def _allowed(self, rule: Rule) -> Any:
        """A new prepared model in evaluation mode; skips where the engine refuses `rule`."""
        try:
            model = qkit.prepare(self.model(), recipe(rule))
        except BackendError as error:
            pytest.skip(str(error))
        if hasattr(model, "eval"):
            model.eval()
        return model

    def _prepared(self, rule: Rule) -> tuple[Any, Any]:
        """A new prepared model in evaluation mode, calibrated if its ranges are static, and inputs for it."""
        model = self._allowed(rule)
        x = self._inputs(model)
        if rule.range != "dynamic":
            with qkit.calibrating(model):
                self._run(model, x)
        return model, x

    def _single(self, make: Any, rule: Rule) -> Any:
        """One layer, prepared or converted by `make`."""
        try:
            return make(self.engine.make_layer("linear", random((128, 256), 1)), recipe(rule), backend=self.engine)
        except BackendError as error:
            pytest.skip(str(error))

    def _stages(self, model: Any) -> set[str]:
        return {layer.stage for layer in self.engine.layers(model)}


def recipe(rule: Rule) -> Recipe:
    """A recipe of one rule."""
    return Recipe(f"conformance {_name(rule)}", (rule,))
