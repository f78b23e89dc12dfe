"""Checkpoints of many tensors: time linear in their number, memory as planned, one map for each file, few lines of output."""

import json
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import qkit
from qkit.artifact.inspect import inspect_directory
from qkit.artifact.verify import verify
from qkit.cli import inspect as inspect_command
from qkit.cli import plan as plan_command
from qkit.cli import progress
from qkit.cli.quantize import quantize
from qkit.exchange.diff import compare
from qkit.exchange.export_model import export_mlx
from qkit.exchange.import_model import read_model
from qkit.processes import in_processes
from qkit.streaming.carry_out import quantize_directory
from qkit.streaming.plan import make_plan

LAYER = ("input_layernorm", "post_attention_layernorm")


def checkpoint(folder, layers, branches):
    """Layers of many small branches, three weights in each, and four larger ones. Their names are those of no experts."""
    small, large = np.ones((8, 64), ml_dtypes.bfloat16), np.ones((64, 64), ml_dtypes.bfloat16)
    tensors = {"model.embed_tokens.weight": large, "lm_head.weight": large}
    for i in range(layers):
        tensors |= {f"model.layers.{i}.{name}.weight": large[0] for name in LAYER}
        tensors |= {f"model.layers.{i}.self_attn.{name}_proj.weight": large for name in "qkvo"}
        for j in range(branches):
            tensors |= {
                f"model.layers.{i}.mlp.branches.{j}.{name}_proj.weight": small for name in ("gate", "up", "down")
            }
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    return folder


def write(made, out, workers=1):
    quantize_directory(made, out, engine=qkit.backend("numpy"), workers=workers, tick=lambda *_: None)


def work(home, branches, layers=2):
    """Processor seconds of each command on a checkpoint, by its name."""
    source, seconds = checkpoint(home / f"in{branches}", layers, branches), {}

    def timed(name, run, *arguments):
        start = time.process_time()
        found = run(*arguments)
        seconds[name] = time.process_time() - start
        return found

    out = home / f"out{branches}"
    made = timed("plan", make_plan, source, qkit.recipe("int4-g64"))
    timed("quantize", write, made, out)
    timed("inspect", inspect_directory, out)
    assert timed("verify", lambda: list(verify(out))) == []
    snapshot = timed("read", read_model, out)
    timed("export", export_mlx, snapshot, home / f"mlx{branches}")
    differences = timed("diff", lambda: list(compare(snapshot, read_model(home / f"mlx{branches}"))))
    assert all(row.equal for row in differences)
    return seconds


def test_every_command_takes_time_linear_in_the_number_of_tensors(tmp_path):
    (tmp_path / "warm").mkdir()
    work(tmp_path / "warm", 10)  # imports
    few, many = work(tmp_path, 70), work(tmp_path, 560)
    for name, seconds in many.items():
        assert seconds < 20 * max(few[name], 0.04), (name, few[name], seconds)  # 8 times the tensors; squared: 64 times


def test_a_directory_has_more_tensors_than_the_system_allows_open_files(tmp_path):
    made = make_plan(checkpoint(tmp_path / "in", 1, 200), qkit.recipe("int4-g64"))
    write(made, tmp_path / "out")
    code = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)); from qkit.cli import main; main()"
    command = [sys.executable, "-c", code, "export", tmp_path / "out", tmp_path / "mlx", "--to", "mlx"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("workers", [2, 6])
def test_more_processes_write_the_same_bytes(tmp_path, workers):
    made = make_plan(checkpoint(tmp_path / "in", 2, 150), qkit.recipe("int4-g64"))
    write(made, tmp_path / "one")
    write(made, tmp_path / "out", workers)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()


def test_a_failure_in_one_process_ends_all(tmp_path):
    source = checkpoint(tmp_path / "in", 2, 150)
    weights = source / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-2:] = b"\x80\x7f"  # infinity
    weights.write_bytes(data)
    with pytest.raises(qkit.RangeError, match="holds inf"):
        write(make_plan(source, qkit.recipe("int4-g64")), tmp_path / "out", 3)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["in"]


