"""Quantizing a checkpoint on disk: `qkit quantize` beside `mlx_lm.convert`, llm-compressor's `model_free_ptq` and `cp`.

One generated Llama-shaped directory in bfloat16, each program a process of its own, on cached files. `cp` and qkit take turns,
and after them the others: `cp` took four times its time after a program that had filled the memory of a machine. Medians and
the best with the spread of the repeats, ratios, the processor time of all cores, and the peak of anonymous memory (Pss_Anon
of the process and its children, sampled: pages that processes share count once).

Usage: python benchmarks/checkpoint.py [--gigabytes 2.2] [--repeats 3] [--folder DIR] [--compressor PYTHON] [--recipes NAME ...]
       [--out FILE.json]

`--compressor` is the Python of an environment with llmcompressor, which does not live beside everybody's transformers.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from measure import Report, relative

from qkit import native
from qkit.storage.arrays import array_stream
from qkit.storage.write import write_directory

WIDTH, INNER, KEYS, VOCABULARY = 2048, 5632, 256, 32000  # TinyLlama's, which is 2.2 GB in 22 layers
LAYER = {
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.k_proj": (KEYS, WIDTH),
    "self_attn.v_proj": (KEYS, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.gate_proj": (INNER, WIDTH),
    "mlp.up_proj": (INNER, WIDTH),
    "mlp.down_proj": (WIDTH, INNER),
    "input_layernorm": (WIDTH,),
    "post_attention_layernorm": (WIDTH,),
}
JOBS = {"int4-g64": ("int4-g64", 4, 64, "W4A16"), "int8-g128": ("int8-g128", 8, 128, "W8A16")}
COMPRESS = """
import sys
from llmcompressor import model_free_ptq
model_free_ptq(model_stub=sys.argv[1], save_directory=sys.argv[2], scheme=sys.argv[3], ignore=["lm_head"], max_workers=2)
"""


def generate(folder: Path, gigabytes: float) -> None:
    """A Llama of about this size, with random weights and a tokenizer that only has to load."""
    layers = max(1, round((gigabytes * 1e9 - 4 * VOCABULARY * WIDTH) / sum(2 * np.prod(s) for s in LAYER.values())))
    shapes = {f"model.layers.{i}.{name}.weight": shape for i in range(layers) for name, shape in LAYER.items()}
    shapes |= {"model.embed_tokens.weight": (VOCABULARY, WIDTH), "lm_head.weight": (VOCABULARY, WIDTH)}
    shapes["model.norm.weight"] = (WIDTH,)
    random = np.random.default_rng(0)
    arrays: dict[tuple[int, ...], np.ndarray[Any, Any]] = {}  # one of each shape: no program looks for equal weights
    for shape in set(shapes.values()):
        w = random.standard_normal(shape, np.float32) * np.float32(WIDTH**-0.5) if len(shape) > 1 else np.ones(shape)
        arrays[shape] = w.astype(ml_dtypes.bfloat16)
    streams = [array_stream(name, arrays[shape]) for name, shape in shapes.items()]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": VOCABULARY,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    }
    vocabulary = {"<unk>": 0, **{chr(97 + i): i + 1 for i in range(26)}}
    tokenizer = {"version": "1.0", "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"}}
    tokenizer |= dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    tokenizer["added_tokens"] = []
    files = {
        "config.json": config,
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"},
    }
    content = {name: json.dumps(table).encode() for name, table in files.items()}
    write_directory(folder, streams, metadata={"format": "pt"}, files=content, shard_bytes=1_000_000_000)


@dataclass(frozen=True)
class Run:
    """One repeat: seconds by the wall and of processor time, and the peak of anonymous memory in bytes."""

    wall: float
    processor: float
    anonymous: int


def commands(source: Path, out: Path, compressor: str | None, recipes: list[str]) -> dict[str, list[str]]:
    """The timed commands by name; each writes `out`."""
    here = sys.executable
    jobs = {"cp": ["cp", "-r", str(source), str(out)]}
    for name, (recipe, bits, group, scheme) in ((name, JOBS[name]) for name in recipes):
        code = "from qkit.cli import main; main()"
        jobs[f"qkit quantize {name}"] = [here, "-c", code, "quantize", str(source), str(out), "--recipe", recipe]
        options = ["--q-bits", str(bits), "--q-group-size", str(group)]
        convert = [here, "-m", "mlx_lm", "convert", "--hf-path", str(source), "--mlx-path", str(out), "-q", *options]
        jobs[f"mlx_lm.convert {name}"] = convert
        if compressor:
            jobs[f"model_free_ptq {scheme}"] = [compressor, "-c", COMPRESS, str(source), str(out), scheme]
    return jobs


def timed(command: list[str], out: Path) -> Run:
    """`command` run once."""
    shutil.rmtree(out, ignore_errors=True)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    used, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with subprocess.Popen(command, **quiet, env={**os.environ, "HF_HUB_OFFLINE": "1"}) as process:
        peak = [0]
        watch = threading.Thread(target=_watch, args=(process, peak))
        watch.start()
        _, errors = process.communicate()
        seconds = time.perf_counter() - start
        watch.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command[:6])}: {errors.decode()[-2000:]}")
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Run(seconds, now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime, peak[0])


def _watch(process: "subprocess.Popen[bytes]", peak: list[int]) -> None:
    while process.poll() is None:
        peak[0] = max(peak[0], _anonymous(process.pid))
        time.sleep(0.01)


def _anonymous(pid: int) -> int:
    """Bytes of anonymous memory of a process and of its children: pages that two processes share count twice.

    `status` has them counted. `smaps_rollup`, without those pages, walks all mapped ones, and takes a core of the program's.
    """
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    own = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)
    return own + sum(_anonymous(int(child)) for child in children)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=2.2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--compressor", default=None)
    parser.add_argument("--recipes", nargs="+", default=list(JOBS), choices=JOBS)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as home:
        source, out = Path(home) / "model", Path(home) / "out"
        generate(source, given.gigabytes)
        size = sum(file.stat().st_size for file in source.iterdir())
        os.sync()
        jobs = commands(source, out, given.compressor, given.recipes)
        results: dict[str, list[Run]] = {name: [] for name in jobs}
        light = [name for name in jobs if name.startswith(("cp", "qkit"))]
        for names in (light, [name for name in jobs if name not in light]):
            for repeat in range(given.repeats + 1):
                for name in names:
                    result = timed(jobs[name], out)
                    os.sync()  # so that nobody writes back what another has written
                    if repeat:  # the first round warms the caches up
                        results[name].append(result)
    print(f"{size / 1e9:.2f} GB of bfloat16, {given.repeats} repeats, {os.cpu_count()} cores, cached files")
    report = Report(given.out, packages=("mlx-lm",), about={"kernels": native.available(), "bytes": size})
    report.machine["load"] = round(os.getloadavg()[1], 2)
    report.versions |= _versions(given.compressor)
    for path, name in ((given.folder, "DIR"), (given.compressor, "PYTHON")):
        report.command = report.command.replace(f" {path} ", f" {name} ")  # without the paths of this machine
    for row in _rows(results):
        report.add(row)
    report.finish()


def _rows(results: dict[str, list[Run]]) -> Iterator[dict[str, Any]]:
    base, ours = results["cp"], None
    for name, runs in results.items():
        ours = runs if name.startswith("qkit") else ours
        median, best = (pick(run.wall for run in runs) for pick in (statistics.median, min))
        yield {
            "program": name,
            "seconds": {**relative([run.wall for run in runs], 3), "best": round(best, 3)},
            "processor seconds": round(statistics.median(run.processor for run in runs), 3),
            "anonymous MB": round(max(run.anonymous for run in runs) / 1e6),
            "/ cp": round(median / statistics.median(run.wall for run in base), 2),
            "best / cp": round(best / min(run.wall for run in base), 2),
            "/ qkit": round(median / statistics.median(run.wall for run in ours), 2) if ours else None,
        }


def _versions(python: str | None) -> dict[str, str]:
    if python is None:
        return {}
    code = "from importlib.metadata import version; print(version('llmcompressor'))"
    return {
        "llmcompressor": subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    }


if __name__ == "__main__":
    main()
