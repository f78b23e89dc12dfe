"""Small tokenizers of the kinds that GGUF files have."""

import json

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from qkit.formats.gguf_splits import PATTERNS

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
TEXTS = ["the cat and the hat", "a cat sat on a mat, then the hat sat", "thin 123 things"]
BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def by_bytes(splits, *, size=260, **options):
    """A byte-level tokenizer that is trained on a few texts, with ChatML's two tokens."""
    made = Tokenizer(models.BPE(**options))
    made.pre_tokenizer, made.decoder = splits, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)
    made.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return made


def by_pieces(merges, letters="abc▁", *, prefix=False):
    """A tokenizer with SentencePiece's bytes and these merges."""
    texts = ["<unk>", "<s>", "</s>", *BYTES, *letters, *dict.fromkeys(left + right for left, right in merges)]
    vocabulary = {text: i for i, text in enumerate(texts)}
    made = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Sequence(
        [*([normalizers.Prepend("▁")] if prefix else []), normalizers.Replace(" ", "▁")]
    )
    made.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in ("<unk>", "<s>", "</s>")])
    made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return made


def saved(folder, made, **settings):
    folder.mkdir(exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": int(1e30), **settings}))
    return folder


def split(pattern):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), BYTE_LEVEL])


SPLITS = {
    **{name: (split(pattern), {"ignore_merges": whole}) for (pattern, whole), name in PATTERNS.items()},
    "gpt-2": (pre_tokenizers.ByteLevel(add_prefix_space=False), {}),
    "smollm": (
        pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
        {},
    ),
}
