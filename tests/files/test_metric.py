"""The metric of outputs: gradients block by block, and rows that make up for each other's errors."""

from pathlib import Path

import numpy as np
import pytest
import torch
from models import make

import qkit
from qkit import reference
from qkit.engines.abilities import offers
from qkit.engines.blocks import Watches
from qkit.fitting.inputs import Inputs
from qkit.fitting.rows import solve_rows
from qkit.fitting.run import Run
from qkit.grid import Grid
from qkit.metric import SEED, STATES, gather_metrics, metrics_of
from qkit.reference.fitting import fit

ENGINES = [name for name in ("torchao", "mlx") if offers(qkit.backend(name), Watches)]
TOKENS = np.random.default_rng(3).integers(0, 200, (6, 32)).astype(np.int32)
FAMILIES = ("llama", "gpt_neox", "qwen3_moe")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("float")
    return {family: Path(make(place / family, family)) for family in FAMILIES}


def metrics_of_the_whole(folder: Path, paths: list[str]) -> dict[str, np.ndarray]:
    """E[g g'] of the outputs of layers, by one backward pass through transformers' own model."""
    model = qkit.load(folder, backend="torchao")
    outputs: dict[str, torch.Tensor] = {}
    for path in paths:
        model.get_submodule(path).register_forward_hook(lambda _, __, out, path=path: outputs.update({path: out}))
    scores = model(torch.from_numpy(TOKENS).long(), use_cache=False).logits.float().log_softmax(-1)
    sums = scores.detach().exp().cumsum(-1)
    wanted = torch.from_numpy(np.random.default_rng(SEED).random(TOKENS.shape, np.float32))
    drawn = torch.searchsorted(sums, wanted[..., None] * sums[..., -1:], right=True).clamp_max(scores.shape[-1] - 1)
    gradients = torch.autograd.grad(scores.gather(-1, drawn).sum(), list(outputs.values()))
    flat = {path: g.flatten(0, -2).double().numpy() for path, g in zip(outputs, gradients, strict=True)}
    return {path: g.T @ g / TOKENS.size for path, g in flat.items()}


@pytest.mark.parametrize(
    ("name", "family"),
    [(name, family) for name in ENGINES for family in FAMILIES if (name, family) != ("mlx", "gpt_neox")],  # other lists
)
def test_metrics_are_those_of_a_backward_pass_through_the_whole_model(
    name: str, family: str, models: dict[str, Path], tmp_path: Path
) -> None:
    engine = qkit.backend(name).mapping()
    model = qkit.load(models[family], backend=engine)
    blocks = engine.blocks(model, length=TOKENS.shape[1])
    paths = [layer.path for layer in engine.layers(model) if layer.kind == "linear"]
    watched = [[path for path in paths if path.startswith(f"{where}.")] for where in blocks.paths]
    run = Run(tmp_path / "out", {}, {}, batch=4)
    gather_metrics(run, blocks, TOKENS, watched, batch=4)
    want = metrics_of_the_whole(models[family], [path for mine in watched for path in mine])
    found = {path: f for number in range(len(blocks.paths)) for path, f in metrics_of(run, number).items()}
    states = found.pop(STATES)  # of the last block
    assert found.keys() == want.keys()
    if family == "llama":  # whose last layer adds to the states
        last = found[f"{blocks.paths[-1]}.mlp.down_proj"]
        assert np.abs(states - last).max() <= 1e-5 * np.abs(last).max()
    for path, f in want.items():
        assert np.abs(found[path] - f).max() <= 1e-3 * np.abs(f).max()  # other kernels, and labels near an edge
    left = [file.name for file in (tmp_path / "out.part").glob("*.npy")]
    assert not left  # states of all blocks are gone
    before = {file: file.read_bytes() for file in (tmp_path / "out.part").glob("*.own")}
    gather_metrics(run, blocks, TOKENS[::-1].copy(), watched, batch=4)  # another run would give others
    assert before == {file: file.read_bytes() for file in before}


def drawn(seed: int, rows: int = 48, n: int = 64) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A weight, moments of its inputs, and a metric of its outputs, with strong directions."""
    random = np.random.default_rng(seed)
    x, g = (random.standard_normal((400, m)) @ random.standard_normal((m, m)) for m in (n, rows))
    return random.standard_normal((rows, n)).astype(np.float32), *((a.T @ a / 400).astype(np.float32) for a in (x, g))


@pytest.mark.parametrize(
    "grid", ["int3-g32-signed", "int4-g32-minmax", "int2-row-absmax", "e2m1-g32-even", "e2m1-g16-nvfp4"]
)
def test_coupled_rows_lose_less_in_the_metric(grid: str) -> None:
    for seed in range(3):
        w, h, f = drawn(seed)
        known, peak = Inputs(h), float(np.abs(w).max()) if grid.endswith("nvfp4") else None

        def loss(q: qkit.QTensor, w: np.ndarray = w, h: np.ndarray = h, f: np.ndarray = f) -> float:
            d = w.astype(np.float64) - reference.dequantize(q)
            return float(np.trace(f @ d @ h @ d.T))

        aim, q = solve_rows(w, Grid.parse(grid), known, f, peak=peak)
        alone, apart = solve_rows(w, Grid.parse(grid), known, None, peak=peak)
        assert (alone == w).all()
        assert loss(q) < 0.9 * loss(apart)
        law = fit(aim, Grid.parse(grid), h, method="solve", peak=peak)
        for name, part in law.parts().items():
            assert (q.parts()[name] == part).all()


def test_rows_that_share_a_scale_or_have_no_metric_are_solved_apart() -> None:
    w, h, f = drawn(5)
    grid = Grid.parse("int8-tensor-absmax")
    aim, q = solve_rows(w, grid, Inputs(h), f, peak=None)
    assert (aim == w).all()
    assert (q.codes == fit(w, grid, h, method="solve").codes).all()


@pytest.mark.parametrize("rows", [1, 5, 17])
def test_few_rows_are_parts_of_their_own(rows: int) -> None:
    w, h, f = drawn(6, rows=rows)
    grid = Grid.parse("int3-g32-signed")
    aim, q = solve_rows(w, grid, Inputs(h), f, peak=None)
    assert (q.codes == fit(aim, grid, h, method="solve").codes).all()
    strongest = int(np.argmax(f.diagonal()))
    assert (aim[strongest] == w[strongest]).all()
