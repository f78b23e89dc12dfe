"""The site: it builds without a warning, has every page once, and its generated parts and pictures are those of the code."""

import html
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import fit_pictures
import generated
import pictures
import pytest
from site_links import relinked

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
sys.path.insert(0, str(DOCS))
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
#: Loads each page in a frame, and says by how many pixels it is wider, and which of its pictures are missing.
HARNESS = """<!doctype html><pre></pre><script>
onload = async () => {
  const found = {};
  for (const page of PAGES) {
    const frame = document.createElement("iframe");
    frame.width = WIDTH; frame.height = 800; frame.src = page;
    document.body.append(frame);
    await new Promise(loaded => frame.onload = loaded);
    const inside = frame.contentDocument;
    const missing = [...inside.images].filter(one => !one.naturalWidth).map(one => one.getAttribute("src"));
    found[page] = {over: inside.documentElement.scrollWidth - WIDTH, missing};
    frame.remove();
  }
  document.querySelector("pre").textContent = JSON.stringify(found);
};
</script>"""


def pages(part):
    """Every file that a part of the navigation names."""
    if isinstance(part, str):
        return [part]
    if isinstance(part, dict):
        return [file for below in part.values() for file in pages(below)]
    return [file for below in part for file in pages(below)]


def test_every_page_is_in_the_navigation_once():
    found = pages(SITE["nav"])
    assert sorted(found) == sorted(str(file.relative_to(DOCS)) for file in DOCS.rglob("*.md"))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the site, built without a warning."""
    if not find_spec("mkdocs_autorefs"):
        pytest.skip("MkDocs is not installed")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_site_builds_without_a_warning(site):
    for part in ("qkit quantize", "--skip-indivisible"):
        assert part in (site / "reference" / "cli" / "index.html").read_text(encoding="utf-8")


@pytest.mark.skipif(BROWSER is None, reason="needs a browser: apt-get install chromium")
@pytest.mark.parametrize("width", [375, 1280])
def test_no_page_is_wider_than_its_window_and_every_picture_shows(site, width, tmp_path):
    """Tables and blocks scroll inside of the page."""
    pages_of_site = sorted(str(file.relative_to(site)) for file in site.rglob("index.html"))
    harness = site / f"harness-{width}.html"
    harness.write_text(HARNESS.replace("PAGES", json.dumps(pages_of_site)).replace("WIDTH", str(width)))
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--allow-file-access-from-files",
        "--virtual-time-budget=120000",
    ]
    done = subprocess.run(
        [BROWSER, *options, "--dump-dom", harness.as_uri()], capture_output=True, text=True, check=True
    )
    found = json.loads(html.unescape(re.search(r"<pre>(.*?)</pre>", done.stdout, re.DOTALL)[1]))
    assert found.keys() == set(pages_of_site)
    assert {page: one for page, one in found.items() if one["over"] > 0 or one["missing"]} == {}


@pytest.mark.parametrize("part", generated.PARTS)
def test_a_page_takes_each_generated_part(part):
    assert len(generated.PARTS[part]().splitlines()) > 20
    assert [file for file in DOCS.rglob("*.md") if f"<!-- made: {part} -->" in file.read_text(encoding="utf-8")]


def test_the_commands_of_the_page_are_those_of_the_parser():
    from typer.main import get_command

    from qkit.cli.application import application

    text = generated.commands()
    for name, command in get_command(application).commands.items():
        assert f"## qkit {name}\n" in text
        for one in command.params:
            assert one.param_type_name == "argument" or one.opts[0] in text


def test_every_key_of_a_run_file_has_a_meaning():
    lines = [line for line in generated.run_file().splitlines() if line.startswith("| `")]
    assert len(lines) > 40
    assert [line for line in lines if line.rstrip().endswith("|  |")] == []


def test_every_message_of_the_table_of_troubles_is_in_the_code():
    page = (DOCS / "help" / "troubleshooting.md").read_text(encoding="utf-8").partition("# All messages")[0]
    named = {
        word
        for line in page.splitlines()
        if line.startswith("| `")
        for word in re.findall(r"`([^`]+)`", line.split("|")[1])
    }
    code = "\n".join(
        file.read_text(encoding="utf-8") for folder in ("qkit", "backends") for file in (ROOT / folder).rglob("*.py")
    )
    code = re.sub(r'"\s+f?"', "", code)  # strings that lie on several lines
    assert len(named) > 6
    assert [word for word in named if word not in code] == []


def test_the_list_of_messages_has_those_that_the_code_raises():
    text = generated.messages()
    assert text.count("\n- ") > 300
    assert "- backend NAME cannot " in text
    for name, _ in generated.raised():
        assert f"## {name}\n" in text


def test_the_pictures_of_fits_are_those_of_the_code_and_the_results():
    drawn = fit_pictures.drawn()
    assert drawn == {file.name: file.read_text(encoding="utf-8") for file in fit_pictures.FOLDER.iterdir()}


@pytest.mark.parametrize(("element", "scale"), sorted(generated.pictured() | pictures.SHOWN))
def test_the_picture_of_a_grid_is_that_of_the_reference(element, scale):
    assert (pictures.FOLDER / f"{element}-{scale}.svg").read_text(encoding="utf-8") == pictures.picture(element, scale)


@pytest.mark.parametrize(
    ("where", "page", "link", "wanted"),
    [
        ("docs/how-to/lora.md", "how-to/lora.md", "train.md#cached", "train.md#cached"),
        ("docs/how-to/lora.md", "how-to/lora.md", "../../numerics.md#laws", "../explanation/laws.md#laws"),
        ("numerics.md", "explanation/laws.md", "docs/evidence/verification.md", "../evidence/verification.md"),
        ("docs/index.md", "index.md", "../LICENSE", "HOST/LICENSE"),
        ("docs/index.md", "index.md", "https://example.com/a.md", "https://example.com/a.md"),
    ],
)
def test_links_out_of_docs_lead_to_the_site_or_to_the_host(where, page, link, wanted):
    assert relinked(f"[a]({link})", where=where, page=page, host="HOST") == f"[a]({wanted})"
