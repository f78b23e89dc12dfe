"""Makes and trains the models that readers open: `python make_models.py FOLDER [NAME ...]`. Text and tokenizers are real.

A Llama and a Gemma 3 with tokenizers like SentencePiece's, and a Qwen3 with tied embeddings and a byte-level BPE. They are small,
with widths that the kernels of servers take. The text is the source of Python's standard library.
"""

import json
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import AutoConfig, AutoModelForCausalLM, GemmaTokenizer, LlamaTokenizer, Qwen2Tokenizer

VOCABULARY = 2048
STEPS, BATCH, LENGTH, RATE = 120, 8, 96, 3e-3
LEARNED = 500_000  #: characters of the text that tokenizers are trained on
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "dtype": "float32",
}
CONFIGS = {
    "llama": {"rms_norm_eps": 1e-5, "tie_word_embeddings": False},
    "qwen3": {"rms_norm_eps": 1e-6, "tie_word_embeddings": True},
    "gemma3_text": {
        "query_pre_attn_scalar": 64,
        "sliding_window": 64,
        "layer_types": ["sliding_attention", "full_attention"],
        "tie_word_embeddings": True,
    },
}
#: The class of each model's tokenizer, and its special tokens in the order of their numbers.
TOKENIZERS = {
    "llama": (LlamaTokenizer, ["<unk>", "<s>", "</s>"]),
    "qwen3": (Qwen2Tokenizer, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]),
    "gemma3_text": (GemmaTokenizer, ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"]),
}
#: The chat template of each model: the first token, a turn of the user, a turn of the model; and the token that ends a turn.
TURNS = {
    "llama": ("{{ bos_token }}", "[INST] {} [/INST]", " {}</s>", "</s>"),
    "qwen3": ("", "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n", "{}<|im_end|>\n", "<|im_end|>"),
    "gemma3_text": (
        "{{ bos_token }}",
        "<start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n",
        "{}<end_of_turn>\n",
        "<end_of_turn>",
    ),
}


def text() -> str:
    """Source of Python's standard library."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = [file for file in sorted(folder.glob("*.py")) if file.stat().st_size < 200_000]
    return "".join(file.read_text(encoding="utf-8", errors="ignore") for file in files)[:2_000_000]


def make(folder: Path, names: Iterable[str] = CONFIGS) -> None:
    """Makes those of the models `names` that `folder` does not have yet."""
    corpus = text()
    for name in names:
        if not (folder / name / "config.json").exists():
            tokenizer = make_tokenizer(name, corpus)
            tokenizer.save_pretrained(folder / name)
            train(name, tokenizer, corpus).save_pretrained(folder / name)


def make_tokenizer(name, corpus):
    """The family's own tokenizer, trained on `corpus`, with a chat template."""
    kind, special = TOKENIZERS[name]
    pieces = _byte_pieces(kind, corpus) if kind is Qwen2Tokenizer else _sentence_pieces(corpus, first=len(special))
    vocabulary, merges = pieces
    numbered = {token: number for number, token in enumerate([*special, *vocabulary])}
    begin, user, answer, end = TURNS[name]
    bos = {} if kind is Qwen2Tokenizer else {"add_bos_token": True}
    tokenizer = kind(vocab=numbered, merges=merges, additional_special_tokens=special[5 if bos else 1 :], **bos)
    tokenizer.eos_token = end
    if bos:
        first = (tokenizer.bos_token, tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(f"{first[0]} $A", special_tokens=[first])
    tokenizer.chat_template = (
        begin
        + "{% for message in messages %}{% if message['role'] == 'user' %}"
        + user.replace("{}", "{{ message['content'] }}")
        + "{% else %}"
        + answer.replace("{}", "{{ message['content'] }}")
        + "{% endif %}{% endfor %}"
    )
    return tokenizer


def _sentence_pieces(corpus, *, first):
    """Pieces and merges as SentencePiece has them: a word with the space before it, and bytes for all other characters."""
    learner = Tokenizer(BPE(fuse_unk=True))
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("▁", "merged_with_next"), pre_tokenizers.Split("\n", "isolated")]
    )
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    size = VOCABULARY - first - len(bytes_)
    learner.train_from_iterator(
        corpus[:LEARNED].splitlines(keepends=True), BpeTrainer(vocab_size=size, limit_alphabet=120, show_progress=False)
    )
    return [*bytes_, *_in_order(learner)], _merges(learner)


def _byte_pieces(kind, corpus):
    """Pieces and merges of bytes, words cut as the family cuts them."""
    learner = Tokenizer(BPE())
    learner.pre_tokenizer = kind().backend_tokenizer.pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=VOCABULARY - 3, initial_alphabet=alphabet, show_progress=False)
    learner.train_from_iterator(corpus[:LEARNED].splitlines(keepends=True), trainer)
    return _in_order(learner), _merges(learner)


def _in_order(learner):
    vocabulary = learner.get_vocab()
    return sorted(vocabulary, key=vocabulary.get)


def _merges(learner):
    return [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]


def train(name, tokenizer, corpus):
    """A model of the family `name`, trained on `corpus` from a fixed seed."""
    torch.manual_seed(0)
    special = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = AutoConfig.for_model(name, **SIZES, **CONFIGS[name], **special)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tokens = torch.tensor(tokenizer(corpus, add_special_tokens=False)["input_ids"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, STEPS)
    for step in range(STEPS):
        begins = torch.randint(len(tokens) - LENGTH, (BATCH,))
        batch = torch.stack([tokens[begin : begin + LENGTH] for begin in begins.tolist()])
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rates.step()
        if step % 40 == 0 or step == STEPS - 1:
            print(name, step, f"{loss.item():.3f}", flush=True)
    return model.eval()


if __name__ == "__main__":
    make(Path(sys.argv[1]), sys.argv[2:] or CONFIGS)
