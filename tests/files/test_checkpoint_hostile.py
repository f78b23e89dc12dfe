"""Directories from strangers: whatever is wrong is refused by file, tensor and way out, and no code in them runs."""

import json
import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from checkpoints import CONFIG, INDEX, entry, raw, tensors
from safetensors.numpy import save_file

import qkit
from qkit.streaming.carry_out import quantize_directory
from qkit.streaming.plan import make_plan


@pytest.fixture
def folder(tmp_path):
    """A sound directory of two shards."""
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    whole = tensors()
    shards = {"model-00001-of-00002.safetensors": list(whole)[:3], "model-00002-of-00002.safetensors": list(whole)[3:]}
    for shard, names in shards.items():
        save_file({name: whole[name] for name in names}, folder / shard)
    places = {name: shard for shard, names in shards.items() for name in names}
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))
    return folder


def attempt(folder):
    """Everything that `qkit quantize` does; gives what is in the output."""
    out = folder.with_name("out")
    plan = make_plan(folder, qkit.recipe("int4-g64"))
    quantize_directory(plan, out, engine=qkit.backend("numpy"), workers=2, tick=lambda name, done: None)
    return {entry.name for entry in out.iterdir()}


def edit_index(folder, edit):
    table = json.loads((folder / INDEX).read_text())
    edit(table["weight_map"])
    (folder / INDEX).write_text(json.dumps(table))


def one_file(folder, edit=None, dtype=np.float32):
    for file in folder.glob("model*"):
        file.unlink()
    named = tensors(dtype)
    if edit:
        edit(named)
    save_file(named, folder / "model.safetensors")


def link(file, target):
    file.unlink(missing_ok=True)
    file.symlink_to(target)


