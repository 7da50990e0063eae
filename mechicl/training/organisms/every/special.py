"""What the rules cannot know, family by family: data only. Keys are sub-configurations ("" is the whole); values replace what the rules gave.

Each entry also turns on what its family can do and its default configuration does not show: sliding layers, sparse selection, other numbers of heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mechicl.training.organisms.every.shrink import D_HEAD, D_MODEL, PATCH, SIDE, VOCAB, WIDTH

MROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 2, 2]}
"""Rotary frequencies of time, height and width, for heads of 16."""
INTERLEAVED = {**MROPE, "mrope_interleaved": True}
QUARTER = {**INTERLEAVED, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
PLAIN = {"rope_type": "default", "rope_theta": 10_000.0}
PICTURE = VOCAB - 10
"""The picture's placeholder."""
CODES = {f"IMGIMG{chr(ord('A') + i // 10)}{chr(ord('A') + i % 10)}Z": 100 + i for i in range(16)}

SPECIAL: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "aria": {"": {"projector_patch_to_query_dict": {16: 4}, "max_value_projector_patch_to_query_dict": 4}},
    "chameleon": {"": {"vocabulary_map": {"<image>": PICTURE, **CODES}, "image_token_id": PICTURE}},
    "cohere_compass": {"text_config": {"rope_parameters": {"full_attention": MROPE, "sliding_attention": MROPE}, "layer_types": ALTERNATING, "logit_scale": 0.5}},
    "cosmos3_edge": {"text_config": {"rope_parameters": MROPE}},
    "cosmos3_omni": {"text_config": {"rope_parameters": INTERLEAVED}},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"], "num_experts_per_tok": 2}},
    "dots3_note": {
        "text_config": {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 24, "swa_kv_lora_rank": 16, "swa_head_dim": 32, "swa_qk_nope_head_dim": 24, "swa_v_head_dim": 12, "index_n_heads": 16},  # as in mistral_large4
        "vision_config": {"mlp_layer_types": ["dense", "sparse", "dense"], "adapter_in_dim": WIDTH, "adapter_out_dim": D_MODEL},
    },
    "emu3": {"": {"vocabulary_map": {"<image>": PICTURE, "<|extra_200|>": PICTURE + 1, **{f"<|visual token {i:06d}|>": 100 + i for i in range(16)}}}},
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": {**PLAIN, "mrope_section": [3, 3, 2]}, "moe_intermediate_size": [32, 32]}},
    "fast_vlm": {"vision_config": {"architecture": "fastvit_mci0", "model_args": {"layers": [1, 1, 1, 1], "embed_dims": [8, 8, 16, 32]}, "hidden_size": 64}},
    "fuyu": {"text_config": {"rope_parameters": {**PLAIN, "partial_rotary_factor": 0.5}}},
    "gemma3": {"text_config": {"layer_types": ALTERNATING}},
    "gemma3n": {
        "": {"image_token_id": 140, "audio_token_id": 150, "vision_soft_tokens_per_image": 4},
        "text_config": {"layer_types": ALTERNATING, "num_kv_shared_layers": 2, "vocab_size_per_layer_input": 128, "laurel_rank": 8, "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0]},
        "vision_config": {"vocab_size": 16, "vocab_offset": 128, "architecture": "test_resnet", "model_args": None, "hidden_size": 96},
        "audio_config": {"vocab_size": 16, "vocab_offset": 144},
    },
    "gemma4": {
        "text_config": {"layer_types": ALTERNATING, "num_kv_shared_layers": 2, "global_head_dim": 2 * D_HEAD, "vocab_size_per_layer_input": VOCAB, "use_bidirectional_attention": "vision"},
        "vision_config": {"pooling_kernel_size": 2},
    },
    "gemma4_unified": {"text_config": {"layer_types": ALTERNATING, "global_head_dim": 2 * D_HEAD}},
    "glm46v": {"text_config": {"rope_parameters": MROPE}},
    "glm4v": {"text_config": {"rope_parameters": MROPE}},
    "glm4v_moe": {"text_config": {"rope_parameters": {**PLAIN, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}}},
    "glm5_next": {"text_config": {"index_topk": 8, "index_kpool": 4}},
    "glm_ocr": {"text_config": {"rope_parameters": MROPE}},
    "glmga": {"text_config": {"rope_parameters": MROPE}},
    "granite4_vision": {"": {"deepstack_layer_map": [[-1, 0], [-2, 1]], "downsample_rate": "1/2", "spatial_target_layers": [0, 1, 2, 3]}, "vision_config": {"hidden_size": 64},
        "text_config": {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.25},
    },
    "hunyuan_vl": {"text_config": {"head_dim": D_HEAD, "rope_parameters": {**PLAIN, "mrope_section": [2, 2, 2, 2]}}},
    "hyperclovax_vision_v2": {"text_config": {"logits_scaling": 0.5}},
    "inkling2": {"text_config": {"layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding", "hybrid"]}},
    "janus": {"vision_config": {"projection_dim": D_MODEL}},
    "kosmos-2.5": {"vision_config": {"patch_embed_hidden_size": 3 * PATCH**2, "max_num_patches": 32}},
    "lfm2_vl": {"text_config": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]}},
    "llama4": {"vision_config": {"intermediate_size": 4 * WIDTH}},
    "minimax_m3_vl": {"text_config": {
        "layer_types": ["full_attention", "minimax_m3_sparse", "full_attention", "minimax_m3_sparse"], "index_n_heads": 2, "index_block_size": 4, "index_topk_blocks": 2,
    }},
    "mistral_large4": {"text_config": {"index_n_heads": 16}},  # with few, many keys tie at exactly zero, and padding decides between them
    "mistral4": {"": {"rope_parameters": {"type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 16, "max_position_embeddings": 512, "beta_fast": 32.0, "beta_slow": 1.0, "mscale_all_dim": 1.0, "mscale": 1.0, "llama_4_scaling_beta": 0.1, "partial_rotary_factor": 0.25}}},
    "mllama": {
        "text_config": {"cross_attention_layers": [1, 3]},
        "vision_config": {"intermediate_layers_indices": [0, 1], "num_global_layers": 1, "vision_output_dim": 3 * WIDTH, "max_num_tiles": 2, "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]]},
    },
    "molmo2": {"adapter_config": {"vision_feature_layer": [2, 1]}, "text_config": {"additional_vocab_size": 8}},
    "muse_glimmer": {"": {"out_hidden_size": 4 * WIDTH}},
    "muse_spark": {"": {"out_hidden_size": 4 * WIDTH}, "audio_config": {"num_hidden_layers": 1, "patch_sizes": [4], "hidden_sizes": [16], "depths": [1]}},
    "nemotron_h_omni": {
        "vision_config": {"video_temporal_patch_size": 2},
        "text_config": {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "full_attention", "moe"], "ssm_state_size": 8, "mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 2, "chunk_size": 8},
    },
    "paddleocr_vl": {"text_config": {"rope_parameters": MROPE}},
    "paligemma": {"text_config": {
        "model_type": "gemma2", "layer_types": ALTERNATING, "sliding_window": 8, "query_pre_attn_scalar": D_HEAD, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0,
    }},
    "perception_lm": {
        "vision_config": {"architecture": "vit_pe_core_base_patch16_224", "model_args": {
            "embed_dim": WIDTH, "img_size": [SIDE, SIDE], "patch_size": PATCH, "depth": 2, "num_heads": 2, "global_pool": "", "ref_feat_shape": [4, 4], "init_values": 0.5,
        }},
    },
    "qwen2_5_omni_thinker": {"": {"vision_start_token_id": 130}, "text_config": {"rope_parameters": MROPE}},
    "qwen2_5_vl": {"text_config": {"rope_parameters": MROPE}},
    "qwen2_vl": {"text_config": {"rope_parameters": MROPE}, "vision_config": {"hidden_size": D_MODEL}},
    "qwen3_5": {"text_config": {"rope_parameters": QUARTER}},
    "qwen3_5_moe": {"text_config": {"rope_parameters": QUARTER}},
    "qwen3_omni_moe_thinker": {"": {"vision_start_token_id": 130}, "text_config": {"rope_parameters": INTERLEAVED}},
    "qwen3_vl": {"text_config": {"rope_parameters": INTERLEAVED}},
    "qwen3_vl_moe": {"text_config": {"rope_parameters": INTERLEAVED}},
    "qwen4_exp": {"text_config": {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8, "indexer_compress_ratio": 4, "hc_lowrank": 8}},
    "shieldgemma2": {"text_config": {"layer_types": ALTERNATING}},
    "step3p7": {"text_config": {"layer_types": ["full_attention", "sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 8, "num_sliding_attention_heads": 8}},
    "unlimited_ocr": {"text_config": {"num_key_value_heads": 4}},
    "granite_docling": {"text_config": {"attention_multiplier": 0.25}},
    "vipllava": {"": {"vision_feature_layer": [-1, -2]}},
}  # fmt: skip
