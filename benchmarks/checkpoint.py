"""Quantizing a checkpoint on disk: `qkit quantize` beside `mlx_lm.convert`, llm-compressor's `model_free_ptq` and `cp`.

One generated Llama-shaped directory in bfloat16, each program a process of its own, in turn, on cached files; medians with
the spread of the repeats, ratios, and the peak of anonymous memory (Pss_Anon of the process and its children, sampled:
pages that processes share count once).

Usage: python benchmarks/checkpoint.py [--gigabytes 2.2] [--repeats 3] [--folder DIR] [--compressor PYTHON]

`--compressor` is the Python of an environment with llmcompressor, which does not live beside everybody's transformers.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from qkit.artifact.tensors import array_stream
from qkit.checkpoint.output import write_directory

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
    streams = []
    for name, shape in shapes.items():
        w = random.standard_normal(shape, np.float32) * np.float32(WIDTH**-0.5) if len(shape) > 1 else np.ones(shape)
        streams.append(array_stream(name, w.astype(ml_dtypes.bfloat16)))
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


def commands(source: Path, out: Path, compressor: str | None) -> dict[str, list[str]]:
    """What is timed, by name; each writes `out`."""
    here = sys.executable
    jobs = {"cp": ["cp", "-r", str(source), str(out)]}
    for name, (recipe, bits, group, scheme) in JOBS.items():
        code = "from qkit.cli import main; main()"
        jobs[f"qkit quantize {name}"] = [here, "-c", code, "quantize", str(source), str(out), "--recipe", recipe]
        options = ["--q-bits", str(bits), "--q-group-size", str(group)]
        convert = [here, "-m", "mlx_lm", "convert", "--hf-path", str(source), "--mlx-path", str(out), "-q", *options]
        jobs[f"mlx_lm.convert {name}"] = convert
        if compressor:
            jobs[f"model_free_ptq {scheme}"] = [compressor, "-c", COMPRESS, str(source), str(out), scheme]
    return jobs


def timed(command: list[str], out: Path) -> tuple[float, int]:
    """Seconds that it takes, and the peak of its anonymous memory in bytes."""
    shutil.rmtree(out, ignore_errors=True)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    start = time.perf_counter()
    with subprocess.Popen(command, **quiet, env={**os.environ, "HF_HUB_OFFLINE": "1"}) as process:
        peak = [0]
        watch = threading.Thread(target=_watch, args=(process, peak))
        watch.start()
        _, errors = process.communicate()
        seconds = time.perf_counter() - start
        watch.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command[:6])}: {errors.decode()[-2000:]}")
    return seconds, peak[0]


def _watch(process: "subprocess.Popen[bytes]", peak: list[int]) -> None:
    while process.poll() is None:
        peak[0] = max(peak[0], _anonymous(process.pid))
        time.sleep(0.01)


def _anonymous(pid: int) -> int:
    """Bytes of anonymous memory of a process and of its children."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    own = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss_Anon")), 0)
    return own + sum(_anonymous(int(child)) for child in children)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=2.2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--compressor", default=None)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as home:
        source, out = Path(home) / "model", Path(home) / "out"
        generate(source, given.gigabytes)
        size = sum(file.stat().st_size for file in source.iterdir())
        os.sync()
        jobs = commands(source, out, given.compressor)
        results: dict[str, list[tuple[float, int]]] = {name: [] for name in jobs}
        for repeat in range(given.repeats + 1):
            for name, command in jobs.items():
                result = timed(command, out)
                os.sync()  # so that nobody writes back what another has written
                if repeat:  # the first round warms the caches up
                    results[name].append(result)
        _show(results, size, given.repeats)


def _show(results: dict[str, list[tuple[float, int]]], size: int, repeats: int) -> None:
    medians = {name: statistics.median(seconds for seconds, _ in runs) for name, runs in results.items()}
    print(f"{size / 1e9:.2f} GB of bfloat16, {repeats} repeats, {os.cpu_count()} cores, cached files")
    print(f"{'':30}{'seconds':>9}{'spread':>14}{'/ cp':>8}{'/ qkit':>8}{'anonymous MB':>14}")
    ours = 1.0
    for name, runs in results.items():
        median = medians[name]
        ours = median if name.startswith("qkit") else ours
        spread = f"{min(s for s, _ in runs) / median:.2f}..{max(s for s, _ in runs) / median:.2f}"
        ratios = f"{median / medians['cp']:8.2f}" + ("        " if name == "cp" else f"{median / ours:8.2f}")
        print(f"{name:30}{median:9.2f}{spread:>14}{ratios}{max(peak for _, peak in runs) / 1e6:14.0f}", flush=True)


if __name__ == "__main__":
    main()