UP = "model.layers.0.mlp.up_proj.weight"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
ATTACKS = {
    "index entry outside": (
        lambda folder: edit_index(folder, lambda places: places.update({UP: "../elsewhere.safetensors"})),
        r"index.json: '\.\./elsewhere.safetensors' is not a file of this folder",
    ),
    "index entry absolute": (
        lambda folder: edit_index(folder, lambda places: places.update({UP: "/etc/x.safetensors"})),
        "'/etc/x.safetensors' is not a file of this folder",
    ),
    "index names a pickle": (
        lambda folder: edit_index(folder, lambda places: places.update({UP: "pytorch_model.bin"})),
        f"{UP} is in 'pytorch_model.bin', which is no safetensors file",
    ),
    "index is a list": (lambda folder: (folder / INDEX).write_text("[1]"), "index.json: not a JSON object"),
    "index without a map": (lambda folder: (folder / INDEX).write_text("{}"), "index.json: not an index of shards"),
    "index says it twice": (
        lambda folder: (folder / INDEX).write_text('{"weight_map": {"a": "b.safetensors", "a": "c.safetensors"}}'),
        "'a' stands twice",
    ),
    "nested deeper than the stack": (
        lambda folder: (folder / "config.json").write_text("[" * 200_000),
        "config.json: not a JSON object",
    ),
    "missing shard": (lambda folder: (folder / SECOND).unlink(), f"{SECOND} is missing: fetch it again"),
    "missing tensor": (
        lambda folder: edit_index(folder, lambda places: places.update(ghost=FIRST)),
        f"ghost is not in {FIRST}",
    ),
    "missing layer": (
        lambda folder: one_file(folder, lambda named: [named.pop(name) for name in list(named) if "layers.0" in name]),
        "no tensor of hidden layer 0 is here, and config.json counts 2",
    ),
    "extra tensor": (
        lambda folder: edit_index(folder, lambda places: places.pop(UP)),
        f"{FIRST}: {UP} stands here, but the index does not have it",
    ),
    "tensor in two shards": (
        lambda folder: save_file({UP: np.zeros(3, np.float32)}, folder / SECOND),
        f"{SECOND}: {UP} stands here, but the index puts it in {FIRST}",
    ),
    "stale shard": (
        lambda folder: save_file({"x": np.zeros(3, np.float32)}, folder / "model-00003-of-00003.safetensors"),
        "model-00003-of-00003.safetensors is not in model.safetensors.index.json",
    ),
    "stale single file": (
        lambda folder: save_file({"x": np.zeros(3, np.float32)}, folder / "model.safetensors"),
        "model.safetensors is not in model.safetensors.index.json",
    ),
    "shards without index": (lambda folder: (folder / INDEX).unlink(), f"has {FIRST} but no {INDEX}"),
    "pickles only": (
        lambda folder: (
            [e.unlink() for e in folder.glob("model*")] and (folder / "pytorch_model.bin").write_bytes(b"\x80")
        ),
        "in pytorch_model.bin, a pickle, which can run code",
    ),
    "nothing": (lambda folder: [e.unlink() for e in folder.glob("model*")], "has neither model.safetensors nor"),
    "a pickle in disguise": (
        lambda folder: raw(folder, b"") or (folder / "model.safetensors").write_bytes(b"\x80\x04cos\nsystem\n"),
        "model.safetensors: ",
    ),
    "truncated": (
        lambda folder: os.truncate(folder / SECOND, (folder / SECOND).stat().st_size - 5),
        f"{SECOND}: .*fetch it again",
    ),
    "longer than its header says": (
        lambda folder: os.truncate(folder / SECOND, (folder / SECOND).stat().st_size + 4),
        f"{SECOND}: .*fetch it again",
    ),
    "empty": (lambda folder: os.truncate(folder / SECOND, 0), f"{SECOND}: .*fetch it again"),
    "header bomb": (lambda folder: raw(folder, b"{}", length=2**62), "model.safetensors: .*fetch it again"),
    "shape bomb": (
        lambda folder: raw(folder, {"x": entry(shape=[2**40, 2**40], offsets=(0, 2))}, b"ab"),
        "model.safetensors: .*fetch it again",
    ),
    "overlap": (
        lambda folder: raw(folder, {"x": entry(), "y": entry(offsets=(1, 3))}, b"abc"),
        "model.safetensors: .*fetch it again",
    ),
    "header says it twice": (
        lambda folder: raw(folder, b'{"x":%b,"x":%b}' % ((json.dumps(entry()).encode(),) * 2), b"ab"),
        "model.safetensors: 'x' stands twice",
    ),
    "unknown type": (
        lambda folder: raw(folder, {"x": entry(shape=[4], offsets=(0, 2), dtype="F4")}, b"ab"),
        "model.safetensors: x is F4, which qkit does not read",
    ),
    "integers for weights": (
        lambda folder: one_file(folder, lambda named: named.update({UP: np.ones((96, 64), np.int64)})),
        "layers.0.mlp.up_proj: its weight is int64: only float32, bfloat16, float16 are quantized",
    ),
    "quantized already": (
        lambda folder: (folder / "config.json").write_text(
            json.dumps({"quantization_config": {"quant_method": "awq"}})
        ),
        "quantized by awq, and no tensor is part of a weight quantized so",
    ),
    "width": (
        lambda folder: one_file(folder, lambda named: named.update({UP: np.ones((96, 60), np.float32)})),
        "layers.0.mlp.up_proj: 60 inputs do not divide into groups of 64",
    ),
    "config is a list": (lambda folder: (folder / "config.json").write_text("[]"), "config.json: not a JSON"),
    "weights are a link out": (
        lambda folder: link(folder / SECOND, (folder / SECOND).rename(folder.parent / "secret.safetensors")),
        f"{SECOND} is a link out of its folder",
    ),
    "tokenizer is a link out": (
        lambda folder: link(folder / "tokenizer.json", "/etc/passwd"),
        "tokenizer.json is a link out of its folder",
    ),
    "config is a link out": (
        lambda folder: link(folder / "config.json", "/etc/passwd"),
        "config.json is a link out of its folder",
    ),
    "parts of a quantized weight beside it": (
        lambda folder: one_file(
            folder, lambda named: named.update({UP.replace("weight", "weight_packed"): np.ones(3, np.float32)})
        ),
        r"up_proj.weight_packed is part of a quantized weight \(compressed-tensors\), and config.json does not say of which kind",
    ),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_it_is_refused_before_anything_is_written(attack, folder):
    do, message = ATTACKS[attack]
    do(folder)
    with pytest.raises((qkit.ArtifactError, qkit.PlanError), match=message):
        attempt(folder)
    assert [entry.name for entry in folder.parent.iterdir() if "out" in entry.name] == []


def test_the_sound_directory_is_taken(folder):
    assert attempt(folder) == {"model.safetensors", "config.json", "qkit.json"}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize(("name", "place"), [(UP, (77, 5)), ("model.norm.weight", (3,)), ("lm_head.weight", (31, 63))])
def test_a_number_that_is_not_finite_is_named_with_its_place(folder, name, place, dtype, value):
    one_file(folder, lambda named: named[name].__setitem__(place, value), dtype)
    with pytest.raises(
        qkit.RangeError, match=rf"model.safetensors: {name} holds {value:g} at \[{', '.join(map(str, place))}\]"
    ):
        attempt(folder)
    assert [entry.name for entry in folder.parent.iterdir()] == ["in"]


def test_a_weight_of_2_to_the_127_is_refused_and_a_mask_of_it_is_copied(folder):
    one_file(folder, lambda named: named.update({"mask": np.full(3, np.finfo(np.float32).min)}))
    attempt(folder)
    one_file(folder, lambda named: named[UP].__setitem__((1, 2), 2.0**127))
    with pytest.raises(qkit.RangeError, match=r"holds 1.70141e\+38 at \[1, 2\]"):
        attempt(folder)


def test_the_hubs_cache_is_links_and_is_taken(folder):
    """Read off huggingface_hub 2.4: snapshots/REVISION/FILE -> ../../blobs/DIGEST."""
    cache = folder.parent / "models--x--y"
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots/abc"
    snapshot.mkdir(parents=True)
    for i, file in enumerate(sorted(folder.iterdir())):
        file.rename(cache / f"blobs/{i}")
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    plan = make_plan(snapshot, qkit.recipe("int4-g64"))
    quantize_directory(plan, folder, engine=qkit.backend("numpy"), workers=1, tick=lambda name, done: None)
    assert (folder / "model.safetensors").is_file()


def test_nothing_in_the_directory_is_run_or_copied_unasked(folder):
    bomb = "import pathlib; pathlib.Path('ran').touch()"
    for name in ("modeling_evil.py", "configuration_evil.py", "tokenizer_evil.py", "tokenizer.pkl", "sitecustomize.py"):
        (folder / name).write_text(bomb)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "auto_map": {"AutoModel": "modeling_evil.Model"}}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "training_args.bin").write_bytes(b"\x80")
    assert attempt(folder) == {"model.safetensors", "config.json", "qkit.json", "tokenizer.json"}
    done = subprocess.run(
        [sys.executable, "-c", "from qkit.cli import main; main()", "plan", ".", "-r", "int4-g64", "--json"],
        cwd=folder,
        env={**os.environ, "PYTHONSAFEPATH": "1"},
        capture_output=True,
        check=True,
    )
    assert "modeling_evil.py" in json.loads(done.stdout)["not_copied"]
    assert not (folder / "ran").exists()
    plan = make_plan(folder, qkit.recipe("int4-g64"), copy_code=True)
    assert {"modeling_evil.py", "tokenizer_evil.py"} <= plan.files.keys()
    assert {"tokenizer.pkl", "training_args.bin"} <= set(plan.left_behind)


def test_a_source_that_shrinks_meanwhile_is_an_error(folder):
    plan = make_plan(folder, qkit.recipe("int4-g64"))
    os.truncate(folder / SECOND, 2000)
    with pytest.raises(qkit.ArtifactError, match=f"{SECOND}: .* ends early: the file has changed since"):
        quantize_directory(
            plan, folder.with_name("out"), engine=qkit.backend("numpy"), workers=2, tick=lambda name, done: None
        )
    assert [entry.name for entry in folder.parent.iterdir()] == ["in"]
