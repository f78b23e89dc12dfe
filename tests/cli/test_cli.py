"""The command line: what it prints, how it fails, and what it does not import."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import qkit
from qkit.cli.application import application, main
from qkit.engines import registry
from qkit.engines.hookspecs import hookimpl
from qkit.engines.numpy import NumpyBackend
from qkit.grid import Grid
from qkit.qtensor import QTensor
from qkit.testing import parity

FRAMEWORKS = ("torch", "torchao", "mlx", "transformers", "mlx_lm", "gguf")
runner = CliRunner()


def fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Exit code and standard error of `qkit ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["qkit", *arguments])
    monkeypatch.delenv("QKIT_DEBUG", raising=False)
    with pytest.raises(SystemExit) as stopped:
        main()
    code = stopped.value.code
    return (code if isinstance(code, int) else 0), capsys.readouterr().err


def test_version() -> None:
    done = runner.invoke(application, ["--version"])
    assert (done.exit_code, done.stdout) == (0, f"qkit {qkit.__version__}\n")


def test_backends_are_listed() -> None:
    done = runner.invoke(application, ["backends"])
    assert done.exit_code == 0
    assert "numpy" in done.stdout


def test_backends_as_json() -> None:
    rows = json.loads(runner.invoke(application, ["backends", "--json"]).stdout)
    assert {"name": "numpy", "framework": "numpy", "ready": True, "reason": ""} in rows


def test_every_recipe_is_listed() -> None:
    done = runner.invoke(application, ["recipes"])
    assert done.exit_code == 0
    for name in qkit.recipes():
        assert f" {name} " in done.stdout


def test_recipes_as_json() -> None:
    rows = json.loads(runner.invoke(application, ["recipes", "--json"]).stdout)
    assert [row["name"] for row in rows] == qkit.recipes()
    assert rows[0].keys() == {"name", "version", "summary", "bits_per_weight", "runs_natively_in", "rules"}


def test_an_alias_says_what_it_resolves_to() -> None:
    done = runner.invoke(application, ["recipes", "MXFP4A16"])
    assert done.exit_code == 0
    assert "MXFP4A16 is an alias of mxfp4-a16-even" in done.stdout
    assert "e2m1-g32-even" in done.stdout


@pytest.fixture
def brackets(tmp_path: Path) -> Path:
    """A recipe full of what rich would take for markup and for emoji."""
    file = tmp_path / "mine.toml"
    file.write_text(
        'schema = 1\nsummary = "see [/notes], :warning:"\n[grids.w]\nelement = "int4"\ngroup = 64\n'
        '[[rules]]\nmatch = "*.[a-z]_proj"\nweight = "w"\n',
        encoding="utf-8",
    )
    return file


def test_a_recipe_is_printed_as_it_was_written(brackets: Path) -> None:
    done = runner.invoke(application, ["recipes", str(brackets)])
    assert done.exit_code == 0, done.output
    assert "mine, version 1: see [/notes], :warning:\n" in done.stdout
    assert "*.[a-z]_proj" in done.stdout


def test_every_recipe_is_listed_as_it_was_written(brackets: Path) -> None:
    class Plugin:
        @hookimpl
        def qkit_recipes(self) -> list[Path]:
            return [brackets]

    registry.register(Plugin(), "brackets")
    try:
        done = runner.invoke(application, ["recipes"])
    finally:
        registry.unregister("brackets")
    assert done.exit_code == 0, done.output
    assert "see [/notes], :warning:" in done.stdout


def test_a_reason_is_printed_as_it_was_written() -> None:
    class Plugin:
        @hookimpl
        def qkit_backends(self) -> list[qkit.BackendSpec]:
            return [qkit.BackendSpec("[b]absent", "absent:Absent", "absent_[i]", "pip install 'absent[/all]'")]

    registry.register(Plugin(), "absent")
    try:
        done = runner.invoke(application, ["backends"])
    finally:
        registry.unregister("absent")
    assert done.exit_code == 0, done.output
    assert "[b]absent" in done.stdout
    assert "needs absent_[i]: pip install 'absent[/all]'" in done.stdout


def test_a_recipe_file_as_json(brackets: Path) -> None:
    table = json.loads(runner.invoke(application, ["recipes", str(brackets), "--json"]).stdout)
    assert table["summary"] == "see [/notes], :warning:"
    assert table["rules"][0]["match"] == ["*.[a-z]_proj"]


def test_parity_of_a_recipe_file_prints_its_name(brackets: Path) -> None:
    file = brackets.rename(brackets.with_name("[b]mine.toml"))
    done = runner.invoke(application, ["parity", str(file), "--backend", "numpy", "--size", "100"])
    assert done.exit_code == 0, done.output
    assert "[b]mine" in done.stdout


def test_parity_counts_what_it_compared() -> None:
    done = runner.invoke(application, ["parity", "int4-g64", "nvfp4", "--backend", "numpy", "--size", "1000"])
    assert done.exit_code == 0, done.output
    assert "0 mismatches in " in done.stdout
    for dtype in ("float32", "bfloat16", "float16"):
        assert dtype in done.stdout


def test_parity_as_json() -> None:
    arguments = ["parity", "mxfp4", "--backend", "numpy", "--dtype", "bfloat16", "--size", "1000", "--json"]
    (row,) = json.loads(runner.invoke(application, arguments).stdout)
    assert (row["backend"], row["grid"], row["dtype"]) == ("numpy", "e2m1-g32-rceil", "bfloat16")
    assert row["exact"]
    assert row["compared"] > 100_000


def test_parity_never_calls_numpy_compiled() -> None:
    done = runner.invoke(application, ["parity", "int4-g64", "--backend", "numpy", "--compiled"])
    assert done.exit_code == 2
    assert "numpy has no compiler, so nothing is left to compare" in done.stderr
    done = runner.invoke(application, ["parity", "int4-g64", "--backend", "numpy", "--all", "--size", "100"])
    assert done.exit_code == 0, done.output
    assert "compiled" not in done.stdout


def test_parity_works_on_the_device_that_is_named() -> None:
    arguments = ["parity", "int4-g64", "--backend", "numpy", "--size", "100", "--device"]
    assert runner.invoke(application, [*arguments, "cpu"]).exit_code == 0
    refused = runner.invoke(application, [*arguments, "moon"])
    assert isinstance(refused.exception, qkit.BackendError)
    assert "no device 'moon'" in str(refused.exception)


class Careless(NumpyBackend):
    """Wrong in one code, one scale and two values of every tensor, except at 8 bits, where it fails."""

    name = "careless"

    def quantize(self, w, grid):  # type: ignore[no-untyped-def]
        if grid.element.bits == 8:
            raise NotImplementedError("no 8 bits here")
        q = super().quantize(w, grid)
        codes, scales = q.codes.copy(), q.scales.copy()
        codes[0, 0] ^= 1
        scales[-1, -1] *= 2
        return QTensor(codes, scales, grid, q.dtype)

    def dequantize(self, q):  # type: ignore[no-untyped-def]
        return super().dequantize(q) * 0 + 1

    def fake_quantize(self, w, grid):  # type: ignore[no-untyped-def]
        values = super().fake_quantize(w, grid)
        values[0, :2] += 1
        return values


def test_parity_finds_every_mismatch() -> None:
    found = parity.compare(Careless(), Grid("int4", 64), dtype="float32", compiled=False, size=100)
    assert (found.codes, found.scales, found.exact) == (1, 1, False)
    assert found.values > 2


def test_parity_reports_an_engine_that_cannot() -> None:
    grids = [Grid("int4", 64), Grid("int8", 64)]
    good, bad = parity.compare_many(Careless(), grids, dtype="float32", compiled=True, size=100)
    assert good.codes
    assert not good.error
    assert bad.error == "NotImplementedError: no 8 bits here"


def test_parity_exits_with_1_where_anything_differs() -> None:
    class Plugin:
        @hookimpl
        def qkit_backends(self) -> list[qkit.BackendSpec]:
            return [qkit.BackendSpec("careless", f"{__name__}:Careless", "numpy", "pip install care")]

    registry.register(Plugin(), "careless")
    sys.modules.setdefault(__name__, sys.modules[Careless.__module__])
    try:
        done = runner.invoke(application, ["parity", "int4-g64", "--backend", "careless", "--size", "100"])
    finally:
        registry.unregister("careless")
    assert done.exit_code == 1
    assert "0 mismatches" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("recipes", "int4-g65"), "qkit: unknown recipe 'int4-g65': did you mean 'int4-g64'?\n"),
        (("parity", "--backend", "nunpy"), "qkit: unknown backend 'nunpy': did you mean 'numpy'?\n"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_3(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    assert fails(monkeypatch, capsys, *arguments) == (3, message)


def test_a_malformed_recipe_names_file_and_key(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("schema = 1\ngruds = 3\n", encoding="utf-8")
    code, message = fails(monkeypatch, capsys, "recipes", str(file))
    assert code == 3
    assert f"qkit: {file}: unknown key 'gruds' in the recipe" in message


@pytest.mark.parametrize("arguments", [("nonsense",), ("parity", "--dtype", "float64"), ("recipes", "--nope")])
def test_wrong_usage_is_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    code, message = fails(monkeypatch, capsys, *arguments)
    assert code == 2
    assert "Traceback" not in message


def test_debug_shows_where(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QKIT_DEBUG", "1")
    monkeypatch.setattr(sys, "argv", ["qkit", "recipes", "nothing-like-it"])
    with pytest.raises(qkit.RecipeError):
        main()


@pytest.mark.parametrize("code", ["import qkit; qkit.recipes(); qkit.backends()", "import qkit.cli"])
def test_no_framework_is_imported_before_it_is_needed(code: str) -> None:
    probe = f"import sys; {code}; print(*(name for name in {FRAMEWORKS} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_recipes_answer_in_well_under_a_second() -> None:
    """In processor time, so that a busy machine does not matter."""
    command = [sys.executable, "-c", "from qkit.cli import main; main()", "recipes"]
    spent = []
    for _ in range(3):  # the first one warms the disk up
        before = os.times()
        subprocess.run(command, capture_output=True, check=True)
        after = os.times()
        spent.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert min(spent) < 1.0
