"""Companions in directories of their own: copied, sealed, replaced and removed with the rest, and nothing of others with them."""

import json

import numpy as np
import pytest
from checkpoints import TENSORS, killed_at, stream
from safetensors.numpy import save_file

import qkit
from qkit.artifact.companions import companions, left_behind
from qkit.storage.write import write_directory

FILES = {
    "config.json": b"{}",
    "1_Pooling/config.json": b'{"pooling": 1}',
    "2_Normalize/notes.txt": b"n",
    "2_Normalize/deep/er/notes.txt": b"d",
}


def write(out, files=FILES, **options):
    streams = [stream(name, array) for name, array in TENSORS.items()]
    write_directory(out, streams, metadata={"qkit": "é"}, files=files, **options)
    return out


def tree(folder):
    return {str(one.relative_to(folder)): one.read_bytes() for one in folder.rglob("*") if one.is_file()}


def model(folder):
    """A directory as sentence-transformers has it, with files that no output gets."""
    folder.mkdir()
    save_file({"a.weight": np.ones((32, 32), np.float32)}, folder / "model.safetensors")
    modules = [
        {"path": ""},
        {"path": "1_Pooling"},
        {"path": "2_Dense"},
        {"path": "modules/3_Norm"},
        {"path": "../elsewhere"},
    ]
    texts = {
        "config.json": {"model_type": "unheard_of"},
        "modules.json": modules,
        "1_Pooling/config.json": {"word_embedding_dimension": 32},
        "2_Dense/config.json": {"in_features": 32},
        "2_Dense/code.py": 0,
        "2_Dense/inner/most/notes.json": {},
        "2_Dense/.cache/notes.json": {},
        "modules/3_Norm/config.json": {},
        "modules/notes.json": {},
        "original/params.json": {},
        "onnx/config.json": {},
        "processor/preprocessor_config.json": {},
        "preprocessor_config.json": {},
    }
    for name, content in texts.items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(json.dumps(content))
    save_file({"linear.weight": np.ones((4, 4), np.float32)}, folder / "2_Dense/model.safetensors")
    (folder / "2_Dense/pytorch_model.bin").write_bytes(b"x")
    return folder


def test_directories_of_modules_and_processors_are_companions(tmp_path):
    found = companions(model(tmp_path / "in"), config={})
    inner = {name for name in found if "/" in name}
    assert inner == {
        "1_Pooling/config.json",
        "2_Dense/config.json",
        "2_Dense/inner/most/notes.json",
        "2_Dense/model.safetensors",
        "modules/3_Norm/config.json",
        "processor/preprocessor_config.json",
    }
    left = left_behind(tmp_path / "in", {*found, "model.safetensors"})
    assert left == ("2_Dense/code.py", "2_Dense/pytorch_model.bin", "modules/notes.json", "onnx", "original")


def test_a_link_out_of_a_directory_of_companions_is_refused(tmp_path):
    folder = model(tmp_path / "in")
    (tmp_path / "secret.json").write_text("x")
    (folder / "1_Pooling/more.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(qkit.ArtifactError, match="is a link out of its folder"):
        companions(folder, config={})


def test_they_are_sealed_and_a_missing_one_is_found(tmp_path):
    out = write(tmp_path / "out")
    assert {*FILES} < {*tree(out)}
    assert not any(name.endswith(".made-by-qkit") for name in tree(out))
    (out / "1_Pooling/config.json").unlink()
    assert any("1_Pooling/config.json: is missing" in str(problem) for problem in problems(out))


def problems(out):
    from qkit.storage.seal import file_problems, read_seal

    return list(file_problems(out, read_seal(out)))


def test_an_output_with_directories_is_replaced_whole(tmp_path):
    out = write(tmp_path / "out")
    write(out, files={"config.json": b"{}", "1_Pooling/config.json": b"new"})
    assert {name for name in tree(out) if "/" in name} == {"1_Pooling/config.json"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "theirs", ["1_Pooling/thesis.txt", "1_Pooling/deeper/thesis.txt", "2_Normalize/deep/thesis.txt", "notes/thesis.txt"]
)
def test_nothing_of_theirs_in_a_directory_is_removed(tmp_path, theirs):
    out = write(tmp_path / "out")
    (out / theirs).parent.mkdir(parents=True, exist_ok=True)
    (out / theirs).write_text("x")
    before = tree(tmp_path)
    with pytest.raises(qkit.ArtifactError, match="which save did not write"):
        write(out)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("call", ["unlink", "rmdir", "mkdir"])
def test_a_kill_leaves_a_whole_directory_and_the_next_run_finishes(tmp_path, call):
    new, kills = tree(write(tmp_path / "new")), 0
    for k in range(1, 40):
        out = write(tmp_path / f"out{k}", files={**FILES, "1_Pooling/config.json": b"old"})
        old = tree(out)
        if not killed_at(call, k, write, out, fingerprint="x"):
            break
        kills += 1
        assert tree(out) in (old, new)
        write(out, fingerprint="x")
        assert tree(out) == new
        assert not list(tmp_path.glob(f".out{k}.*"))
    assert kills > 0


def test_a_seal_whose_files_lead_elsewhere_is_refused(tmp_path):
    out = write(tmp_path / "out")
    table = json.loads((out / "qkit.json").read_text())
    for name in ("../x", "1_Pooling/../../x", "/etc/passwd", "/".join("abcdefghijklmnopqrst")):
        (out / "qkit.json").write_text(json.dumps({**table, "files": [name]}))
        with pytest.raises(qkit.ArtifactError, match="not what qkit writes"):
            problems(out)
