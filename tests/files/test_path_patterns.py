"""Paths as patterns with ranges of numbers: exact both ways, one for a stack of layers, and safe to read from strangers."""

import json

import numpy as np
import pytest
from checkpoints import whole
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import qkit
from qkit.artifact.inspect import inspect_directory
from qkit.artifact.metadata import read_rules
from qkit.path_patterns import collapse, expand
from qkit.storage.read import read_folder
from qkit.streaming.carry_out import quantize_directory
from qkit.streaming.plan import make_plan

PARTS = st.sampled_from(["layers", "0", "1", "2", "7", "10", "007", "{0-3}", "{", "}}", "", "up", "1234567890", "٣"])


@given(st.sets(st.lists(PARTS, min_size=1, max_size=5).map(".".join), max_size=40))
def test_expanding_gives_back_every_path_once(paths):
    assert sorted(expand(collapse(sorted(paths)), most=100)) == sorted(paths)


def test_experts_of_all_layers_are_one_pattern():
    paths = [f"layers.{i}.experts.{e}.up" for i in range(60) for e in range(256)]
    assert collapse(paths) == {"layers.{0-59}.experts.{0-255}.up": 60 * 256}
    rest = [path for path in paths if "layers.3." not in path]
    assert collapse(rest) == {"layers.{0-2,4-59}.experts.{0-255}.up": 59 * 256}


def test_what_is_no_product_of_ranges_is_several_patterns():
    assert collapse(["a.0.0", "a.0.1", "a.1.1"]) == {"a.0.{0-1}": 2, "a.1.1": 1}


@pytest.mark.parametrize("text", ["a{", "a.{}", "{5-2}", "{1,}", "{01}", "{-1}", "{0-9999999999}", "a.}b"])
def test_a_text_that_is_no_pattern_is_refused(text):
    with pytest.raises(ValueError, match="is no pattern of paths"):
        expand([text], most=1000)


def test_patterns_of_too_many_paths_are_refused_before_any_is_made():
    with pytest.raises(ValueError, match="more than 1,000 paths"):
        expand(["a.{0-999999999}.{0-999999999}"], most=1000)
    with pytest.raises(ValueError, match="more than 1,000 paths"):
        expand(["a.{0-600}", "b.{0-600}"], most=1000)


@pytest.fixture
def artifact(tmp_path):
    source, out = whole(tmp_path / "in"), tmp_path / "out"
    quantize_directory(
        make_plan(source, qkit.recipe("int4-g64")), out, engine=qkit.backend("numpy"), workers=1, tick=lambda *_: None
    )
    return out


def rewrite(folder, change):
    """The weights of `folder` with other metadata; without a seal, which would differ."""
    _, metadata = read_folder(folder)
    described = json.loads(metadata["qkit"])
    change(described["rules"][0])
    tensors = {name: np.array(array) for name, array in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"qkit": json.dumps(described)})
    (folder / "qkit.json").unlink()


def test_metadata_hold_patterns_and_an_artifact_that_lists_every_path_opens_too(artifact):
    _, metadata = read_folder(artifact)
    rules = read_rules(artifact, metadata, None)
    assert json.loads(metadata["qkit"])["rules"][0]["patterns"] == [
        "model.layers.{0-1}.mlp.gate_proj",
        "model.layers.{0-1}.mlp.up_proj",
    ]

    def before(table):
        del table["patterns"]
        table["layers"] = list(rules[0].paths)

    rewrite(artifact, before)
    _, metadata = read_folder(artifact)
    assert read_rules(artifact, metadata, None) == rules
    assert inspect_directory(artifact).groups[0].stored == rules[0]


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["model.layers.{0-499999999}.mlp.up_proj"], "more than 500,000 paths"),
        (["model.layers.{0-1}.mlp.up_proj", "model.layers.1.mlp.up_proj"], "a layer stands twice"),
        (["model.layers.{1-0}.mlp.up_proj"], "no range of numbers"),
        ([], "patterns: want a list of paths"),
        ("model.layers.{0-1}", "patterns: want a list of paths"),
    ],
)
def test_bad_patterns_in_metadata_are_refused_by_name(artifact, patterns, message):
    rewrite(artifact, lambda table: table.update(patterns=patterns))
    with pytest.raises(qkit.ArtifactError, match=f"{artifact}: .*{message}"):
        inspect_directory(artifact)
