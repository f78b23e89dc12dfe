"""The report's page in a real browser without a window: charts are there and have a size, and nothing is asked of the network."""

import html
import json
import re
import shutil
import subprocess

import pytest

from qkit.report import About, CodeChange, Comparison, Estimate, Measured, Premium, render_page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs a browser: apt-get install chromium")

#: Loads the page in a frame, untouched, and says what is in it; the answer is read off the harness's own DOM.
HARNESS = """<!doctype html><title>harness</title><iframe src="PAGE" width="1000" height="2000"></iframe><pre></pre><script>
onload = () => {
  const frame = document.querySelector("iframe"), page = frame.contentDocument, inside = frame.contentWindow;
  const box = one => { const {width, height} = one.getBoundingClientRect(); return [width, height]; };
  const marks = chart => [...chart.querySelectorAll("rect, path.whisker, text")].map(box);
  document.querySelector("pre").textContent = JSON.stringify({
    title: page.title,
    charts: [...page.querySelectorAll("svg[role=img]")].map(chart => ({
      label: chart.getAttribute("aria-label"), box: box(chart), marks: marks(chart),
    })),
    colors: [...new Set([...page.querySelectorAll("svg[role=img] rect")].map(one => inside.getComputedStyle(one).fill))],
    paper: inside.getComputedStyle(page.body).backgroundColor,
    wider: page.documentElement.scrollWidth - page.documentElement.clientWidth,
    outside: [...page.querySelectorAll("svg text, td, th, dd, li, h1")].filter(one => {
      const {left, right, width} = one.getBoundingClientRect();
      return width && (left < -0.5 || right > page.documentElement.clientWidth + 0.5);
    }).map(one => one.textContent),
    apart: [...page.querySelectorAll("svg[role=img]")].map(chart => {
      const names = [...chart.querySelectorAll("text.name, text.point")].map(one => one.getBoundingClientRect());
      const over = (a, b) => a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 3 && b.top < a.bottom - 3;
      return names.some((a, i) => names.some((b, j) => i < j && over(a, b)));
    }),
    above: [...page.querySelectorAll("text.name")].map(one => one.getBoundingClientRect().bottom),
    bodies: [...page.querySelectorAll("svg[role=img] rect[rx]")].map(one => one.getBoundingClientRect().top),
    named: [...page.querySelectorAll("svg svg text")].map(one => one.textContent),
    letters: [...page.querySelectorAll("svg[role=img] text")].map(one => parseFloat(inside.getComputedStyle(one).fontSize)),
    asked: inside.performance.getEntriesByType("resource").map(one => one.name),
  });
};
</script>"""


def estimate(value):
    return Estimate(value, value - 0.01, value + 0.01)


def comparison(layers):
    """A small one, with a grid that training helps and one that it does not."""
    rows = [
        ("float", "", 2.0),
        ("PTQ", "int3-g32", 2.3),
        ("QAT", "int3-g32", 2.1),
        ("QAT on int3-g64", "int3-g64", 2.25),
    ]
    moved = tuple(CodeChange(f"model.layers.{n}.mlp.down_proj", 4096, 40 * n, 0.1, 0.02) for n in range(1, layers + 1))
    return Comparison(
        recipe="int3-g32",
        recipes=({"name": "int3-g32", "version": 1, "rules": []},),
        baseline="float",
        rows=tuple(
            Measured(name, grid, "made here", estimate(loss), estimate(loss - 2.0), 7.4, 0.01, 0.9, 3.5, 700_000)
            for name, grid, loss in rows
        ),
        premiums=(
            Premium("int3-g32", {"PTQ": estimate(0.2)}, None, {"PTQ": estimate(0.66)}),
            Premium("int3-g64", {"PTQ": estimate(-0.05)}, estimate(0.15), {"PTQ": None}),
        ),
        trained=moved,
        deployed={"int3-g64": moved},
        masters="masters",
        masters_equal=(4096, 4096),
        tokens=8192,
        windows=32,
        length=256,
    )


def browse(folder, *options, width=1000, layers=30):
    """The findings of the harness, and the output of the browser."""
    source = About("qkit compare", "torchao", "cpu", {"qkit": "0"}, {"system": "Linux"}, ("text",), 1.0)
    (folder / "report.html").write_text(render_page(comparison(layers), source, title="A <report>"), encoding="utf-8")
    (folder / "harness.html").write_text(
        HARNESS.replace("PAGE", "report.html").replace("1000", str(width), 1), encoding="utf-8"
    )
    command = [
        *(
            BROWSER,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--allow-file-access-from-files",
        ),
        *("--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr"),
        *(f"--user-data-dir={folder / 'profile'}", *options, "--dump-dom", (folder / "harness.html").as_uri()),
    ]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    answer = re.search(r"<pre>(.+)</pre>", done.stdout, flags=re.DOTALL)
    assert answer, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(html.unescape(answer[1])), done.stderr


def test_the_charts_are_drawn_and_nothing_is_asked_for(tmp_path):
    found, said = browse(tmp_path)
    assert found["title"] == "A <report>"
    assert [chart["label"].partition(",")[0] for chart in found["charts"]] == [
        "Loss",
        "Loss above float",
        "Size and loss",
        "Codes flipped",
        "Values moved",
    ]
    for chart in found["charts"]:
        width, height = chart["box"]
        assert width > 500
        assert height > 100
        assert len(chart["marks"]) >= 10
        for mark in chart["marks"]:
            assert mark[0] > 0
            assert mark[1] > 0
    assert found["asked"] == []
    assert "CONSOLE" not in said
    assert len(found["colors"]) == 4
    assert "rgb(0, 0, 0)" not in found["colors"]  # what has no color is black
    assert found["wider"] == 0  # the page itself does not scroll sideways


@pytest.mark.parametrize("layers", [7, 30])
@pytest.mark.parametrize("width", [320, 375, 1000])
def test_nothing_is_cut_at_any_width(tmp_path, width, layers):
    """Names are above their bars and of a size to read, cells wrap, and no number of an axis is cut."""
    found, _ = browse(tmp_path, width=width, layers=layers)
    assert found["wider"] == 0
    assert found["outside"] == []
    assert not any(found["apart"])
    assert min(found["letters"]) >= 12
    assert len(found["above"]) == len(found["bodies"]) == 7
    assert all(name <= body + 4 for name, body in zip(found["above"], found["bodies"], strict=True))


def test_layers_have_their_names_below_the_columns(tmp_path):
    found, _ = browse(tmp_path, layers=7)
    assert found["named"] == [f"{n}.mlp.down_proj" for n in range(1, 8)] * 2


def test_the_page_is_dark_where_the_reader_is(tmp_path):
    light, _ = browse(tmp_path)
    dark, _ = browse(tmp_path, "--blink-settings=preferredColorScheme=0")
    assert brightness(light["paper"]) > 200
    assert brightness(dark["paper"]) < 60
    assert not set(light["colors"]) & set(dark["colors"])


def brightness(color):
    """Mean of the channels of `rgb(r, g, b)`, 0 .. 255."""
    return sum(map(int, re.findall(r"\d+", color)[:3])) / 3
