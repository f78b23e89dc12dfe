"""Training that begins with the codes of a quantized directory: exact before the first step, or refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import make, small
from runs import folder, table
from tables import TRAINERS as ENGINES
from typer.testing import CliRunner

import qkit
from qkit.cli.application import application
from qkit.exchange.import_model import read_model
from qkit.experts import expert_of
from qkit.fitting.fits import Fit
from qkit.formats.packed import unpack
from qkit.reference.rounding import scale_values
from qkit.streaming.carry_out import quantize_directory
from qkit.streaming.plan import make_plan
from qkit.training import run_from_table, train_model
from qkit.training.begin import source_of
from qkit.training.folder import LOG, read_log, run_folder_of
from qkit.training.model import open_to_train

pytestmark = [
    pytest.mark.skipif(not ENGINES, reason="needs an engine that trains"),
    pytest.mark.filterwarnings("ignore:training changed no code"),
]
#: Element, group and rule of grids whose scales learn.
GRIDS = [
    ("int4", 32, "signed"),
    ("int2", 16, "signed"),
    ("int3", 32, "absmax"),
    ("int4", 32, "minmax"),
    ("e2m1", 32, "even"),
]
GRIDS += [("int4", '"row"', "signed"), ("int8", 32, "midmax")]


def recipe(path: Path, element: str, group: Any, scale: str, *, learned: bool = True) -> str:
    """A recipe file for all linear layers and experts, but not for the head."""
    scales = 'scales = "learned"\n' if learned else ""
    path.write_text(
        f'schema = 1\n[grids.w]\nelement = "{element}"\ngroup = {group}\nscale = "{scale}"\n'
        f'[[rules]]\nmatch = ["lm_head"]\n[[rules]]\nmatch = "*"\nkind = "experts"\nweight = "w"\n{scales}'
        f'[[rules]]\nmatch = "*"\nweight = "w"\n{scales}',
        encoding="utf-8",
    )
    return str(path)


def fitted(model: Path, out: Path, recipe: str, fit: Fit | None = None) -> Path:
    """The model of a float directory by `search`, where numbers do not learn."""
    plan = make_plan(model, qkit.recipe(recipe), fit=fit or Fit("search"))
    return quantize_directory(plan, out, engine=qkit.backend("numpy"), workers=1, tick=lambda *_: None)


def begun(path: Path, name: str, init: Path, recipe: str | None, **changes: Any) -> Any:
    """The prepared model before the first step."""
    run = run_from_table(table(path, backend=name, init=str(init), recipe=recipe, **changes))
    return open_to_train(qkit.backend(name), source_of(run), run)[0]


def same_codes(name: str, model: Any, folder: Path) -> int:
    """Compares the codes and scales of a converted model with those in `folder`; how many weights there were."""
    engine, found = qkit.backend(name), {}
    for layer in engine.layers(model):
        if layer.stage == "converted" and layer.kind == "experts":
            each = engine.unpack_experts(layer.module)
            found |= {f"{layer.name}.{n}.{part}": q for part, several in each.items() for n, q in enumerate(several)}
        elif layer.stage == "converted" and not layer.tied:
            found[layer.name] = engine.unpack(layer.module)
    found = {_usual(path): q for path, q in found.items()}
    stored = {_usual(path): held for path, held in read_model(folder).weights.items()}
    assert found.keys() == stored.keys()
    for path, held in stored.items():
        q, want = found[path].map(engine.to_numpy), unpack(held.read())
        assert np.array_equal(q.codes, want.codes), path
        assert np.array_equal(scale_values(q), scale_values(want)), path
        assert (q.zeros is None) == (want.zeros is None)
        assert q.zeros is None or np.array_equal(q.zeros, want.zeros), path
    return len(stored)


def _usual(path: str) -> str:
    """The path of an expert in transformers' modules, whatever files and engines call it."""
    found = expert_of(path)
    return f"{found[0].replace('block_sparse_moe', 'mlp')}.{found[1]}.{found[2]}" if found else path


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_prepared_model_begins_with_the_fitted_codes(name: str, grid: Any, tmp_path: Path) -> None:
    path = folder(tmp_path)
    by_rule, learned = (recipe(tmp_path / f"{n}.toml", *grid, learned=n == "l") for n in "rl")
    out = fitted(path / "model", path / "fitted", by_rule)
    assert same_codes(name, qkit.convert(begun(path, name, out, learned)), out) == 14
    again = begun(path, name, out, learned, model=str(out))  # the directory is the model, too
    assert same_codes(name, qkit.convert(again), out) == 14


