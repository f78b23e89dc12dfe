"""A budget: the best choice of grids within it, to the byte, and a recipe that quantize takes."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import make
from typer.testing import CliRunner

import qkit
from qkit import fused
from qkit.budget import Allotment, Budget, allot
from qkit.calibration import calibrate
from qkit.cli.application import application
from qkit.cli.budget import as_toml, read_budget
from qkit.errors import PlanError
from qkit.fitting.choose import Choice, choose
from qkit.fitting.fits import Fit
from qkit.rules import parse_recipe
from qkit.streaming.carry_out import quantize_directory
from qkit.streaming.plan import make_plan

TOKENS = np.random.default_rng(3).integers(0, 200, (12, 32)).astype(np.int32)
GRIDS = ("int2-g32", "int3-g32", "int4-g32")
pytestmark = pytest.mark.filterwarnings("ignore::qkit.errors.FewTokensWarning")
torch_engine = qkit.backend("torchao")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(make(tmp_path_factory.mktemp("float") / "model", "llama"))


@pytest.fixture(scope="module")
def stats(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibrate(model, tmp_path_factory.mktemp("stats") / "stats", TOKENS, engine=torch_engine)


def spend(model: Path, stats: Path, budget: Budget, grids: tuple[str, ...] = GRIDS, **given: Any) -> Allotment:
    recipes = [qkit.recipe(name) for name in grids]
    return allot(model, recipes, budget, TOKENS, engine=torch_engine, fit=Fit("solve", stats), **given)


@pytest.mark.parametrize("seed", range(6))
def test_no_choice_within_the_capacity_is_better(seed: int) -> None:
    draw = np.random.default_rng(seed)
    choices = [
        [Choice(n, int(draw.integers(1, 50)), float(draw.exponential())) for n in range(draw.integers(1, 4))]
        for _ in range(6)
    ]
    least = sum(min(one.nbytes for one in mine) for mine in choices)
    for capacity in (least, least + 20, 10_000):
        every = [pick for pick in itertools.product(*choices) if sum(one.nbytes for one in pick) <= capacity]
        best = min(sum(one.harm for one in pick) for pick in every)
        found = choose(choices, capacity)
        assert sum(one.nbytes for one in found) <= capacity
        assert sum(one.harm for one in found) == pytest.approx(best, abs=1e-12)
    with pytest.raises(PlanError, match=f"the least possible are {least:,}"):
        choose(choices, least - 1)


def test_many_sizes_are_told_apart_less_finely_and_stay_within(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qkit.fitting.choose.STATES", 64)
    draw = np.random.default_rng(0)
    choices = [[Choice(n, int(draw.integers(1, 5000)), float(draw.exponential())) for n in range(3)] for _ in range(12)]
    least = sum(min(one.nbytes for one in mine) for mine in choices)
    for capacity in (least, least + 3, least + 4000):
        assert sum(one.nbytes for one in choose(choices, capacity)) <= capacity


@pytest.mark.parametrize("exact", [False, True])
def test_a_budget_of_bits_is_kept_and_partners_share_a_grid(exact: bool, model: Path, stats: Path) -> None:
    found = spend(model, stats, Budget(3.5, "bpw"), exact=exact)
    uniform = make_plan(model, qkit.recipe("int3-g32"))
    grids = {row.path: row.rule.weight for row in found.plan.rows if row.rule}
    assert grids.keys() == {row.path for row in uniform.rows if row.rule}
    for group in fused.groups(grids):
        assert len({grids[path] for path in group}) == 1
    assert tensors(found) <= sum(slot.nbytes for row in uniform.rows for slot in row.slots)
    assert len(set(grids.values())) > 1
    assert found.bits <= 3.5


def tensors(found: Allotment) -> int:
    return sum(slot.nbytes for row in found.plan.rows for slot in row.slots)


def test_more_bytes_never_do_more_harm(model: Path, stats: Path) -> None:
    harms = [spend(model, stats, Budget(bits, "bpw")).harm for bits in (2.5, 3.0, 3.5, 4.0, 4.5)]
    assert harms == sorted(harms, reverse=True)
    assert harms[0] > harms[-1]


@pytest.mark.parametrize("spare", [0, 1, *(pytest.param(more, marks=pytest.mark.size) for more in (500, 3000))])
def test_a_budget_of_bytes_is_that_of_all_files(spare: int, model: Path, stats: Path, tmp_path: Path) -> None:
    least = spend(model, stats, Budget(10**9, "bytes"), grids=("int2-g32", "int2-g64")).plan.output_bytes
    amount = max(least, make_plan(model, qkit.recipe("int3-g32")).output_bytes) + spare
    found = spend(model, stats, Budget(amount, "bytes"))
    out = tmp_path / "out"
    quantize_directory(found.plan, out, engine=qkit.backend("numpy"), workers=1, tick=lambda *_: None)
    assert sum(file.stat().st_size for file in out.iterdir()) <= amount


def test_a_budget_below_the_least_possible_names_the_least(model: Path, stats: Path) -> None:
    with pytest.raises(PlanError, match=r"2\.4 bits per weight is below the least possible, which is 2\.5000"):
        spend(model, stats, Budget(2.4, "bpw"))
    assert spend(model, stats, Budget(2.5, "bpw")).bits == 2.5
    with pytest.raises(PlanError, match=r"10,000 bytes is below the least possible, which is ([0-9,]+)") as refused:
        spend(model, stats, Budget(10_000, "bytes"))
    named = int(str(refused.value).split("which is ")[1].split(" ")[0].replace(",", ""))
    assert spend(model, stats, Budget(named, "bytes")).bits == 2.5
    with pytest.raises(PlanError, match="below the least possible"):
        spend(model, stats, Budget(named - 1, "bytes"))


def test_grids_that_do_not_go_together_are_refused(model: Path, stats: Path) -> None:
    with pytest.raises(PlanError, match="among two or more grids"):
        spend(model, stats, Budget(4, "bpw"), grids=("int4-g32",))
    with pytest.raises(PlanError, match="quantize other layers, such as"):
        spend(model, stats, Budget(4, "bpw"), grids=("int4-g32", "int4-g32-all"))


def test_the_fisher_information_is_that_of_drawn_labels(model: Path) -> None:
    import torch

    one, path = qkit.load(model, backend="torchao"), "model.layers.1.mlp.down_proj"
    found = torch_engine.squared_gradients(one, TOKENS[:2], [path], seed=5)[path]
    random, want = torch.Generator().manual_seed(5), 0.0
    weight = one.get_parameter(f"{path}.weight")
    for row in TOKENS[:2]:
        scores = one(torch.tensor(row)[None].long()).logits[0].log_softmax(-1)
        labels = torch.multinomial(scores.detach().exp(), 1, generator=random)
        want = want + torch.autograd.grad(scores.gather(-1, labels).sum(), weight)[0].numpy() ** 2
    np.testing.assert_allclose(found, want / 64, rtol=1e-4, atol=1e-12)  # sums of fp32
    again = torch_engine.squared_gradients(one, TOKENS[:2], [path], seed=5)[path]
    assert (again == found).all()
    assert (torch_engine.squared_gradients(one, TOKENS[:2], [path], seed=6)[path] != found).any()


def test_the_printed_recipe_is_the_one_that_was_chosen(model: Path, stats: Path) -> None:
    found = spend(model, stats, Budget(3.5, "bpw"), grids=("int2-g32", "mxfp4-a16", "nvfp4-a16"))
    read = parse_recipe(as_toml(found.recipe), name="mine", source="mine.toml")
    assert read.rules == found.recipe.rules


def test_texts_of_budgets() -> None:
    import typer

    assert read_budget("3.5bpw") == Budget(3.5, "bpw")
    assert read_budget("8GB") == Budget(8e9, "bytes")
    for text in ("0bpw", "bpw", "-1bpw", "3.5", "many"):
        with pytest.raises(typer.BadParameter):
            read_budget(text)


def test_the_command_line_prints_a_recipe_that_quantize_takes(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"{number} and {number * number}" for number in range(400)), encoding="utf-8")
    words = ["plan", str(model), "--budget", "3.5bpw", "--grids", ",".join(GRIDS), "--data", str(text)]
    run = CliRunner().invoke(application, [*words, "--length", "32", "--windows", "8"])
    assert run.exit_code == 0, run.output
    mine = tmp_path / "mine.toml"
    mine.write_text(run.stdout, encoding="utf-8")
    run = CliRunner().invoke(application, ["quantize", str(model), str(tmp_path / "out"), "--recipe", str(mine)])
    assert run.exit_code == 0, run.output
    assert CliRunner().invoke(application, [*words[:4]]).exit_code != 0
    assert CliRunner().invoke(application, ["plan", str(model)]).exit_code != 0
