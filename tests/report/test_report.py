"""The four-way report: what its numbers are, and that its page says them safely."""

import json
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import models
import numpy as np
import pytest
from safetensors.numpy import save_file
from tables import BUILDERS
from typer.testing import CliRunner

import qkit
from qkit import Grid, Recipe, Rule
from qkit.cli.application import application
from qkit.evaluation import Evaluation, consecutive, evaluate, open_model
from qkit.formats.packed import pack
from qkit.report import (
    Comparison,
    Sources,
    compare,
    compare_codes,
    describe_source,
    evaluate_matrix,
    mean,
    recovered,
    render_page,
)
from qkit.report.estimates import Row, baseline, premium
from qkit.report.estimates import rows_of as measured_rows
from qkit.report.master_weights import model_of_checkpoint, newest_checkpoint
from qkit.report.measured import Measurement, Measurements, setting_of
from qkit.report.text import summary

TEXT = bytes(np.random.default_rng(1).integers(0, 256, 250).astype(np.uint8))
ROWS = consecutive(np.frombuffer(TEXT, np.uint8).astype(np.int32), length=20)
TRAINED, OTHER = "int4-g64-absmax", "int4-g32-minmax"


def recipe(name, grid):
    """The head in float, the rest on `grid`."""
    return Recipe(name, (Rule(("lm_head",)), Rule(("*",), weight=grid)))


def nudged(engine, folder, model, size):
    """Writes `model` with other weights, as if it had been trained on; gives it back."""
    random = np.random.default_rng(3)
    arrays = {name: engine.to_numpy(array) for name, array in engine.tensors(model).items()}
    engine.fill(model, {name: a + size * random.standard_normal(a.shape).astype(a.dtype) for name, a in arrays.items()})
    qkit.save(model, folder)
    return qkit.load(folder, backend=engine)


@pytest.fixture(scope="module", params=BUILDERS)
def made(request, tmp_path_factory):
    """An engine and a folder with `float`, `longer`, `masters` and what they are on the grid: `qat`."""
    place, engine = tmp_path_factory.mktemp(request.param), qkit.backend(request.param)
    qkit.save(models.build(request.param), place / "float")
    nudged(engine, place / "longer", models.build(request.param), 0.001)
    qkit.save(
        qkit.convert(nudged(engine, place / "masters", models.build(request.param), 0.003), TRAINED), place / "qat"
    )
    (place / "text").write_bytes(TEXT)
    return engine, place


@pytest.fixture(scope="module")
def found(made):
    """The comparison of all of them."""
    engine, place = made
    sources = Sources(
        floats=place / "float",
        recipe=qkit.recipe(TRAINED),
        deploy=(qkit.recipe(OTHER),),
        qat=place / "qat",
        master_weights=place / "masters",
        longer=place / "longer",
    )
    return compare(engine, sources, ROWS, progress=lambda row, windows: None)


def test_rows_are_the_losses_of_the_models(made, found):
    engine, place = made
    rows = {row.name: row for row in found.rows}
    want = {
        "float": open_model(engine, place / "float"),
        "float, longer": open_model(engine, place / "longer"),
        "PTQ": qkit.convert(open_model(engine, place / "float"), TRAINED),
        f"PTQ on {OTHER}": qkit.convert(open_model(engine, place / "float"), OTHER),
        "longer PTQ": qkit.convert(open_model(engine, place / "longer"), TRAINED),
        f"longer PTQ on {OTHER}": qkit.convert(open_model(engine, place / "longer"), OTHER),
        "QAT": open_model(engine, place / "qat"),
        f"QAT on {OTHER}": qkit.convert(open_model(engine, place / "masters"), OTHER),
    }
    assert list(rows) == list(want)
    for name, model in want.items():
        loss = evaluate(engine, model, ROWS).loss
        assert rows[name].loss.value == loss
        assert rows[name].above.value == pytest.approx(loss - rows[found.baseline].loss.value, abs=1e-12)  # sums
    assert (rows["float"].kl, rows["float"].agreement) == (0.0, 1.0)
    assert rows["QAT"].kl > 0


