"""A hook of MkDocs: files of the root become pages, parts that follow from the code are put in, and links out of docs/ hold."""

import re
import sys
from pathlib import Path
from posixpath import dirname, join, normpath, relpath
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from generated import PARTS

ROOT = Path(__file__).parents[1]

#: Files outside docs/ that are pages of the site. A page there has the line `<!-- whole: FILE -->` in place of their text.
PAGES = {
    "numerics.md": "explanation/laws.md",
    "CONTRIBUTING.md": "extend/contributing.md",
    "SECURITY.md": "help/security.md",
    "CHANGELOG.md": "help/changelog.md",
    "README.md": "index.md",
    "benchmarks/README.md": "evidence/commands.md",
}


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """The text of a page: whole files and generated parts put in, links changed."""
    source = page.file.src_uri
    whole = re.fullmatch(r"<!-- whole: (\S+) -->\s*", markdown)
    where = join("docs", source)
    if whole:
        where, markdown = whole[1], (ROOT / whole[1]).read_text(encoding="utf-8")
    markdown = re.sub(r"<!-- made: ([a-z ]+) -->", lambda found: PARTS[found[1]](), markdown)
    return relinked(markdown, where=where, page=source, host=f"{config.repo_url}/blob/main")


def relinked(markdown: str, *, where: str, page: str, host: str) -> str:
    """`markdown` of the file `where`, with links for the page of the site at `page`; other files are at `host`."""

    def link(found: re.Match[str]) -> str:
        target, hash_, anchor = found[1].partition("#")
        if ":" in target or not target:
            return found[0]
        file = normpath(join(dirname(where), target))
        inside = file.removeprefix("docs/") if file.startswith("docs/") else PAGES.get(file)
        there = relpath(inside, dirname(page) or ".") if inside else f"{host}/{file}"
        return f"]({there}{hash_}{anchor})"

    return re.sub(r"\]\(([^)\s]+)\)", link, markdown)
