"""Small mixtures of experts of transformers' classes, with random weights."""

SIZE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 131,
    "num_experts_per_tok": 2,
}
LATENT = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
MODELS = {
    "mixtral": ("MixtralConfig", {"num_local_experts": 4}),
    "qwen3_moe": ("Qwen3MoeConfig", {"num_experts": 4, "moe_intermediate_size": 32}),
    "gpt_oss": ("GptOssConfig", {"num_local_experts": 4}),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            **LATENT,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "moe_intermediate_size": 32,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
    ),
}
OTHERS = {
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    ),
    "granitemoe": ("GraniteMoeConfig", {"num_local_experts": 4}),
    "phimoe": ("PhimoeConfig", {"num_local_experts": 4}),
    "olmoe": ("OlmoeConfig", {"num_experts": 4}),
    "glm4_moe": (
        "Glm4MoeConfig",
        {
            "n_routed_experts": 4,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "llama4": (
        "Llama4TextConfig",
        {
            "num_local_experts": 4,
            "intermediate_size_mlp": 64,
            "num_experts_per_tok": 1,
            "attn_temperature_tuning": False,
        },
    ),
    "nemotron_h": (
        "NemotronHConfig",
        {
            "hybrid_override_pattern": "*E",
            "n_routed_experts": 4,
            "moe_intermediate_size": 32,
            "moe_shared_expert_intermediate_size": 32,
            "n_group": 1,
            "topk_group": 1,
            "mamba_num_heads": 4,
            "mamba_head_dim": 32,
            "n_groups": 1,
            "ssm_state_size": 16,
        },
    ),
}
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")


def make(name, implementation="eager", dtype="float32"):
    """A causal model in evaluation mode."""
    import torch
    import transformers

    kind, more = {**MODELS, **OTHERS}[name]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**{**SIZE, **more})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
    with torch.no_grad():
        for _, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape) * 0.1)
    model.set_experts_implementation(implementation)
    return model
