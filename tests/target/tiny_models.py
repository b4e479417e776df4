"""Tiny random models of the types that targets have, each with what is particular to its type."""

from typing import Any, NamedTuple

import torch

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW = 16
SLIDING = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": WINDOW}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8}
ROUTED = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
MANY = {"num_key_value_heads": 4, "v_head_dim": 12}
NO_WIDTH = {"head_dim": None}  # its config has none, or another meaning of it
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
OF_GPT2 = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 128}


class Tiny(NamedTuple):
    """A type of model, what its text config has beyond `SIZES`, and its config around that."""

    model_type: str
    text: dict[str, Any]
    around: dict[str, Any] | None = None  # of models that read images
    eager: bool = False  # whether its attention is more than a softmax
    windows: int = 0  # layers that see a window


MODELS = {
    "llama": Tiny("llama", {}),
    "llama, attention and mlp biases": Tiny("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": Tiny("mistral", {"sliding_window": WINDOW}, windows=4),
    "mistral, full": Tiny("mistral", {"sliding_window": None}),
    "ministral": Tiny("ministral", SLIDING, windows=2),
    "ministral3": Tiny("ministral3", {}),
    "mixtral": Tiny("mixtral", {"num_local_experts": 4, "sliding_window": None}),
    "qwen2": Tiny("qwen2", {}),
    "qwen2_moe": Tiny("qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 16}),
    "qwen3": Tiny("qwen3", {}),
    "qwen3_moe": Tiny("qwen3_moe", EXPERTS),
    "gemma": Tiny("gemma", {}),
    "gemma2": Tiny(
        "gemma2",
        {**SLIDING, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 0.5},
        eager=True,
        windows=2,
    ),
    "gemma3": Tiny("gemma3_text", {**SLIDING, "query_pre_attn_scalar": 8}, windows=2),
    "gemma3, images": Tiny(
        "gemma3", {**SLIDING, "query_pre_attn_scalar": 8}, {"mm_tokens_per_image": 4}, windows=2
    ),
    "gemma4": Tiny(
        "gemma4_text",
        {
            **SLIDING,
            "global_head_dim": 16,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "final_logit_softcapping": 30.0,
            "hidden_size_per_layer_input": 0,
            "num_kv_shared_layers": 0,
        },
        windows=2,
    ),
    "phi3": Tiny("phi3", {"sliding_window": None}),
    "phi3, sliding": Tiny("phi3", {"sliding_window": WINDOW}, windows=4),
    "granite": Tiny(
        "granite", {"logits_scaling": 6.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5}
    ),
    "granitemoe": Tiny("granitemoe", {"logits_scaling": 6.0, "num_local_experts": 4}),
    "cohere": Tiny("cohere", {"logit_scale": 0.0625}),
    "cohere2": Tiny("cohere2", {**SLIDING, "logit_scale": 0.0625}, windows=2),
    "olmo2": Tiny("olmo2", {}),
    "olmo3": Tiny("olmo3", SLIDING, windows=2),
    "olmoe": Tiny("olmoe", EXPERTS),
    "smollm3": Tiny("smollm3", {}),
    "glm4": Tiny("glm4", {}),
    "glm4_moe": Tiny("glm4_moe", {**EXPERTS, **ROUTED}),
    "deepseek_v3": Tiny("deepseek_v3", {**EXPERTS, **ROUTED, **LATENT, **NO_WIDTH, **MANY}),
    "gpt_oss": Tiny(
        "gpt_oss", {**SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2}, None, True, 2
    ),
    "seed_oss": Tiny("seed_oss", {}),
    "minimax_m2": Tiny("minimax_m2", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "exaone4": Tiny("exaone4", SLIDING, windows=2),
    "llama4": Tiny(
        "llama4_text",
        {
            "attention_chunk_size": 8,
            "num_local_experts": 4,
            "intermediate_size_mlp": 48,
            "layer_types": ["chunked_attention", "full_attention"] * 2,
        },
    ),
    "starcoder2": Tiny("starcoder2", {"sliding_window": WINDOW}, windows=4),
    "stablelm": Tiny("stablelm", {}),
    "gpt2": Tiny("gpt2", OF_GPT2),
    "gpt_neox": Tiny("gpt_neox", {}),
    "phi": Tiny("phi", {}),
    "opt": Tiny("opt", {"word_embed_proj_dim": 32, "ffn_dim": 48}),
    "qwen3_vl": Tiny("qwen3_vl", {}, {}),
    "mistral3": Tiny("mistral3", {"model_type": "mistral", "sliding_window": None}, {}),
}

# layers with state of their own, which cannot be taken back; attention that cannot be chosen
CAPTURE_ONLY = {
    "falcon": Tiny("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, **NO_WIDTH}),
    "qwen3_next": Tiny(
        "qwen3_next",
        {
            **EXPERTS,
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "shared_expert_intermediate_size": 16,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    ),
    "lfm2": Tiny("lfm2", {"layer_types": ["conv", "full_attention"] * 2, **NO_WIDTH}),
}


def make_model(name: str) -> Any:
    """The model of that name in `MODELS` or `CAPTURE_ONLY`, with random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    torch.manual_seed(0)
    tiny = (MODELS | CAPTURE_ONLY)[name]
    fields = {**SIZES, **tiny.text}.items()
    text = {name: value for name, value in fields if value is not None or name not in NO_WIDTH}
    if tiny.around is None:
        config = AutoConfig.for_model(tiny.model_type, **text)
        model = AutoModelForCausalLM.from_config(config)
    else:
        vision = {**VISION, "num_hidden_layers": 1, "depth": 1, "num_heads": 2}
        around = {"text_config": text, "vision_config": vision, **tiny.around}
        config = AutoConfig.for_model(tiny.model_type, **around)
        model = AutoModelForImageTextToText.from_config(config)
    return model.eval()
