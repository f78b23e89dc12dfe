"""Artifacts in the repository: today's code writes them byte for byte, and opens them and those of earlier metadata."""

import numpy as np
import pytest
from make_artifacts import OUT, make_module, make_saved, make_streamed

import qkit
from qkit.artifact.verify import verify
from qkit.exchange.export_model import export_mlx
from qkit.exchange.import_model import read_model, to_artifact
from qkit.formats.packed import unpack

ARTIFACTS = ("integers", "small-floats", "static")
STREAMED = ("integers", "small-floats", "mlx")
EARLIER = (
    OUT.parent / "earlier"
)  #: metadata that list every path, embeddings named by paths, packed integers with activations


def content(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def streamed(tmp_path_factory):
    out = tmp_path_factory.mktemp("streamed")
    make_streamed(out, tmp_path_factory.mktemp("work"))
    return out


@pytest.mark.parametrize("name", STREAMED)
def test_the_same_inputs_give_the_bytes_of_the_golden_directories(streamed, name):
    assert content(streamed / name) == content(OUT / name)


def test_a_saved_model_has_the_bytes_of_the_golden_directory(tmp_path):
    make_saved(tmp_path)
    assert content(tmp_path / "static") == content(OUT / "static")


@pytest.mark.parametrize("name", [*ARTIFACTS, "mlx"])
def test_golden_directories_are_whole_and_readable(name):
    assert list(verify(OUT / name)) == []
    assert read_model(OUT / name).weights


@pytest.mark.parametrize("name", ["integers", "mlx", "static"])
def test_directories_of_earlier_versions_are_read_as_those_of_today(name):
    assert list(verify(EARLIER / name)) == []
    assert read_model(EARLIER / name).digests() == read_model(OUT / name).digests()


def test_a_golden_artifact_exports_to_the_golden_export(tmp_path):
    export_mlx(read_model(OUT / "integers"), tmp_path / "mlx")
    assert content(tmp_path / "mlx") == content(OUT / "mlx")


def test_the_golden_export_imports_as_the_golden_artifact(tmp_path):
    to_artifact(read_model(OUT / "mlx"), tmp_path / "integers")
    assert read_model(tmp_path / "integers").digests() == read_model(OUT / "integers").digests()


def test_a_golden_artifact_loads_into_a_module():
    model = qkit.load(OUT / "static", into=make_module())
    for path, stored in read_model(OUT / "static").weights.items():
        mine = qkit.backend("torchao").unpack(model[path])
        assert np.array_equal(mine.codes.numpy(), unpack(stored.read()).codes)


@pytest.mark.parametrize("name", ["integers", "small-floats"])
def test_a_golden_artifact_builds_its_model(name, tmp_path):
    model = qkit.load(OUT / name, backend="torchao")
    qkit.save(model, tmp_path / name, source=OUT / name)
    assert read_model(tmp_path / name).digests() == read_model(OUT / name).digests()