def test_premiums_are_differences_of_rows(found):
    loss = {row.name: row.loss.value for row in found.rows}
    home, other = found.premiums
    assert (home.grid, home.deployment, other.grid) == (TRAINED, None, OTHER)
    for name in ("PTQ", "longer PTQ"):
        assert home.training[name].value == pytest.approx(loss[name] - loss["QAT"])
        assert other.training[name].value == pytest.approx(loss[f"{name} on {OTHER}"] - loss[f"QAT on {OTHER}"])
    assert other.deployment.value == pytest.approx(loss[f"QAT on {OTHER}"] - loss["QAT"])
    for one in (*home.training.values(), *other.training.values(), other.deployment):
        assert one.low < one.value < one.high


def test_masters_are_held_to_the_trained_model(made, found):
    engine, place = made
    numbers = sum(change.numbers for change in found.trained)
    assert found.masters_equal == (numbers, numbers)
    sources = Sources(place / "float", qat=place / "qat", master_weights=place / "float")
    wrong = compare(engine, sources, ROWS, progress=lambda row, windows: None)
    equal, numbers = wrong.masters_equal
    assert numbers - equal == sum(change.flipped for change in wrong.trained) > 0


def test_without_masters_the_dequantized_values_are_put_on_the_other_grid(made):
    engine, place = made
    row = {name: qkit.recipe(name) for name in (TRAINED, "int8-g32")}
    sources = Sources(place / "float", row[TRAINED], (row["int8-g32"],), qat=place / "qat")
    finer = compare(engine, sources, ROWS, progress=lambda row, windows: None)
    assert "its dequantized values" in finer.masters
    assert finer.masters_equal is None
    assert finer.baseline == "float"
    values = [change.error for change in finer.deployed["int8-g32"]]
    assert 0 < max(values) < 0.01  # what int4 holds, int8 holds nearly


def test_masters_are_read_from_a_checkpoint_beside_the_trained_model(made, found, tmp_path):
    engine, place = made
    arrays = {name: engine.to_numpy(a) for name, a in engine.tensors(open_model(engine, place / "masters")).items()}
    state = {f"weights.{name}": array for name, array in arrays.items()} | {"steps": np.ones((), np.int64)}
    shutil.copytree(place / "qat", tmp_path / "qat")
    (tmp_path / "qat.run").mkdir()
    save_file(state, tmp_path / "qat.run" / "checkpoint-00000002.safetensors")
    save_file({"steps": np.zeros((), np.int64)}, tmp_path / "qat.run" / "checkpoint-00000001.safetensors")
    newest = newest_checkpoint(tmp_path / "qat")
    sources = Sources(place / "float", deploy=(qkit.recipe(OTHER),), qat=place / "qat", master_weights=newest)
    again = compare(engine, sources, ROWS, progress=lambda row, windows: None)
    assert again.rows[-1].loss == found.rows[-1].loss
    assert again.masters_equal == found.masters_equal
    assert newest_checkpoint(place / "qat") is None
    with pytest.raises(qkit.ArtifactError, match=r"checkpoint-00000001.safetensors holds no weights"):
        model_of_checkpoint(engine, newest.with_name("checkpoint-00000001.safetensors"), models.CONFIG)


def test_the_recipe_follows_from_the_trained_model(made):
    engine, place = made
    named = compare(
        engine,
        Sources(place / "float", qkit.recipe(TRAINED), qat=place / "qat"),
        ROWS,
        progress=lambda row, windows: None,
    )
    read = compare(engine, Sources(place / "float", qat=place / "qat"), ROWS, progress=lambda row, windows: None)
    assert read.recipe == "int4-g64-absmax"
    assert [row.loss for row in read.rows] == [row.loss for row in named.rows]


def test_another_grid_than_the_trained_model_is_on_is_refused(made):
    engine, place = made
    with pytest.raises(
        qkit.RecipeError, match=r"q_proj is on int4-g64-absmax .* recipe 'int4-g64' says int4-g64-signed"
    ):
        compare(
            engine,
            Sources(place / "float", qkit.recipe("int4-g64"), qat=place / "qat"),
            ROWS,
            progress=lambda row, windows: None,
        )


