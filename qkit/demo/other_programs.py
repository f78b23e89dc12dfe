"""The loss of a directory in the program that it is for, in a process that cannot import qkit."""

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from qkit.errors import BackendError, QkitError
from qkit.exchange.export_model import export_mlx
from qkit.exchange.import_model import read_model

READERS = ("transformers", "mlx-lm")

#: The program for `python -c`. An editable install puts qkit on every path, so the script makes its import fail.
SCRIPT = """
import importlib.abc, json, sys

class Nobody(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("qkit", "qkit_mlx", "qkit_torchao", "qkit_recipes"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Nobody())
try:
    import qkit
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("qkit can be imported here: this proves nothing")

import numpy as np

reader, folder, tokens = sys.argv[1], sys.argv[2], np.load(sys.argv[3])
if reader == "transformers":
    import torch
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    decoded = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", quantization_config=decoded).eval()

    def logits(ids):
        with torch.no_grad():
            return model(torch.from_numpy(ids).long()).logits.double().numpy()
else:
    from pathlib import Path

    import mlx.core as mx
    from mlx_lm.utils import load_model

    model, _ = load_model(Path(folder))

    def logits(ids):
        return np.array(model(mx.array(ids)).astype(mx.float32)).astype(np.float64)

total = 0.0
for part in np.array_split(tokens, -(-tokens.size // 4096)):
    scores = logits(part[:, :-1])
    scores -= scores.max(-1, keepdims=True)
    total += (np.log(np.exp(scores).sum(-1)) - np.take_along_axis(scores, part[:, 1:, None], -1)[..., 0]).sum()
print("\\n" + json.dumps(total / tokens[:, 1:].size))
"""


def losses_in_other_programs(artifact: Path, export: Path, tokens: NDArray[np.int32]) -> dict[str, float | str]:
    """By each of `READERS`, the loss of `artifact`, or the obstacle as a text. Writes `export`, the directory for mlx-lm."""
    found: dict[str, float | str] = {}
    for reader in READERS:
        try:
            if reader == "mlx-lm":
                export_mlx(read_model(artifact), export)
            found[reader] = loss_in(reader, export if reader == "mlx-lm" else artifact, tokens)
        except QkitError as error:
            found[reader] = str(error)
    return found


def loss_in(reader: str, folder: Path, tokens: NDArray[np.int32]) -> float:
    """Mean loss in nats per predicted token of `tokens` [batch, length + 1], in one of `READERS`.

    Raises:
        BackendError: the program is not installed, or cannot open `folder`; the message is its last line.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with TemporaryDirectory() as place:
        file = Path(place) / "tokens.npy"
        np.save(file, tokens)
        command = [sys.executable, "-c", SCRIPT, reader, str(folder.absolute()), str(file)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=place)
    if done.returncode:
        raise BackendError(f"{reader}: {(done.stderr.strip().splitlines() or ['it said nothing'])[-1]}")
    return float(json.loads(done.stdout.splitlines()[-1]))
