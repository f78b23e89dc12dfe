"""Hosted CI runs the make targets that users run; the metadata of the package and of the citation agree."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import qkit

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted(file for file in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if file.name != "config.yml")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def commands(workflow):
    """Each line that a workflow runs."""
    jobs = yaml.safe_load(workflow.read_text(encoding="utf-8"))["jobs"]
    return [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda file: file.stem)
def test_a_workflow_runs_make_targets_and_nothing_else(workflow):
    for line in commands(workflow):
        target = re.fullmatch(r"make ([a-z-]+)", line)
        assert line == ".ci/run" or re.search(rf"^{target[1]}:", MAKEFILE, flags=re.MULTILINE), line


def test_the_jobs_of_hosted_ci_are_these():
    lines = {line for workflow in WORKFLOWS for line in commands(workflow)}
    assert lines >= {
        ".ci/run",
        "make docs",
        "make test-readers",
        "make wheels",
        "make wheels-published",
        "make test-install",
    }
    assert (ROOT / ".ci" / "run").read_text(encoding="utf-8").rstrip().endswith("make test\nmake docs")


@pytest.mark.network
@pytest.mark.parametrize(
    ("schema", "files"), [("vendor.github-workflows", WORKFLOWS), ("vendor.github-issue-forms", FORMS)]
)
def test_the_host_takes_the_files(schema, files):
    """By the schemas that `check-jsonschema` has from the host's editors."""
    command = [
        sys.executable,
        "-m",
        "uv",
        "tool",
        "run",
        "check-jsonschema",
        "--builtin-schema",
        schema,
        *map(str, files),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode and re.search("error sending request|dns error|tcp connect", done.stderr):
        pytest.skip(f"the package index cannot be reached: {done.stderr[-300:]}")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("form", FORMS, ids=lambda file: file.stem)
def test_a_form_has_the_parts_that_the_host_wants(form):
    table = yaml.safe_load(form.read_text(encoding="utf-8"))
    assert {"name", "description", "body"} <= table.keys()
    named = [part["id"] for part in table["body"] if part["type"] != "markdown"]
    assert len(named) == len(set(named)) > 0
    assert all("label" in part["attributes"] for part in table["body"] if part["type"] != "markdown")


def test_the_citation_is_that_of_the_package():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == PROJECT["version"] == qkit.__version__
    assert cited["license"] == PROJECT["license"]
    assert cited["authors"] == PROJECT["authors"]
    assert cited["repository-code"] == PROJECT["urls"]["Repository"]


def test_every_classifier_is_one_that_the_index_knows():
    known = pytest.importorskip("trove_classifiers").classifiers
    assert set(PROJECT["classifiers"]) <= set(known)
