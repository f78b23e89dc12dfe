"""Learned rounding: blocks that come nearer to the float model's, and the same codes from the same statistics everywhere."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import make
from typer.testing import CliRunner

import qkit
from qkit import reference
from qkit.artifact.inspect import inspect_directory
from qkit.artifact.metadata import read_rules
from qkit.calibration import calibrate
from qkit.cli.application import application
from qkit.drift_calibration import calibrate_drift
from qkit.engines.blocks import Lesson
from qkit.errors import ArtifactError, BackendError, GridError, PlanError, RecipeError
from qkit.fitting.fits import Fit
from qkit.fitting.rows import root_of
from qkit.fitting.run import Run
from qkit.fitting.statistics import open_statistics
from qkit.metric import STATES, gather_metrics, metrics_of
from qkit.qtensor import QTensor
from qkit.rules import parse_recipe
from qkit.storage.read import read_folder
from qkit.streaming.carry_out import quantize_directory
from qkit.streaming.plan import make_plan

TOKENS = np.random.default_rng(3).integers(0, 200, (16, 32)).astype(np.int32)
LESSON = Lesson(steps=40, batch=4, seed=1, reach=0.5)
RECIPES = ("int2-g32", "int4-g32-minmax", "mxfp4-a16", "nvfp4-a16")
MIXED = """
schema = 1
[grids.two]
element = "int2"
group = 32
[[rules]]
match = "*mlp*"
weight = "two"
rounding = "learned"
[[rules]]
match = "*"
weight = "two"
"""
pytestmark = pytest.mark.filterwarnings("ignore::qkit.errors.FewTokensWarning")
torch_engine = qkit.backend("torchao")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(make(tmp_path_factory.mktemp("float") / "model", "llama"))


def learned(model: Path, out: Path, recipe: Any, **given: Any) -> Path:
    given = {"lesson": LESSON, **given}
    return calibrate_drift(model, out, TOKENS, engine=torch_engine, recipe=recipe, batch=4, **given)


@pytest.fixture(scope="module")
def stats(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("stats")
    return {name: learned(model, place / name, qkit.recipe(name)) for name in RECIPES}


def quantize(model: Path, out: Path, recipe: Any, how: Fit, engine: str = "numpy") -> Path:
    plan = make_plan(model, recipe, fit=how)
    return quantize_directory(plan, out, engine=qkit.backend(engine), workers=1, tick=lambda *_: None)


def block_error(model: Path, values: dict[str, Any], place: Path) -> float:
    """Of the first block: mean squared difference of its outputs from the float ones, in the metric of states."""
    whole, other = (qkit.load(model, backend="torchao") for _ in range(2))
    blocks, mine = (torch_engine.blocks(one, length=TOKENS.shape[1]) for one in (whole, other))
    run = Run(place, {}, {}, batch=4)
    gather_metrics(run, blocks, TOKENS, [()] * len(blocks.paths), batch=4)
    root = root_of(metrics_of(run, 0)[STATES])
    for path, one in values.items():
        mine.put(path, one)
    states = blocks.enter(TOKENS)
    return float(np.mean(((blocks.look(0, states, ())[0] - mine.look(0, states, ())[0]) @ root) ** 2))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_learned_block_is_never_further_from_the_float_one_than_a_solved_one(
    recipe: str, model: Path, stats: dict[str, Path], tmp_path: Path
) -> None:
    solved = open_statistics(learned(model, tmp_path / "solved", qkit.recipe(recipe), lesson=None))
    known = open_statistics(stats[recipe])
    first = [path for path in known.paths if path.startswith("model.layers.0.")]
    assert len(first) == 7
    grid = qkit.recipe(recipe).rules[-1].weight
    assert grid is not None
    values = {path: QTensor(grid=grid, dtype="float32", **(known.codes(path) or {})) for path in first}
    before = {
        path: reference.fit(
            np.array(solved.aim(path)), grid, solved.moments(path), method="solve", peak=solved.peak(path)
        )
        for path in first
    }
    errors = [
        block_error(model, {path: reference.dequantize(q) for path, q in one.items()}, tmp_path / "metric")
        for one in (values, before)
    ]
    assert errors[0] <= errors[1]
    if grid.element.kind == "integer":  # so few steps move no code of a float far enough
        assert errors[0] < errors[1]


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_same_statistics_give_the_same_codes_on_every_engine(
    recipe: str, model: Path, stats: dict[str, Path], tmp_path: Path
) -> None:
    how, known = Fit("round", stats[recipe]), open_statistics(stats[recipe])
    outs = [quantize(model, tmp_path / name, qkit.recipe(recipe), how, name) for name in ("numpy", "torchao")]
    converted = qkit.convert(qkit.load(model, backend="mlx"), recipe, fit=how)
    for engine, one in (
        *((torch_engine, qkit.load(out, backend="torchao")) for out in outs),
        (qkit.backend("mlx"), converted),
    ):
        layers = {layer.path: layer.module for layer in engine.layers(one)}
        for path in known.paths:
            want, q = known.codes(path), engine.unpack(layers[path]).map(engine.to_numpy)
            assert want is not None
            assert (q.codes == want["codes"]).all()
            assert (
                reference.scale_values(q) == reference.scale_values(QTensor(grid=q.grid, dtype=q.dtype, **want))
            ).all()


def test_the_same_text_gives_the_same_statistics_on_one_engine(
    model: Path, stats: dict[str, Path], tmp_path: Path
) -> None:
    again = learned(model, tmp_path / "again", qkit.recipe("int2-g32"))
    other = learned(
        model, tmp_path / "other", qkit.recipe("int2-g32"), lesson=Lesson(steps=40, batch=4, seed=2, reach=0.5)
    )
    assert contents(again) == contents(stats["int2-g32"])
    assert contents(other) != contents(again)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_an_interrupted_run_ends_with_the_same_bytes(model: Path, stats: dict[str, Path], tmp_path: Path) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learned(model, tmp_path / "stats", qkit.recipe("int2-g32"), tick=stop)
    assert not (tmp_path / "stats").exists()
    learned(model, tmp_path / "stats", qkit.recipe("int2-g32"))
    assert contents(tmp_path / "stats") == contents(stats["int2-g32"])


def test_a_rule_names_the_layers_that_learn(model: Path, tmp_path: Path) -> None:
    recipe = parse_recipe(MIXED, name="mixed", source="mixed.toml")
    assert [rule.rounding for rule in recipe.rules] == ["learned", "nearest"]
    with pytest.raises(PlanError, match=r'mlp\.down_proj: its rounding is to be "learned", .* qkit calibrate --learn'):
        make_plan(model, recipe)
    plain = calibrate(model, tmp_path / "plain", TOKENS, engine=torch_engine)
    with pytest.raises(PlanError, match='rounding is to be "learned"'):
        make_plan(model, recipe, fit=Fit("solve", plain))
    for verb in (qkit.convert, qkit.prepare):
        with pytest.raises(PlanError, match='rounding is to be "learned"'):
            verb(qkit.load(model, backend="torchao"), recipe)
    known = open_statistics(learned(model, tmp_path / "stats", recipe, lesson=None))
    assert known.lesson == {"steps": Lesson().steps, "batch": 8, "seed": 0, "reach": 1.0}
    for path in known.paths:
        assert (known.codes(path) is not None) == ("mlp" in path)
    out = quantize(model, tmp_path / "out", recipe, Fit("round", known))
    assert {one.rule.rounding for one in read_rules(out, read_folder(out)[1], None)} == {"nearest"}
    assert inspect_directory(out).fit["lesson"] == known.lesson


def test_wrong_uses_are_refused(model: Path, stats: dict[str, Path], tmp_path: Path) -> None:
    plain = calibrate(model, tmp_path / "plain", TOKENS, engine=torch_engine)
    with pytest.raises(PlanError, match="has no learned rounding: run qkit calibrate with --learn"):
        Fit("round", plain)
    with pytest.raises(PlanError, match="round needs statistics"):
        Fit("round")
    for method in ("solve", "search"):
        with pytest.raises(PlanError, match=f"under round, not of int2-g32-signed under {method}"):
            make_plan(model, qkit.recipe("int2-g32"), fit=Fit(method, stats["int2-g32"]))
    with pytest.raises(PlanError, match="not of int3-g32-signed under round"):
        make_plan(model, qkit.recipe("int3-g32"), fit=Fit("round", stats["int2-g32"]))
    with pytest.raises(GridError, match="whose rows share a scale"):
        learned(
            model,
            tmp_path / "tensor",
            parse_recipe(
                MIXED.replace('"two"\nrounding = "learned"', '"two"').replace("32", '"tensor"'), name="t", source="t"
            ),
        )
    with pytest.raises(RecipeError, match='rounding = "learned" is for linear layers'):
        parse_recipe(MIXED.replace("32", '"tensor"'), name="t", source="t")
    with pytest.raises(BackendError, match="'mlx' cannot learn rounding"):
        calibrate_drift(
            model, tmp_path / "mlx", TOKENS, engine=qkit.backend("mlx"), recipe=qkit.recipe("int2-g32"), lesson=LESSON
        )


def test_codes_of_another_shape_are_refused(stats: dict[str, Path]) -> None:
    how, path = Fit("round", stats["int2-g32"]), "model.layers.0.mlp.down_proj"
    with pytest.raises(ArtifactError, match="learned codes are of shape"):
        how.quantize(np.zeros((8, 32), np.float32), qkit.Grid("int2", 32), path=path, peak=None)


def test_the_command_line_learns_and_rounds(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"{number} and {number * number}" for number in range(400)), encoding="utf-8")
    words = ["calibrate", str(model), str(tmp_path / "stats"), "--data", str(text), "--backend", "torchao"]
    words += ["--length", "32", "--windows", "8", "--recipe", "int2-g32"]
    run = CliRunner().invoke(application, [*words, "--learn", "--steps", "4"])
    assert run.exit_code == 0, run.output
    words = ["quantize", str(model), str(tmp_path / "out"), "--recipe", "int2-g32", "--fit", "round"]
    run = CliRunner().invoke(application, [*words, "--stats", str(tmp_path / "stats")])
    assert run.exit_code == 0, run.output
    assert inspect_directory(tmp_path / "out").fit["method"] == "round"