def test_an_existing_quantized_directory_takes_the_place_of_converting(made, tmp_path):
    engine, place = made
    qkit.save(qkit.convert(open_model(engine, place / "longer"), TRAINED), tmp_path / "ptq")
    sources = Sources(place / "float", qat=place / "qat", ptq=tmp_path / "ptq")
    rows = {row.name: row for row in compare(engine, sources, ROWS, progress=lambda row, windows: None).rows}
    assert rows["PTQ"].loss.value == evaluate(engine, open_model(engine, tmp_path / "ptq"), ROWS).loss
    assert rows["PTQ"].source == str(tmp_path / "ptq")


def test_two_recipes_of_one_name_are_refused(made):
    engine, place = made
    twice = (recipe("mine", Grid("int4", 32)), recipe("mine", Grid("int4", 64)))
    with pytest.raises(qkit.RecipeError, match="two of the recipes are called 'mine'"):
        compare(engine, Sources(place / "float", twice[0], twice[1:]), ROWS, progress=lambda row, windows: None)


def test_neither_recipe_nor_trained_model_is_refused(made):
    engine, place = made
    with pytest.raises(qkit.RecipeError, match="neither a recipe nor a trained model"):
        compare(engine, Sources(place / "float"), ROWS, progress=lambda row, windows: None)


def test_a_matrix_deploys_each_model_on_each_grid(made):
    engine, place = made
    models = {name: (lambda name=name: open_model(engine, place / name)) for name in ("float", "masters")}
    grids = {name: (lambda model, name=name: qkit.convert(model, name)) for name in (TRAINED, OTHER)}
    square = evaluate_matrix(engine, models, grids, ROWS)
    assert square["masters"][TRAINED].loss == evaluate(engine, open_model(engine, place / "qat"), ROWS).loss
    assert len({one.loss for row in square.values() for one in row.values()}) == 4


# costs and savings, and the honest baseline


def rows_of(**losses):
    """A comparison whose models have these losses on 40 windows; `_on_` stands for a second grid."""
    draw = np.random.default_rng(0)
    text = 0.01 * draw.standard_normal(40)
    named = {name.replace("_", " ").replace("longer float", "float, longer"): loss for name, loss in losses.items()}
    rows = {}
    for name, loss in named.items():
        grid = "" if name.startswith("float") else "other" if " on " in name else "home"
        one = Evaluation(loss + text, 20, np.zeros(40), np.ones(40))
        rows[name] = Row(grid, "here", Measurement(one, 4.25, 1000))
    base = baseline(rows)
    grids = ["home", *["other"] * any(row.grid == "other" for row in rows.values())]
    return Comparison(
        recipe="home",
        recipes=(),
        baseline=base,
        rows=tuple(measured_rows(rows, base)),
        premiums=tuple(premium(rows, grid, home="home", base=base) for grid in grids),
        trained=(),
        deployed={},
        masters="",
        masters_equal=None,
        tokens=800,
        windows=40,
        length=20,
    )


@pytest.mark.parametrize(("moved", "said"), [(1.42, "saves 0.6800"), (2.78, "costs 0.6800")])
def test_the_verdict_says_what_the_table_says(moved, said):
    found = rows_of(float=1.0, PTQ=3.0, QAT=2.1, PTQ_on_other=3.0, QAT_on_other=moved)
    assert f"Deploying the trained weights on other {said} over home." in summary(found)
    assert "Training on home saves 0.9000 over PTQ" in summary(found)
    assert "takes" not in summary(found)
    assert "costs 0.9000 over PTQ" in summary(rows_of(float=1.0, PTQ=2.1, QAT=3.0))


