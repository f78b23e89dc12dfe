"""Compiles the C sources beside it into its own folder. Imports nothing of qkit, so that a build can run it first.

Usage: python qkit/native/build.py
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

SOURCE = Path(__file__).with_name("kernels.c")
#: Each source with the flag that it has besides: the law rounds every operation once, and a product may contract two.
SOURCES = {
    SOURCE: "-ffp-contract=off",
    SOURCE.with_name("values.c"): "-ffp-contract=off",
    SOURCE.with_name("products.c"): "-ffp-contract=fast",
}
HEADERS = (SOURCE.with_name("numbers.h"), SOURCE.with_name("weights.h"))
#: The name is not one that Python takes for a module; only `library.py` opens the file.
LIBRARY = Path(__file__).with_name("kernels.compiled")

#: Without -ffast-math. The last three flags change no value.
FLAGS = ("-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi")


def compiler() -> str | None:
    """Path of the C compiler, `$CC` or cc; None if it is missing."""
    return shutil.which(os.environ.get("CC", "cc"))


def digest() -> str:
    """SHA-256 of the sources and of the flags. A library holds its own, and one of another version is not used."""
    texts = b"".join(path.read_bytes() for path in (*SOURCES, *HEADERS))
    return hashlib.sha256(texts + " ".join((*FLAGS, *SOURCES.values())).encode()).hexdigest()


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
    with TemporaryDirectory() as folder:
        objects = [str(Path(folder) / f"{source.stem}.o") for source in SOURCES]
        steps = [
            [*FLAGS, contract, f'-DDIGEST="{digest()}"', "-c", "-o", made, str(source)]
            for made, (source, contract) in zip(objects, SOURCES.items(), strict=True)
        ]
        for step in (*steps, ["-shared", "-o", str(aside), *objects, "-lm"]):
            done = subprocess.run([cc, *step], capture_output=True, text=True, check=False)
            if done.returncode:
                aside.unlink(missing_ok=True)
                return f"{cc} failed: {done.stderr.strip()[-500:]}"
    aside.rename(LIBRARY)
    return ""


if __name__ == "__main__":
    sys.exit(build() or 0)
