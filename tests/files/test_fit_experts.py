"""Statistics of experts: each expert is solved by the inputs that reached it, and by search where they are few."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import make
from typer.testing import CliRunner

import qkit
from qkit import reference
from qkit.calibration import calibrate
from qkit.cli.application import application
from qkit.drift_calibration import calibrate_drift
from qkit.engines.abilities import offers
from qkit.engines.blocks import Watches
from qkit.experts import paths_of
from qkit.fitting.fits import Fit
from qkit.fitting.statistics import open_statistics
from qkit.reference.fitting import fit
from qkit.streaming.carry_out import quantize_directory
from qkit.streaming.plan import make_plan

ENGINES = [name for name in ("torchao", "mlx") if offers(qkit.backend(name), Watches)]
TOKENS = np.random.default_rng(3).integers(0, 200, (10, 128)).astype(np.int32)
FAMILIES = ("mixtral", "qwen3_moe", "gpt_oss")
GATED = {"mixtral": ("w1", "w3", "w2"), "qwen3_moe": ("gate_proj", "up_proj", "down_proj")}
pytestmark = pytest.mark.filterwarnings("ignore::qkit.errors.FewTokensWarning")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("float")
    return {family: Path(make(place / family, family)) for family in FAMILIES}


@pytest.fixture(scope="module")
def stats(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    place = tmp_path_factory.mktemp("stats")
    return {
        (name, family): calibrate(folder, place / f"{name}-{family}", TOKENS, engine=qkit.backend(name))
        for name in ENGINES
        for family, folder in models.items()
    }


def quantize(model: Path, out: Path, recipe: str, how: Fit) -> Path:
    plan = make_plan(model, qkit.recipe(recipe), fit=how)
    return quantize_directory(plan, out, engine=qkit.backend("numpy"), workers=1, tick=lambda *_: None)


def experts(model: Any) -> dict[str, Any]:
    """The codes of experts, by their paths in files."""
    engine = qkit.backend("torchao")
    return {
        path: q[projection][number].map(engine.to_numpy)
        for layer in engine.layers(model)
        if layer.kind == "experts"
        for q in [engine.unpack_experts(layer.module)]
        for (number, projection), path in paths_of(layer.path, layer.projections, engine.config(model)).items()
    }


def weights(folder: Path) -> dict[str, Any]:
    """The float weights of experts, by their paths in files."""
    engine = qkit.backend("torchao")
    model = qkit.load(folder, backend=engine)
    return {
        path: engine.to_numpy(stacks[projection][number])
        for layer in engine.layers(model)
        if layer.kind == "experts"
        for stacks in [engine.experts(layer.module)]
        for (number, projection), path in paths_of(layer.path, layer.projections, engine.config(model)).items()
    }


@torch.no_grad()
def reached(folder: Path, block: int) -> dict[str, np.ndarray]:
    """The inputs of the experts of a block, of a run of transformers' own model whose experts run one after another."""
    model = qkit.load(folder, backend="torchao")
    model.set_experts_implementation("eager")
    found, calls = dict[str, np.ndarray](), list[tuple[torch.Tensor, torch.Tensor]]()
    module = model.model.layers[block].mlp.experts
    hook = module.register_forward_pre_hook(lambda _, args: calls.append(args[:2]))
    model(torch.from_numpy(TOKENS).long(), use_cache=False)
    hook.remove()
    (x, chosen), kind = calls[0], model.config.model_type
    place = f"model.layers.{block}.{'block_sparse_moe' if kind == 'mixtral' else 'mlp'}.experts"
    for number in range(4):
        mine = x[(chosen == number).any(-1)]
        gate, up = (mine @ module.gate_up_proj[number].T).chunk(2, -1)
        for name, inputs in zip(GATED[kind], (mine, mine, torch.nn.functional.silu(gate) * up), strict=True):
            found[f"{place}.{number}.{name}"] = inputs.double().numpy()
    return found


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("family", GATED)
def test_moments_are_those_of_the_tokens_that_reach_an_expert(
    name: str, family: str, models: dict[str, Path], stats: dict[tuple[str, str], Path]
) -> None:
    known = open_statistics(stats[name, family])
    for path, inputs in reached(models[family], 1).items():
        want = inputs.T @ inputs / len(inputs)
        assert known.about["layers"][path]["tokens"] == len(inputs)
        assert np.abs(known.moments(path) - want).max() <= 1e-4 * np.abs(want).max()  # sums of fp32 on other paths
    assert not known.few


