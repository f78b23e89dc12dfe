"""How codes were fitted is said by every file that holds them: after convert and save, exports, imports, and in `compare`."""

import json

import pytest
from checkpoints import make
from models import small
from runs import TEXT
from tables import BUILDERS
from typer.testing import CliRunner

import qkit
from qkit.artifact.inspect import inspect_directory
from qkit.artifact.metadata import fit_of
from qkit.cli.application import application
from qkit.fitting.statistics import open_statistics
from qkit.storage.read import read_folder

RUNNER = CliRunner()
FIT = {"method": "search"}


def run(*arguments):
    done = RUNNER.invoke(application, list(map(str, arguments)))
    assert done.exit_code == 0, done.output + repr(done.exception)
    return done


@pytest.fixture
def fitted(tmp_path):
    """A directory that `qkit quantize --fit search` wrote."""
    make(tmp_path / "float", "llama")
    run("quantize", tmp_path / "float", tmp_path / "fitted", "-r", "int4-g64", "--fit", "search")
    assert inspect_directory(tmp_path / "fitted").fit == FIT
    return tmp_path / "fitted"


def test_an_export_for_mlx_and_an_import_of_it_keep_the_fit(fitted, tmp_path):
    run("export", fitted, tmp_path / "mlx", "--to", "mlx")
    assert fit_of(read_folder(tmp_path / "mlx")[1]) == FIT
    run("import", tmp_path / "mlx", tmp_path / "back")
    assert inspect_directory(tmp_path / "back").fit == FIT


def test_a_gguf_file_states_the_fit(fitted, tmp_path):
    gguf = pytest.importorskip("gguf")
    run("export", fitted, tmp_path / "model.gguf", "--to", "gguf", "--without-tokenizer")
    field = gguf.GGUFReader(tmp_path / "model.gguf").fields["qkit.fit"]
    assert json.loads(field.contents()) == FIT


@pytest.mark.parametrize("name", BUILDERS)
def test_convert_and_save_state_the_fit(tmp_path, name):
    model = qkit.convert(small(name), "int4-g32", fit="search")
    qkit.save(model, tmp_path / "out")
    assert inspect_directory(tmp_path / "out").fit == FIT
    qkit.save(qkit.load(tmp_path / "out", backend=name), tmp_path / "again")
    assert inspect_directory(tmp_path / "again").fit == FIT
    qkit.save(qkit.convert(small(name), "int4-g32"), tmp_path / "plain")
    assert inspect_directory(tmp_path / "plain").fit is None


@pytest.mark.parametrize("name", BUILDERS)
def test_a_merge_changes_codes_and_their_fit_is_no_longer_said(tmp_path, name):
    model = qkit.adapt(qkit.convert(small(name), "int4-g32", fit="search"), qkit.Adapter(rank=2))
    qkit.save(qkit.merge(model), tmp_path / "out")
    assert inspect_directory(tmp_path / "out").fit is None


@pytest.mark.parametrize("name", BUILDERS[:1])
def test_compare_shows_the_fit(tmp_path, name):
    qkit.save(small(name), tmp_path / "float")
    run("quantize", tmp_path / "float", tmp_path / "ptq", "-r", "int4-g32", "--fit", "search")
    (tmp_path / "text.txt").write_text(TEXT)
    arguments = ("compare", tmp_path / "float", "--recipe", "int4-g32", "--ptq", tmp_path / "ptq", "--backend", name)
    done = run(
        *arguments, "--data", tmp_path / "text.txt", "--length", 16, "--windows", 2, "--out", tmp_path / "report"
    )
    assert "fitted by search" in done.stdout
    assert "fitted by search" in (tmp_path / "report" / "report.html").read_text()


SOLVED = ("solve", "damping 0.01", "rounds 3", "statistics ")  #: words about a solved directory, before the digest


@pytest.mark.filterwarnings("ignore::qkit.errors.FewTokensWarning")
@pytest.mark.parametrize("name", BUILDERS[:1])
def test_compare_verify_and_inspect_show_method_damping_and_digest(tmp_path, name):
    qkit.save(small(name), tmp_path / "float")
    (tmp_path / "text.txt").write_text(TEXT)
    texts = ("--data", tmp_path / "text.txt", "--length", 16)
    run("calibrate", tmp_path / "float", tmp_path / "stats", *texts, "--backend", name)
    words = ("quantize", tmp_path / "float", tmp_path / "ptq", "-r", "int4-g32", "--fit", "solve", "--stats")
    run(*words, tmp_path / "stats")
    digest = open_statistics(tmp_path / "stats").digest
    arguments = ("compare", tmp_path / "float", "--recipe", "int4-g32", "--ptq", tmp_path / "ptq", "--backend", name)
    for said in (
        run(*arguments, *texts, "--windows", 2, "--out", tmp_path / "report").stdout,
        (tmp_path / "report" / "report.html").read_text(),
        run("verify", tmp_path / "ptq").stdout,
        run("inspect", tmp_path / "ptq").stdout,
    ):
        whole = " ".join(said.split()).replace(" ", "")  # a narrow terminal breaks lines anywhere
        assert all(word.replace(" ", "") in whole for word in SOLVED)
        assert digest in whole
    assert json.loads(run("verify", tmp_path / "ptq", "--json").stdout)["fit"]["statistics"] == digest
    run("quantize", tmp_path / "float", tmp_path / "plain", "-r", "int4-g32")
    assert run("verify", tmp_path / "plain").stdout.strip().endswith("is whole")
