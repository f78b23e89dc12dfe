"""Drift correction: fitted models that come nearer to the float model, by statistics of the fitted model's own inputs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import make
from typer.testing import CliRunner

import qkit
from qkit import reference
from qkit.artifact.inspect import inspect_directory
from qkit.calibration import calibrate
from qkit.cli.application import application
from qkit.drift_calibration import calibrate_drift
from qkit.engines.abilities import offers
from qkit.engines.blocks import Watches
from qkit.errors import PlanError
from qkit.fitting.fits import Fit
from qkit.fitting.statistics import open_statistics
from qkit.grid import Grid
from qkit.overrides import overridden
from qkit.reference.fitting import fit
from qkit.rules import Rule
from qkit.storage.read import read_folder
from qkit.streaming.carry_out import quantize_directory
from qkit.streaming.plan import make_plan

ENGINES = [name for name in ("torchao", "mlx") if offers(qkit.backend(name), Watches)]
TOKENS = np.random.default_rng(3).integers(0, 200, (24, 64)).astype(np.int32)
RECIPES = ("int3-g32", "nvfp4-a16")
pytestmark = pytest.mark.filterwarnings("ignore::qkit.errors.FewTokensWarning")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(make(tmp_path_factory.mktemp("float") / "model", "llama"))


@pytest.fixture(scope="module")
def stats(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("stats")
    return {
        f"{name} {recipe}": calibrate_drift(
            model, place / f"{name}-{recipe}", TOKENS, engine=qkit.backend(name), recipe=qkit.recipe(recipe)
        )
        for name in ENGINES
        for recipe in RECIPES
    }


def quantize(model: Path, out: Path, recipe: str, how: Fit) -> Path:
    plan = make_plan(model, qkit.recipe(recipe), fit=how)
    return quantize_directory(plan, out, engine=qkit.backend("numpy"), workers=1, tick=lambda *_: None)


def apart(one: Any, other: Any) -> float:
    """Mean squared difference of logits."""
    engine = qkit.backend("torchao")
    return float(np.mean((engine.logits(one, TOKENS) - engine.logits(other, TOKENS)) ** 2))


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_corrected_model_is_nearer_to_the_float_one(
    name: str, recipe: str, model: Path, stats: dict[str, Path], tmp_path: Path
) -> None:
    plain = calibrate(model, tmp_path / "plain", TOKENS, engine=qkit.backend(name))
    whole = qkit.load(model, backend="torchao")
    found = [
        apart(whole, qkit.load(quantize(model, tmp_path / f"out-{n}", recipe, Fit("solve", folder)), backend="torchao"))
        for n, folder in enumerate((plain, stats[f"{name} {recipe}"]))
    ]
    assert found[1] < 0.95 * found[0]


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_codes_are_those_of_the_law_for_the_aims(
    name: str, recipe: str, model: Path, stats: dict[str, Path], tmp_path: Path
) -> None:
    known, engine = open_statistics(stats[f"{name} {recipe}"]), qkit.backend("torchao")
    out = quantize(model, tmp_path / "out", recipe, Fit("solve", known))
    converted = qkit.convert(qkit.load(model, backend="torchao"), recipe, fit=Fit("solve", known))
    for one in (qkit.load(out, backend="torchao"), converted):
        layers = {layer.path: layer.module for layer in engine.layers(one)}
        for path in known.paths:
            grid, aim = qkit.recipe(recipe).rules[-1].weight, known.aim(path)
            law = fit(np.array(aim), grid, known.moments(path), method="solve", peak=known.peak(path))
            q = engine.unpack(layers[path]).map(engine.to_numpy)
            assert (q.codes == law.codes).all()
            assert (reference.scale_values(q) == reference.scale_values(law)).all()
    shared = {known.peak(f"model.layers.0.self_attn.{one}_proj") for one in "qkv"}
    assert len(shared) == 1
    assert (shared == {None}) == (recipe != "nvfp4-a16")


@pytest.mark.parametrize("name", ENGINES)
def test_a_float_head_is_corrected(name: str, model: Path, stats: dict[str, Path], tmp_path: Path) -> None:
    how, engine = Fit("solve", stats[f"{name} int3-g32"]), qkit.backend("torchao")
    assert how.statistics is not None
    assert how.statistics.heads == ["lm_head"]
    assert not how.statistics.has("lm_head")
    out = quantize(model, tmp_path / "out", "int3-g32", how)
    before, after = (read_folder(place)[0]["lm_head.weight"].mapped() for place in (model, out))
    for other in ENGINES:
        converted = qkit.convert(qkit.load(model, backend=other), "int3-g32", fit=how)
        mine = next(one.module for one in qkit.backend(other).layers(converted) if one.path == "lm_head")
        assert (qkit.backend(other).to_numpy(qkit.backend(other).weight(mine)) == after).all()
    whole = qkit.load(model, backend=engine)
    blocks = [engine.blocks(qkit.load(place, backend=engine), length=TOKENS.shape[1]) for place in (model, out)]
    inputs = [one.inputs_after(_last(one), "lm_head").astype(np.float64) for one in blocks]
    wanted = inputs[0] @ before.T.astype(np.float64)
    errors = [float(((inputs[1] @ head.T.astype(np.float64) - wanted) ** 2).sum()) for head in (before, after)]
    assert errors[1] < errors[0]
    fitted = qkit.load(out, backend=engine)
    near = apart(whole, fitted)
    with torch.no_grad():
        fitted.lm_head.weight.copy_(torch.from_numpy(np.array(before)))
    assert near < apart(whole, fitted)
    assert inspect_directory(out).fit["heads"] == ["lm_head"]


def _last(blocks: Any) -> np.ndarray:
    """The states of `TOKENS` after the last block."""
    states = blocks.enter(TOKENS)
    for number in range(len(blocks.paths)):
        states = blocks.look(number, states, ())[0]
    return states


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("recipe", ["int4-g32", "int4-g32-all"])
def test_a_head_that_is_tied_or_quantized_is_not_corrected(name: str, recipe: str, tmp_path: Path) -> None:
    tied = recipe == "int4-g32"
    model = Path(make(tmp_path / "model", "llama", tie_word_embeddings=tied))
    stats = calibrate_drift(
        model, tmp_path / "stats", TOKENS[:4], engine=qkit.backend(name), recipe=qkit.recipe(recipe)
    )
    assert not open_statistics(stats).heads
    out = quantize(model, tmp_path / "out", recipe, Fit("solve", stats))
    if tied:
        before, after = (read_folder(place)[0]["model.embed_tokens.weight"].mapped() for place in (model, out))
        assert (before == after).all()


@pytest.mark.parametrize("name", ENGINES)
def test_tokens_weigh_as_the_next_norm_sees_their_states(name: str, model: Path, stats: dict[str, Path]) -> None:
    known, engine = open_statistics(stats[f"{name} int3-g32"]), qkit.backend("torchao")
    blocks = engine.blocks(qkit.load(model, backend="torchao"), length=TOKENS.shape[1])
    path, total, weight = "model.layers.0.self_attn.q_proj", np.zeros(()), 0.0
    for start in range(0, len(TOKENS), 8):
        states = blocks.enter(TOKENS[start : start + 8])
        after, shown = blocks.look(0, states, (path,))
        squares = np.square(after.reshape(-1, after.shape[-1]).astype(np.float64)).mean(axis=1)
        shares, x = 1 / np.maximum(squares, 0.01 * squares.mean()), shown[path][0].astype(np.float64)
        total, weight = total + (shares[:, None] * x).T @ x, weight + shares.sum()
    want = total / weight
    assert np.abs(known.moments(path) - want).max() <= 1e-5 * np.abs(want).max()  # sums of fp32
    flat = sum(x.T @ x for x in [shown[path][0].astype(np.float64)])
    assert np.abs(flat / flat.trace() - want / want.trace()).max() > 1e-3 * np.abs(want / want.trace()).max()


def test_an_interrupted_correction_ends_with_the_same_bytes(
    model: Path, stats: dict[str, Path], tmp_path: Path
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    given = {"engine": qkit.backend("torchao"), "recipe": qkit.recipe("int3-g32")}
    with pytest.raises(KeyboardInterrupt):
        calibrate_drift(model, tmp_path / "stats", TOKENS, tick=stop, **given)
    calibrate_drift(model, tmp_path / "stats", TOKENS, **given)
    whole = stats["torchao int3-g32"]
    for file in whole.iterdir():
        assert file.read_bytes() == (tmp_path / "stats" / file.name).read_bytes()


def test_corrections_of_another_recipe_are_refused(model: Path, stats: dict[str, Path], tmp_path: Path) -> None:
    folder = stats["torchao int3-g32"]
    with pytest.raises(
        PlanError, match=r"correct the drift of int3-g32-signed under solve, not of int4-g32-signed under solve"
    ):
        make_plan(model, qkit.recipe("int4-g32"), fit=Fit("solve", folder))
    with pytest.raises(PlanError, match=r"not of int3-g32-signed under search: calibrate for this recipe"):
        make_plan(model, qkit.recipe("int3-g32"), fit=Fit("search", folder))
    fewer = overridden(qkit.recipe("int3-g32"), ignore=["*.1.*o_proj"])
    with pytest.raises(
        PlanError, match=r"1\.self_attn\.o_proj: these statistics correct the drift of int3.* leaves it in float"
    ):
        make_plan(model, fewer, fit=Fit("solve", folder))
    every = replace(
        fewer, rules=(Rule(("lm_head",), weight=Grid.parse("int3-g32-signed")), *qkit.recipe("int3-g32").rules)
    )
    with pytest.raises(PlanError, match="lm_head: these statistics correct it in float, and the recipe quantizes it"):
        make_plan(model, every, fit=Fit("solve", folder))
    with pytest.raises(PlanError, match="drift is not corrected for recipes that quantize inputs"):
        calibrate_drift(
            model,
            tmp_path / "no",
            TOKENS,
            engine=qkit.backend("torchao"),
            recipe=qkit.recipe("int8-dynamic-act-int4-weight"),
        )
    ran = CliRunner().invoke(
        application, ["calibrate", str(model), str(tmp_path / "no"), "--data", __file__, "--drift"]
    )
    assert ran.exit_code == 2
    assert "--drift is of one recipe: add --recipe" in ran.output


def test_the_artifact_says_that_drift_was_corrected(model: Path, stats: dict[str, Path], tmp_path: Path) -> None:
    out = quantize(model, tmp_path / "out", "int3-g32", Fit("solve", stats["torchao int3-g32"]))
    found = inspect_directory(out).fit
    assert found
    assert found["drift"] == "corrected"
    assert found["rows"] == "coupled"


def test_a_directory_in_the_place_of_the_run_is_left_alone(model: Path, tmp_path: Path) -> None:
    (tmp_path / "stats.part").mkdir()
    (tmp_path / "stats.part" / "mine.txt").write_text("mine")
    with pytest.raises(PlanError, match=r"stats.part is there already, and is no run of calibrate: move it away"):
        calibrate(model, tmp_path / "stats", TOKENS, engine=qkit.backend("torchao"))
    assert (tmp_path / "stats.part" / "mine.txt").read_text() == "mine"