@pytest.mark.parametrize(
    ("name", "family", "recipe"),
    [("torchao", "mixtral", "nvfp4-a16"), ("torchao", "gpt_oss", "int3-g32")]
    + [(name, "qwen3_moe", "int3-g32") for name in ENGINES],
)
def test_every_expert_has_the_codes_of_the_law(
    name: str, family: str, recipe: str, models: dict[str, Path], stats: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    how = Fit("solve", stats[name, family])
    known, own = how.statistics, weights(models[family])
    assert known
    grid = next(rule.weight for rule in qkit.recipe(recipe).rules if rule.kind == "experts")
    streamed = experts(qkit.load(quantize(models[family], tmp_path / "out", recipe, how), backend="torchao"))
    converted = experts(qkit.convert(qkit.load(models[family], backend="torchao"), recipe, fit=how))
    assert streamed.keys() == converted.keys() == own.keys() == known.few.keys() | (known.paths & own.keys())
    up = {"w1": "w3", "w3": "w1"}
    assert all((converted[path].codes == q.codes).all() for path, q in streamed.items())
    for path, w in list(own.items())[::5]:  # experts and projections in turn
        pair = own.get(f"{path[:-2]}{up.get(path[-2:], '')}", w)
        peak = float(max(np.abs(w).max(), np.abs(pair).max())) if recipe == "nvfp4-a16" else None
        h = None if path in known.few else known.moments(path)
        law = fit(w, grid, h, method="search" if h is None else "solve", peak=peak)
        assert (streamed[path].codes == law.codes).all()
        assert (reference.scale_values(streamed[path]) == reference.scale_values(law)).all()
        assert path in known.few or (fit(w, grid).codes != law.codes).any()


@pytest.mark.parametrize("name", ENGINES)
def test_experts_with_few_tokens_are_fitted_by_search_and_named(
    name: str, models: dict[str, Path], tmp_path: Path
) -> None:
    few = np.tile(np.arange(5, dtype=np.int32), 26)[None].repeat(2, 0)  # a few tokens: some experts get most of them
    stats = calibrate(models["qwen3_moe"], tmp_path / "stats", few, engine=qkit.backend(name))
    known = open_statistics(stats)
    assert known.few
    for path, tokens in known.few.items():
        assert tokens < known.about["layers"][path]["tokens"] + 1 <= 128
        assert path not in known.paths
    words = ["quantize", models["qwen3_moe"], tmp_path / "out", "-r", "int3-g32", "--fit", "solve", "--stats", stats]
    ran = CliRunner().invoke(application, list(map(str, words)))
    assert ran.exit_code == 0, ran.output
    said = ran.output.replace("\n", " ")
    assert "fitted by search, since fewer tokens than inputs reached them" in said
    assert any(path in said for path in known.few)
    made = experts(qkit.load(tmp_path / "out", backend="torchao"))
    again = experts(
        qkit.convert(qkit.load(models["qwen3_moe"], backend="torchao"), "int3-g32", fit=Fit("solve", stats))
    )
    own = weights(models["qwen3_moe"])
    for path in [*known.few, *[path for path in own if path in known.paths][::5]]:
        w = own[path]
        h = None if path in known.few else known.moments(path)
        law = fit(w, made[path].grid, h, method="search" if h is None else "solve")
        assert (made[path].codes == law.codes).all()
        assert (again[path].codes == law.codes).all()


@pytest.mark.parametrize("name", ["torchao", pytest.param("mlx", marks=pytest.mark.size)])  # a quarter of a minute
def test_experts_of_a_corrected_model_are_solved_by_their_inputs_there(
    name: str, models: dict[str, Path], stats: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    engine, recipe, folder = qkit.backend(name), qkit.recipe("int3-g32"), models["qwen3_moe"]
    place = calibrate_drift(folder, tmp_path / "drift", TOKENS, engine=engine, recipe=recipe)
    known, plain = open_statistics(place), open_statistics(stats[name, "qwen3_moe"])
    own = weights(folder)
    assert own.keys() <= known.paths
    path = "model.layers.1.mlp.experts.0.down_proj"
    assert np.abs(known.moments(path) - plain.moments(path)).max() > 1e-3 * np.abs(plain.moments(path)).max()
    made = qkit.load(quantize(folder, tmp_path / "out", "int3-g32", Fit("solve", known)), backend="torchao")
    for at, q in list(experts(made).items())[::5]:
        assert (q.codes == fit(own[at], q.grid, known.moments(at), method="solve").codes).all()
    want = qkit.backend("torchao").logits(qkit.load(folder, backend="torchao"), TOKENS)
    apart = [
        float(np.mean((qkit.backend("torchao").logits(one, TOKENS) - want) ** 2))
        for one in (made, qkit.convert(qkit.load(folder, backend="torchao"), "int3-g32", fit="search"))
    ]
    assert apart[0] < 0.7 * apart[1]


def test_statistics_of_quantized_inputs_of_experts(models: dict[str, Path], tmp_path: Path) -> None:
    recipe, folder = qkit.recipe("int8-dynamic-act-int4-weight"), models["mixtral"]
    found = {}
    for name in ENGINES:
        place = calibrate(folder, tmp_path / name, TOKENS, engine=qkit.backend(name), recipe=recipe)
        found[name] = open_statistics(place)
        assert make_plan(folder, recipe, fit=Fit("solve", found[name])).by_search == ()
    plain = open_statistics(calibrate(folder, tmp_path / "plain", TOKENS, engine=qkit.backend(ENGINES[0])))
    path = "model.layers.0.block_sparse_moe.experts.2.w2"
    for known in found.values():
        assert known.activation(path) is not None
        apart = np.abs(known.moments(path) - plain.moments(path)).max()
        assert 0 < apart < 0.05 * np.abs(plain.moments(path)).max()
