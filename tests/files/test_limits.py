"""qkit refuses inputs by size, name or kind before any work; the largest real models are within the limits."""

import json
import os
import socket
import time

import numpy as np
import pytest
from checkpoints import CONFIG, entry, raw, tensors
from safetensors.numpy import save_file

import qkit
from qkit import Grid
from qkit.artifact import inspect
from qkit.artifact.config import LAYERS, check_config
from qkit.artifact.verify import verify
from qkit.formats import targets
from qkit.formats.targets import Targets
from qkit.intake import DEPTH, parse_json
from qkit.rules import read_recipe
from qkit.storage import layout, read
from qkit.storage.layout import Slot, lay_out
from qkit.streaming.plan import make_plan

RECIPE = 'schema = 1\n[grids.w]\nelement = "int4"\ngroup = 64\n[[rules]]\nmatch = "*"\nweight = "w"\n'


def plan(folder):
    return make_plan(folder, qkit.recipe("int4-g64"))


@pytest.mark.parametrize(
    "name", ["", "a\0b", "\0", "../x", "a/../../x", "/etc/x", "..\\x", "a\nb", "x" * 1001], ids=repr
)
def test_a_name_that_no_tensor_has_is_refused(folder, name):
    raw(folder, {name: entry()}, b"ab")
    with pytest.raises(qkit.ArtifactError, match=r"is no name of a tensor|is a path out of the folder"):
        plan(folder)


@pytest.mark.parametrize("shape", [[1] * 17, [0, 2**62], [2**40, 0, 2**40]], ids=str)
def test_a_shape_that_no_array_has_is_refused(folder, shape):
    raw(folder, {"x": entry(shape=shape, offsets=(0, 1 if 0 not in shape else 0))}, b"a" if 0 not in shape else b"")
    with pytest.raises(qkit.ArtifactError, match="want at most 16 axes"):
        plan(folder)


def test_more_metadata_than_any_model_has_is_refused(folder):
    raw(folder, {"__metadata__": {"x": "a" * 50_000_000}, "x": entry()}, b"ab")
    with pytest.raises(qkit.ArtifactError, match="more than 16,777,216 bytes of metadata"):
        plan(folder)


def test_200_000_tensors_in_a_file_are_refused_by_number(folder):
    raw(folder, {f"t{i}": entry(shape=[0], offsets=(0, 0)) for i in range(200_000)})
    with pytest.raises(qkit.ArtifactError, match="has 200,000 tensors, and qkit opens at most 150,000 in a file"):
        plan(folder)


def test_the_largest_real_models_are_within_the_limits():
    """60 layers of 256 experts with 9 tensors each; and the largest known, 61 layers of 384 experts."""
    assert 200_000 > layout.FILE_TENSORS > 60 * 256 * 9
    assert read.TENSORS > 61 * 384 * 9


def test_qkit_itself_begins_another_file_at_the_limit(monkeypatch):
    monkeypatch.setattr(layout, "FILE_TENSORS", 2)
    made = lay_out([Slot(name, "U8", (1,)) for name in "abcde"], metadata={})
    assert len(made.headers) == 3


def test_a_directory_of_too_many_tensors_is_refused(folder, monkeypatch):
    monkeypatch.setattr(read, "TENSORS", 3)
    with pytest.raises(qkit.ArtifactError, match="has more than 3 tensors"):
        plan(folder)


def test_a_byte_that_is_no_boolean_is_refused(folder):
    raw(folder, {"mask": entry(shape=[4], offsets=(0, 4), dtype="BOOL")}, b"\0\1\2\1")
    found, _ = read.read_folder(folder)
    with pytest.raises(qkit.ArtifactError, match="mask holds the byte 2 at 2, which is no boolean"):
        found["mask"].mapped()


def test_a_byte_that_is_no_boolean_is_not_copied(folder):
    from qkit.streaming.carry_out import quantize_directory

    save_file({**tensors(), "mask": np.array([1, 7], np.uint8).view(np.bool_)}, folder / "model.safetensors")
    with pytest.raises(qkit.ArtifactError, match="mask holds the byte 7 at 1"):
        quantize_directory(
            plan(folder), folder.with_name("out"), engine=qkit.backend("numpy"), workers=1, tick=lambda name, done: None
        )
    assert not folder.with_name("out").exists()


def pipe(file):
    os.mkfifo(file)


def loop(file):
    file.symlink_to(file.name)


def to_socket(file):
    with socket.socket(socket.AF_UNIX) as opened:
        here = os.getcwd()
        os.chdir(file.parent)  # the path of a socket is short
        opened.bind(file.name)
        os.chdir(here)


