"""Tiny configs of multimodal families, whose language model is run with text alone."""

from typing import Any

from tests.helpers.families.attention import ATTENTION
from tests.helpers.families.hybrid import HYBRID
from tests.helpers.families.settings import (
    COMMON,
    DENSE_FIRST,
    GROUPS,
    INDEXER,
    KIMI_DELTA,
    MLA,
    NUM_EXPERTS,
    SLIDING,
    WIDTHS,
    Settings,
)

__all__ = ["MULTIMODAL"]

_IMAGE_AND_VIDEO: Settings = {
    "image_token_id": 90,
    "video_token_id": 91,
    "vision_start_token_id": 92,
    "vision_end_token_id": 93,
    "image_start_token_id": 92,
    "image_end_token_id": 93,
    "video_start_token_id": 94,
    "video_end_token_id": 95,
    "tie_word_embeddings": False,
}
_MROPE: Settings = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [1, 1, 2],
        "partial_rotary_factor": 1.0,
    }
}

# Encoders that text never meets, as small as their classes allow.
_QWEN_VISION: Settings = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "out_hidden_size": 32,
    "num_position_embeddings": 4,
    "spatial_merge_size": 1,
    "deepstack_visual_indexes": [0],
    "projection_intermediate_size": 16,
}
_VISION: Settings = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
_PIXTRAL: Settings = {**_VISION, "model_type": "pixtral", "head_dim": 8}
_OCR_VISION: Settings = {
    "sam_config": {
        **_VISION,
        "image_size": 32,
        "patch_size": 8,
        "output_channels": 8,
        "mlp_dim": 16,
        "window_size": 2,
        "global_attn_indexes": [0],
        "downsample_channels": [8, 8],
    },
    "encoder_config": {
        **_VISION,
        "num_key_value_heads": 2,
        "image_size": 32,
        "patch_size": 8,
        "head_dim": 8,
    },
}
_SHARED_MOE: Settings = {**WIDTHS, "n_routed_experts": NUM_EXPERTS, "n_shared_experts": 1}
_OCR_TEXT: Settings = {
    **_SHARED_MOE,
    **DENSE_FIRST,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "n_shared_experts": 2,
}
_QWEN3_TEXT: Settings = {
    **WIDTHS,
    **_MROPE,
    "head_dim": 8,
    "num_experts": NUM_EXPERTS,
    "mlp_only_layers": [0],
}


def _with_text(text: Settings, **fields: Any) -> Settings:
    return {"text_config": {**COMMON, **text}, **fields}


