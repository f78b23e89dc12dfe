"""The bars of a whole checkpoint: `quantize` beside `cp`, `verify` beside `sha256sum`, exports beside `cp` of the artifact.

One generated Llama-shaped directory in bfloat16. Each command is a process of its own, and each round runs a command of qkit's
right after its base. A ratio is the median of the rounds, with the least and greatest, once by the wall and once by processor
time, which counts where other programs share the cores. `sha256sum` runs in as many processes as there are cores, one for each
weights file. Exports stand beside `cp` of the artifact, and like it leave it to the system when bytes reach the disk. `quantize`
ends when they are there; its `cp` does not.

Usage: python benchmarks/checkpoint_bars.py [--gigabytes 13] [--rounds 3] [--folder DIR] [--out FILE.json]
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from checkpoint import Run, generate, timed
from measure import Report

from qkit import native
from qkit.processes import cores

RECIPE = "int4-g64"
MEMORY = 150  #: most megabytes of anonymous memory
TARGETS = (("mlx", []), ("gguf", ["--without-tokenizer"]))  #: the generated tokenizer is no BPE
SHARD = "500MB"  #: so that sha256sum has a file for each of its processes


def qkit(*arguments: object) -> list[str]:
    """A command of qkit's in a process of its own."""
    return [sys.executable, "-m", "qkit", *map(str, arguments)]


def warm_up(home: Path) -> None:
    """Runs every command once on a small model, so that its bytecode is there."""
    source, artifact, out = (home / f"small-{name}" for name in ("model", "artifact", "out"))
    generate(source, 0.3)
    timed(qkit("quantize", source, artifact, "--recipe", RECIPE), artifact)
    timed(qkit("verify", artifact), out)
    for target, options in TARGETS:
        timed(qkit("export", artifact, out, "--to", target, *options), out)
        remove(out)
    remove(source)
    remove(artifact)


def remove(path: Path) -> None:
    """Removes an output, a directory or a file."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def turns(jobs: dict[str, tuple[list[str], Path]], rounds: int) -> dict[str, list[Run]]:
    """Each job in each round, in the order of `jobs`; outputs are removed, those of the last round too."""
    found: dict[str, list[Run]] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, (command, out) in jobs.items():
            os.sync()  # so that nobody writes back what another has written
            found[name].append(timed(command, out))
            remove(out)
    return found


def row(name: str, base: str, bar: float, runs: dict[str, list[Run]]) -> dict[str, Any]:
    """The ratios of one command to its base."""
    pairs = list(zip(runs[name], runs[base], strict=True))
    wall = [mine.wall / theirs.wall for mine, theirs in pairs]
    processor = [mine.processor / max(theirs.processor, 0.01) for mine, theirs in pairs]
    memory = max(mine.anonymous for mine in runs[name]) / 1e6
    return {
        "command": name,
        "base": base,
        "seconds": [round(mine.wall, 2) for mine, _ in pairs],
        "base seconds": [round(theirs.wall, 2) for _, theirs in pairs],
        "processor seconds": [round(mine.processor, 2) for mine, _ in pairs],
        "base processor seconds": [round(theirs.processor, 2) for _, theirs in pairs],
        "ratio": {"median": round(statistics.median(wall), 2), "spread": [round(min(wall), 2), round(max(wall), 2)]},
        "processor ratio": round(statistics.median(processor), 2),
        "bar": bar,
        "anonymous MB": round(memory),
        "met": statistics.median(wall) <= bar and memory <= MEMORY,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=13)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as home:
        os.environ["PYTHONPYCACHEPREFIX"] = (
            f"{home}/bytecode"  # as installed: where it may not be written, each start compiles
        )
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        source, artifact, out = (Path(home) / name for name in ("model", "artifact", "out"))
        generate(source, given.gigabytes)
        warm_up(Path(home))
        size = sum(file.stat().st_size for file in source.iterdir())
        about = {"kernels": native.available(), "bytes": size, "recipe": RECIPE, "shards of the artifact": SHARD}
        report = Report(given.out, packages=("gguf",), about=about)
        report.command = report.command.replace(str(given.folder), "DIR")  # without the paths of this machine
        report.machine["load before"] = round(os.getloadavg()[1], 2)
        quantize = qkit("quantize", source, out, "--recipe", RECIPE, "--shard-size", SHARD)
        jobs = {"cp of the model": (["cp", "-r", str(source), str(out)], out), "qkit quantize": (quantize, out)}
        report.add(row("qkit quantize", "cp of the model", 1.5, turns(jobs, given.rounds)))
        timed(qkit("quantize", source, artifact, "--recipe", RECIPE, "--shard-size", SHARD), artifact)
        shutil.rmtree(source)  # the exports need room, on the disk and in the system's cache
        digests = f"find {artifact} -name '*.safetensors' -print0 | xargs -0 -P {cores()} -n 1 sha256sum"
        jobs = {"sha256sum": (["sh", "-c", digests], out), "qkit verify": (qkit("verify", artifact), out)}
        report.add(row("qkit verify", "sha256sum", 1.2, turns(jobs, given.rounds)))
        copy = (["cp", "-r", str(artifact), str(out)], out)
        for target, options in TARGETS:
            name, export = f"qkit export --to {target}", qkit("export", artifact, out, "--to", target, *options)
            runs = turns({"cp of the artifact": copy, name: (export, out)}, given.rounds)
            report.add(row(name, "cp of the artifact", 2, runs))
        report.machine["load after"] = round(os.getloadavg()[1], 2)
    report.finish()


if __name__ == "__main__":
    main()
