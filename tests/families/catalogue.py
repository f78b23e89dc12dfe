"""The families of the gate: one small model of each, by transformers' own classes, and its checkpoint as published ones lie."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import more
import torch
import transformers
from safetensors.torch import load_file, save_file

#: The smallest sizes that groups of 32 divide, by key of a configuration. A key applies where the configuration has it.
SMALL: Mapping[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embed_dim", "word_embed_proj_dim", "lru_width"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "hidden_dim", "intermediate_size_mlp"), 128),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "projection_dim", "out_hidden_size"), 128),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers", "n_layers", "depth"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_key_value_heads"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("head_dim", "global_head_dim", "d_kv", "v_head_dim", "qk_rope_head_dim", "qk_nope_head_dim"), 16),
    **dict.fromkeys(
        ("linear_key_head_dim", "linear_value_head_dim", "state_size", "mamba_d_state", "mamba_d_head"), 16
    ),
    **dict.fromkeys(
        ("q_lora_rank", "kv_lora_rank", "laurel_rank", "hidden_size_per_layer_input", "time_step_rank"), 32
    ),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "n_shared_experts", "n_groups"), 1),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 160),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 64),
    **dict.fromkeys(("max_target_positions", "max_source_positions"), 64),
    **dict.fromkeys(("sliding_window", "attention_window", "local_attention", "mamba_dt_rank"), 32),
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), None),
    "rotary_dim": 8,
    "image_size": 32,
    "patch_size": 16,
    "num_mel_bins": 16,
    "decoder_start_token_id": 1,
    "expand": 2,
    "mamba_expand": 2,
    "mamba_n_heads": 8,
    "mamba_n_groups": 1,
    "conv_kernel": 4,
    "n_inner": None,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "num_kv_shared_layers": 0,
    "projector_hidden_act": "gelu",
    "deepstack_visual_indexes": [0, 1],
    "fullatt_block_indexes": [0],
    "image_token_id": 150,
    "image_token_index": 150,
    "video_token_id": 151,
    "vision_start_token_id": 152,
    "vision_end_token_id": 153,
    "audio_token_id": 154,
    "boi_token_id": 155,
    "eoi_token_id": 156,
    "boa_token_id": 157,
    "eoa_token_id": 158,
}


@dataclass(frozen=True)
class Family:
    """One row of the gate.

    Attributes:
        architecture: transformers' class.
        sizes: keys of its configuration beside `SMALL`, and those of a part of it in a table of its own.
        dtype: type of the checkpoint.
        renamed: patterns of tensor names as transformers saves them, and their text as published checkpoints have them.
        stored: tensors that the published checkpoint holds too: name, and the tensor that it equals; or a shape of zeros.
        shards: whether the checkpoint has several files.
        quick: whether `make test` runs the row.
    """

    architecture: str
    sizes: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    renamed: Mapping[str, str] = field(default_factory=dict)
    stored: Mapping[str, str | tuple[int, ...]] = field(default_factory=dict)
    shards: bool = False
    quick: bool = False


def config(cls: Any, sizes: Mapping[str, Any]) -> Any:
    """The smallest configuration of `cls` that builds."""
    default = cls()
    known = set(default.to_dict()) | set(vars(default))
    values = {key: value for key, value in SMALL.items() if key in known}
    for part in cls.sub_configs or {}:
        if (inner := getattr(default, part, None)) is not None:
            values[part] = config(type(inner), sizes.get(part) or {}).to_dict()
    return cls(**{**values, **{key: value for key, value in sizes.items() if key not in (cls.sub_configs or {})}})


def make(family: Family, folder: Path, *, seed: int = 0) -> Any:
    """A checkpoint of the family in `folder`, as published ones lie, of random weights."""
    cls = getattr(transformers, family.architecture)
    torch.manual_seed(seed)
    model = cls._from_config(config(cls.config_class, family.sizes), dtype=getattr(torch, family.dtype)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # transformers starts some at zero, which would hide faults
            if parameter.dim() > 1:
                parameter.normal_(std=0.08)
            elif name.endswith("bias"):
                parameter.normal_(std=0.02)
            elif name.endswith("_gate") and parameter.numel() == 1:  # closed, Mllama's would hide all pictures
                parameter.fill_(0.5)
    model.save_pretrained(folder, max_shard_size="100KB" if family.shards else "5GB")
    if family.renamed or family.stored:
        _publish(folder / "model.safetensors", family)
    return model


def _publish(file: Path, family: Family) -> None:
    found = {}
    for name, tensor in load_file(file).items():
        for pattern, text in family.renamed.items():
            name = re.sub(pattern, text, name)
        found[name] = tensor
    for name, source in family.stored.items():
        found[name] = found[source].clone() if isinstance(source, str) else torch.zeros(source)
    save_file(found, file, metadata={"format": "pt"})


TIED = {"tie_word_embeddings": True}
#: Sections of the positions of pictures; the heads are smaller than published ones.
SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"]}
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
COMMON: Mapping[str, Family] = {
    "Llama": Family("LlamaForCausalLM", quick=True),
    "Llama, tied, sharded": Family("LlamaForCausalLM", TIED, shards=True),
    "Llama, with rotary buffers": Family(
        "LlamaForCausalLM",
        stored={f"model.layers.{n}.self_attn.rotary_emb.inv_freq": (8,) for n in (0, 1)},
        dtype="bfloat16",
    ),
    "Llama, tied head stored": Family(
        "LlamaForCausalLM", TIED, stored={"lm_head.weight": "model.embed_tokens.weight"}, quick=True
    ),
    "Mistral": Family("MistralForCausalLM"),
    "Qwen2": Family("Qwen2ForCausalLM", TIED),
    "Qwen3": Family("Qwen3ForCausalLM", TIED, quick=True),
    "Qwen3.5": Family("Qwen3_5ForCausalLM", HYBRID),
    "Gemma": Family("GemmaForCausalLM"),
    "Gemma 2": Family("Gemma2ForCausalLM"),
    "Gemma 3, text": Family("Gemma3ForCausalLM", {"num_hidden_layers": 6}, quick=True),
    "Phi": Family("PhiForCausalLM"),
    "Phi-3": Family("Phi3ForCausalLM"),
    "GPT-2": Family(
        "GPT2LMHeadModel",
        renamed={r"^transformer\.": ""},
        stored={f"h.{n}.attn.bias": (1, 1, 64, 64) for n in (0, 1)},
    ),
    "GPT-NeoX": Family("GPTNeoXForCausalLM", {"intermediate_size": 256}),
    "GPT-J": Family("GPTJForCausalLM"),
    "OPT": Family("OPTForCausalLM"),
    "Falcon": Family("FalconForCausalLM", stored={"lm_head.weight": "transformer.word_embeddings.weight"}, quick=True),
    "Bloom": Family("BloomForCausalLM", renamed={r"^transformer\.": ""}),
    "MPT": Family("MptForCausalLM"),
    "StarCoder2": Family("Starcoder2ForCausalLM"),
    "Cohere": Family("CohereForCausalLM"),
    "Cohere 2": Family("Cohere2ForCausalLM", {"num_hidden_layers": 4}),
    "OLMo": Family("OlmoForCausalLM"),
    "OLMo 2": Family("Olmo2ForCausalLM"),
    "OLMo 3": Family("Olmo3ForCausalLM", SLIDING),
    "StableLM": Family("StableLmForCausalLM"),
    "Granite": Family("GraniteForCausalLM"),
    "Granite 4": Family(
        "GraniteMoeHybridForCausalLM", {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 64}
    ),
    "Nemotron": Family("NemotronForCausalLM"),
    "SmolLM3": Family("SmolLM3ForCausalLM"),
    "EXAONE 4": Family("Exaone4ForCausalLM", SLIDING),
    "Helium": Family("HeliumForCausalLM"),
    "Ernie 4.5": Family("Ernie4_5ForCausalLM"),
    "Hunyuan": Family("HunYuanDenseV1ForCausalLM"),
    "LFM2": Family("Lfm2ForCausalLM", {"layer_types": ["conv", "full_attention"]}),
    "Mamba": Family("MambaForCausalLM"),
    "Mamba 2": Family("Mamba2ForCausalLM", {"num_heads": 8, "head_dim": 16}),
    "RecurrentGemma": Family("RecurrentGemmaForCausalLM", {"num_hidden_layers": 3}),
    "RWKV": Family("RwkvForCausalLM"),
    "Jamba": Family("JambaForCausalLM", {"attn_layer_period": 2, "attn_layer_offset": 1}),
    "Mixtral": Family("MixtralForCausalLM", quick=True),
    "Qwen2-MoE": Family("Qwen2MoeForCausalLM"),
    "Qwen3-MoE": Family("Qwen3MoeForCausalLM", quick=True),
    "Qwen3-Next": Family("Qwen3NextForCausalLM", HYBRID),
    "gpt-oss": Family("GptOssForCausalLM"),
    "DeepSeek-V2": Family("DeepseekV2ForCausalLM", {"num_key_value_heads": 4}),
    "DeepSeek-V3": Family("DeepseekV3ForCausalLM", {"num_key_value_heads": 4}),
    "OLMoE": Family("OlmoeForCausalLM"),
    "Phi-MoE": Family("PhimoeForCausalLM", {"attention_bias": True, "lm_head_bias": True}),
    "Granite-MoE": Family("GraniteMoeForCausalLM"),
    "Llama 4": Family("Llama4ForCausalLM"),
    "GLM 4": Family("Glm4ForCausalLM"),
    "GLM 4.5": Family("Glm4MoeForCausalLM"),
    "dots.llm1": Family("Dots1ForCausalLM"),
    "Ernie 4.5-MoE": Family("Ernie4_5_MoeForCausalLM"),
    "T5": Family(
        "T5ForConditionalGeneration",
        TIED,
        stored={f"{part}.embed_tokens.weight": "shared.weight" for part in ("encoder", "decoder")}
        | {"lm_head.weight": "shared.weight"},
        quick=True,
    ),
    "mT5": Family("MT5ForConditionalGeneration", {"tie_word_embeddings": False}),
    "BART": Family("BartForConditionalGeneration"),
    "Whisper": Family("WhisperForConditionalGeneration", quick=True),
    "BERT": Family("BertForMaskedLM"),
    "BERT, as first published": Family(
        "BertForMaskedLM",
        renamed={r"LayerNorm\.weight$": "LayerNorm.gamma", r"LayerNorm\.bias$": "LayerNorm.beta"},
        stored={"cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight"},
        quick=True,
    ),
    "BERT, embeddings": Family("BertModel"),
    "RoBERTa": Family("RobertaForMaskedLM", {"pad_token_id": 1}),
    "DistilBERT": Family("DistilBertForMaskedLM"),
    "ELECTRA": Family("ElectraForMaskedLM", {"embedding_size": 64}),
    "DeBERTa v2": Family("DebertaV2ForMaskedLM"),
    "MPNet": Family("MPNetModel"),
    "ModernBERT": Family("ModernBertForMaskedLM"),
    "ViT": Family("ViTForImageClassification"),
    "CLIP": Family("CLIPModel", {"text_config": {"eos_token_id": 7}}),
    "SigLIP": Family("SiglipModel", quick=True),
    "Qwen2-VL": Family(
        "Qwen2VLForConditionalGeneration", {"vision_config": {"hidden_size": 64}, "text_config": SECTIONS}, quick=True
    ),
    "Qwen2.5-VL": Family(
        "Qwen2_5_VLForConditionalGeneration", {"vision_config": {"out_hidden_size": 64}, "text_config": SECTIONS}
    ),
    "Qwen3-VL": Family(
        "Qwen3VLForConditionalGeneration", {"vision_config": {"out_hidden_size": 64}, "text_config": SECTIONS}
    ),
    "Llava": Family("LlavaForConditionalGeneration", quick=True),
    "Idefics 3": Family("Idefics3ForConditionalGeneration"),
    "SmolVLM": Family("SmolVLMForConditionalGeneration"),
    "PaliGemma": Family("PaliGemmaForConditionalGeneration", {"vision_config": {"projection_dim": 64}}),
    "Gemma 3": Family("Gemma3ForConditionalGeneration", {"text_config": {"num_hidden_layers": 6}}),
    "Gemma 3n, text": Family("Gemma3nForCausalLM"),
    "Gemma 4": Family("Gemma4ForConditionalGeneration", {"text_config": {"pad_token_id": 0}}),
    "Mistral 3": Family("Mistral3ForConditionalGeneration"),
    "Mllama": Family(
        "MllamaForConditionalGeneration",
        {
            "text_config": {"cross_attention_layers": [1], "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
            "vision_config": {
                "attention_heads": 4,
                "num_global_layers": 1,
                "intermediate_layers_indices": [0, 1],
                "vision_output_dim": 192,
            },
        },
    ),
}
QUICK = ("NemotronH",)  #: whose files call blocks of experts otherwise than the model does
FAMILIES: Mapping[str, Family] = {
    **COMMON,
    **{name: Family(cls, sizes) for name, (cls, sizes) in more.VARIANTS.items()},
    **{name: Family(cls, quick=name in QUICK) for name, cls in more.plain().items()},
    **{cls: Family(cls, sizes) for cls, sizes in more.SIZED.items()},
}
