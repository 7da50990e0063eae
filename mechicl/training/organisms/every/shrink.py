"""Any configuration of transformers made tiny by rules: what a key means decides how small it gets, whichever family it belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

Role = Literal["top", "text", "vision", "audio", "bridge", "codes"]
"""What a sub-configuration describes: the whole, the decoder, the vision tower, the audio tower, a connector, a quantiser of pictures."""

VOCAB = 160
D_MODEL, N_HEADS, D_HEAD, N_LAYERS = 64, 4, 16, 4
WIDTH, VISION_HEADS, VISION_LAYERS, PATCH, SIDE = 32, 2, 3, 4, 16
"""Width, heads, layers of a vision tower; side of a patch and of a picture in pixels."""

SHARED: Mapping[str, Any] = {
    "vocab_size": VOCAB, "max_position_embeddings": 512, "num_channels": 3, "in_channels": 3, "initializer_range": 0.02,
}  # fmt: skip
TEXT: Mapping[str, Any] = {
    "hidden_size": D_MODEL, "embed_dim": D_MODEL, "word_embed_proj_dim": D_MODEL, "intermediate_size": 48, "ffn_dim": 48, "dense_intermediate_size": 48,
    "shared_intermediate_size": 48, "intermediate_size_mlp": 48, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32, "shared_experts_intermediate_size": 32, "share_expert_dim": 32, "moe_hidden_size": 32,
    "num_hidden_layers": N_LAYERS, "layers": N_LAYERS, "num_attention_heads": N_HEADS, "attention_heads": N_HEADS, "num_key_value_heads": 2,
    "swa_num_attention_heads": N_HEADS, "swa_num_key_value_heads": 2, "num_sliding_attention_heads": 2 * N_HEADS, "head_dim": D_HEAD, "swa_head_dim": D_HEAD,
    "num_experts": 4, "n_routed_experts": 4, "num_local_experts": 4, "moe_num_experts": 4, "moe_num_shared_experts": 1, "n_shared_experts": 1,
    "num_experts_per_tok": 2, "moe_topk": 2, "moe_k": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0,
    "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 24, "v_head_dim": 12, "index_topk": 6, "index_head_dim": 16, "index_n_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_head_dim": 8, "linear_num_heads": 4,
    "sliding_window": 8, "sliding_window_size": 8, "attention_chunk_size": 8, "hidden_size_per_layer_input": 8, "query_pre_attn_scalar": D_HEAD,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "eod_token_id": 3, "sep_token_id": 4,
}  # fmt: skip
VISION: Mapping[str, Any] = {
    "hidden_size": WIDTH, "embed_dim": WIDTH, "intermediate_size": 48, "mlp_dim": 48, "num_hidden_layers": VISION_LAYERS, "depth": VISION_LAYERS, "n_layers": VISION_LAYERS,
    "num_attention_heads": VISION_HEADS, "num_heads": VISION_HEADS, "attention_heads": VISION_HEADS, "num_key_value_heads": VISION_HEADS, "head_dim": WIDTH // VISION_HEADS,
    "patch_size": PATCH, "image_size": SIDE, "out_hidden_size": D_MODEL, "text_hidden_size": D_MODEL, "projection_dim": 16, "num_patches": (SIDE // PATCH) ** 2,
    "num_position_embeddings": (SIDE // PATCH) ** 2, "window_size": 2 * 2 * PATCH, "pos_emb_height": 4, "pos_emb_width": 4, "moe_intermediate_size": 32, "num_local_experts": 4,
    "num_experts_per_tok": 2, "output_channels": 16, "downsample_channels": [16, WIDTH], "deepstack_visual_indexes": [0, 1, 2], "fullatt_block_indexes": [2],
    "global_attn_indexes": [2], "projector_input_dim": WIDTH, "projector_output_dim": WIDTH, "vision_output_dim": WIDTH, "insert_layer_id": 1,
    "position_embedding_size": 16, "posemb_grid_size": 4, "max_img_size": SIDE, "max_image_size": SIDE, "num_pos_feats": 8, "projection_hidden_dim": WIDTH, "projection_intermediate_size": WIDTH,
    "mm_embed_dim": D_MODEL, "mm_posemb_size": 16, "output_proj_dims": D_MODEL, "vocab_size": VOCAB,
}  # fmt: skip
AUDIO: Mapping[str, Any] = {
    "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "encoder_layers": 1, "encoder_attention_heads": 2,
    "encoder_ffn_dim": 48, "d_model": WIDTH, "output_dim": D_MODEL, "conf_num_hidden_layers": 1, "conf_num_attention_heads": 2, "text_hidden_size": D_MODEL,
    "out_hidden_size": D_MODEL, "head_dim": 16, "adapter_input_size": WIDTH, "adapter_out_dim": D_MODEL, "downsample_hidden_size": 16,
    "vocab_size": 16, "mel_vocab_size": 16,
}  # fmt: skip
BRIDGE: Mapping[str, Any] = {
    "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "encoder_hidden_size": WIDTH,
    "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 2, "resampler_head_dim": 16, "text_hidden_size": D_MODEL,
}  # fmt: skip
CODES: Mapping[str, Any] = {
    "embed_dim": 8, "num_embeddings": 16, "codebook_size": 16, "latent_channels": 8, "base_channels": 32, "hidden_size": 32, "num_res_blocks": 1, "resolution": SIDE,
    "channel_multiplier": [1, 1, 1], "num_patches": 4, "projection_dim": D_MODEL, "image_token_embed_dim": D_MODEL,
}  # fmt: skip
TOP: Mapping[str, Any] = {
    "hidden_size": D_MODEL, "projection_dim": D_MODEL, "projector_hidden_size": WIDTH, "projection_hidden_size": WIDTH, "alignment_intermediate_size": WIDTH,
    "merged_hidden_size": WIDTH, "image_text_hidden_size": 16, "out_hidden_size": D_MODEL, "num_query_tokens": 4, "latent_query_num": 4, "image_seq_length": 16,
    "image_size": SIDE, "patch_size": PATCH, "vision_hidden_size": WIDTH, "image_grid_pinpoints": [[SIDE, 2 * SIDE], [2 * SIDE, SIDE]], "pad_token_id": 0,
    "num_image_tokens": 16, "mm_tokens_per_image": 4, "insert_layer_id": 1, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
RULES: Mapping[Role, Mapping[str, Any]] = {"top": TOP, "text": TEXT, "vision": VISION, "audio": AUDIO, "bridge": BRIDGE, "codes": CODES}


def role_of(name: str) -> Role:
    """What a sub-configuration describes, by the attribute that holds it."""
    for word, role in (
        ("text", "text"),
        ("audio", "audio"),
        ("vq", "codes"),
        ("qformer", "bridge"),
        ("perceiver", "bridge"),
        ("adapter", "bridge"),
    ):
        if word in name:
            return role  # type: ignore[return-value]
    return "vision"


def tiny(config: Any, role: Role = "top") -> dict[str, Any]:
    """Keyword arguments that make `config`'s class as small as it gets: every key with a rule, where the default is a number (or a list of them)."""
    from transformers import PreTrainedConfig

    rules = {**SHARED, **(TEXT if role == "top" else {}), **RULES[role]}
    kwargs: dict[str, Any] = {}
    for name, value in vars(config).items():
        if value is None and name == "vision_config":  # Gemma 4 is a text model unless told otherwise
            value = config.sub_configs[name]()
        if isinstance(value, PreTrainedConfig):
            kwargs[name] = {"model_type": value.model_type, **tiny(value, role_of(name))}
        elif name in rules and value is not None and value != 0 and not isinstance(value, bool):  # 0 switches a thing off
            kwargs[name] = _like(value, rules[name])
    if role in ("text", "top") and "kv_lora_rank" in kwargs:  # latent attention: every head has its own keys and values
        kwargs["num_key_value_heads"] = kwargs["num_attention_heads"]
        kwargs.pop("head_dim", None)  # follows from the widths of its rotated and unrotated parts
    if role == "top":
        kwargs |= placeholders(config)
    return kwargs


def _like(value: Any, rule: Any) -> Any:
    """The rule's value in the shape of the default: [448, 448] becomes [16, 16]."""
    if isinstance(value, list | tuple) and not isinstance(rule, list | tuple):
        return [rule] * len(value) if len(value) <= 2 else rule
    return rule


def placeholders(config: Any) -> dict[str, int]:
    """Special tokens at the end of the vocabulary, each its own, in the order of the configuration's keys; the picture's first."""
    names = [
        n
        for n in vars(config)
        if n.endswith(("token_id", "token_index", "patch_id")) and n not in ("pad_token_id", "bos_token_id", "eos_token_id")
    ]
    names.sort(key=lambda n: n not in ("image_token_id", "image_token_index", "image_patch_id"))
    return {name: VOCAB - 10 - k for k, name in enumerate(names)}
