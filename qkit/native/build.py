"""Compiles `kernels.c` into its own folder. Imports nothing of qkit, so that a build can run it first.

Usage: python qkit/native/build.py
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).with_name("kernels.c")
#: The name is not one that Python takes for a module; only `library.py` opens the file.
LIBRARY = Path(__file__).with_name("kernels.compiled")

#: Without -ffast-math, since the law rounds every operation once. The last two flags change no value.
FLAGS = ("-O3", "-fPIC", "-shared", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")


def compiler() -> str | None:
    """Path of the C compiler, `$CC` or cc; None if it is missing."""
    return shutil.which(os.environ.get("CC", "cc"))


def digest() -> str:
    """SHA-256 of the source and of the flags. A library holds its own, and one of another version is not used."""
    return hashlib.sha256(SOURCE.read_bytes() + " ".join(FLAGS).encode()).hexdigest()


def build() -> str:
    """Compiles the library. Returns the reason why it did not, or an empty string.

    The new library replaces the old one in one step, so that a process that loaded the old one keeps it.
    """
    cc = compiler()
    if cc is None:
        return "there is no C compiler: set CC, or install one"
    if sys.byteorder != "little" or os.name != "posix":
        return "it is written for little-endian POSIX systems"
    aside = LIBRARY.with_suffix(f".{os.getpid()}")
    command = [cc, *FLAGS, f'-DDIGEST="{digest()}"', "-o", str(aside), str(SOURCE), "-lm"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        aside.unlink(missing_ok=True)
        return f"{cc} failed: {done.stderr.strip()[-500:]}"
    aside.rename(LIBRARY)
    return ""


if __name__ == "__main__":
    sys.exit(build() or 0)
