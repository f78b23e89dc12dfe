"""A Hugging Face `tokenizer.json` applied to text, in a process of its own. The only module that runs tokenizers.

A stranger's tokenizer can end the library in a panic, which prints its stack, or contain a regular expression that never ends.
Python can neither catch the first nor stop the second inside its own process.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qkit.errors import BackendError, RunError
from qkit.installation import ENGINE, how_to_install
from qkit.intake import check_regular

SECONDS = 60.0  #: the time limit for opening the file, whatever the text
RATE = 20_000  #: the lowest speed in bytes of text a second: a hundredth of that of common tokenizers
MISSING = 9  #: exit code of the process if the library is missing

#: Reads texts and writes token numbers and the places in the text where the tokens begin, each after its length in eight bytes.
SCRIPT = f"""
import sys
from array import array

try:
    from tokenizers import Tokenizer
except ImportError:
    sys.exit({MISSING})
tokenizer = Tokenizer.from_file(sys.argv[1])
tokenizer.no_truncation()
tokenizer.no_padding()
while size := sys.stdin.buffer.read(8):
    text = sys.stdin.buffer.read(int.from_bytes(size, "little")).decode("utf-8")
    found = tokenizer.encode(text, add_special_tokens=False)
    for numbers in (found.ids, [begin for begin, end in found.offsets] if "places" in sys.argv else []):
        data = array("i", numbers).tobytes()
        sys.stdout.buffer.write(len(data).to_bytes(8, "little") + data)
"""


def encode(texts: list[str], tokenizer: Path) -> list[NDArray[np.int32]]:
    """The tokens of each text [n], without special ones.

    Raises:
        See `encode_with_places`.
    """
    return _run(texts, tokenizer)[::2]


def encode_with_places(texts: list[str], tokenizer: Path) -> list[tuple[NDArray[np.int32], NDArray[np.int32]]]:
    """The tokens of each text [n], and the place of each token's first character in the text [n].

    Raises:
        BackendError: the library is missing.
        RunError: the library does not open the file, or takes longer than the limit.
        ArtifactError: the file is not a regular file.
    """
    found = _run(texts, tokenizer, "places")
    return list(zip(found[::2], found[1::2], strict=True))


def _run(texts: list[str], tokenizer: Path, *more: str) -> list[NDArray[np.int32]]:
    check_regular(tokenizer)
    content = [text.encode("utf-8") for text in texts]
    seconds = SECONDS + sum(map(len, content)) / RATE
    message = b"".join(len(data).to_bytes(8, "little") + data for data in content)
    command = [
        sys.executable,
        "-P",
        "-c",
        SCRIPT,
        str(tokenizer.absolute()),
        *more,
    ]  # -P: no module of the current folder
    try:
        done = subprocess.run(command, input=message, capture_output=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise RunError(
            f"{tokenizer} did not end within {seconds:.0f} seconds: a pattern in it may never end; fetch it again"
        ) from None
    if done.returncode == MISSING:
        raise BackendError(f"{tokenizer} needs tokenizers: {how_to_install(ENGINE)}")
    if done.returncode:
        words = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {done.returncode}"]
        raise RunError(f"{tokenizer}: not a tokenizer that tokenizers opens ({words[-1]}): fetch it again")
    return _tokens(done.stdout)


def _tokens(data: bytes) -> list[NDArray[np.int32]]:
    out, place = [], 0
    while place < len(data):
        size = int.from_bytes(data[place : place + 8], "little")
        out.append(np.frombuffer(data, np.int32, size // 4, place + 8))
        place += 8 + size
    return out
