"""Equal means equal, across layouts; what differs is counted and named. And the commands around it."""

import json
import shutil
import sys

import numpy as np
import pytest
from checkpoints import quantized
from models import make
from safetensors.numpy import save_file
from typer.testing import CliRunner

from qkit.artifact.verify import verify
from qkit.cli.application import application
from qkit.exchange.diff import compare
from qkit.exchange.distance import measure
from qkit.exchange.export_model import export_dense, export_mlx
from qkit.exchange.import_model import read_model
from qkit.formats.packed import unpack
from qkit.reference import dequantize
from qkit.storage.arrays import read_file

runner = CliRunner()
UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("diff")
    export_mlx(read_model(quantized(root, "int4-g64")), root / "mlx")
    export_dense(read_model(root / "qkit"), root / "dense")
    return root


def edited(folder, target, edit):
    """A copy of the artifact whose tensors went through `edit`."""
    shutil.copytree(folder / "qkit", target)
    tensors, metadata = read_file(target / "model.safetensors")
    tensors = {name: np.array(array) for name, array in tensors.items()}
    edit(tensors)
    save_file(tensors, target / "model.safetensors", metadata=metadata)
    (target / "qkit.json").unlink()  # or its digests would be what differs
    return read_model(target)


def unequal(first, second):
    return [row for row in compare(first, second) if not row.equal]


@pytest.mark.parametrize("other", ["qkit", "mlx", "dense"])
def test_a_model_equals_itself_in_every_layout(folder, other):
    rows = list(compare(read_model(folder / "qkit"), read_model(folder / other)))
    assert len(rows) == 21
    assert all(row.equal for row in rows)
    assert {row.compared for row in rows if row.name == f"{UP}.weight"} == {"values" if other == "dense" else "codes"}


def test_a_flipped_code_is_one_code(folder, tmp_path):
    def flip(tensors):
        tensors[f"{UP}.weight_packed"][3, 2] ^= 1 << 8  # one bit of the third code of eight in that word

    (row,) = unequal(read_model(folder / "qkit"), edited(folder, tmp_path / "out", flip))
    assert (row.name, row.compared, row.codes, row.scales, row.numbers) == (f"{UP}.weight", "codes", 1, 0, 256 * 128)
    (row,) = unequal(read_model(folder / "dense"), read_model(tmp_path / "out"))
    assert (row.compared, row.values, row.detail) == ("values", 1, "float, int4-g64-signed")


def test_a_changed_scale_is_one_scale(folder, tmp_path):
    def change(tensors):
        tensors[f"{UP}.weight_scale"][7, 1] *= 2

    (row,) = unequal(read_model(folder / "mlx"), edited(folder, tmp_path / "out", change))
    assert (row.name, row.codes, row.scales) == (f"{UP}.weight", 0, 1)
    (row,) = unequal(read_model(folder / "dense"), read_model(tmp_path / "out"))
    assert 50 < row.values <= 64  # zeros stay zeros


def test_tensors_that_only_one_side_has_are_missing_or_extra(folder, tmp_path):
    def rename(tensors):
        tensors["model.other.weight"] = tensors.pop("model.norm.weight")

    found = {
        row.name: row.compared for row in unequal(read_model(folder / "qkit"), edited(folder, tmp_path / "out", rename))
    }
    assert found == {"model.norm.weight": "missing", "model.other.weight": "extra"}


def test_shapes_and_types_that_differ_are_said(folder, tmp_path):
    def change(tensors):
        tensors["model.norm.weight"] = np.zeros(3, np.float32)
        tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.float16)

    found = {
        row.name: (row.compared, row.detail)
        for row in unequal(read_model(folder / "mlx"), edited(folder, tmp_path / "out", change))
    }
    assert found == {"model.norm.weight": ("shape", "[128], [3]"), "lm_head.weight": ("type", "float32, float16")}


def test_two_grids_are_compared_by_their_values(folder, tmp_path):
    other = read_model(quantized(tmp_path, "int8-g64"))
    rows = unequal(read_model(folder / "qkit"), other)
    assert len(rows) == 14
    assert {row.detail for row in rows} == {"int4-g64-signed, int8-g64-absmax"}
    assert all(row.values > row.numbers / 2 for row in rows)


