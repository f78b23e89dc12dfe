"""Compiling `kernels.c` beside itself. Stands alone, so that a build can run it before qkit can be imported.

Usage: python qkit/native/build.py
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).with_name("kernels.c")
#: Under no name that Python would take for a module; `library.py` alone looks for it.
LIBRARY = Path(__file__).with_name("kernels.compiled")

#: No -ffast-math: one rounding for every operation is what makes the bits. The other two change no value.
FLAGS = ("-O3", "-fPIC", "-shared", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")


def compiler() -> str | None:
    """Path of the C compiler: `$CC`, or cc; None where there is none."""
    return shutil.which(os.environ.get("CC", "cc"))


def digest() -> str:
    """Of the source and of how it is compiled; a library says it, so that one of another version is not used."""
    return hashlib.sha256(SOURCE.read_bytes() + " ".join(FLAGS).encode()).hexdigest()


def build() -> str:
    """Compiles the library; returns why it did not, or nothing.

    It is put in place in one step, so that a process that has the old one loaded keeps it.
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
