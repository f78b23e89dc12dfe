"""`qkit plan`, `quantize`, `inspect`, `verify`: what they print, how they fail, and what they do not import."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from checkpoints import INDEX, tensors
from safetensors.numpy import load_file, save_file

from qkit import PlanError
from qkit.cli.quantize import quantize
from qkit.storage.layout import lay_out
from qkit.storage.write import Output


def qkit(*arguments, **options):
    command = [sys.executable, "-c", "from qkit.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"}, **options)


@pytest.fixture
def artifact(folder):
    out = folder.with_name("out")
    done = qkit("quantize", folder, out, "--recipe", "int4-g64", "--shard-size", "20kB")
    assert (done.returncode, done.stderr) == (0, "")
    assert "4 layers quantized" in done.stdout
    return out


def test_the_plan_is_exact_and_complete(folder):
    (folder / "notes.ipynb").write_text("x")
    told = json.loads(qkit("plan", folder, "-r", "int4-g64", "--json", "--shard-size", "20kB").stdout)
    done = qkit("quantize", folder, folder.with_name("out"), "-r", "int4-g64", "--shard-size", "20kB")
    assert done.stderr == "not copied: notes.ipynb\n"
    written = {entry.name: entry.stat().st_size for entry in folder.with_name("out").iterdir()}
    assert told["output_bytes"] == sum(written.values())
    assert told["files"] == {name: size for name, size in written.items() if name.endswith("safetensors")}
    assert told["not_copied"] == ["notes.ipynb"]
    rows = {row["name"]: row for row in told["tensors"]}
    assert rows.keys() == tensors().keys()
    assert rows["model.layers.0.mlp.up_proj.weight"]["weight"] == "int4-g64-signed"
    assert rows["lm_head.weight"]["left_alone"] == "left alone by the rule for lm_head, *.lm_head"
    assert rows["model.norm.weight"]["left_alone"] == "1 axis: a layer has two"


def test_ignored_and_indivisible_layers_stay_in_float(folder):
    options = ("-r", "int4-g128", "--skip-indivisible", "--ignore", "*.up_proj", "--json")
    rows = {row["name"]: row for row in json.loads(qkit("plan", folder, *options).stdout)["tensors"]}
    assert rows["model.layers.0.mlp.up_proj.weight"]["left_alone"] == "left alone by the rule for *.up_proj"
    assert rows["model.layers.0.mlp.gate_proj.weight"]["left_alone"].startswith("skipped: 64 inputs do not divide")
    done = qkit("quantize", folder, folder.with_name("out"), "-r", "int4-g64", "--ignore", "*.no_proj")
    assert done.returncode == 3
    assert "--ignore '*.no_proj' matches no layer of this model" in done.stderr
    assert not folder.with_name("out").exists()


def test_the_plan_reads_no_tensor(folder):
    """A file of the right size whose tensors cannot be read at all is planned just the same."""
    done = qkit("plan", folder, "-r", "int4-g64")
    assert "int4-g64-signed" in done.stdout
    weights = folder / "model.safetensors"
    size, length = weights.stat().st_size, int.from_bytes(weights.read_bytes()[:8], "little")
    os.truncate(weights, 8 + length)
    os.truncate(weights, size)  # a hole where the data were
    assert qkit("plan", folder, "-r", "int4-g64").stdout == done.stdout


def test_inspect(artifact):
    told = json.loads(qkit("inspect", artifact, "--json").stdout)
    (rule,) = told["rules"]
    assert rule["weight"] == {"element": "int4", "group": 64, "scale": "signed"}
    assert rule["layers"] == sorted(name.removesuffix(".weight") for name in tensors() if "proj" in name)
    assert (rule["format"], rule["dtype"]) == ("pack-quantized", "float32")
    assert rule["bits_per_weight"] == 4 + 32 / 64 + 8 * 16 / (96 * 64)
    assert told["left_alone"] == ["lm_head", "model.embed_tokens"]
    assert set(told["files"]) == {entry.name for entry in artifact.glob("*.safetensors")}
    assert "int4-g64-signed" in qkit("inspect", artifact).stdout


def test_inspect_of_a_float_model(folder):
    told = json.loads(qkit("inspect", folder, "--json").stdout)
    assert (told["rules"], told["bits_per_weight"]) == ([], 32)
    assert "no quantized layers" in qkit("inspect", folder).stdout


def test_verify(artifact):
    done = qkit("verify", artifact)
    assert (done.returncode, done.stdout) == (0, f"{artifact} is whole\n")


def flip(folder):
    file = folder / "model-00001-of-00002.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def nan_scale(folder):
    for file in folder.glob("*.safetensors"):
        found = load_file(file)
        if (name := "model.layers.0.mlp.up_proj.weight_scale") in found:
            data = bytearray(file.read_bytes())
            at = data.index(found[name].tobytes())
            data[at : at + 4] = np.float32(np.nan).tobytes()
            file.write_bytes(data)


def rename(folder):
    file = next(iter(folder.glob("model-00001*")))
    file.write_bytes(file.read_bytes().replace(b"lm_head.weight", b"lm_tail.weight"))


def edit_config(folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = 8
    (folder / "config.json").write_text(json.dumps(config))


def stray(name):
    return lambda folder: (folder / name).write_bytes(b"x")


DAMAGES = {
    "flipped bit": (flip, r"model-00001-of-00002.safetensors: .*: its bytes are not those that were written"),
    "truncated": (
        lambda f: os.truncate(f / "model-00002-of-00002.safetensors", 300),
        r"model-00002-of-00002.safetensors",
    ),
    "missing shard": (
        lambda f: (f / "model-00002-of-00002.safetensors").unlink(),
        r"model-00002\S+ is missing|: is missing",
    ),
    "missing config": (lambda f: (f / "config.json").unlink(), "config.json: is missing"),
    "missing index": (lambda f: (f / INDEX).unlink(), "index.json: is missing"),
    "NaN scale": (nan_scale, r"layers.0.mlp.up_proj: weight_scale holds 1 numbers"),
    "renamed tensor": (rename, "its header is not the one that was written"),
    "another grid in config": (
        edit_config,
        "config.json: config_groups of its quantization_config is not that",
    ),
    "stray shard": (
        stray("model-00009-of-00009.safetensors"),
        "model-00009-of-00009.safetensors: is a weights file that qkit",
    ),
    "stray pickle": (
        stray("pytorch_model.bin"),
        "pytorch_model.bin: is a weights file that qkit did not write.*remove it",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_with_its_place(damage, artifact):
    import re

    do, message = DAMAGES[damage]
    do(artifact)
    done = qkit("verify", artifact)
    assert done.returncode == 6, done.stderr
    assert re.search(message, done.stderr), done.stderr
    assert "Traceback" not in done.stderr


def test_exit_codes(folder, tmp_path):
    out = tmp_path / "out"
    assert qkit("quantize", folder, out).returncode == 2  # no recipe
    assert qkit("plan", folder, "-r", "int4-g64", "--shard-size", "many").returncode == 2
    assert qkit("quantize", folder, out, "-r", "int4-g65").returncode == 3
    assert qkit("verify", folder).returncode == 3
    with Output(out, lay_out([], metadata={}), files={}):
        done = qkit("quantize", folder, out, "-r", "int4-g64")
        assert done.returncode == 4
        assert "another process" in done.stderr
    assert "is the model itself" in qkit("quantize", folder, folder, "-r", "int4-g64").stderr
    done = qkit("plan", folder, "-r", "int4-g128")
    assert done.returncode == 5
    assert done.stderr.startswith("qkit: model.layers.0.mlp.gate_proj, model.layers.0.mlp.up_proj, ")
    assert "model.layers.1.mlp.up_proj: 64 inputs do not divide into groups of 128: " in done.stderr
    assert qkit("quantize", tmp_path / "nowhere", out, "-r", "int4-g64").returncode == 5


def test_the_output_can_be_the_current_directory(folder, tmp_path, monkeypatch, capsys):
    """It is replaced under the command's feet: nothing after that may look a relative path up."""
    out = tmp_path / "out"
    for _ in range(2):
        out.mkdir(exist_ok=True)
        monkeypatch.chdir(out)
        quantize(Path("..") / folder.relative_to(tmp_path), Path(), "int4-g64")
        assert capsys.readouterr().out.startswith(".: 4 layers quantized")
    assert (out / "qkit.json").is_file()