@pytest.mark.parametrize("name", ENGINES)
def test_solved_codes_are_trained_from_where_they_are(name: str, tmp_path: Path) -> None:
    path, runner = folder(tmp_path), CliRunner()
    by_rule, learned = (recipe(tmp_path / f"{n}.toml", "int2", 32, "signed", learned=n == "l") for n in "rl")
    texts = ["--data", str(path / "text.txt"), "--length", "16", "--backend", name]
    rates = ["--steps", "8", "--batch", "2", "--learning-rate", "1e-3"]
    for words in (
        ["calibrate", path / "model", path / "stats", *texts, "--windows", "200"],
        ["quantize", path / "model", path / "fitted", "-r", by_rule, "--fit", "solve", "--stats", path / "stats"],
        ["train", path / "model", path / "out", "--init", path / "fitted", "-r", learned, *texts, *rates],
    ):
        ran = runner.invoke(application, [str(word) for word in words])
        assert ran.exit_code == 0, ran.output
    before = read_log(run_folder_of(path / "out") / LOG)
    first = next(event["loss"] for event in before if event["event"] == "evaluation")
    whole = train_model(
        run_from_table(
            table(path, backend=name, model=str(path / "fitted"), recipe="float", steps=1, out=str(path / "f"))
        )
    )
    assert first == pytest.approx(whole.held_out_before, rel=1e-6)  # of the values of the fitted codes
    with pytest.raises(AssertionError):
        same_codes(name, qkit.load(path / "out", backend=name), path / "fitted")  # it has trained


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize(("known", "tied", "count"), [("int4-g32", False, 14), ("int4-g32-all", True, 15)])
def test_codes_of_the_rule_s_own_scales_need_no_learned_ones(
    name: str, known: str, tied: bool, count: int, tmp_path: Path
) -> None:
    path = folder(tmp_path, tie_word_embeddings=tied)
    plan = make_plan(path / "model", qkit.recipe(known))
    out = quantize_directory(plan, path / "out", engine=qkit.backend("numpy"), workers=1, tick=lambda *_: None)
    assert same_codes(name, qkit.convert(begun(path, name, out, None)), out) == count


@pytest.mark.parametrize("name", ENGINES)
def test_master_weights_in_bfloat16_begin_with_the_same_codes(name: str, tmp_path: Path) -> None:
    path = folder(tmp_path)
    by_rule, learned = (recipe(tmp_path / f"{n}.toml", "int8", 32, "signed", learned=n == "l") for n in "rl")
    out = fitted(path / "model", path / "fitted", by_rule)
    assert same_codes(name, qkit.convert(begun(path, name, out, learned, dtype="bfloat16")), out) == 14


def codes_of(folder: Path) -> dict[str, Any]:
    return {_usual(path): unpack(held.read()) for path, held in read_model(folder).weights.items()}


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize(("family", "grid"), [("", GRIDS[1]), ("", GRIDS[3]), ("mixtral", ("int3", 32, "signed"))])
def test_frozen_codes_stay_while_their_scales_train(name: str, family: str, grid: Any, tmp_path: Path) -> None:
    path = folder(tmp_path)
    model = Path(make(tmp_path / "other", family)) if family else path / "model"
    by_rule = recipe(tmp_path / "r.toml", *grid, learned=False)
    out, rest = fitted(model, path / "fitted", by_rule), {"dtype": "bfloat16"} if grid[0] == "int2" else {}
    given = {"model": str(model), "init": str(out), "recipe": None, "backend": name, "freeze_codes": True, "steps": 6}
    ended = train_model(run_from_table(table(path, **given, learning_rate=3e-3, **rest)))
    assert ended.held_out_after < ended.held_out_before
    before, after = codes_of(out), codes_of(path / "out")
    assert before.keys() == after.keys()
    for at, q in before.items():
        assert np.array_equal(q.codes, after[at].codes), at
        assert q.zeros is None or np.array_equal(q.zeros, after[at].zeros), at
    assert any(not np.array_equal(scale_values(q), scale_values(after[at])) for at, q in before.items())


def test_frozen_codes_of_a_quantized_model_are_those_in_its_files(tmp_path: Path) -> None:
    path = folder(tmp_path)
    by_rule = recipe(tmp_path / "r.toml", *GRIDS[1], learned=False)
    out = fitted(path / "model", path / "fitted", by_rule)
    asked = iter([False] * 4 + [True] * 9)
    given = {"model": str(out), "recipe": None, "freeze_codes": True, "steps": 8, "checkpoint_every": 4}
    train_model(run_from_table(table(path, out=str(path / "whole"), **given)))
    stopped = run_from_table(table(path, out=str(path / "twice"), **given))
    with pytest.raises(KeyboardInterrupt):
        train_model(stopped, stop=lambda: next(asked))
    train_model(stopped)
    assert (path / "whole/model.safetensors").read_bytes() == (path / "twice/model.safetensors").read_bytes()
    after = codes_of(path / "whole")
    assert all(np.array_equal(q.codes, after[at].codes) for at, q in codes_of(out).items())


