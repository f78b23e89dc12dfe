"""The pictures of matplotlib: titled, with the legend off the curves, and the beginning of QAT in words."""

import json
from types import SimpleNamespace

import pytest

from qkit import pictures
from qkit.demo.picture import draw as draw_demo
from qkit.training.curve import draw_log, explain, turns

figures = pytest.importorskip("matplotlib.figure")

AT_ZERO = {"event": "evaluation", "step": 0, "loss": 2.75}


def drawn(monkeypatch, draw):
    """The figure that `draw` saves, laid out."""
    saved = []
    save = figures.Figure.savefig

    def keep(figure, *places, **options):
        saved.append(figure)
        save(figure, *places, **options)

    monkeypatch.setattr(figures.Figure, "savefig", keep)
    draw()
    (figure,) = saved
    figure.draw_without_rendering()
    return figure


def log(folder, **run):
    events = [{"event": "start", "step": 0, "run": {"out": "runs/mine", "recipe": "int4-g64", **run}}, AT_ZERO]
    events += [{"event": "step", "step": step, "loss": 2.7 - step / 100} for step in range(1, 41)]
    file = folder / "log.jsonl"
    file.write_text("".join(json.dumps(event) + "\n" for event in events))
    return file


@pytest.mark.parametrize("recipe", ["int4-g64", "float"])
def test_a_run_has_a_title_and_its_legend_is_off_the_curves(monkeypatch, tmp_path, recipe):
    file = log(tmp_path, recipe=recipe)
    figure = drawn(monkeypatch, lambda: draw_log(file, tmp_path / "loss.png"))
    (axes,), (legend,) = figure.axes, figure.legends
    assert figure.get_suptitle() == ("mine: loss in float" if recipe == "float" else "mine: loss on int4-g64")
    assert not legend.get_window_extent().overlaps(axes.get_window_extent())
    outside = figure.bbox
    for one in (
        legend,
        axes.xaxis.label,
        axes.yaxis.label,
    ):
        box = one.get_window_extent()
        assert box.width == 0 or (outside.x0 <= box.x0 and box.x1 <= outside.x1), one  # nothing is cut


def test_the_picture_of_the_demo_explains_where_qat_starts(monkeypatch, tmp_path):
    curve = [(step, 3.0 - step / 100) for step in range(1, 31)]
    losses = {"float_loss": 2.0, "ptq_loss": 3.0, "longer_float_loss": 1.0, "longer_ptq_loss": 2.5, "qat_loss": 1.25}
    result = SimpleNamespace(curves={"float": curve, "float, longer": curve, "QAT": curve}, **losses)
    result.recipe, result.backend = "int2-g64", "torchao"
    figure = drawn(monkeypatch, lambda: draw_demo(result, tmp_path / "losses.png"))
    (axes,), (legend,) = figure.axes, figure.legends
    note = axes.get_title(loc="left").replace("\n", " ")
    assert "QAT starts at step 30 (dotted line) from the weights of the float model, rounded to the grid" in note
    assert "3.000 on held-out text" in note
    assert figure.get_suptitle().startswith("A small Llama on int2-g64")
    assert not legend.get_window_extent().overlaps(axes.get_window_extent())
    low, high = axes.get_ylim()
    assert low < 1.0
    assert high > 2.99  # every loss is within the picture


@pytest.mark.parametrize(
    ("run", "said", "steps"),
    [
        ({"recipe": "int4-g64"}, "Training computes on the grid. Held-out losses are on the grid from step 0 on", []),
        ({"quantization": {"start": 60}}, "From step 60 on (dotted line), training computes on the grid", [60]),
        ({"quantization": {"windows": [[10, 20], [30, 40]]}}, "From step 10 on (dotted line)", [10, 30]),
        ({"quantization": {"ramp": [[50, "int8-g64"]]}}, "From step 51 on (dotted line)", [51]),
        ({"recipe": "float"}, "No layer is quantized.", []),
    ],
)
def test_the_start_of_qat_is_explained(run, said, steps):
    assert explain(run, [AT_ZERO]).startswith(said)
    assert turns(run) == steps
    assert ("2.7500" in explain(run, [AT_ZERO])) == (run.get("recipe") != "float")
    assert "rounded to it (PTQ)" in explain({}, [])


def test_a_note_is_wrapped_and_shown():
    figure, axes = pictures.new_picture("A title", "Many words of a note. " * 20, size=(9, 4))
    lines = axes.get_title(loc="left").splitlines()
    assert len(lines) > 3
    assert max(map(len, lines)) <= 93
    assert figure.get_suptitle() == "A title"