def test_both_baselines_are_named_and_shown():
    found = rows_of(float=1.0, longer_float=0.9, PTQ=2.0, longer_PTQ=1.8, QAT=1.4)
    (home,) = found.premiums
    assert {name: round(one.value, 9) for name, one in home.training.items()} == {"PTQ": 0.6, "longer PTQ": 0.4}
    assert "saves 0.6000 over PTQ and saves 0.4000 over longer PTQ" in summary(found)
    page = render_page(found, describe_source("x", backend="", device="", files=[], tokens_per_byte=1.0), title="t")
    for name in ("PTQ", "longer PTQ"):
        assert f"training, over {name}" in page
        assert f"of the cost of {name} won back" in page


def test_a_float_model_that_overfitted_is_no_baseline():
    """Training it longer made it worse, 1.5 after 1.0: counted from it, QAT would have won back 150 %."""
    found = rows_of(float=1.0, longer_float=1.5, PTQ=2.0, longer_PTQ=2.1, QAT=1.2)
    assert found.baseline == "float"
    assert found.premiums[0].recovered["PTQ"].value == pytest.approx(0.8)
    assert found.premiums[0].recovered["longer PTQ"].value == pytest.approx(0.9 / 1.1)
    assert "float, longer is worse than float by 0.5000" in summary(found)
    assert rows_of(float=1.5, longer_float=1.0, PTQ=2.0, longer_PTQ=2.0, QAT=1.2).baseline == "float, longer"


# nothing is measured in vain


@pytest.mark.parametrize(
    ("unfit", "said"),
    [
        (recipe("odd", Grid("int4", 96)), "do not divide into groups of 96"),
        (
            Recipe("nowhere", (Rule(("no.such",), weight=Grid("int4", 64)), Rule(("*",), weight=Grid("int4", 32)))),
            "is first for no",
        ),
        (
            Recipe("static", (Rule(("*",), "linear", Grid("int4", 64), Grid("int8", "tensor"), range="calibrated"),)),
            "--ptq",
        ),
    ],
)
def test_every_recipe_is_checked_before_a_model_is_measured(made, unfit, said):
    engine, place = made
    measured = []
    sources = Sources(place / "float", qkit.recipe(TRAINED), (qkit.recipe(OTHER), unfit))
    with pytest.raises(qkit.RecipeError, match=f"recipe '{unfit.name}' does not fit .*{said}"):
        compare(engine, sources, ROWS, progress=lambda row, windows: measured.append(row))
    assert measured == []


def test_one_window_is_refused_before_a_model_is_measured(made):
    engine, place = made
    measured = []
    with pytest.raises(qkit.QkitError, match="at least 2 windows"):
        compare(
            engine,
            Sources(place / "float", qkit.recipe(TRAINED)),
            ROWS[:1],
            progress=lambda row, windows: measured.append(row),
        )
    assert measured == []


@pytest.mark.parametrize("failure", [KeyboardInterrupt, MemoryError, qkit.RangeError])
def test_what_was_measured_is_kept_and_goes_on(made, tmp_path, monkeypatch, failure):
    engine, place = made
    arguments = ["compare", place / "float", "--recipe", TRAINED, "--qat", place / "qat", "--data", place / "text"]
    arguments = list(map(str, [*arguments, "--length", 20, "--backend", engine.name, "--out", tmp_path / "out"]))
    measured = []

    def counted(engine, model, rows, **options):
        if len(measured) == 2 and options.get("fail", True) and not (tmp_path / "again").exists():
            raise failure("no more")
        measured.append(model)
        return evaluate(engine, model, rows, **options)

    monkeypatch.setattr("qkit.report.comparison.evaluate", counted)
    stopped = CliRunner().invoke(application, arguments)
    assert stopped.exit_code != 0
    assert "measured so far, in nats per token: float " in stopped.stderr
    assert "PTQ" in stopped.stderr
    assert not (tmp_path / "out" / "report.json").exists()
    (tmp_path / "again").touch()
    done = CliRunner().invoke(application, arguments)
    assert done.exit_code == 0, done.output
    assert len(measured) == 3  # float, PTQ; then QAT alone
    once = json.loads((tmp_path / "out" / "report.json").read_text())
    fresh = CliRunner().invoke(application, [*arguments[:-1], str(tmp_path / "fresh"), "--json"])
    assert json.loads(fresh.stdout)["rows"] == once["rows"]