def test_codes_that_cannot_be_frozen_are_refused(tmp_path: Path) -> None:
    path = folder(tmp_path)
    for changes, error, message in (
        ({"recipe": "float"}, qkit.RunError, "freeze_codes: codes are on a grid"),
        ({"adapter": {"rank": 2}}, qkit.RunError, "freeze_codes: an adapter changes codes"),
        ({"recipe": "mxfp4-a16"}, qkit.RecipeError, 'scales = "alone" is not there for e2m1-g32'),
        ({"recipe": "nvfp4-a16"}, qkit.RecipeError, 'scales = "alone" is not there for e2m1-g16-nvfp4'),
    ):
        with pytest.raises(error, match=message):
            train_model(run_from_table(table(path, freeze_codes=True, **changes)))


def test_a_stopped_run_goes_on_from_its_checkpoint_and_not_from_the_codes(tmp_path: Path) -> None:
    path = folder(tmp_path)
    by_rule, learned = (recipe(tmp_path / f"{n}.toml", "int2", 32, "signed", learned=n == "l") for n in "rl")
    out = fitted(path / "model", path / "fitted", by_rule)
    given = {"init": str(out), "recipe": learned, "steps": 8, "checkpoint_every": 4}
    train_model(run_from_table(table(path, out=str(path / "whole"), **given)))
    asked = iter([False] * 4 + [True] * 9)
    stopped = run_from_table(table(path, out=str(path / "twice"), **given))
    with pytest.raises(KeyboardInterrupt):
        train_model(stopped, stop=lambda: next(asked))
    train_model(stopped)
    whole, twice = ((path / one / "model.safetensors").read_bytes() for one in ("whole", "twice"))
    assert whole == twice


@pytest.mark.parametrize("name", ENGINES)
def test_experts_begin_with_their_codes(name: str, tmp_path: Path) -> None:
    model = Path(make(tmp_path / "model", "mixtral"))
    (tmp_path / "text.txt").write_text("some text, " * 200)
    by_rule, learned = (recipe(tmp_path / f"{n}.toml", "int3", 32, "signed", learned=n == "l") for n in "rl")
    out = fitted(model, tmp_path / "fitted", by_rule)
    assert same_codes(name, qkit.convert(begun(tmp_path, name, out, learned)), out) > 14


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("known", ["int3-g32", "nvfp4-a16"])
def test_scales_that_a_rule_finds_otherwise_are_refused(name: str, known: str, tmp_path: Path) -> None:
    path = folder(tmp_path)
    out = fitted(path / "model", path / "fitted", known)
    words = ["train", path / "model", path / "out", "--init", out, "-r", known, "--data", path / "text.txt"]
    ran = CliRunner().invoke(application, [str(word) for word in (*words, "--length", "16", "--backend", name)])
    assert isinstance(ran.exception, qkit.RunError)
    assert ("which cannot learn" if known == "nvfp4-a16" else 'take a recipe with scales = "learned"') in str(
        ran.exception
    )
    assert not (path / "out").exists()


def test_a_start_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    name, path = ENGINES[0], folder(tmp_path)
    int3 = recipe(tmp_path / "r.toml", "int3", 32, "signed", learned=False)
    out = fitted(path / "model", path / "fitted", int3)
    other = qkit.save(small(name, num_hidden_layers=2), path / "small", backend=name)
    weights = other / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    for init, asked, changes, message in (
        (path / "model", "int3-g32", {}, "is a float model, whose codes nobody has chosen"),
        (out, "int4-g32", {}, r"is on int3-g32-signed in .*, and the recipe wants int4-g32-signed"),
        (out, "int3-g32", {"ignore": ["*o_proj"]}, r"has codes of .*o_proj, which the recipe leaves in float"),
        (out, "float", {}, "codes are on a grid, and recipe is 'float'"),
    ):
        with pytest.raises(qkit.RunError, match=message):
            begun(path, name, init, asked, **changes)
    head = fitted(path / "model", path / "less", _without(tmp_path / "w.toml"))
    with pytest.raises(qkit.RunError, match=r"has no codes of .*q_proj, which the recipe quantizes"):
        begun(path, name, head, "int3-g32")
    with pytest.raises(qkit.RunError, match="is quantized, too: name the float model"):
        begun(path, name, out, "int3-g32", model=str(head))
    changed = folder(tmp_path / "changed", rms_norm_eps=1e-5)
    _touch(changed / "model")
    with pytest.raises(qkit.RunError, match=r"is of another model than .*, since model\.norm\.weight differs"):
        begun(changed, name, out, "int3-g32")


def _without(path: Path) -> str:
    text = Path(recipe(path, "int3", 32, "signed", learned=False)).read_text(encoding="utf-8")
    path.write_text(text.replace('["lm_head"]', '["lm_head", "*q_proj"]'), encoding="utf-8")
    return str(path)


def _touch(model: Path) -> None:
    """Changes one norm of a float model."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + np.float32(1)
    save_file(tensors, model / "model.safetensors")
    (model / "qkit.json").unlink(missing_ok=True)
