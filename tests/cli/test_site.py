"""The site: it builds without a warning, has every page once, and its generated parts and pictures are those of the code."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import generated
import pictures
import pytest
from site_links import relinked

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
sys.path.insert(0, str(DOCS))


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


@pytest.mark.skipif(not find_spec("mkdocs_autorefs"), reason="MkDocs is not installed")
def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for part in ("qkit quantize", "--skip-indivisible"):
        assert part in (tmp_path / "site" / "reference" / "cli" / "index.html").read_text(encoding="utf-8")


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
