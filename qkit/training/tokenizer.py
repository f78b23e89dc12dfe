"""A Hugging Face `tokenizer.json` applied to text. The only module that imports tokenizers."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qkit.errors import RunError


def encode(texts: list[str], tokenizer: Path, *, vocabulary: int) -> list[NDArray[np.int32]]:
    """The tokens of each text, without special ones.

    Raises:
        RunError: the library is missing, the file is none of its, or it has tokens that a model of `vocabulary` has not.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise RunError(f"{tokenizer} needs tokenizers: pip install 'qkit[hf]'") from None
    try:
        made = Tokenizer.from_file(str(tokenizer))
    except Exception as error:  # the library raises plain exceptions
        raise RunError(f"{tokenizer}: not a tokenizer that tokenizers opens ({error}): fetch it again") from None
    largest = max(made.get_vocab(with_added_tokens=True).values(), default=0)
    if largest >= vocabulary:
        raise RunError(
            f"{tokenizer} has tokens up to {largest}, and the model's vocab_size is {vocabulary}: it is another model's"
        )
    return [np.array(made.encode(text, add_special_tokens=False).ids, np.int32) for text in texts]