def test_a_negative_zero_is_not_zero(folder, tmp_path):
    def negate(tensors):
        tensors["model.norm.weight"][0] = 0.0
        tensors["lm_head.weight"][0, 0] = np.nan

    def again(tensors):
        tensors["model.norm.weight"][0] = -0.0
        tensors["lm_head.weight"][0, 0] = np.nan

    (row,) = unequal(edited(folder, tmp_path / "a", negate), edited(folder, tmp_path / "b", again))
    assert (row.name, row.values) == ("model.norm.weight", 1)


def test_digests_follow_the_content_and_not_the_container(folder, tmp_path):
    of = {name: read_model(folder / name) for name in ("qkit", "mlx", "dense")}
    assert of["qkit"].digest() == of["mlx"].digest() != of["dense"].digest()
    name = f"{UP}.weight"

    def flip(tensors):
        tensors[f"{UP}.weight_packed"][0, 0] ^= 1

    before, after = of["qkit"].digests(), edited(folder, tmp_path / "out", flip).digests()
    assert [key for key in before if before[key] != after[key]] == [name]


# errors of values


@pytest.mark.parametrize("name", ["int4-g64", "int8-g64", "mxfp4-a16", "nvfp4-a16"])
def test_each_layer_has_its_errors_from_the_float_model(tmp_path, name):
    """Every sum against NumPy's own, on the values of the reference."""
    quantized(tmp_path, name)
    floats, after = read_model(tmp_path / "float"), read_model(tmp_path / "qkit")
    rows = {row.name: row for row in compare(floats, after)}
    assert {f"{path}.weight" for path in after.weights} == {row.name for row in rows.values() if row.error}
    for path, weight in after.weights.items():
        a = np.array(floats.tensors[f"{path}.weight"], np.float64)
        b = np.array(dequantize(unpack(weight.read())), np.float64)
        one = rows[f"{path}.weight"].error
        assert one.mse == pytest.approx(((a - b) ** 2).mean(), rel=1e-9)
        assert one.sqnr == pytest.approx(10 * np.log10((a**2).sum() / ((a - b) ** 2).sum()), rel=1e-9)
        assert one.cosine == pytest.approx((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b), rel=1e-9)
        assert one.largest == np.abs(a - b).max() > 0


@pytest.mark.parametrize(
    ("a", "b", "mse", "sqnr", "cosine", "largest"),
    [
        ([3.0, 4.0], [3.0, 4.0], 0.0, None, 1.0, 0.0),
        ([3.0, 4.0], [0.0, 0.0], 12.5, 0.0, 0.0, 4.0),
        ([0.0, 0.0], [0.0, 0.0], 0.0, None, 1.0, 0.0),
        ([0.0, 0.0], [1.0, 0.0], 0.5, None, 0.0, 1.0),
        ([1.0, 0.0], [-1.0, 0.0], 2.0, 10 * np.log10(1 / 4), -1.0, 2.0),
    ],
)
def test_errors_of_small_tensors(a, b, mse, sqnr, cosine, largest):
    found = measure([(np.array(a, np.float32), np.array(b, np.float32))])
    assert (found.mse, found.largest) == (mse, largest)
    assert found.sqnr == (None if sqnr is None else pytest.approx(sqnr))
    assert found.cosine == pytest.approx(cosine)


def test_errors_are_those_of_the_whole_tensor_however_it_is_cut():
    draw = np.random.default_rng(0)
    a, b = draw.standard_normal((2, 96, 64)).astype(np.float32)
    whole, cut = measure([(a, b)]), measure([(a[:31], b[:31]), (a[31:], b[31:])])
    for name in ("mse", "sqnr", "cosine", "largest"):
        assert getattr(cut, name) == pytest.approx(getattr(whole, name), rel=1e-12)


def test_types_that_differ_have_errors_too(folder, tmp_path):
    def change(tensors):
        tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.float16)

    (row,) = unequal(read_model(folder / "mlx"), edited(folder, tmp_path / "out", change))
    assert row.compared == "type"
    assert 0 < row.error.largest < 1e-2


