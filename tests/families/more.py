"""More rows of the gate: families by their class alone, and structural variants of common ones."""

from collections.abc import Mapping
from typing import Any

#: Classes of transformers whose smallest configuration needs nothing beside `catalogue.SMALL`.
PLAIN = """
Apertus Arcee AriaText BertGeneration=BertGenerationDecoder BigBird BioGpt BitNet Blenderbot BlenderbotSmall
CodeGen Cohere2Moe CTRL=CTRLLMHeadModel DeepseekV4 DiffLlama Doge Electra Ernie ExaoneMoe FalconMamba FlexOlmo Flint Gemma4
Gemma4Unified Glm GPTBigCode GPTNeoXJapanese GraniteMoeShared GraniteMoeSWA GraniteSWA HunYuanMoEV1 HyperCLOVAX HYV3 HYV4
Inkling Inkling2 Jais2 JetMoe
Kolibri1 Laguna Marian MBart MegatronBert Mellum MiMoV2Flash MiniMax MiniMaxM2 MiniMaxM3VL Ministral Ministral3 Moshi Mvp
NanoChat NemotronH OlmoHybrid OpenAIGPT=OpenAIGPTLMHeadModel Pegasus Persimmon Phi4Multimodal PLBart RemBert RoFormer
SeedOss SolarOpen TrOCR VaultGemma XGLM XLNet=XLNetLMHeadModel Albert=AlbertForMaskedLM BigBirdMasked=BigBirdForMaskedLM
ConvBert=ConvBertForMaskedLM Deberta=DebertaForMaskedLM EuroBert=EuroBertForMaskedLM FNet=FNetForMaskedLM Gte=GteForMaskedLM
JinaEmbeddingsV3=JinaEmbeddingsV3ForMaskedLM LayoutLM=LayoutLMForMaskedLM ModernVBert=ModernVBertForMaskedLM
Nystromformer=NystromformerForMaskedLM Tapas=TapasForMaskedLM Yoso=YosoForMaskedLM
Aria=AriaForConditionalGeneration AyaVision=AyaVisionForConditionalGeneration Fuyu
AudioFlamingo3=AudioFlamingo3ForConditionalGeneration DeepseekVL=DeepseekVLForConditionalGeneration
GlmAsr=GlmAsrForConditionalGeneration GotOcr2=GotOcr2ForConditionalGeneration GraniteSpeech=GraniteSpeechForConditionalGeneration
Idefics2=Idefics2ForConditionalGeneration InternVL=InternVLForConditionalGeneration Lfm2Vl=Lfm2VlForConditionalGeneration
LightOnOcr=LightOnOcrForConditionalGeneration LlavaNext=LlavaNextForConditionalGeneration
LlavaNextVideo=LlavaNextVideoForConditionalGeneration LlavaOnevision=LlavaOnevisionForConditionalGeneration
LongT5=LongT5ForConditionalGeneration MiniMaxM3=MiniMaxM3SparseForConditionalGeneration Ovis2=Ovis2ForConditionalGeneration
PegasusX=PegasusXForConditionalGeneration Qwen2Audio=Qwen2AudioForConditionalGeneration
Qwen3OmniMoe=Qwen3OmniMoeThinkerForConditionalGeneration
SwitchTransformers=SwitchTransformersForConditionalGeneration T5Gemma2=T5Gemma2ForConditionalGeneration
UMT5=UMT5ForConditionalGeneration VideoLlama3=VideoLlama3ForConditionalGeneration
VideoLlava=VideoLlavaForConditionalGeneration VipLlava=VipLlavaForConditionalGeneration Voxtral=VoxtralForConditionalGeneration
"""

