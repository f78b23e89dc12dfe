"""Statistics of a model's inputs, and checkpoints and models whose codes are fitted by them."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  teaches NumPy the name bfloat16
import numpy as np
import pytest
import torch
from models import make
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import qkit
from qkit import reference
from qkit.artifact.inspect import inspect_directory
from qkit.artifact.metadata import KEY
from qkit.calibration import calibrate
from qkit.cli.application import application
from qkit.drift_calibration import calibrate_drift
from qkit.engines.abilities import offers
from qkit.engines.blocks import Watches
from qkit.errors import ArtifactError, FewTokensWarning, PlanError, RangeError, RunError, StageError
from qkit.fitting.fits import Fit
from qkit.fitting.statistics import open_statistics
from qkit.reference.fitting import fit
from qkit.storage.read import MissingError, read_folder
from qkit.streaming.carry_out import quantize_directory
from qkit.streaming.plan import make_plan

ENGINES = [name for name in ("torchao", "mlx") if offers(qkit.backend(name), Watches)]
TOKENS = np.random.default_rng(3).integers(0, 200, (12, 128)).astype(np.int32)
pytestmark = pytest.mark.filterwarnings("ignore::qkit.errors.FewTokensWarning")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(make(tmp_path_factory.mktemp("float") / "model", "llama"))


@pytest.fixture(scope="module")
def stats(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibrate(model, tmp_path_factory.mktemp("stats") / "stats", TOKENS, engine=qkit.backend("torchao"))


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def quantize(model: Path, out: Path, recipe: str, how: Fit | None) -> Path:
    plan = make_plan(model, qkit.recipe(recipe), fit=how)
    return quantize_directory(plan, out, engine=qkit.backend("numpy"), workers=1, tick=lambda *_: None)


def weights(model: Path) -> dict[str, Any]:
    return {name: stored.mapped() for name, stored in read_folder(model)[0].items()}


@pytest.mark.parametrize("name", ENGINES)
def test_moments_are_those_of_the_float_model_s_inputs(name: str, model: Path, tmp_path: Path) -> None:
    found = open_statistics(calibrate(model, tmp_path / "stats", TOKENS, engine=qkit.backend(name), batch=5))
    whole, inputs = qkit.load(model, backend="torchao"), {}
    layers = {
        path: module
        for path, module in whole.named_modules()
        if isinstance(module, torch.nn.Linear) and "lm_head" not in path
    }
    for path, module in layers.items():
        module.register_forward_pre_hook(lambda _, args, path=path: inputs.__setitem__(path, args[0]))
    with torch.no_grad():
        whole(torch.from_numpy(TOKENS).long(), use_cache=False)
    assert found.paths == layers.keys()
    for path, x in inputs.items():
        rows = x.reshape(-1, x.shape[-1]).double().numpy()
        want = rows.T @ rows / len(rows)
        assert np.abs(found.moments(path) - want).max() <= 1e-5 * np.abs(want).max()  # sums of fp32
        assert found.about["layers"][path]["tokens"] == TOKENS.size
    assert found.like("model.layers.1.self_attn.v_proj") == "model.layers.1.self_attn.q_proj"
    assert found.like("model.layers.1.mlp.up_proj") == "model.layers.1.mlp.gate_proj"


@pytest.mark.parametrize("name", ENGINES)
def test_an_interrupted_run_ends_with_the_same_bytes(
    name: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, seen = qkit.backend(name), []

    def stop(where: str, _: int) -> None:
        raise KeyboardInterrupt

    calibrate(model, tmp_path / "whole", TOKENS, engine=engine)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, tmp_path / "stats", TOKENS, engine=engine, tick=stop)
    assert not (tmp_path / "stats").exists()
    monkeypatch.setattr("qkit.fitting.run.Run.enter", lambda *_: seen.append("entered again"))
    calibrate(model, tmp_path / "stats", TOKENS, engine=engine)
    assert not seen
    assert contents(tmp_path / "stats") == contents(tmp_path / "whole")
    assert not list(tmp_path.glob("*.part"))


KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
import safetensors.numpy
import qkit
from qkit.calibration import calibrate
from qkit.drift_calibration import calibrate_drift
from qkit.fitting import run

model, out, name, where, drift, rows = Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:6], np.load(sys.argv[6])
left = {"states": 5, "moments": 2, "metric": 2, "note": 1, "cleared": 1, "renamed": 1}[where]
left += 2 * (where == "moments" and drift == "drift")  # after the metrics of both blocks

def killing(function):
    def called(*args, **more):
        global left
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **more)
    return called

def ending(self, target):
    done = rename(self, target)
    if self.name.endswith(".part"):
        os.kill(os.getpid(), signal.SIGKILL)
    return done

rename = Path.rename
if where == "states":
    run.Run.put = killing(run.Run.put)
elif where == "moments":  # the second block's, after its note
    safetensors.numpy.save_file = killing(safetensors.numpy.save_file)
elif where == "metric":
    run.Run.save = killing(run.Run.save)
elif where == "note":
    Path.replace = killing(Path.replace)
elif where == "cleared":
    Path.rename = lambda self, to: os.kill(os.getpid(), signal.SIGKILL) if self.suffix == ".part" else rename(self, to)
else:
    Path.rename = ending
if drift == "drift":
    calibrate_drift(model, out, rows, engine=qkit.backend(name), recipe=qkit.recipe("int4-g32"))
else:
    calibrate(model, out, rows, engine=qkit.backend(name))
"""
KILLS = [("torchao", where, "plain") for where in ("states", "moments", "note", "cleared", "renamed")]
KILLS += [("torchao", "metric", "drift"), ("mlx", "states", "plain")]
LONG = [("torchao", "states", "drift"), ("mlx", "moments", "drift")]  #: 10 to 20 s


