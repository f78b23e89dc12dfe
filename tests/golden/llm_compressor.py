"""Makes the directories in `llm-compressor/`: a tiny Llama in bfloat16, and what llm-compressor makes of it.

Made with llmcompressor 0.14.0.1, compressed-tensors 0.19.0, transformers 5.17.0 and torch 2.13.0 on a CPU, in an environment of
its own: python tests/golden/llm_compressor.py
"""

import shutil
from pathlib import Path

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

OUT = Path(__file__).parent / "llm-compressor"
SCHEMES = ("W4A16", "W4A16_ASYM", "W8A16", "MXFP4A16", "NVFP4A16", "W8A8", "FP8_DYNAMIC")
KEPT = ("config.json", "model.safetensors")

if __name__ == "__main__":
    shutil.rmtree(OUT, ignore_errors=True)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=1,
        vocab_size=32,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(OUT / "float")
    for scheme in SCHEMES:
        model = AutoModelForCausalLM.from_pretrained(OUT / "float", dtype=torch.bfloat16)
        oneshot(model=model, recipe=QuantizationModifier(targets="Linear", scheme=scheme, ignore=["lm_head"]))
        model.save_pretrained(OUT / scheme, save_compressed=True)
    for file in OUT.glob("*/*"):
        if file.name not in KEPT:
            file.unlink()