def test_another_text_or_model_is_measured_anew(made, tmp_path):
    engine, place = made

    def count(rows, origin):
        """How many models are measured in the same folder."""
        measured = []
        setting = setting_of(engine.name, "", place / "float", rows, {})
        sources = Sources(place / "float", qkit.recipe(TRAINED), longer=place / origin)
        kept = Measurements(tmp_path / "measured.json", setting)
        compare(engine, sources, rows, progress=lambda row, n: None if n else measured.append(row), measurements=kept)
        return measured

    assert len(count(ROWS, "longer")) == 4
    assert count(ROWS, "longer") == []
    assert count(ROWS, "masters") == ["float, longer", "longer PTQ"]
    assert len(count(ROWS[:5], "masters")) == 4


def test_a_damaged_record_is_measured_anew(tmp_path):
    file = tmp_path / "measured.json"
    for text in ("", "[1]", '{"qkit_measured": 1, "rows": {"float": {"key": 1}}}', '{"qkit_measured": 9, "rows": {}}'):
        file.write_text(text)
        assert Measurements(file, {}).known("float", "1") is None


# intervals


def losses(size=0.1, windows=400):
    random = np.random.default_rng(0)
    text = random.gamma(2.0, 1.0, windows)  # some windows are harder than others, for every model
    return (
        text,
        text + 0.10 + size * random.standard_normal(windows),
        text + 0.04 + size * random.standard_normal(windows),
    )


def test_the_share_recovered_and_its_interval():
    floats, untrained, trained = losses()
    one = recovered(floats, untrained, trained)
    assert one.value == pytest.approx((untrained - trained).mean() / (untrained - floats).mean())
    assert 0.3 < one.low < one.value < one.high < 0.7
    assert recovered(floats, untrained, trained) == one


def test_an_interval_is_paired():
    """The spread of the windows, 1.4, is the same for both models and does not count; that of the difference, 0.14, does."""
    _, untrained, trained = losses()
    one = mean(untrained - trained)
    standard_error = (untrained - trained).std() / 20
    assert one.high - one.low == pytest.approx(2 * 1.96 * standard_error, rel=0.1)  # 2000 draws
    assert one.high - one.low < (mean(untrained).high - mean(untrained).low) / 5


def test_nothing_is_recovered_of_nothing():
    floats, untrained, trained = losses()
    assert recovered(untrained, floats, trained) is None
    assert recovered(floats, floats + 1e-3 * (untrained - untrained.mean()), trained) is None


def test_one_window_has_no_interval():
    with pytest.raises(qkit.QkitError, match="at least 2 windows"):
        mean(np.ones(1))


# how far weights are from each other


def packed(values, grid):
    return {"layer": pack(qkit.quantize(np.asarray(values, np.float32), grid))}


def test_a_step_of_the_other_sign_alone_flips_nothing():
    grid = Grid("int4", 32, "signed")
    row = np.linspace(-6, 7, 32)[None]
    ours = qkit.quantize(row.astype(np.float32), grid)
    turned = replace(ours, codes=np.clip(-ours.codes, -8, 7), scales=-ours.scales)
    (change,) = compare_codes({"layer": pack(ours)}, {"layer": pack(turned)})
    assert change.flipped == int((ours.codes == -8).sum()) == 2  # whose opposite there is no code for
    assert (ours.codes != turned.codes).sum() > 20


def test_codes_and_values_that_differ_are_counted():
    grid = Grid("int4", 32, "absmax")
    before = np.zeros((2, 32))
    before[:, 0] = 7.0
    after = before.copy()
    after[1, 1:3] = 3.0
    (change,) = compare_codes(packed(before, grid), packed(after, grid))
    assert (change.numbers, change.flipped) == (64, 2)
    assert change.steps == pytest.approx(6 / 64)
    assert change.error == pytest.approx((18 / 98) ** 0.5)