@pytest.mark.parametrize(
    ("name", "where", "drift"),
    [
        pytest.param(*kill, marks=[pytest.mark.size] if kill in LONG else [])
        for kill in (*KILLS, *LONG)
        if kill[0] in ENGINES
    ],
)
def test_a_killed_run_ends_with_the_same_bytes(name: str, where: str, drift: str, model: Path, tmp_path: Path) -> None:
    rows, out, engine = TOKENS[:, :64].copy(), tmp_path / "stats", qkit.backend(name)
    np.save(tmp_path / "rows.npy", rows)
    given = [model, out, name, where, drift, tmp_path / "rows.npy"]
    killed = subprocess.run([sys.executable, "-W", "ignore", "-c", KILLED, *given], check=False, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert out.exists() == (where == "renamed")
    recipe = qkit.recipe("int4-g32")
    for place in (out, tmp_path / "whole"):
        if drift == "drift":
            calibrate_drift(model, place, rows, engine=engine, recipe=recipe)
        else:
            calibrate(model, place, rows, engine=engine)
    assert contents(out) == contents(tmp_path / "whole")
    assert not list(tmp_path.glob("*.part"))


def test_a_run_of_another_text_begins_anew(model: Path, tmp_path: Path) -> None:
    engine = qkit.backend("torchao")

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(model, tmp_path / "stats", TOKENS[:, ::-1].copy(), engine=engine, tick=stop)
    calibrate(model, tmp_path / "stats", TOKENS, engine=engine)
    calibrate(model, tmp_path / "whole", TOKENS, engine=engine)
    assert contents(tmp_path / "stats") == contents(tmp_path / "whole")


@pytest.mark.parametrize("recipe", ["int3-g32", "int4-g32-minmax", "mxfp4-a16", "nvfp4-a16", "int8-row"])
def test_every_path_gives_the_codes_of_the_law(recipe: str, model: Path, stats: Path, tmp_path: Path) -> None:
    how, found = Fit("solve", stats), open_statistics(stats)
    out = quantize(model, tmp_path / "out", recipe, how)
    loaded = {name: qkit.load(out, backend=name) for name in ENGINES}
    converted = {name: qkit.convert(qkit.load(model, backend=name), recipe, fit=how) for name in ENGINES}
    source, paths = weights(model), found.paths
    peaks = dict.fromkeys(paths)
    if recipe == "nvfp4-a16":
        for group in qkit.fused.groups(sorted(paths)):
            peaks |= dict.fromkeys(group, max(float(np.abs(source[f"{path}.weight"]).max()) for path in group))
    for path in sorted(paths):
        grid = qkit.recipe(recipe).rules[-1].weight
        law = fit(source[f"{path}.weight"], grid, found.moments(path), method="solve", peak=peaks[path])
        for kind in (loaded, converted):
            for name, one in kind.items():
                engine = qkit.backend(name)
                layer = next(layer for layer in engine.layers(one) if layer.path == path)
                q = engine.unpack(layer.module).map(engine.to_numpy)
                assert (q.codes == law.codes).all(), (name, path)
                assert (reference.scale_values(q) == reference.scale_values(law)).all(), (name, path)


@pytest.mark.skipif(len(ENGINES) < 2, reason="needs two engines")
def test_the_same_text_gives_each_engine_statistics_of_its_own(model: Path, stats: Path, tmp_path: Path) -> None:
    other = open_statistics(calibrate(model, tmp_path / "mlx", TOKENS, engine=qkit.backend("mlx")))
    mine = open_statistics(stats)
    assert other.about["data"] == mine.about["data"]
    assert other.digest != mine.digest  # engines sum in other orders
    path = "model.layers.1.mlp.down_proj"
    assert np.abs(other.moments(path) - mine.moments(path)).max() < 1e-4 * np.abs(mine.moments(path)).max()
    for known in (mine, other):  # which of the two a directory is of can be told
        out = quantize(model, tmp_path / known.digest, "int2-g32", Fit("solve", known))
        assert (inspect_directory(out).fit or {})["statistics"] == known.digest


def test_search_needs_no_statistics(model: Path, tmp_path: Path) -> None:
    out = quantize(model, tmp_path / "out", "int2-g32", Fit("search"))
    engine = qkit.backend("torchao")
    layers = {layer.path: layer for layer in engine.layers(qkit.load(out, backend="torchao"))}
    path = "model.layers.0.mlp.down_proj"
    law = fit(weights(model)[f"{path}.weight"], qkit.Grid("int2", 32))
    assert (engine.to_numpy(engine.unpack(layers[path].module).codes) == law.codes).all()


def test_processes_and_blocks_of_rows_change_nothing(
    model: Path, stats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(model, qkit.recipe("int3-g32"), fit=Fit("solve", stats))
    quantize_directory(plan, tmp_path / "one", engine=qkit.backend("numpy"), workers=1, tick=lambda *_: None)
    monkeypatch.setattr("qkit.formats.row_blocks.ELEMENTS", 64 * 32)
    quantize_directory(plan, tmp_path / "two", engine=qkit.backend("torchao"), workers=2, tick=lambda *_: None)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_the_artifact_says_how_it_was_fitted(model: Path, stats: Path, tmp_path: Path) -> None:
    out = quantize(model, tmp_path / "out", "int4-g32", Fit("solve", stats))
    digest = open_statistics(stats).digest
    want = {"method": "solve", "damping": 0.01, "rounds": 3, "statistics": digest}
    assert json.loads(read_folder(out)[1][KEY])["fit"] == want
    assert inspect_directory(out).fit == want
    shown = CliRunner().invoke(application, ["inspect", str(out)])
    assert f"fitted by solve, damping 0.01, rounds 3, statistics {digest}" in shown.output.replace("\n", "")
    assert inspect_directory(quantize(model, tmp_path / "plain", "int4-g32", None)).fit is None


def test_statistics_of_quantized_inputs(model: Path, stats: Path, tmp_path: Path) -> None:
    recipe = qkit.recipe("int8-dynamic-act-int4-weight")
    with pytest.raises(
        PlanError, match=r"statistics are of inputs as they are, and the recipe rounds them to int8-row-minmax"
    ):
        make_plan(model, recipe, fit=Fit("solve", stats))
    own = open_statistics(calibrate(model, tmp_path / "own", TOKENS, engine=qkit.backend("torchao"), recipe=recipe))
    plain, path = open_statistics(stats), "model.layers.0.self_attn.q_proj"
    assert own.activation(path) == "int8-row-minmax"
    apart = np.abs(own.moments(path) - plain.moments(path)).max()
    assert 0 < apart < 0.05 * np.abs(plain.moments(path)).max()
    assert make_plan(model, recipe, fit=Fit("solve", own)).by_search == ()
    with pytest.raises(PlanError, match="the recipe does not round them"):
        make_plan(model, qkit.recipe("int4-g32"), fit=Fit("solve", own))


# Bad input


def test_statistics_of_another_model_are_refused(stats: Path, tmp_path: Path) -> None:
    other = Path(make(tmp_path / "other", "llama"))
    tensors, _ = read_folder(other)
    stored = tensors["model.layers.1.mlp.down_proj.weight"]
    with stored.file.open("r+b") as stream:  # as trained by one step
        stream.seek(stored.begin)
        stream.write(bytes(255 - byte for byte in stored.read().tobytes()))
    with pytest.raises(ArtifactError, match=r"has statistics of another model than .*other: run qkit calibrate"):
        make_plan(other, qkit.recipe("int4-g32"), fit=Fit("solve", stats))


def test_damaged_statistics_are_refused(model: Path, stats: Path, tmp_path: Path) -> None:
    for name, change, error, message in (
        (
            "block-00000.safetensors",
            lambda data: data[:-1] + bytes([data[-1] ^ 1]),
            ArtifactError,
            "is not the file that",
        ),
        ("block-00001.safetensors", None, MissingError, "is missing: calibrate again"),
        ("statistics.json", lambda data: data[:-30], ArtifactError, "is not readable"),
        (
            "statistics.json",
            lambda data: data.replace(b'"version": 1', b'"version": 2'),
            ArtifactError,
            "is of version 2",
        ),
        ("statistics.json", None, MissingError, "has no statistics.json: name a directory that qkit calibrate"),
    ):
        copy = tmp_path / f"copy-{len(list(tmp_path.iterdir()))}"
        copy.mkdir()
        for file, data in contents(stats).items():
            if file != name:
                (copy / file).write_bytes(data)
            elif change:
                (copy / file).write_bytes(change(data))
        with pytest.raises(error, match=message):
            Fit("solve", copy)


def test_too_few_tokens_are_refused_and_few_are_named(model: Path, tmp_path: Path) -> None:
    engine = qkit.backend("torchao")
    with pytest.raises(RunError, match=r"60 tokens are too few for blocks of 128 inputs: give more text"):
        calibrate(model, tmp_path / "stats", TOKENS[:1, :60], engine=engine)
    with pytest.warns(FewTokensWarning, match="256 tokens are few for blocks of 128 inputs: from 2,560 on"):
        calibrate(model, tmp_path / "stats", TOKENS[:2], engine=engine)


@pytest.mark.parametrize("name", ENGINES)
def test_inputs_that_are_not_finite_are_refused(name: str, tmp_path: Path) -> None:
    broken = Path(make(tmp_path / "broken", "llama"))
    stored = read_folder(broken)[0]["model.layers.1.post_attention_layernorm.weight"]
    with stored.file.open("r+b") as stream:
        stream.seek(stored.begin)
        stream.write(np.array([3e38], np.float32).tobytes())
    with pytest.raises(
        RangeError, match=r"model.layers.1.mlp.gate_proj: its inputs hold NaN or infinity, or numbers whose"
    ):
        calibrate(broken, tmp_path / "stats", TOKENS, engine=qkit.backend(name))
    given = {"engine": qkit.backend(name), "recipe": qkit.recipe("int4-g32")}
    with pytest.raises(RangeError, match=r"hold NaN or infinity: an input of a layer was not finite"):
        calibrate_drift(broken, tmp_path / "drift", TOKENS[:2], **given)


def test_a_place_that_is_taken_is_refused(model: Path, stats: Path) -> None:
    with pytest.raises(PlanError, match="is there already"):
        calibrate(model, stats, TOKENS, engine=qkit.backend("torchao"))


def test_prepared_models_ship_as_they_were_trained(model: Path) -> None:
    for name in ENGINES:
        prepared = qkit.prepare(qkit.load(model, backend=name), "int4-g32")
        with pytest.raises(StageError, match="trained values ship as they were trained"):
            qkit.convert(prepared, fit="search")


def test_wrong_fits_are_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="solve needs statistics of the model: run qkit calibrate first"):
        Fit("solve")
    with pytest.raises(PlanError, match="no method 'guess'"):
        Fit("guess")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="solve needs statistics"):
        qkit.convert(qkit.load(model, backend="torchao"), "int4-g32", fit="solve")
    ran = CliRunner().invoke(
        application, ["quantize", str(model), str(tmp_path / "out"), "-r", "int4-g32", "--stats", str(model)]
    )
    assert ran.exit_code == 2
    assert "--stats belongs to --fit" in ran.output


