"""The README and the pages under docs/ are true: blocks run, commands exist, links lead to files, tables are as measured."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pages
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

import qkit
from qkit.cli.application import application

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = {
    str(file.relative_to(ROOT)): file.read_text(encoding="utf-8")
    for file in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
}
CHECKED = {name: text for name, text in PAGES.items() if name == "README.md" or name.startswith("docs/")}
VERIFICATION = PAGES["docs/evidence/verification.md"]
BLOCKS = {
    name: blocks
    for name, text in CHECKED.items()
    if (blocks := re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL))
}
COMMANDS = {
    name: [body for kind, _, body in pages.steps(text) if kind == "command" and body.startswith("qkit ")]
    for name, text in CHECKED.items()
}
ENGINES = {status.name for status in qkit.backends() if status.ready}

#: Pages whose commands run, and the engines and libraries that they need.
RUN = {
    "README.md": ("trl", "mlx_lm", "gguf"),
    "docs/start/ptq.md": ("gguf",),
    "docs/start/cuda.md": ("trl",),
    "docs/start/mac.md": ("mlx_lm",),
    "docs/how-to/choose.md": (),
    "docs/how-to/data.md": (),
    "docs/how-to/train.md": (),
    "docs/how-to/lora.md": (),
    "docs/how-to/distil.md": (),
    "docs/how-to/report.md": (),
    "docs/how-to/calibrate.md": (),
    "docs/how-to/better-ptq.md": (),
    "docs/how-to/budget.md": (),
    "docs/how-to/serve.md": ("mlx_lm", "gguf"),
    "docs/reference/artifact.md": (),
    "docs/reference/cli.md": (),
}
ENGINE_OF = {"docs/start/mac.md": "mlx"}
LEFT_OUT = ("run.toml", "mlx-lora", "theirs", "--install-completion", "gguf", "drift/", "serve.py")


def test_the_readme_is_short_and_its_first_screen_says_who_what_how_good_and_how_to_install():
    lines = PAGES["README.md"].splitlines()
    assert len(lines) <= 135
    first = "\n".join(lines[:32])
    for part in ("ships exactly the model that it trained", "report.png", "tokens/s", "## Install", "pip install"):
        assert part in first, part


def test_the_table_of_the_readme_is_that_of_the_result_file():
    import readme

    made = readme.table(json.loads((RESULTS / "cpu" / "readme.json").read_text(encoding="utf-8")))
    assert f"readme.json -->\n{made}\n<!-- end of table -->" in PAGES["README.md"]


def test_the_count_of_comparisons_in_the_readme_is_that_of_the_result_files():
    cells = [row.split("|") for row in parity_table()]
    count = sum(int(row[4].replace(",", "")) for row in cells if row[1].strip() != "numpy")
    assert f"{count / 1e6:.0f} million comparisons" in PAGES["README.md"]


def test_sentences_of_the_readme_are_short():
    prose = re.sub(r"```.*?```|<!--.*?-->", "", PAGES["README.md"], flags=re.DOTALL)
    prose = "\n".join(line for line in prose.splitlines() if not line.startswith(("|", "#", "!")))
    for part in re.split(r"(?<=[.:;])\s|\n\n|\n- ", prose):
        words = re.findall(r"[\w'`./-]+", re.sub(r"\(.*?\)", "", part))
        assert len(words) <= 25, part


def test_the_pages_with_blocks_are_these():
    assert {name for kind, name, _ in pages.steps(PAGES["README.md"]) if kind == "file"} == {"full.py", "lora.py"}
    assert set(BLOCKS) >= {
        "docs/how-to/own-recipes.md",
        "docs/how-to/train.md",
        "docs/how-to/lora.md",
        "docs/reference/artifact.md",
        "docs/extend/engine.md",
        "docs/extend/surgery.md",
        "docs/explanation/why-grids.md",
    }


@pytest.mark.skipif(not {"torchao", "mlx"} <= ENGINES, reason="the pages visit both engines")
@pytest.mark.parametrize("page", [page for page in BLOCKS if page not in RUN])
def test_the_blocks_of_a_page_run_from_the_first_to_the_last(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for block in BLOCKS[page]:
        exec(compile(block, page, "exec"), namespace)


@pytest.mark.parametrize("page", PAGES)
def test_a_block_of_commands_can_be_copied_whole_into_a_shell(page):
    """Without prompts, which a shell takes for the name of a command."""
    assert not re.search(r"^\s*\$ ", PAGES[page], flags=re.MULTILINE)
    for block in re.findall(r"^```bash\n(.*?)^```", PAGES[page], flags=re.DOTALL | re.MULTILINE):
        assert subprocess.run(["bash", "-n"], input=block, text=True, check=False).returncode == 0, block


def words_of(line):
    return shlex.split(line, comments=True)[1:]


@pytest.mark.parametrize("command", sorted({words_of(line)[0] for lines in COMMANDS.values() for line in lines}))
def test_the_commands_exist(command):
    assert CliRunner().invoke(application, [command, "--help"]).exit_code == 0


@pytest.mark.skipif(not {"torchao", "mlx"} <= ENGINES, reason="the pages visit both engines")
@pytest.mark.filterwarnings("ignore:training changed no code", "ignore::qkit.errors.FewTokensWarning")
@pytest.mark.parametrize("page", RUN)
def test_a_page_runs_from_its_first_line_to_its_last(page, tmp_path, monkeypatch):
    """As it stands, on a small model and with few steps; see `pages.py`."""
    for library in RUN[page]:
        pytest.importorskip(library)
    monkeypatch.chdir(pages.furnish(tmp_path))
    left_out = [word for word in LEFT_OUT if word != "gguf" or "gguf" not in RUN[page]]
    ran = pages.run(PAGES[page], engine=ENGINE_OF.get(page, "torchao"), left_out=left_out)
    assert ran
    if "lora" in page:
        pair = [load_file(f"{one}/model.safetensors") for one in ("adapted", "merged")]
        assert all(np.array_equal(pair[0][name], pair[1][name]) for name in pair[0])


def test_every_page_with_commands_runs_or_has_none_to_run():
    """Each command of qkit on a page that is not run is of a kind that no test can run, or shows a program of a listing."""
    for page, lines in COMMANDS.items():
        if page not in RUN:
            left = [line for line in lines if not pages.ELSEWHERE.match(line)]
            assert len(left) <= 3, (page, left)


LINKS = sorted(
    {
        (page, target)
        for page, text in PAGES.items()
        for target in re.findall(r"\]\(([^)]+)\)", text)
        if ":" not in target
    }
)


@pytest.mark.parametrize(("page", "target"), LINKS)
def test_a_link_leads_to_a_file_and_to_a_heading_in_it(page, target):
    name, _, anchor = target.partition("#")
    file = (ROOT / page).parent / name if name else ROOT / page
    assert file.exists()
    if anchor:
        headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def paths_of(text):
    """Files and folders of the repository that a page names in backticks, or at the beginning of a line of a block."""
    found = re.findall(r"`((?:qkit|backends|tests|benchmarks|recipes|docs)/[^`\s]*)`", text)
    for block in re.findall(r"```\n(.*?)```", text, flags=re.DOTALL):
        found += re.findall(r"(?:^| )((?:qkit|backends|tests|benchmarks|recipes|docs)/\S*)", block)
    return {path for path in found if not re.search(r"[<{A-Z]", path)}


@pytest.mark.parametrize("page", [name for name in PAGES if name != "CHANGELOG.md"])
def test_the_files_that_a_page_names_exist(page):
    for path in paths_of(PAGES[page]):
        assert list(ROOT.glob(path.rstrip("/"))), path
    for name in (
        re.findall(r"`([\w*/-]+\.json)`", PAGES[page])
        if page in ("docs/evidence/benchmarks.md", "docs/evidence/verification.md")
        else ()
    ):
        assert name == "qkit.json" or list(RESULTS.glob(name.removeprefix("benchmarks/results/"))), name


def test_every_page_of_the_root_is_linked_from_the_readme():
    linked = {target for page, target in LINKS if page == "README.md"}
    assert {name for name in PAGES if "/" not in name and name != "README.md"} <= linked


@pytest.mark.parametrize("page", [name for name in PAGES if name != "numerics.md"])
def test_a_page_that_cites_a_law_links_the_laws(page):
    if re.search(r"(?<![A-Za-z0-9_])R\d+(?![\d_A-Za-z])", PAGES[page]):
        assert re.search(r"numerics\.md[#)]", PAGES[page])


def parity_table():
    """The table of comparisons, made from the result files."""
    rows = []
    for file in sorted(RESULTS.glob("*/parity*.json")):
        report = json.loads(file.read_text(encoding="utf-8"))
        where = report["machine"]["gpu"].split()[1] if "gpu" in report["machine"] else "CPU"  # as in NVIDIA H200
        for row in report["rows"]:
            wrong = sum(row[key] for key in ("codes", "scales", "values", "not run"))
            rows.append(f"| {row['backend']} | {where} | {row['mode']} | {row['compared']:,} | {wrong} |")
    return rows


def test_the_table_of_comparisons_is_that_of_the_result_files():
    rows = parity_table()
    assert len(rows) >= 9
    assert "\n".join(rows) in VERIFICATION
    assert all(row.endswith("| 0 |") for row in rows)


def probe_table():
    """The table of recipes and engines, made from the result files: recipes with the same cells share a row."""
    cells = {}
    for file in ("cpu/probe", "h200/probe-torch", "h200/probe-mlx"):
        report = json.loads((RESULTS / f"{file}.json").read_text(encoding="utf-8"))
        where = "H200" if "gpu" in report["machine"] else "CPU"
        for one in report["rows"]:
            assert one["exact"], one
            column = cells.setdefault((one["backend"], where), {})
            column.setdefault(one["recipe"], {}).setdefault(one["dtype"], []).append(one["outcome"])
    columns = [cells[key] for key in (("torchao", "CPU"), ("torchao", "H200"), ("mlx", "CPU"), ("mlx", "H200"))]
    rows = {}
    for recipe in qkit.recipes():
        if any(rule.scales == "learned" for rule in qkit.recipe(recipe).rules):
            continue  # deployed as the recipe with the grid's own scales, which is in the table
        rows.setdefault(tuple(map(probe_cell, (column[recipe] for column in columns))), []).append(recipe)
    return [f"| {', '.join(names)} | {' | '.join(row)} |" for row, names in rows.items()]


def probe_cell(by_dtype):
    """`native`, `decoded`, or in which types which; of several rules, the least."""
    least = {dtype: "decoded" if "decoded" in outcomes else "native" for dtype, outcomes in by_dtype.items()}
    assert not any("missing" in outcomes for outcomes in by_dtype.values())
    natives = [dtype for dtype in least if least[dtype] == "native"]
    if len(natives) in (0, len(least)):
        return "native" if natives else "decoded"
    return f"native in {', '.join(natives)}; else decoded"


def test_the_table_of_recipes_and_engines_is_that_of_the_probes():
    rows = probe_table()
    assert len(rows) >= 3
    assert "\n".join(rows) in VERIFICATION


def test_the_conformance_figures_are_those_of_the_result_files():
    for machine, suite in (("h100", "TestTorchaoOnCuda"), ("h200", "TestMlx")):
        report = json.loads((RESULTS / machine / "conformance.json").read_text(encoding="utf-8"))
        (row,) = report["rows"]
        assert (row["suite"], row["failures"]) == (suite, [])
        assert f"{row['passed']:,} laws" in VERIFICATION


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("serve-8b", 23),
        ("serve-1b", 17),
    ],
)
def test_the_tables_of_serving_are_those_of_the_result_files(name, least):
    report = json.loads((RESULTS / "h200" / f"{name}.json").read_text(encoding="utf-8"))
    columns = ("linears", "compiled", "eager", "prefill", "memory")
    cells = [[f"{row[name]:.2f}" if name in row else "" for name in columns] for row in report["rows"][1:]]
    rows = [f"| {row['recipe']} | {' | '.join(mine)} |" for row, mine in zip(report["rows"][1:], cells, strict=True)]
    assert len(rows) >= least
    assert "\n".join(rows) in (ROOT / "docs" / "evidence" / "benchmarks.md").read_text(encoding="utf-8")


def test_the_bars_of_serving_are_kept_where_the_page_says_so():
    report = json.loads((RESULTS / "h200" / "serve-8b.json").read_text(encoding="utf-8"))
    rows = {row["recipe"]: row for row in report["rows"][1:] if not row["recipe"].startswith("torchao")}
    assert all(row["prefill"] <= 1.12 for row in rows.values())
    eager = set()
    for name, row in rows.items():
        rule = qkit.recipe(name).rules[-1]
        if rule.activation is None:
            few = 0.68 if rule.weight.element.kind == "float" else 0.60
            bar = few if rule.weight.element.bits <= 4 else 0.80
            assert round(row["linears"], 2) <= bar, name
            assert round(row["compiled"], 2) <= bar, name
            if rule.weight.element.bits in (4, 8):
                eager |= {(rule.weight.element.bits, round(row["eager"], 2) <= bar)}
    assert eager == {(4, False), (8, True)}


def scale_row(row):
    standard, own = row["memory GB"]
    return f"| {row['row']} | {row['ratio of medians']:.3f} | {own / standard:.2f} |"


def adapter_row(row):
    return (
        f"| {row['way']} | {row['layer']} | {row['ms']:.0f} | {row['over lora']:.2f} | {row['memory over lora']:.2f} |"
    )


def later_row(row):
    standard, own = row["memory GB"]
    times = row["ratio of medians"], row["ratio"]["median"], row["ratio in a row"]["median"]
    return f"| {row['row']} | {' | '.join(f'{one:.3f}' for one in times)} | {own / standard:.2f} |"


def peak_row(row):
    return f"| {row['way']} | {row['layer']} | {row['ms']:.0f} | {row['peak GB']:.2f} |"


def memory_row(row):
    return f"| {row['recipe']} | {row['layers']} | {row['peak_gb']:.2f} | {row['estimate_gb']:.2f} |"


@pytest.mark.parametrize(
    ("name", "line", "least"),
    [
        ("h200/train_scale", scale_row, 13),
        ("2xh200/train_scale", scale_row, 9),
        ("h200/adapters_speed-1b", adapter_row, 3),
        ("h200/adapters_speed-8b", adapter_row, 3),
        ("h200/train_memory", memory_row, 6),
        ("h200/train_scale-busy-host", later_row, 7),
        ("h200/train_scale-busy-host-later", later_row, 5),
        ("h200/adapters_speed-8b-whole-checkpointing", peak_row, 2),
    ],
)
def test_the_tables_of_training_are_those_of_the_result_files(name, line, least):
    found = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["rows"]
    rows = [line(row) for row in found if "error" not in row]  # the time of a run may end before its last rows
    assert len(rows) >= least
    assert "\n".join(rows) in (ROOT / "docs" / "evidence" / "benchmarks.md").read_text(encoding="utf-8")


def test_the_table_of_cpu_serving_is_that_of_the_result_file():
    found = json.loads((RESULTS / "cpu" / "serve.json").read_text(encoding="utf-8"))["rows"]
    one, other = ({row["recipe"]: row for row in found if row["dtype"] == kind} for kind in ("bfloat16", "float32"))
    rows = []
    for name in (name for name in one if name != "float"):
        cells = [one[name]["one token"], other[name]["one token"]]
        cells += [one[name][key] for key in ("four rows", "prefill", "memory")]
        rows.append(f"| {name} | {' | '.join(f'{cell:.2f}' for cell in cells)} |")
    assert len(rows) >= 20
    assert "\n".join(rows) in (ROOT / "docs" / "evidence" / "benchmarks.md").read_text(encoding="utf-8")


def test_the_figures_of_mlx_steps_are_those_of_the_result_file():
    report = json.loads((RESULTS / "cpu" / "mlx_decode.json").read_text(encoding="utf-8"))
    ratios = [row["qkit / mlx.nn.quantize"]["median"] for row in report["rows"]]
    assert f"from {min(ratios):.3f}x to {max(ratios):.3f}x" in VERIFICATION


TARGETS = sorted(
    {
        name
        for text in CHECKED.values()
        for name in re.findall(r"(?:^|`)make ([a-z-]+)(?=`|$)", text, flags=re.MULTILINE)
    }
)


@pytest.mark.parametrize("target", TARGETS)
def test_the_make_targets_exist(target):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)
