"""Small random models that have a text decoder among other parts, made by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
PIXELS = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
BLOCKS = {
    "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "patch_size": 8, "out_hidden_size": 32,
}  # fmt: skip
VISION_TOKENS = {"image_token_id": 57, "video_token_id": 58, "vision_start_token_id": 59, "vision_end_token_id": 60}


def mrope(head_dim: int, **more: Any) -> dict[str, Any]:
    third = head_dim // 6
    sections = [head_dim // 2 - 2 * third, third, third]
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": sections} | more}


# Of each wrapper: what its text_config and its top level have, and its vision_config.
PARTS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "gemma3": (
        {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
        {"mm_tokens_per_image": 4, "image_token_index": 60, "boi_token_index": 58, "eoi_token_index": 59},
        PIXELS,
    ),
    "gemma4": (
        {
            "head_dim": 8,
            "global_head_dim": 16,
            "sliding_window": 4,
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 61,
        },
        {
            "image_token_id": 97,
            "video_token_id": 98,
            "audio_token_id": 99,
            "audio_config": {
                "hidden_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "output_proj_dims": 16,
            },
        },
        {**PIXELS, "num_key_value_heads": 2, "head_dim": 8, "position_embedding_size": 16},
    ),
    "gemma4_unified": (
        {
            "head_dim": 8,
            "global_head_dim": 16,
            "sliding_window": 4,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        {"image_token_id": 97, "video_token_id": 98, "audio_token_id": 99, "audio_config": {"audio_embed_dim": 8}},
        {"patch_size": 4, "mm_embed_dim": 16, "mm_posemb_size": 16, "output_proj_dims": 16},
    ),
    "mistral3": ({"model_type": "mistral", "head_dim": 8}, {}, {**PIXELS, "model_type": "pixtral", "head_dim": 8}),
    "qwen2_5_vl": (
        {**mrope(8), "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
        VISION_TOKENS,
        {**BLOCKS, "fullatt_block_indexes": [0]},
    ),
    "qwen3_vl": (
        {**mrope(8, mrope_interleaved=True), "head_dim": 8},
        VISION_TOKENS,
        {**BLOCKS, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    ),
}


def wrapped(name: str, tied: bool = False, seed: int = 0, **text: Any) -> Any:
    """A model in which no parameter is what it would be at the start; `text` is put into its text_config."""
    own, top, vision = PARTS[name]
    config = AutoConfig.for_model(
        name, text_config={**SIZES, **own, **text}, vision_config=vision, tie_word_embeddings=tied, **top
    )
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for key, x in [*model.named_parameters(), *((k, x) for k, x in model.state_dict().items() if "scalar" in k)]:
            if ("norm" in key and x.ndim == 1) or key.endswith("layer_scalar"):
                x.add_(torch.empty_like(x).uniform_(-0.5, 0.5))
            else:
                x.normal_(0, 0.2)
    return model


def saved(model: Any, folder: Path, spelling: str = "hub", **options: Any) -> Path:
    """Its folder, with the names of tensors as on the hub, or as transformers 5 has them in memory."""
    model.save_pretrained(folder, save_original_format=spelling == "hub", **options)
    return folder
