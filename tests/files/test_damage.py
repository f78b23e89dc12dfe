"""A damaged directory is not read: not exported, not imported, unless every value in it is still the written one."""

import shutil

import pytest
from damage import damages
from models import make
from typer.testing import CliRunner

import qkit
from qkit.cli.application import application
from qkit.exchange.export_model import export_dense, export_mlx
from qkit.exchange.import_model import read_model
from qkit.streaming.carry_out import quantize_directory
from qkit.streaming.plan import make_plan

runner = CliRunner()
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64, "num_attention_heads": 2}
KINDS = ["int4-g32", "int8-minmax", "mxfp8-a16", "nvfp4-a16", "mlx", "dense"]


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """One of each kind, in two shards or more."""
    root = tmp_path_factory.mktemp("damage")
    source = make(root / "float", "llama", dtype="bfloat16", **SMALL)
    minmax = qkit.Recipe("minmax", (qkit.Rule(("*",), weight=qkit.Grid("int8", 32, "minmax")),))
    for kind in KINDS[:4]:
        recipe = minmax if kind == "int8-minmax" else qkit.recipe(kind)
        plan = make_plan(source, recipe, shard_bytes=9_000)
        quantize_directory(plan, root / kind, engine=qkit.backend("numpy"), workers=1, tick=lambda *_: None)
    export_mlx(read_model(root / "int4-g32"), root / "mlx", shard_bytes=9_000)
    export_dense(read_model(root / "int4-g32"), root / "dense", shard_bytes=30_000)
    return root


@pytest.mark.parametrize("kind", KINDS)
def test_no_damage_that_changes_a_value_passes(kind, artifacts, tmp_path):
    """Each command is run on each damage; the one that ends well must have read the values that were written."""
    undamaged, wrong, tried = read_model(artifacts / kind), [], 0
    export_dense(undamaged, tmp_path / "dense")
    wanted = {"import": undamaged.digest(), "export": read_model(tmp_path / "dense").digest()}
    for name, damage in damages(artifacts / kind):
        folder = tmp_path / "damaged"
        shutil.copytree(artifacts / kind, folder)
        damage(folder)
        commands = [["export", "--to", "dense"], ["import"]] if kind != "dense" else [["import"]]
        for verb, *options in commands:
            out = tmp_path / "out"
            done = runner.invoke(application, [verb, str(folder), str(out), *options])
            tried += 1
            assert done.exit_code == 0 or isinstance(done.exception, qkit.QkitError), (name, done.exception)
            assert (done.exit_code == 0) == out.exists(), name
            if done.exit_code == 0:
                if read_model(out).digest() != wanted[verb]:
                    wrong.append((name, verb))
                shutil.rmtree(out)
        shutil.rmtree(folder)
    assert tried > 80
    assert wrong == []


@pytest.mark.parametrize("kind", KINDS)
def test_without_damage_all_pass(kind, artifacts, tmp_path):
    assert runner.invoke(application, ["import", str(artifacts / kind), str(tmp_path / "out")]).exit_code == 0
    assert read_model(tmp_path / "out").digest() == read_model(artifacts / kind).digest()


def test_what_another_program_wrote_needs_no_seal(artifacts, tmp_path):
    shutil.copytree(artifacts / "dense", tmp_path / "theirs", ignore=shutil.ignore_patterns("qkit.json"))
    assert read_model(tmp_path / "theirs").digest() == read_model(artifacts / "dense").digest()


@pytest.mark.parametrize("reader", ["inspect", "verify"])
def test_a_missing_file_is_said_by_the_commands_that_only_look(reader, artifacts, tmp_path):
    shutil.copytree(artifacts / "int4-g32", tmp_path / "damaged")
    (tmp_path / "damaged" / "config.json").unlink()
    assert runner.invoke(application, [reader, str(tmp_path / "damaged")]).exit_code != 0