def test_results_come_as_they_are_ready_and_one_task_needs_no_process():
    assert sorted(in_processes(abs, range(-20, 1), workers=3)) == list(range(21))
    assert list(in_processes(lambda x: -x, [1], workers=3)) == [-1]  # a lambda cannot be pickled
    assert list(in_processes(abs, [], workers=3)) == []


def test_plan_and_inspect_show_one_line_for_layers_and_branches_that_are_alike(tmp_path, capsys):
    source, out = checkpoint(tmp_path / "in", 3, 100), tmp_path / "out"
    plan_command.plan(source, "int4-g64")
    told = capsys.readouterr().out
    (line,) = (line for line in told.splitlines() if "gate_proj" in line)
    assert line.split()[0].startswith("model.layers.{0-2}.mlp.branches.{0-99}.gate_proj")
    assert line.split()[1:3] == ["300", "BF16"]
    assert len(told.splitlines()) < 25
    quantize(source, out, "int4-g64")
    capsys.readouterr()
    inspect_command.inspect(out)
    told = capsys.readouterr().out
    (line,) = (line for line in told.splitlines() if "gate_proj" in line)
    assert line.split()[0].startswith("model.layers.{0-2}.mlp.branches.{0-99}.gate_proj")
    assert line.split()[1:3] == ["300", "int4-g64-signed"]
    assert "all layers: kind linear" in told
    for command, arguments in ((plan_command.plan, (source, "int4-g64")), (inspect_command.inspect, (out,))):
        command(*arguments, all_rows=True)
        told = capsys.readouterr().out
        assert sum("gate_proj" in line for line in told.splitlines()) == 300


def test_progress_without_a_terminal_is_a_line_a_minute(monkeypatch, capsys):
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.showing(4_000_000_000) as tick:
        tick("", 1_000_000_000)  # an earlier run's work
        for second in range(1, 151):
            now[0] = 1000.0 + second
            tick("a", 10_000_000)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["1.6 GB of 4.0 GB, 10.0 MB/s, about 4 min left", "2.2 GB of 4.0 GB, 10.0 MB/s, about 3 min left"]


# `make test-size`: the sizes of today's largest mixtures


@pytest.mark.size
def test_60_layers_of_256_branches_are_planned_in_10_seconds(tmp_path):
    source = checkpoint(tmp_path / "in", 60, 256)
    start = time.process_time()
    made = make_plan(source, qkit.recipe("int4-g64"))
    assert time.process_time() - start < 10
    assert len(made.rows) == 60 * (256 * 3 + 6) + 2


@pytest.mark.size
@pytest.mark.parametrize("count", [1000, 50_000])
def test_memory_on_tiny_tensors_is_below_what_the_plan_says(tmp_path, count):
    source = checkpoint(tmp_path / "in", 10, count // 30)
    told = make_plan(source, qkit.recipe("int4-g64")).peak_memory(2)
    command = [sys.executable, "-c", "from qkit.cli import main; main()", "quantize", source, tmp_path / "out"]
    peak = 0
    with subprocess.Popen([*command, "-r", "int4-g64", "--jobs", "2"], stdout=subprocess.DEVNULL) as running:
        while running.poll() is None:
            peak = max(peak, anonymous(running.pid))
            time.sleep(0.05)
    assert running.returncode == 0
    assert told / 4 < peak < told


def anonymous(pid):
    """Bytes of anonymous memory of a process and its children, shared pages divided among them."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    own = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss_Anon")), 0)
    return own + sum(anonymous(int(child)) for child in children)


@pytest.mark.size
def test_50_000_tiny_tensors_go_through_every_command(tmp_path):
    seconds = work(tmp_path, 8000)  # 48,014 tensors
    assert max(seconds.values()) < 60, seconds
