"""benchmarks/recover.py at a tiny size, and the peer's quantiser in it, held to the peer."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("torchao")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SETTINGS = (
    "--device cpu --size tiny --seeds 2 --float-steps 150 --steps 30 --batch 8 --length 32 --windows 48 --float-rate 3e-3 "
    "--rate 1e-3 --recipe int2-g32 --recipe int2-g64 --jobs 2"
)
DIALECTS = {"signed", "absmax", "midmax", "mlx affine"}


@pytest.fixture
def benchmarks(monkeypatch):
    """The scripts, importable."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The result file of one small run: the row of all seeds, and a row for each."""
    file = tmp_path_factory.mktemp("recover") / "recover.json"
    command = [sys.executable, str(BENCHMARKS / "recover.py"), *SETTINGS.split(), "--out", str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    found = json.loads(file.read_text())
    whole, *seeds = found["rows"]
    return {**found, "over all seeds": whole, "seeds": seeds}


def test_shares_follow_from_the_losses(report):
    assert len(report["seeds"]) == 2
    for seed in report["seeds"]:
        floats = seed["floats"]["float, longer"]["loss"]
        for row in seed["recipes"].values():
            ptq, qat = row["longer_ptq"]["loss"], row["qat"]["loss"]
            assert row["cost"]["value"] == pytest.approx(ptq - floats, abs=2e-6)  # printed to six digits
            assert row["won"]["value"] == pytest.approx(ptq - qat, abs=2e-6)
            assert row["recovered"]["value"] == pytest.approx((ptq - qat) / (ptq - floats), abs=1e-3)
    for name, row in report["over all seeds"]["recipes"].items():
        costs = [seed["recipes"][name]["cost"]["value"] for seed in report["seeds"]]
        assert row["cost"]["value"] == pytest.approx(np.mean(costs), abs=2e-6)
        assert row["recovered"]["value"] == pytest.approx(row["won"]["value"] / row["cost"]["value"], abs=1e-3)
        assert row["recovered"]["low"] < row["recovered"]["value"] < row["recovered"]["high"]


def test_training_wins_back_some_of_what_two_bits_cost(report):
    for row in report["over all seeds"]["recipes"].values():
        assert row["recovered"]["low"] > 0  # so few steps leave the share wide, and its sign not


def test_the_matrix_is_whole_and_its_diagonal_is_the_zero_of_the_move(report):
    for table in (report["over all seeds"]["matrix"], *(seed["matrix"] for seed in report["seeds"])):
        assert table.keys() == {"float, longer", *DIALECTS}
        for trained, row in table.items():
            assert row.keys() == DIALECTS
            for deployed, cell in row.items():
                if trained == "float, longer":
                    assert cell.keys() == {"loss"}
                    continue
                assert (cell["deployment premium"] is None) == (trained == deployed)
                untrained = table["float, longer"][deployed]["loss"]["value"]
                assert cell["training premium"]["value"] == pytest.approx(untrained - cell["loss"]["value"], abs=2e-6)
                if trained != deployed:
                    moved = cell["loss"]["value"] - row[trained]["loss"]["value"]
                    assert cell["deployment premium"]["value"] == pytest.approx(moved, abs=2e-6)


def test_the_report_says_how_it_was_made(report):
    assert report["command"].endswith(SETTINGS)
    assert report["about"]["settings"]["steps"] == 30
    assert {"torch", "python", "qkit-quant"} <= report["versions"].keys()
    assert report["about"]["parameters"] == 115008
    trainings = ["float", "float, longer", "int2-g32", "int2-g64", *(f"int4-g64 {name}" for name in DIALECTS)]
    for seed in report["seeds"]:
        assert seed["curves"].keys() == set(trainings)


def test_the_sizes_are_what_their_names_say(benchmarks):
    from small_llama import SIZES, Llama

    count = {name: sum(p.numel() for p in Llama(size, seed=0, longest=1).parameters()) for name, size in SIZES.items()}
    assert (count["4m"], count["30m"]) == (4_361_472, 29_173_248)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_affine_rule_is_that_of_mlx_bit_for_bit(benchmarks, bits):
    mx = pytest.importorskip("mlx.core")
    from affine import affine, affine_values

    random = np.random.default_rng(0)
    drawn = random.standard_normal((64, 256)).astype(np.float32)
    for w in (drawn, 1e-9 * drawn, np.abs(drawn), -np.abs(drawn), np.zeros_like(drawn), np.full_like(drawn, 0.3)):
        words, scales, biases = mx.quantize(mx.array(w), group_size=64, bits=bits, stream=mx.cpu)
        values = mx.dequantize(words, scales, biases, group_size=64, bits=bits, stream=mx.cpu)
        _, our_scales, our_biases = affine(torch.from_numpy(w), bits=bits, group=64)
        ours = affine_values(torch.from_numpy(w), bits=bits, group=64)
        for theirs, made in ((scales, our_scales), (biases, our_biases), (values, ours)):
            assert (np.array(theirs).view(np.uint32) == made.numpy().view(np.uint32)).all()


def test_a_layer_on_the_affine_grid_trains_its_master_and_deploys_its_values(benchmarks):
    from affine import affine_values, convert_affine, prepare_affine
    from torch import nn

    model = nn.Sequential(nn.Linear(64, 8, bias=False))
    master = model[0].weight.detach().clone()
    x = torch.randn(4, 64)
    prepared = prepare_affine(model)(x)
    prepared.sum().backward()
    assert torch.equal(model[0].weight.grad, x.sum(0).expand(8, 64))
    assert torch.equal(convert_affine(model)(x), prepared.detach())
    assert torch.equal(model[0].weight, affine_values(master, bits=4, group=64))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("recipe", [None, "int8-dynamic-act-int4-weight", "mxfp4"])
def test_a_step_in_a_graph_trains_as_an_eager_one(benchmarks, monkeypatch, recipe):
    import small_llama
    from small_llama import SIZES, Llama, Run, train

    import qkit

    text = torch.randint(0, 256, (4096,), dtype=torch.uint8, device="cuda")
    run = Run(steps=8, batch=4, length=32, rate=1e-3, weight_decay=0.1, seed=0, half=False)

    def trained():
        model = Llama(SIZES["tiny"], seed=0, longest=32).cuda()
        losses = train(qkit.prepare(model, recipe) if recipe else model, text, run)
        return losses, torch.cat([p.detach().flatten() for p in model.parameters()])

    losses, weights = trained()
    monkeypatch.setattr(small_llama, "captured", lambda step, model, optimizer: small_llama.eager(step, optimizer))
    eager_losses, eager_weights = trained()
    assert losses == pytest.approx(
        eager_losses, abs=1e-3
    )  # atomics and TF32 order sums anew; Adam doubles small gradients' noise
    assert (weights - eager_weights).abs().max() < 2e-3  # two steps of the rate