@pytest.mark.parametrize("make", [pipe, loop, to_socket, os.mkdir], ids=["pipe", "loop", "socket", "directory"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_what_is_no_regular_file_is_not_opened(folder, name, make):
    (folder / name).unlink()
    make(folder / name)
    with pytest.raises((qkit.ArtifactError, qkit.PlanError), match=f"{name} is a |has neither"):
        plan(folder)


def test_a_pipe_is_no_recipe(tmp_path):
    os.mkfifo(tmp_path / "mine.toml")
    with pytest.raises(qkit.RecipeError, match="is a named pipe: put a regular file there"):
        read_recipe(tmp_path / "mine.toml")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('match = "*"', f"match = {json.dumps(['a*'] * 100_000)}", "more than 1,000 patterns"),
        ('match = "*"', f'match = "{"*a" * 5000}"', "more than 1,000 characters"),
        ("group = 64", f"group = 0x{'f' * 5000}", "it holds an integer of 20000 bits"),
        ("group = 64", f"group = {'9' * 5000}", "4300"),
        ("group = 64", f"group = {'[' * 5000}", "mine.toml: "),
        ("group = 64", "group = 4000000000", "group is more than 16,777,216"),
    ],
    ids=["patterns", "pattern", "hexadecimal", "decimal", "nested", "group"],
)
def test_a_recipe_beyond_all_measure_is_refused(tmp_path, old, new, message):
    file = tmp_path / "mine.toml"
    file.write_text(RECIPE.replace(old, new))
    with pytest.raises(qkit.RecipeError, match=message):
        read_recipe(file)


@pytest.mark.parametrize("group", [10**400, 2**40, 2**24], ids=["10^400", "2^40", "2^24"])
def test_a_remedy_for_a_group_is_found_at_once(group):
    began = time.process_time()
    with pytest.raises(qkit.GridError, match=r"group is more than|do not divide"):
        Grid("int4", group).scale_shape((1, 2**40 + 1))
    assert time.process_time() - began < 1


@pytest.mark.parametrize(
    "text",
    ["[" * (DEPTH + 1) + "]" * (DEPTH + 1), "[" * 100_000, "9" * 5000, str(2**63), '{"a": 1, "a": 2}', "{"],
    ids=["deep", "deeper", "digits", "integer", "twice", "cut"],
)
def test_json_of_no_measure_is_refused(text):
    with pytest.raises(ValueError, match=r"nested|integer|twice|Expecting"):
        parse_json(text)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("quantization_config", value) for value in ([1], "x", 7, True)),
        *(("num_hidden_layers", value) for value in (10**9, LAYERS + 1, -1, "2", 2.0, True)),
        *(("vocab_size", value) for value in (2**31, -1, "x", [None])),
        *(
            ("text_config", []),
            ("rope_parameters", [1]),
            ("architectures", "x"),
            ("model_type", {}),
            ("rms_norm_eps", "x"),
        ),
        *(("tie_word_embeddings", "yes"), ("rope_theta", float("inf"))),
    ],
    ids=repr,
)
def test_a_key_of_another_type_is_named(folder, key, value):
    (folder / "config.json").write_text(json.dumps({**CONFIG, key: value}))
    with pytest.raises(qkit.ArtifactError, match=rf"config.json: {key} is .*: want"):
        plan(folder)


def test_null_is_as_good_as_no_key(tmp_path):
    check_config(dict.fromkeys(("num_hidden_layers", "quantization_config", "text_config")), tmp_path)


def group_of(path, *named):
    groups = {str(i): {"targets": list(one)} for i, one in enumerate(named)}
    return int(Targets.of({"config_groups": groups}).group_of(path, kind="Linear"))


def test_a_target_is_a_path_its_end_a_pattern_or_a_class():
    assert group_of("a.b.c", ["Linear"], ["re:a"], ["b.c"]) == 2
    assert group_of("a.b.c", ["Linear"], ["re:.*c$"], ["x"]) == 1
    assert group_of("a.b.c", ["Linear"], ["re:x"]) == 0


def test_a_target_of_two_groups_is_refused():
    with pytest.raises(qkit.ArtifactError, match="has two groups for 'Linear', 0 and 1"):
        group_of("a.b", ["Linear"], ["b", "Linear"])


def test_a_hundred_thousand_targets_are_looked_up_and_as_many_patterns_refused():
    found = Targets.of({"config_groups": {"g": {"targets": [f"layers.{i}.w" for i in range(100_000)]}}})
    began = time.process_time()
    assert all(found.group_of(f"model.layers.{i}.w", kind="Linear") for i in range(0, 100_000, 10))
    assert time.process_time() - began < 2
    with pytest.raises(qkit.ArtifactError, match="more than 1,000 patterns"):
        Targets.of({"config_groups": {"g": {"targets": [f"re:{i}" for i in range(100_000)]}}})


def test_a_pattern_that_never_ends_is_stopped(monkeypatch):
    monkeypatch.setattr(targets, "SECONDS", 0.2)
    with pytest.raises(qkit.ArtifactError, match=r"take more than 0\.2 seconds"):
        group_of("a" * 60 + "!", ["re:(a+)+$"])


def counted(many, folder, monkeypatch):
    """How many times the names of an artifact's tensors are looked through, by `inspect` and `verify`."""
    folder.mkdir()
    w = np.ones((2, 64), np.float32)
    save_file({f"model.layers.{i}.w.weight": w for i in range(many)}, folder / "model.safetensors")
    from qkit.streaming.carry_out import quantize_directory

    quantize_directory(
        plan(folder), folder / "out", engine=qkit.backend("numpy"), workers=1, tick=lambda name, done: None
    )
    began = time.process_time()
    assert list(verify(folder / "out")) == []
    inspect.inspect_directory(folder / "out")
    return time.process_time() - began


def test_twice_the_tensors_take_twice_the_time(tmp_path, monkeypatch):
    """Four times the layers took sixteen times as long; linear with the machine's noise is below eight."""
    counted(50, tmp_path / "first", monkeypatch)
    few, many = counted(500, tmp_path / "few", monkeypatch), counted(2000, tmp_path / "many", monkeypatch)
    assert many < 8 * few
