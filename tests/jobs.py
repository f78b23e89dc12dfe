"""The job of each extra, carried out with that extra alone: `python tests/jobs.py EXTRA FOLDER`.

FOLDER has `model/`, a small Llama with a tokenizer and a chat template; `text.txt`; and `chat.jsonl`. Needs no other file of the
tests, so that it runs in an environment that has nothing else. `allow` leaves of this environment an extra's distributions only.
"""

import importlib.metadata
import re
import shlex
import sys
from collections import deque
from importlib.machinery import PathFinder

#: The base has no framework: files only. `{...}` are the words that commands of one engine share.
FILES = """
recipes int4-g64
plan model --recipe int4-g32
quantize model base-out --recipe int4-g32
inspect base-out
verify base-out
export base-out base-mlx --to mlx
import base-mlx base-again
diff base-out base-again
"""
TEXTS = "--data text.txt --length 16 --backend {engine}"
ENGINE = f"""
eval model base-out {TEXTS}
calibrate model {{engine}}-stats --data text.txt --length 16 --backend {{engine}}
quantize model {{engine}}-fit --recipe int4-g32 --fit solve --stats {{engine}}-stats
train model {{engine}}-trained --recipe int4-g32 {TEXTS} --steps 2 --batch 2
train base-out {{engine}}-adapted --set adapter.rank=2 {TEXTS} --steps 2 --batch 2
merge base-out {{engine}}-adapted.run/adapter {{engine}}-merged
compare model --qat {{engine}}-trained {TEXTS} --out {{engine}}-report
train model {{engine}}-chat --recipe int4-g32 --data chat.jsonl --length 32 --backend {{engine}} --steps 2 --batch 2
"""
TUNED = """
train model {engine}-sft --method sft --recipe int4-g32 --data chat.jsonl --backend {engine} --steps 2 --batch 2 --length 32
"""
GGUF = """
quantize model gguf-out --recipe int4-g32-all
export gguf-out model.gguf --to gguf
"""
JOBS = {
    "": FILES,
    "cuda": FILES + ENGINE.format(engine="torchao"),
    "train-torch": TUNED.format(engine="torchao"),  # which has all that `cuda` has
    "mac": FILES + ENGINE.format(engine="mlx"),
    "train-mlx": TUNED.format(engine="mlx"),
    "gguf": FILES + GGUF,
}


def run(extra):
    """Carries out the job of an extra in the current folder.

    Raises:
        SystemExit: a command failed; its output is on standard output.
    """
    from typer.testing import CliRunner

    from qkit.cli.application import application

    for line in filter(None, JOBS[extra].splitlines()):
        done = CliRunner().invoke(application, shlex.split(line))
        if done.exit_code:
            sys.exit(f"qkit {line}: exit code {done.exit_code}: {done.output}{done.exception!r}")
    BESIDES.get(extra, lambda: None)()


def _generate_with_transformers():
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("torchao-trained")
    assert model.generate(torch.tensor([[65, 66]]), max_new_tokens=2, do_sample=False).shape == (1, 4)


def _generate_with_mlx_lm():
    from mlx_lm import generate, load

    model, tokenizer = load("base-mlx")
    assert isinstance(generate(model, tokenizer, prompt="AB", max_tokens=2), str)


def _tune_with_trl():
    from datasets import load_dataset
    from peft import LoraConfig
    from qkit_torchao import QatCallback
    from trl import SFTConfig, SFTTrainer

    rows = load_dataset("json", data_files="chat.jsonl", split="train")
    options = SFTConfig("trl", max_steps=1, per_device_train_batch_size=2, max_length=32, report_to=[], use_cpu=True)
    tuner = SFTTrainer(
        "model", options, train_dataset=rows, peft_config=LoraConfig(r=2), callbacks=[QatCallback("int4-g32")]
    )
    tuner.train()


#: The other programs that an extra brings.
BESIDES = {"cuda": _generate_with_transformers, "mac": _generate_with_mlx_lm, "train-torch": _tune_with_trl}


def closure(name, extra):
    """Names of the distributions that `pip install 'NAME[EXTRA]'` installs, by the metadata of this environment.

    What a distribution requires that is not installed here is unknown, and left out.
    """
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    seen, ahead = set(), deque([(name, extra)])
    while ahead:
        name, extra = one = ahead.popleft()
        if one in seen:
            continue
        seen.add(one)
        for line in _requirements(name):
            wanted = Requirement(line)
            if wanted.marker is None or wanted.marker.evaluate({"extra": extra}):
                ahead += [(canonicalize_name(wanted.name), one) for one in ("", *wanted.extras)]
    return {canonicalize_name(name) for name, _ in seen}


def _requirements(name):
    try:
        return importlib.metadata.requires(name) or ()
    except importlib.metadata.PackageNotFoundError:
        return ()


def allow(names):
    """Hides from `import` all packages of distributions that are not among `names`."""
    owners = importlib.metadata.packages_distributions()
    hidden = {top for top, those in owners.items() if not {re.sub("[-_.]+", "-", one).lower() for one in those} & names}

    class Allowed(PathFinder):
        """Finds no hidden package."""

        @classmethod
        def find_spec(cls, fullname, path=None, target=None):
            if fullname.partition(".")[0] in hidden:
                return None
            return PathFinder.find_spec(fullname, path, target)

    sys.meta_path[:] = [Allowed if finder is PathFinder else finder for finder in sys.meta_path]


if __name__ == "__main__":
    run(sys.argv[1])
    print("done")