def test_blocks_that_do_not_run_by_themselves_are_refused() -> None:
    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(8, 64)
            self.layers = torch.nn.ModuleList([torch.nn.Bilinear(64, 64, 64)])

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            x = self.embed(tokens)
            for layer in self.layers:
                x = layer(x, x + 1)
            return x

    engine = qkit.backend("torchao")
    with pytest.raises(qkit.BackendError, match=r"layers.0 takes more than states from the tokens"):
        engine.blocks(Odd(), length=4)
    with pytest.raises(qkit.BackendError, match="has no list of blocks"):
        engine.blocks(torch.nn.Sequential(torch.nn.Linear(4, 4)), length=4)


MEASURED = """
import sys
from pathlib import Path
import numpy as np
import qkit
from qkit.calibration import calibrate
from qkit.drift_calibration import calibrate_drift
from qkit.grid import Grid
from qkit.rules import Recipe, Rule
from transformers import LlamaConfig, LlamaForCausalLM

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1000

out, drift = Path(sys.argv[1]), sys.argv[2] == "drift"
rows = np.random.default_rng(0).integers(0, 64, (5, 128)).astype(np.int32)
engine, found = qkit.backend(sys.argv[5]), []
tick = lambda *_: found.append(anonymous())
first = Rule(("*.0.self_attn.q_proj",), weight=Grid("int8", 64))  # one layer, to be quick
more = {"recipe": Recipe("first", rules=(first,))} if drift else {}
warm = calibrate_drift if drift else calibrate
warm(Path(sys.argv[3]), out / "warm", rows, engine=engine, **more)
before = anonymous()
warm(Path(sys.argv[4]), out / "stats", rows, engine=engine, tick=tick, **more)
print(max(found) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux alone tells anonymous memory")
@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.size  # up to half a minute
@pytest.mark.parametrize("what", ["watch", "drift"])
def test_memory_has_one_block_of_the_model(what: str, name: str, tmp_path: Path) -> None:
    for blocks in (1, 20):
        config = {"hidden_size": 320, "intermediate_size": 832, "num_attention_heads": 4, "num_key_value_heads": 4}
        small = LlamaConfig(vocab_size=64, num_hidden_layers=blocks, max_position_embeddings=256, **config)
        LlamaForCausalLM(small).save_pretrained(tmp_path / str(blocks))
    model = (tmp_path / "20" / "model.safetensors").stat().st_size / 1e6  # MB; 4.8 of each block
    command = [sys.executable, "-W", "ignore", "-c", MEASURED, tmp_path, what, tmp_path / "1", tmp_path / "20", name]
    given_back = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # or glibc keeps up to 64 MB of freed memory
    grown = float(subprocess.run(command, check=True, capture_output=True, text=True, env=given_back).stdout)
    assert model > 90
    assert grown < model / 2  # of two models, under drift
