"""How the command line ends: exit codes, one line, closed and narrow outputs, Ctrl-C from the first import on."""

import errno
import os
import signal
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool

import pytest

import qkit
from qkit.cli.boundary import MEANINGS, run

START = "import sys; sys.argv[0] = 'qkit'; from qkit.cli import main; main()"


def ends(command):
    with pytest.raises(SystemExit) as stopped:
        run(command)
    return stopped.value.code


def failing(error):
    def command():
        raise error

    return command


def system(number, *files):
    return OSError(number, os.strerror(number), *files)


class PanicError(BaseException):
    """As PyO3 raises: no Exception."""


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (system(errno.ENOSPC, "a.bin"), 5, "a.bin: no space left on device: make room on that disk, or choose another"),
        (system(errno.EDQUOT, "a"), 5, "a: disk quota exceeded: make room within your quota"),
        (system(errno.EACCES, "a"), 5, "a: permission denied: change its permissions"),
        (system(errno.EPERM, "a"), 5, "a: operation not permitted: change its permissions"),
        (system(errno.EROFS, "a"), 5, "a: read-only file system: choose a place that can be written"),
        (system(errno.EMFILE), 5, "too many open files: raise the limit"),
        (system(errno.EIO, "a"), 5, "a: input/output error: the disk failed"),
        (system(errno.ETXTBSY, "a"), 5, "a: text file busy: repeat the command"),
        (system(errno.ENOENT, "a"), 3, "a: no such file or directory: name one that exists"),
        (system(errno.EISDIR, "a"), 3, "a: is a directory: name a file"),
        (system(errno.ENOTDIR, "a"), 3, "a: not a directory: a part of its path is a file"),
        (system(errno.ELOOP, "a"), 3, "a: too many levels of symbolic links: its links lead in a circle"),
        (system(errno.ENAMETOOLONG, "a"), 3, "a: file name too long: choose a shorter name"),
        (MemoryError("9 TB"), 5, "out of memory (9 TB)"),
        (BrokenProcessPool("a worker died"), 5, "out of memory (a worker died)"),
        (qkit.RecipeError("a\nb\x1b[31m"), 3, r"a b\x1b[31m"),
        (qkit.ArtifactError("v" * 5000), 3, "v" * 2000 + " ..."),
        (qkit.LockedError("a"), 4, "a"),
        (qkit.PlanError("a"), 5, "a"),
        (qkit.VerificationError("a"), 6, "a"),
        (ZeroDivisionError("oops"), 70, "ZeroDivisionError: oops (a defect of qkit; QKIT_DEBUG=1 shows where)"),
        (PanicError("oops"), 70, "PanicError: oops"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_a_failure_is_a_line_and_a_code(error, code, line, capsys, monkeypatch):
    monkeypatch.delenv("QKIT_DEBUG", raising=False)
    assert ends(failing(error)) == code
    said = capsys.readouterr().err
    assert said.startswith(f"qkit: {line}")
    assert said.count("\n") == 1
    assert code in MEANINGS


def test_an_interrupt_that_a_package_turns_into_its_own_error_is_an_interrupt(capsys):
    def command():
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            raise ImportError("numpy failed to load") from None

    assert ends(command) == 130
    assert capsys.readouterr().err == "qkit: interrupted\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_every_code_is_in_the_help_and_on_the_page_of_files(capsys):
    from pathlib import Path

    from qkit.cli.application import application

    page = (Path(__file__).parents[2] / "docs" / "reference" / "exit-codes.md").read_text()
    assert ends(lambda: application(["--help"], prog_name="qkit")) == 0
    said = " ".join(capsys.readouterr().out.split())
    for code, meaning in MEANINGS.items():
        assert f"{code}: {meaning}" in said
        assert f"| {code} | {meaning} |" in page


def shell(command, **environment):
    """Exit code and standard error of a shell's command, in which $qkit is the command line."""
    names = {**os.environ, "PYTHON": sys.executable, "START": START, **environment}
    names.pop("QKIT_DEBUG", None)
    script = f'qkit() {{ "$PYTHON" -c "$START" "$@"; }}; {command}'
    done = subprocess.run(["bash", "-c", script], env=names, capture_output=True, text=True, timeout=100)
    return done.returncode, done.stderr, done.stdout


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_output_is_said():
    assert shell("qkit recipes > /dev/full")[:2] == (
        5,
        "qkit: standard output: no space left on device: make room on that disk, or choose another\n",
    )


def test_a_closed_output_has_no_traceback():
    assert shell("qkit recipes >&-") == (0, "", "")
    assert shell("qkit recipes nothing-like-it >&- 2>&-") == (3, "", "")


@pytest.mark.parametrize("arguments", ["recipes", "recipes --json"])
def test_a_reader_that_goes_away_ends_the_command_in_silence(arguments):
    code, errors, _ = shell(f"qkit {arguments} | true; exit ${{PIPESTATUS[0]}}")
    assert (code, errors) == (141, "")


def test_a_narrow_output_prints_every_character_in_some_way(tmp_path):
    file = tmp_path / "mine.toml"
    text = 'schema = 1\nsummary = "größe ✓ 数"\n[grids.w]\nelement = "int4"\ngroup = 64\n[[rules]]\nmatch = "é*"\nweight = "w"\n'
    file.write_text(text, encoding="utf-8")
    code, errors, out = shell(f"qkit recipes {file}; qkit recipes é", PYTHONIOENCODING="ascii")
    assert code == 3
    assert r"\u6570" in out
    assert errors.startswith(r"qkit: unknown recipe '\xe9'")
    assert "Traceback" not in errors


@pytest.mark.parametrize("module", ["numpy", "typer", "qkit.cli.recipes"])
def test_ctrl_c_while_the_command_line_starts_is_one_line(module):
    """The interrupt comes at the import of a module, the same one every time."""
    code = f"""
import os, signal, sys
class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupting())
sys.argv = ["qkit", "recipes"]
from qkit.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (130, "qkit: interrupted\n")


def test_other_programs_keep_their_own_interrupts():
    code = "import signal, qkit; assert signal.getsignal(signal.SIGINT) is signal.default_int_handler"
    subprocess.run([sys.executable, "-c", code], check=True)