MULTIMODAL: dict[str, Settings] = {
    "aria": _with_text(
        ATTENTION["aria_text"],
        image_token_index=90,
        vision_config={
            **_VISION,
            "model_type": "idefics3_vision",
            "hidden_size": 32,
            "num_attention_heads": 4,
        },
        projector_patch_to_query_dict={4: 4},
    ),
    "deepseek_ocr2": _with_text(_OCR_TEXT, image_token_id=90, vision_config=_OCR_VISION),
    "dots3_note": _with_text(
        ATTENTION["dots3_note_text"],
        **_IMAGE_AND_VIDEO,
        audio_token_id=89,
        vision_config={
            **_VISION,
            "moe_intermediate_size": 8,
            "mlp_layer_types": ["dense"],
            "adapter_in_dim": 16,
            "adapter_out_dim": 32,
            "per_layer_config": {},
        },
        audio_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "adapter_input_size": 16,
            "adapter_out_dim": 32,
        },
    ),
    "gemma4": _with_text(
        ATTENTION["gemma4_text"],
        image_token_id=90,
        video_token_id=91,
        audio_token_id=92,
        boi_token_id=93,
        eoi_token_id=94,
        boa_token_id=95,
        eoa_token_index=89,
        tie_word_embeddings=True,
        vision_config=None,
    ),
    "glm4v_moe": _with_text(
        {**_SHARED_MOE, **_MROPE, **GROUPS, "first_k_dense_replace": 1},
        **_IMAGE_AND_VIDEO,
        vision_config=_QWEN_VISION,
    ),
    "glm5_next": _with_text(
        {
            **_SHARED_MOE,
            **MLA,
            "qk_rope_head_dim": 0,
            **INDEXER,
            **KIMI_DELTA,
            **GROUPS,
            **DENSE_FIRST,
            "layer_types": ["linear_attention", "indexed_attention", "linear_attention"],
            "hc_mult": 2,
            "index_kpool": 2,
        },
        **_IMAGE_AND_VIDEO,
        vision_config=_QWEN_VISION,
    ),
    "inkling2": _with_text(
        ATTENTION["inkling2_text"],
        image_token_id=90,
        vision_config={
            **_VISION,
            "projection_hidden_dim": 16,
            "text_hidden_size": 32,
            "posemb_grid_size": 2,
        },
    ),
    "inkling_mm_model": _with_text(
        ATTENTION["inkling_text"],
        image_token_id=90,
        audio_token_id=91,
        vision_config={"text_hidden_size": 32, "patch_size": 4, "num_hidden_layers": 4},
        audio_config={"text_hidden_size": 32, "n_mel_bins": 4, "mel_vocab_size": 8},
    ),
    "minimax_m3_vl": _with_text(
        ATTENTION["minimax_m3_vl_text"],
        image_token_index=90,
        video_token_index=91,
        projector_hidden_size=16,
        vision_config={**_VISION, "hidden_size": 32, "spatial_merge_size": 1},
    ),
    "mistral3": _with_text(
        {**ATTENTION["mistral4"], "model_type": "mistral4"},
        image_token_index=90,
        spatial_merge_size=1,
        tie_word_embeddings=False,
        vision_config=_PIXTRAL,
    ),
    "mistral_large4": _with_text(
        {**_SHARED_MOE, **MLA, **INDEXER, **GROUPS, **DENSE_FIRST},
        image_token_index=90,
        spatial_merge_size=1,
        vision_config=_PIXTRAL,
    ),
    "muse_spark": _with_text(
        {
            **WIDTHS,
            **DENSE_FIRST,
            **SLIDING,
            "head_dim": 8,
            "num_local_experts": NUM_EXPERTS,
            "moe_hidden_size": 20,
        },
        image_token_id=90,
        video_token_id=91,
        audio_token_id=92,
        out_hidden_size=32,
        projector_hidden_size=16,
        vision_config={
            **_VISION,
            "pos_emb_height": 2,
            "pos_emb_width": 2,
            "layer_types": ["full_attention"],
        },
        audio_config={"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "out_hidden_size": 32},
    ),
    "qwen3_5_moe": _with_text(
        HYBRID["qwen3_5_moe_text"], **_IMAGE_AND_VIDEO, vision_config=_QWEN_VISION
    ),
    "qwen3_omni_moe_thinker": _with_text(
        _QWEN3_TEXT,
        **_IMAGE_AND_VIDEO,
        audio_token_id=89,
        vision_config=_QWEN_VISION,
        audio_config={
            "num_mel_bins": 8,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 16,
            "d_model": 16,
            "output_dim": 32,
            "downsample_hidden_size": 8,
            "n_window": 4,
            "max_source_positions": 16,
        },
    ),
    "qwen3_vl_moe": _with_text(_QWEN3_TEXT, **_IMAGE_AND_VIDEO, vision_config=_QWEN_VISION),
    "qwen4_exp": _with_text(
        HYBRID["qwen4_exp_text"], **_IMAGE_AND_VIDEO, vision_config=_QWEN_VISION
    ),
    "step3p7": _with_text(
        {**WIDTHS, **DENSE_FIRST, **SLIDING, "head_dim": 8, "n_routed_experts": NUM_EXPERTS},
        image_token_id=90,
        vision_config=_VISION,
    ),
    "unlimited_ocr": _with_text(_OCR_TEXT, image_token_id=90, vision_config=_OCR_VISION),
}
"""model_type -> settings."""
