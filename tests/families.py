"""The MoE families of transformers: which class, and what makes its model tiny. Data only; see `zoo`.

One generic set of overrides shrinks a family's default config; a family lists only what it needs beyond that.
"""

from dataclasses import dataclass, field
from typing import Any

HIDDEN = 64
VOCABULARY = 128
EXPERTS = 4
TOP_K = 2

TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "moe_intermediate_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "moe_num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "num_experts_per_token": TOP_K,
    "top_k_experts": TOP_K,
    "moe_topk": TOP_K,
    "moe_k": TOP_K,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "shared_expert_intermediate_size": 40,
    "shared_intermediate_size": 40,
    "moe_shared_expert_intermediate_size": 40,
    "shared_experts_intermediate_size": 40,
    "dense_intermediate_size": 48,
    "n_group": 1,
    "topk_group": 1,
    "num_expert_group": 1,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "index_topk": 8,
    "index_head_dim": 32,
    "index_n_heads": 2,
    "sliding_window": 16,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_head_dim": 16,
    "linear_num_heads": 4,
    "num_nextn_predict_layers": 0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""What shrinks the language model of any family; a family takes the keys that its config has."""

TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_heads": 2,
    "head_dim": 16,
    "depth": 1,
    "embed_dim": 32,
    "out_hidden_size": HIDDEN,
    "image_size": 28,
    "patch_size": 14,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
    "d_model": 32,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "output_dim": HIDDEN,
    "text_hidden_size": HIDDEN,
    "adapter_in_dim": 32,
    "adapter_input_size": 32,
    "adapter_out_dim": HIDDEN,
    "n_layers": 1,
    "projection_intermediate_size": 32,
    "mlp_dim": 32,
    "output_channels": 32,
    "downsample_channels": [32, 32],
    "downsample_hidden_size": 16,
    "global_attn_indexes": [0],
    "hidden_sizes": [16, 16, 16, 16],
    "depths": [1, 1, 1, 1],
    "num_mel_bins": 16,
}
"""What shrinks vision and audio towers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How the tiny model of one family is made.

    Attributes:
        architecture: the transformers class.
        text: overrides of the language model's config, beyond `TEXT`.
        towers: overrides of sub-configs, by their key, beyond `TOWER`.
        top: overrides of a composite config's own fields.
        no_logits: why the model gives no next-token logits for `input_ids`, "" when it does.
    """

    architecture: str
    text: dict[str, Any] = field(default_factory=dict)
    towers: dict[str, dict[str, Any]] = field(default_factory=dict)
    top: dict[str, Any] = field(default_factory=dict)
    no_logits: str = ""


GEMMA: dict[str, Any] = {
    "enable_moe_block": True,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": VOCABULARY,
    "global_head_dim": 32,
}
GEMMA_TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "patch_size": 4,
    "position_embedding_size": 256,
}
LLAMA4: dict[str, Any] = {
    "num_experts_per_tok": 1,
    "num_hidden_layers": 3,
    "layer_types": ["chunked_attention", "full_attention", "chunked_attention"],
    "moe_layers": [1, 2],
    "no_rope_layers": [1, 0, 1],
    "intermediate_size_mlp": 48,
    "attention_chunk_size": 16,
}
LLAMA4_TOWER: dict[str, Any] = {
    "intermediate_size": 128,
    "projector_input_dim": HIDDEN,
    "projector_output_dim": HIDDEN,
    "vision_output_dim": HIDDEN,
}
INKLING: dict[str, Any] = {
    "logits_mup_width_multiplier": 1.0,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 16,
}

FAMILIES: dict[str, Family] = {
    "afmoe": Family(architecture="AfmoeForCausalLM"),
    "aria": Family(architecture="AriaForConditionalGeneration"),
    "axk1": Family(architecture="AXK1ForCausalLM"),
    "axk2": Family(architecture="AXK2ForCausalLM"),
    "bailing_hybrid": Family(architecture="BailingHybridForCausalLM"),
    "beam": Family(architecture="BeamForCausalLM"),
    "cohere2_moe": Family(architecture="Cohere2MoeForCausalLM", text={"logit_scale": 1.0}),
    "deepseek_ocr2": Family(
        architecture="DeepseekOcr2ForConditionalGeneration", text={"mlp_layer_types": ["dense", "sparse", "sparse"]}
    ),
    "deepseek_v2": Family(architecture="DeepseekV2ForCausalLM"),
    "deepseek_v3": Family(architecture="DeepseekV3ForCausalLM"),
    "deepseek_v32": Family(architecture="DeepseekV32ForCausalLM"),
    "deepseek_v4": Family(architecture="DeepseekV4ForCausalLM"),
    "diffusion_gemma": Family(
        architecture="DiffusionGemmaForBlockDiffusion",
        no_logits="denoises a random block instead of predicting the next token",
    ),
    "dots1": Family(architecture="Dots1ForCausalLM"),
    "dots3_note": Family(
        architecture="Dots3NoteForConditionalGeneration",
        text={
            "head_dim": 32,
            "swa_num_attention_heads": 2,
            "swa_num_key_value_heads": 2,
            "swa_q_lora_rank": 32,
            "swa_kv_lora_rank": 32,
            "swa_head_dim": 32,
            "swa_qk_nope_head_dim": 16,
            "swa_v_head_dim": 16,
        },
        towers={"vision_config": {"per_layer_config": {0: {"num_local_experts": 4}}, "mlp_layer_types": ["sparse"]}},
    ),
    "ernie4_5_moe": Family(architecture="Ernie4_5_MoeForCausalLM"),
    "ernie4_5_vl_moe": Family(
        architecture="Ernie4_5_VLMoeForConditionalGeneration",
        text={
            "moe_intermediate_size": [40, 32],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]},
        },
    ),
    "exaone_moe": Family(architecture="ExaoneMoeForCausalLM"),
    "flex_olmo": Family(architecture="FlexOlmoForCausalLM"),
    "flint": Family(architecture="FlintForCausalLM", text={"mlp_only_layers": [0]}),
    "gemma4": Family(architecture="Gemma4ForConditionalGeneration", text=GEMMA, top={"vision_config": GEMMA_TOWER}),
    "gemma4_text": Family(architecture="Gemma4ForCausalLM", text=GEMMA),
    "glm4_moe": Family(architecture="Glm4MoeForCausalLM"),
    "glm4_moe_lite": Family(architecture="Glm4MoeLiteForCausalLM"),
    "glm4v_moe": Family(
        architecture="Glm4vMoeForConditionalGeneration",
        text={
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
                "mrope_section": [2, 1, 1],
            }
        },
    ),
    "glm5_next": Family(
        architecture="Glm5NextForConditionalGeneration", text={"index_kpool": 2, "qk_rope_head_dim": 0}
    ),
    "glm_moe_dsa": Family(architecture="GlmMoeDsaForCausalLM"),
    "gpt_oss": Family(architecture="GptOssForCausalLM"),
    "granitemoe": Family(architecture="GraniteMoeForCausalLM"),
    "granitemoe_swa": Family(architecture="GraniteMoeSWAForCausalLM"),
    "granitemoehybrid": Family(
        architecture="GraniteMoeHybridForCausalLM",
        text={
            "layer_types": ["linear_attention", "full_attention", "full_attention"],
            "mamba_n_heads": 8,
            "mamba_d_head": "auto",
            "mamba_d_state": 16,
        },
    ),
    "granitemoeshared": Family(architecture="GraniteMoeSharedForCausalLM"),
    "hunyuan_v1_moe": Family(architecture="HunYuanMoEV1ForCausalLM"),
    "hy_v3": Family(architecture="HYV3ForCausalLM"),
    "hy_v4": Family(architecture="HYV4ForCausalLM"),
    "inkling_mm_model": Family(architecture="InklingForConditionalGeneration", text=INKLING),
    "inkling_text": Family(architecture="InklingForCausalLM", text=INKLING),
    "inkling2": Family(
        architecture="Inkling2ForConditionalGeneration",
        text={
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
            "swa_head_dim": 16,
            "unpadded_vocab_size": VOCABULARY,
        },
    ),
    "inkling2_text": Family(
        architecture="Inkling2ForCausalLM",
        text={
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
            "swa_head_dim": 16,
            "unpadded_vocab_size": VOCABULARY,
        },
    ),
    "jamba": Family(
        architecture="JambaForCausalLM",
        text={
            "attn_layer_period": 3,
            "attn_layer_offset": 1,
            "expert_layer_offset": 0,
            "mamba_dt_rank": 8,
            "use_mamba_kernels": False,
        },
    ),
    "kimi_linear": Family(architecture="KimiLinearForCausalLM"),
    "kolibri1": Family(architecture="Kolibri1ForCausalLM"),
    "laguna": Family(architecture="LagunaForCausalLM"),
    "lfm2_moe": Family(
        architecture="Lfm2MoeForCausalLM", text={"layer_types": ["conv", "full_attention", "full_attention"]}
    ),
    "mellum": Family(architecture="MellumForCausalLM"),
    "mimo_v2_flash": Family(architecture="MiMoV2FlashForCausalLM"),
    "llama4": Family(
        architecture="Llama4ForConditionalGeneration", text=LLAMA4, towers={"vision_config": LLAMA4_TOWER}
    ),
    "llama4_text": Family(architecture="Llama4ForCausalLM", text=LLAMA4),
    "minimax": Family(architecture="MiniMaxForCausalLM"),
    "minimax_m2": Family(architecture="MiniMaxM2ForCausalLM"),
    "minimax_m3_vl": Family(architecture="MiniMaxM3SparseForConditionalGeneration", top={"projector_hidden_size": 32}),
    "mistral4": Family(architecture="Mistral4ForCausalLM"),
    "mistral_large4": Family(architecture="MistralLarge4ForConditionalGeneration"),
    "mixtral": Family(architecture="MixtralForCausalLM"),
    "muse_spark": Family(
        architecture="MuseSparkForConditionalGeneration",
        text={"layer_rope_theta": [500000.0, 0, 0], "moe_hidden_size": 48, "output_multiplier": 1.0},
        top={"projector_hidden_size": 32},
        towers={"audio_config": {"num_hidden_layers": 4}},
    ),
    "nemotron_h": Family(
        architecture="NemotronHForCausalLM",
        text={
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "ssm_state_size": 16,
            "n_groups": 2,
            "use_mamba_kernels": False,
        },
    ),
    "olmoe": Family(architecture="OlmoeForCausalLM"),
    "openai_privacy_filter": Family(
        architecture="OpenAIPrivacyFilterForTokenClassification",
        no_logits="classifies tokens instead of predicting the next one",
    ),
    "phimoe": Family(architecture="PhimoeForCausalLM"),
    "qwen2_moe": Family(architecture="Qwen2MoeForCausalLM"),
    "qwen3_5_moe": Family(architecture="Qwen3_5MoeForConditionalGeneration"),
    "qwen3_5_moe_text": Family(architecture="Qwen3_5MoeForCausalLM"),
    "qwen3_moe": Family(architecture="Qwen3MoeForCausalLM"),
    "qwen3_next": Family(architecture="Qwen3NextForCausalLM"),
    "qwen3_omni_moe_thinker": Family(architecture="Qwen3OmniMoeThinkerForConditionalGeneration"),
    "qwen3_vl_moe": Family(architecture="Qwen3VLMoeForConditionalGeneration"),
    "qwen4_exp": Family(
        architecture="Qwen4ExpForConditionalGeneration",
        text={
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 32,
            "indexer_budget": 8,
            "indexer_compress_ratio": 2,
            "hc_lowrank": 16,
        },
    ),
    "solar_open": Family(architecture="SolarOpenForCausalLM"),
    "unlimited_ocr": Family(architecture="UnlimitedOcrForConditionalGeneration"),
    "zaya": Family(architecture="ZayaForCausalLM", text={"num_experts_per_tok": 1, "router_hidden_size": 32}),
}