def test_zero_points_are_no_flips():
    whole = np.tile(np.arange(-7.0, 9.0), 2)[
        None
    ]  # multiples of 1 on both grids: from zero point 7, and of a step of -1
    minmax, signed, absmax = (Grid("int4", 32, rule) for rule in ("minmax", "signed", "absmax"))
    (same,) = compare_codes(packed(whole, minmax), packed(whole, signed))
    (across,) = compare_codes(packed(whole, minmax), packed(whole, absmax))
    assert (same.flipped, same.steps, same.error) == (0, 0.0, 0.0)
    assert across.flipped > 0  # its step is 8 / 7


def test_codes_of_unlike_elements_are_not_compared_but_values_are():
    row = np.linspace(-6, 7, 32)[None]
    (change,) = compare_codes(packed(row, Grid("int4", 32)), packed(row, Grid("int8", 32)))
    assert change.flipped is None
    assert 0 < change.error < 0.1


# the page


class Tags(HTMLParser):
    """Every tag, and whether all were closed in order."""

    VOID = ("meta",)

    def __init__(self, text):
        super().__init__()
        self.open, self.tags = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def a_page(place, found, **changes):
    source = describe_source("qkit compare", backend="torchao", device="cpu", files=["text"], tokens_per_byte=1.0)
    return render_page(found, replace(source, **changes), title="A title")


def test_the_page_is_whole_and_asks_for_nothing(made, found):
    text = a_page(made[1], found)
    tags = Tags(text)
    assert not tags.open
    assert ("html", {"lang": "en"}) in tags.tags
    assert not {"script", "link", "img", "iframe", "object", "base"} & {tag for tag, _ in tags.tags}
    assert not [attrs for _, attrs in tags.tags if {"src", "href", "onload", "onclick"} & attrs.keys()]
    assert "url(" not in text
    assert "@import" not in text
    assert "http:" not in text
    assert "https:" not in text
    charts = [attrs for tag, attrs in tags.tags if tag == "svg" and attrs.get("role") == "img"]
    assert len(charts) == 5
    assert all(attrs["aria-label"] for attrs in charts)
    tables = [tag for tag, _ in tags.tags if tag in ("table", "caption")]
    assert tables == ["table", "caption"] * 4


def test_the_page_shows_the_numbers(made, found):
    text = a_page(made[1], found)
    for row in found.rows:
        assert f"{row.loss.value:.4f}" in text
        assert f'<th scope="row">{row.name}</th>' in text
    for change in found.trained:
        assert f"{change.path}, PTQ to QAT on {found.recipe}: {change.flipped / change.numbers:.2%}" in text


def test_what_comes_from_outside_is_escaped(made, found):
    evil = '<script>alert("x")</script>&'
    row = replace(found.rows[0], source=evil)
    layer = replace(found.trained[0], path=evil)
    dirty = replace(found, rows=(row, *found.rows[1:]), trained=(layer, *found.trained[1:]), masters=evil)
    text = a_page(made[1], dirty, command=evil, files=(evil,), device=evil) + render_page(
        replace(found, recipe=evil),
        describe_source(evil, backend=evil, device="", files=["text"], tokens_per_byte=1.0),
        title=evil,
    )
    assert "<script" not in text
    assert text.count("&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt;&amp;") >= 10


def test_the_command_writes_page_numbers_and_picture_twice_the_same(made, tmp_path):
    engine, place = made
    arguments = ["compare", place / "float", "--recipe", TRAINED, "--qat", place / "qat", "--deploy-recipe", OTHER]
    arguments += ["--data", place / "text", "--length", "20", "--backend", engine.name, "--out", tmp_path / "out"]
    done = [CliRunner().invoke(application, list(map(str, arguments))) for _ in range(2)]
    assert [one.exit_code for one in done] == [0, 0], done[0].output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["recipe"] == TRAINED
    assert [row["name"] for row in report["rows"]] == ["float", "PTQ", f"PTQ on {OTHER}", "QAT", f"QAT on {OTHER}"]
    assert f"{report['rows'][3]['loss']['value']:.4f}" in done[0].stdout
    assert done[0].stdout == done[1].stdout
    pytest.importorskip("matplotlib")
    assert (tmp_path / "out" / "report.png").read_bytes().startswith(b"\x89PNG")