LATENT = {"num_key_value_heads": 4}
PADDED = {"pad_token_id": 1}
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
PAD0 = {"pad_token_id": 0}
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
#: Classes, and the keys of their configuration that they need.
SIZED: Mapping[str, Mapping[str, Any]] = {
    "AfmoeForCausalLM": {"layer_types": ["sliding_attention", "full_attention"]},
    "AXK1ForCausalLM": LATENT,
    "DeepseekV32ForCausalLM": LATENT,
    "Glm4MoeLiteForCausalLM": LATENT,
    "GlmMoeDsaForCausalLM": LATENT,
    "LongcatFlashForCausalLM": LATENT,
    "MiniCPM3ForCausalLM": LATENT,
    "YoutuForCausalLM": LATENT,
    "KimiLinearForCausalLM": {**LATENT, **HYBRID},
    "Qwen3_5MoeForCausalLM": HYBRID,
    "BambaForCausalLM": {"attn_layer_indices": [1]},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "FalconH1ForCausalLM": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16},
    "Qwen3VLMoeForConditionalGeneration": {
        "tie_word_embeddings": False,
        "text_config": {
            "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        },
        "vision_config": {"out_hidden_size": 64},
    },
    "BailingHybridForCausalLM": {
        **LATENT,
        "n_group": 1,
        "topk_group": 1,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "BertLMHeadModel": {"is_decoder": True},
    "HrmTextForCausalLM": {},
    "Lfm3ForCausalLM": {"layer_types": ["conv", "full_attention"]},
    "XmodForCausalLM": {**PADDED, "languages": ["en_XX"], "default_language": "en_XX"},
    "Zamba2ForCausalLM": {"layers_block_type": ["mamba", "hybrid"], "n_mamba_heads": 8, "adapter_rank": 32},
    "ZayaForCausalLM": {"num_experts_per_tok": 1, "router_hidden_size": 64},
    "Cohere2VisionForConditionalGeneration": {},
    "Exaone4_5_ForConditionalGeneration": {},
    "Glm4vMoeForConditionalGeneration": {
        "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}},
        "vision_config": {"out_hidden_size": 64},
    },
    "Llama4ForConditionalGeneration": {},
    "Qwen2_5OmniThinkerForConditionalGeneration": {
        "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
    },
    "CwmForCausalLM": ENDS,
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "ModernBertDecoderForCausalLM": ENDS,
    "CamembertForMaskedLM": PADDED,
    "XLMRobertaForMaskedLM": PADDED,
    "XLMRobertaXLForMaskedLM": PADDED,
    "RobertaPreLayerNormForMaskedLM": PADDED,
    "EsmForMaskedLM": {**PADDED, "mask_token_id": 3},
    "LongformerForMaskedLM": {**PADDED, "attention_window": 8},
    "NomicBertForMaskedLM": PAD0,
    "M2M100ForConditionalGeneration": PADDED,
    "LEDForConditionalGeneration": {**PADDED, "attention_window": 8},
    "T5GemmaForConditionalGeneration": {"encoder": PAD0, "decoder": PAD0, **PAD0},
    "DeiTForImageClassification": {},
    "Dinov2ForImageClassification": {},
    "Dinov2WithRegistersForImageClassification": {},
    "BeitForImageClassification": {},
    "ViTMSNForImageClassification": {},
    "IJepaForImageClassification": {},
    "Glm4vForConditionalGeneration": {
        "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}},
        "vision_config": {"out_hidden_size": 64},
    },
    "Qwen3_5ForConditionalGeneration": {"text_config": HYBRID, "vision_config": {"out_hidden_size": 64}},
}

GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
WIDE = {"head_dim": 32}  #: heads that are wider together than the hidden state
ONE = {"num_key_value_heads": 1}
SLIDING = {"use_sliding_window": True, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 32}
#: Structural variants: class and keys.
VARIANTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "Llama, wide heads": ("LlamaForCausalLM", {**WIDE, **TIED}),
    "Llama, one key head, biases": ("LlamaForCausalLM", {**ONE, "attention_bias": True, "mlp_bias": True}),
    "Llama, a key head for each": ("LlamaForCausalLM", {"num_key_value_heads": 4}),
    "Mistral, wide heads, sliding": ("MistralForCausalLM", {**WIDE, **ONE, **TIED, "sliding_window": 4}),
    "Qwen2, untied, sliding": ("Qwen2ForCausalLM", {**SLIDING, **UNTIED, **ONE}),
    "Qwen3, untied, wide heads, biases": ("Qwen3ForCausalLM", {**WIDE, **UNTIED, "attention_bias": True}),
    "Qwen3, sliding": ("Qwen3ForCausalLM", SLIDING),
    "Gemma, untied, wide heads": ("GemmaForCausalLM", {**WIDE, **UNTIED, **ONE}),
    "Gemma 2, wide heads, biases": ("Gemma2ForCausalLM", {**WIDE, "attention_bias": True, "sliding_window": 4}),
    "Gemma 3, text, wide heads": ("Gemma3ForCausalLM", {**WIDE, **ONE, "num_hidden_layers": 6, "sliding_window": 4}),
    "Phi, one key head, tied": ("PhiForCausalLM", {**ONE, **TIED, "qk_layernorm": True}),
    "Phi-3, tied, one key head": ("Phi3ForCausalLM", {**TIED, **ONE, "sliding_window": 4}),
    "Phi-3, partial rotary": (
        "Phi3ForCausalLM",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    ),
    "StableLM, biases, parallel": (
        "StableLmForCausalLM",
        {"use_qkv_bias": True, "use_parallel_residual": True, "qk_layernorm": True, **TIED},
    ),
    "GPT-NeoX, sequential, tied": (
        "GPTNeoXForCausalLM",
        {"intermediate_size": 256, "use_parallel_residual": False, "attention_bias": False, **TIED},
    ),
    "GPT-2, untied": ("GPT2LMHeadModel", UNTIED),
    "OPT, projected, norms after": ("OPTForCausalLM", {"word_embed_proj_dim": 32, "do_layer_norm_before": False}),
    "OPT, untied, no biases": ("OPTForCausalLM", {**UNTIED, "enable_bias": False}),
    "Falcon, one key head, biases": (
        "FalconForCausalLM",
        {"multi_query": True, "new_decoder_architecture": False, "bias": True, **UNTIED},
    ),
    "Falcon, grouped": ("FalconForCausalLM", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "StarCoder2, untied, no biases": ("Starcoder2ForCausalLM", {**UNTIED, **ONE, "use_bias": False}),
    "Cohere, norms of heads": ("CohereForCausalLM", {"use_qk_norm": True, **ONE}),
    "OLMo, clipped, tied": ("OlmoForCausalLM", {**TIED, "clip_qkv": 2.0, **ONE}),
    "OLMo 2, tied, biases": ("Olmo2ForCausalLM", {**TIED, "attention_bias": True, **ONE}),
    "Granite, untied, biases": ("GraniteForCausalLM", {**UNTIED, "attention_bias": True, "mlp_bias": True, **ONE}),
    "SmolLM3, layers without rope": ("SmolLM3ForCausalLM", {"no_rope_layers": [1, 0], **UNTIED}),
    "Nemotron, wide heads, biases": ("NemotronForCausalLM", {**WIDE, "attention_bias": True, "mlp_bias": True}),
    "GLM 4, biases, tied": ("Glm4ForCausalLM", {**TIED, "attention_bias": True, **ONE}),
    "Mamba, no biases, untied": ("MambaForCausalLM", {**UNTIED, "use_conv_bias": False}),
    "Mamba 2, tied, biases": (
        "Mamba2ForCausalLM",
        {"num_heads": 8, "head_dim": 16, **TIED, "use_bias": True},
    ),
    "Mamba 2, two groups": ("Mamba2ForCausalLM", {"num_heads": 8, "head_dim": 16, "n_groups": 2}),
    "Granite 4, two groups": (
        "GraniteMoeHybridForCausalLM",
        {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 64, "mamba_n_groups": 2},
    ),
    "Mixtral, tied, wide heads": ("MixtralForCausalLM", {**TIED, **WIDE, **ONE}),
    "Qwen2-MoE, a dense layer": ("Qwen2MoeForCausalLM", {"mlp_only_layers": [0], **TIED}),
    "Qwen3-MoE, a dense layer, wide heads": ("Qwen3MoeForCausalLM", {"mlp_only_layers": [0], **WIDE}),
    "gpt-oss, wide heads, tied": ("GptOssForCausalLM", {**WIDE, **TIED}),
    "DeepSeek-V2, yarn, plain queries": (
        "DeepseekV2ForCausalLM",
        {**LATENT, "q_lora_rank": None, "rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}},
    ),
    "DeepSeek-V3, yarn": (
        "DeepseekV3ForCausalLM",
        {**LATENT, "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}},
    ),
    "Phi-3, longrope": (
        "Phi3ForCausalLM",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
                "long_factor": [2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0],
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "DeepSeek-V2, plain queries": ("DeepseekV2ForCausalLM", {**LATENT, "q_lora_rank": None}),
    "DeepSeek-V3, two groups, plain queries": (
        "DeepseekV3ForCausalLM",
        {**LATENT, "q_lora_rank": None, "n_group": 2, "topk_group": 1, "n_shared_experts": 2},
    ),
    "GLM 4.5, norms of heads, biases": ("Glm4MoeForCausalLM", {"use_qk_norm": True, "attention_bias": True}),
    "Granite 4, experts": (
        "GraniteMoeHybridForCausalLM",
        {
            "layer_types": ["mamba", "attention"],
            "shared_intermediate_size": 64,
            "num_local_experts": 4,
            "intermediate_size": 64,
        },
    ),
    "T5, gated, untied": ("T5ForConditionalGeneration", GATED),
    "LFM2, tied": ("Lfm2ForCausalLM", {"layer_types": ["full_attention", "conv"], **TIED}),
    "Llama 4, dense": ("Llama4ForCausalLM", {"moe_layers": [], **TIED}),
}


def plain() -> dict[str, str]:
    """The class of each family of `PLAIN`, by its name."""
    found = {}
    for word in PLAIN.split():
        name, _, cls = word.partition("=")
        found[name] = cls or f"{name}ForCausalLM"
    return found
