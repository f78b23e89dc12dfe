"""A Hugging Face `tokenizer.json` applied to text. The only module that imports tokenizers."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qkit.errors import BackendError, RunError
from qkit.installation import how_to_install


def encode(texts: list[str], tokenizer: Path) -> list[NDArray[np.int32]]:
    """The tokens of each text, without special ones.

    Raises:
        BackendError: the library is missing.
        RunError: the file is none of its.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise BackendError(f"{tokenizer} needs tokenizers: {how_to_install('hf')}") from None
    try:
        made = Tokenizer.from_file(str(tokenizer))
    except Exception as error:  # the library raises plain exceptions
        raise RunError(f"{tokenizer}: not a tokenizer that tokenizers opens ({error}): fetch it again") from None
    return [np.array(made.encode(text, add_special_tokens=False).ids, np.int32) for text in texts]
