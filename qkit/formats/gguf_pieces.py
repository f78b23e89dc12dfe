"""SentencePiece's tokens with their scores, which say what llama.cpp merges first: from its own file, or from merges."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from qkit.errors import ArtifactError, BackendError
from qkit.installation import how_to_install
from qkit.intake import TEXT_BYTES, check_regular

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  #: GGUF's kinds of tokens, and SentencePiece's
BPE: Final = 2  #: SentencePiece's number for byte-pair models
FOREIGN: Final = -1000.0  #: score of tokens that no merge makes
BYTES: Final = frozenset(f"<0x{i:02X}>" for i in range(256))


class Piece(NamedTuple):
    """A token: its text, its score and GGUF's kind of it."""

    text: str
    score: float
    kind: int


def merged_pieces(
    vocabulary: Mapping[str, int], merges: Sequence[tuple[str, ...]], *, apart: Collection[str], unknown: str | None
) -> dict[int, Piece] | None:
    """The tokens of a vocabulary with merges, by id; None where no scores have the effect of the merges.

    llama.cpp joins two neighbours whenever the vocabulary has their text, the highest score first. So each such pair has to be
    a merge, and all merges into one token have to follow each other.

    Args:
        apart: tokens that are cut out of a text before all merges.

    Raises:
        ArtifactError: a byte has no token, so that llama.cpp would fail at letters that the vocabulary lacks.
    """
    missing = BYTES - vocabulary.keys()
    if missing:
        raise ArtifactError(f"its vocabulary lacks {len(missing)} of 256 bytes, which llama.cpp needs")
    ranks: dict[str, int] = {}
    counts: dict[str, int] = {}
    last = ""
    for left, right in merges:
        text = left + right
        if text != last and text in ranks:
            return None
        last = text
        ranks.setdefault(text, len(ranks))
        counts[text] = counts.get(text, 0) + 1
    if any(_pairs(t, vocabulary) != counts.get(t, 0) for t in vocabulary if t not in BYTES and t not in apart):
        return None
    return {i: Piece(text, -float(ranks.get(text, 0)), _kind(text, unknown)) for text, i in vocabulary.items()}


def sentence_pieces(file: Path) -> tuple[dict[int, Piece], bool]:
    """The tokens of SentencePiece's own file by id, and whether it puts a space before a text.

    Raises:
        ArtifactError: the model is no byte-pair model, or it changes text.
        BackendError: the sentencepiece package is not installed.
    """
    try:
        from sentencepiece import sentencepiece_model_pb2 as messages
    except ModuleNotFoundError:
        raise BackendError(f"{file.name} needs the sentencepiece package: {how_to_install('gguf')}") from None
    size = check_regular(file)
    if size > TEXT_BYTES:
        raise ArtifactError(f"{file.name} has {size:,} bytes, and qkit reads at most {TEXT_BYTES:,} there")
    model: Any = vars(messages)["ModelProto"]()
    try:
        model.ParseFromString(file.read_bytes())
    except Exception as error:  # protobuf's own class
        raise ValueError(str(error)) from None
    if model.trainer_spec.model_type != BPE:
        raise ArtifactError("its SentencePiece model is no byte-pair model, and llama.cpp has those alone")
    if model.normalizer_spec.name not in ("", "identity") or model.normalizer_spec.remove_extra_whitespaces:
        raise ArtifactError(
            f"its SentencePiece model changes text ({model.normalizer_spec.name}), and llama.cpp does not"
        )
    pieces = {i: Piece(one.piece, one.score, one.type) for i, one in enumerate(model.pieces)}
    return pieces, model.normalizer_spec.add_dummy_prefix


def _pairs(text: str, vocabulary: Collection[str]) -> int:
    """How many pairs of tokens have this text together."""
    return sum(text[:i] in vocabulary and text[i:] in vocabulary for i in range(1, len(text)))


def _kind(text: str, unknown: str | None) -> int:
    if text == unknown:
        return UNKNOWN
    return BYTE if text in BYTES else NORMAL