def test_diff_shows_the_errors_and_draws_them(tmp_path):
    quantized(tmp_path, "int4-g64")
    command = ["diff", str(tmp_path / "float"), str(tmp_path / "qkit")]
    told = json.loads(runner.invoke(application, [*command, "--json"]).output)
    (row,) = (row for row in told["tensors"] if row["name"] == f"{UP}.weight")
    assert row["error"].keys() == {"mse", "sqnr", "cosine", "largest"}
    done = runner.invoke(application, command)
    assert done.exit_code == 1
    *_, line = (line for line in done.output.splitlines() if f" {UP} " in line)
    assert f"{row['error']['sqnr']:.2f}" in line
    assert f"{row['error']['mse']:.3e}" in line
    pytest.importorskip("matplotlib")
    done = runner.invoke(application, [*command, "--picture", str(tmp_path / "errors.png")])
    assert (tmp_path / "errors.png").read_bytes().startswith(b"\x89PNG")


# the commands


def test_the_commands_go_the_whole_way(folder, tmp_path):
    source, mlx, back, dense = (
        str(path) for path in (folder / "qkit", tmp_path / "mlx", tmp_path / "back", tmp_path / "dense")
    )
    for command in (
        ["export", source, mlx, "--to", "mlx"],
        ["import", mlx, back],
        ["export", back, dense, "--to", "dense"],
    ):
        done = runner.invoke(application, command)
        assert done.exit_code == 0, done.output
    for other in (mlx, back, dense):
        done = runner.invoke(application, ["diff", source, other])
        assert done.exit_code == 0, done.output
        assert "0 of 21 tensors differ" in done.output


def test_diff_shows_what_differs_and_exits_with_1(folder, tmp_path):
    def flip(tensors):
        tensors[f"{UP}.weight_packed"][3, 2] ^= 1

    edited(folder, tmp_path / "out", flip)
    command = ["diff", str(folder / "qkit"), str(tmp_path / "out")]
    done = runner.invoke(application, command)
    assert done.exit_code == 1
    assert f" {UP} " in done.output
    assert "1 of 21 tensors differ: 1 codes, 0 scales, 0 values" in done.output
    done = runner.invoke(application, [*command, "--json"])
    assert done.exit_code == 1
    found = json.loads(done.output)
    assert (found["equal"], found["codes"], found["scales"], found["values"]) == (False, 1, 0, 0)
    assert [row["name"] for row in found["tensors"] if not row["equal"]] == [f"{UP}.weight"]


def test_names_of_layers_are_whole_at_80_columns(tmp_path, monkeypatch):
    from qkit.cli.console import console

    quantized(tmp_path, "int4-g32")
    monkeypatch.setattr(console, "_width", 80)  # rich has no setter
    for command in (
        ["diff", str(tmp_path / "float"), str(tmp_path / "qkit")],
        ["inspect", str(tmp_path / "qkit"), "--all"],
    ):
        lines = runner.invoke(application, command).output.splitlines()
        assert any(line.startswith(f" {UP} ") for line in lines)
        assert max(map(len, lines)) <= 80 or command[0] == "inspect"  # whose lists of other tensors a terminal wraps


def test_a_float_model_is_compared_too(tmp_path):
    first, second = make(tmp_path / "a", "llama"), make(tmp_path / "b", "llama")
    assert not unequal(read_model(first), read_model(second))


def test_an_export_that_cannot_be_is_bad_input(folder, tmp_path, monkeypatch, capsys):
    from qkit.cli.application import main

    quantized(tmp_path, "nvfp4-a16")
    monkeypatch.setattr(sys, "argv", ["qkit", "export", str(tmp_path / "qkit"), str(tmp_path / "mlx"), "--to", "mlx"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 3
    assert "MLX's nvfp4 has no scale for the tensor" in capsys.readouterr().err
    assert not (tmp_path / "mlx").exists()


def test_verify_knows_exports(folder, tmp_path):
    for name in ("mlx", "dense"):
        assert not list(verify(folder / name))
    shutil.copytree(folder / "mlx", tmp_path / "mlx")
    file = tmp_path / "mlx" / "model.safetensors"
    tensors, metadata = read_file(file)
    tensors = {name: np.array(array) for name, array in tensors.items()}
    tensors[f"{UP}.scales"][0, 0] = np.nan
    save_file(tensors, file, metadata=metadata)
    found = "; ".join(map(str, verify(tmp_path / "mlx")))
    assert f"{UP}: scales holds 1 numbers" in found
    assert f"{UP}.scales" in found  # its digest