def test_quantizing_loads_no_framework(folder, tmp_path):
    code = f"""
import sys
sys.argv = ["qkit", "quantize", {str(folder)!r}, {str(tmp_path / "out")!r}, "-r", "nvfp4-a16"]
from qkit.cli import main
try:
    main()
finally:
    loaded = {{"torch", "torchao", "mlx", "mlx_lm", "transformers", "compressed_tensors"}} & set(sys.modules)
    assert not loaded, loaded
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_progress_is_for_terminals_only(folder, tmp_path):
    import pty

    leader, follower = pty.openpty()
    command = [
        sys.executable,
        "-c",
        "from qkit.cli import main; main()",
        "quantize",
        folder,
        tmp_path / "a",
        "-r",
        "int4-g64",
    ]
    with subprocess.Popen(command, stderr=follower, stdout=subprocess.DEVNULL) as running:
        running.wait()
    os.close(follower)
    assert b"MB/s" in os.read(leader, 1 << 16)
    os.close(leader)
    assert qkit("quantize", folder, tmp_path / "b", "-r", "int4-g64").stderr == ""


def test_a_disk_without_room_is_found_before_any_work(folder, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(PlanError, match=r"out needs 3\d.\d kB, and .* has 10.0 kB free: make room"):
        quantize(folder, tmp_path / "out", "int4-g64")
    assert [entry.name for entry in tmp_path.iterdir()] == ["in"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_stays_below_what_the_plan_says_and_150_mb(tmp_path):
    """On 100 MB of bfloat16, anonymous memory of all processes, sampled; the pages they share counted once."""
    source = tmp_path / "in"
    source.mkdir()
    w = np.ones((4096, 4096), ml_dtypes.bfloat16)
    save_file({f"{i}.weight": w for i in range(3)}, source / "model.safetensors")
    told = json.loads(qkit("plan", source, "-r", "int4-g64-minmax", "--json").stdout)["peak_memory_bytes"]
    command = [sys.executable, "-c", "from qkit.cli import main; main()", "quantize", source, tmp_path / "out"]
    peak = 0
    with subprocess.Popen([*command, "-r", "int4-g64-minmax"], stdout=subprocess.DEVNULL) as running:
        while running.poll() is None:
            peak = max(peak, anonymous(running.pid))
    assert running.returncode == 0
    assert 0 < peak < told < 150e6


def anonymous(pid):
    """Bytes of anonymous memory of a process and its children, shared pages divided among them."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    own = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss_Anon")), 0)
    return own + sum(anonymous(int(child)) for child in children)
