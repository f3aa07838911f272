"""config.json files as they are published, in the spelling of their time: understood, and models of their size."""

from __future__ import annotations

from typing import Any

import pytest

from para_jax import BackboneConfig
from para_jax.backbones.config import AttentionKind, Rope
from para_jax.convert.families import FAMILIES, hf_fields

USUAL = {"architectures": ["X"], "attention_dropout": 0.0, "initializer_range": 0.02, "transformers_version": "4.44.0",
         "torch_dtype": "bfloat16", "use_cache": True, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip


def sizes(vocabulary: int, d: int, f: int, layers: int, heads: int, kv: int, context: int) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary, "hidden_size": d, "intermediate_size": f, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv, "max_position_embeddings": context,
    }  # fmt: skip


# The number of parameters that the hub counts, and config.json.
PUBLISHED: dict[str, tuple[int, dict[str, Any]]] = {
    "Llama 2 7B": (6_738_415_616, {
        "model_type": "llama", **sizes(32000, 4096, 11008, 32, 32, 32, 4096), "hidden_act": "silu",
        "pretraining_tp": 1, "rms_norm_eps": 1e-5, "rope_scaling": None, "tie_word_embeddings": False,
    }),
    "Llama 3.1 8B": (8_030_261_248, {
        "model_type": "llama", **sizes(128256, 4096, 14336, 32, 32, 8, 131072), "attention_bias": False,
        "hidden_act": "silu", "mlp_bias": False, "pretraining_tp": 1, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        "tie_word_embeddings": False, "eos_token_id": [128001, 128008, 128009],
    }),
    "Llama 3.2 1B": (1_235_814_400, {
        "model_type": "llama", **sizes(128256, 2048, 8192, 16, 32, 8, 131072), "head_dim": 64, "hidden_act": "silu",
        "mlp_bias": False, "attention_bias": False, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "rope_scaling": {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        "tie_word_embeddings": True,
    }),
    "SmolLM2 135M": (134_515_008, {
        "model_type": "llama", **sizes(49152, 576, 1536, 30, 9, 3, 8192), "hidden_act": "silu", "attention_bias": False,
        "is_llama_config": True, "mlp_bias": False, "pretraining_tp": 1, "rms_norm_eps": 1e-5,
        "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000, "tie_word_embeddings": True,
        "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}}, "pad_token_id": 2,
    }),
    "Mistral 7B v0.3": (7_248_023_552, {
        "model_type": "mistral", **sizes(32768, 4096, 14336, 32, 32, 8, 32768), "hidden_act": "silu",
        "rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False,
    }),
    "Mistral Nemo 12B": (12_247_782_400, {
        "model_type": "mistral", **sizes(131072, 5120, 14336, 40, 32, 8, 131072), "head_dim": 128,
        "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "sliding_window": None,
        "tie_word_embeddings": False,
    }),
    "Qwen2.5 0.5B": (494_032_768, {
        "model_type": "qwen2", **sizes(151936, 896, 4864, 24, 14, 2, 32768), "hidden_act": "silu",
        "max_window_layers": 24, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "sliding_window": 32768,
        "tie_word_embeddings": True, "use_mrope": False, "use_sliding_window": False,
    }),
    "Qwen2.5 7B": (7_615_616_512, {
        "model_type": "qwen2", **sizes(152064, 3584, 18944, 28, 28, 4, 131072), "hidden_act": "silu",
        "max_window_layers": 28, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "sliding_window": 131072,
        "tie_word_embeddings": False, "use_mrope": False, "use_sliding_window": False,
    }),
    "Qwen3 8B": (8_190_735_360, {
        "model_type": "qwen3", **sizes(151936, 4096, 12288, 36, 32, 8, 40960), "attention_bias": False,
        "head_dim": 128, "hidden_act": "silu", "max_window_layers": 36, "rms_norm_eps": 1e-6, "rope_scaling": None,
        "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": False, "use_sliding_window": False,
    }),
    "Gemma 2B": (2_506_172_416, {
        "model_type": "gemma", **sizes(256000, 2048, 16384, 18, 8, 1, 8192), "attention_bias": False, "head_dim": 256,
        "hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh", "pad_token_id": 0, "rms_norm_eps": 1e-6,
        "rope_scaling": None, "rope_theta": 10000.0,
    }),
    "Gemma 2 9B": (9_241_705_984, {
        "model_type": "gemma2", **sizes(256000, 3584, 14336, 42, 16, 8, 8192), "attention_bias": False,
        "attn_logit_softcapping": 50.0, "cache_implementation": "hybrid", "final_logit_softcapping": 30.0,
        "head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
        "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "sliding_window": 4096, "sliding_window_size": 4096,
    }),
    "Gemma 3 1B": (999_885_952, {
        "model_type": "gemma3_text", **sizes(262144, 1152, 6912, 26, 4, 1, 32768), "attention_bias": False,
        "attn_logit_softcapping": None, "cache_implementation": "hybrid", "final_logit_softcapping": None,
        "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "pad_token_id": 0, "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-6, "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000,
        "sliding_window": 512, "sliding_window_pattern": 6,
    }),
    "Phi-3 mini 4k": (3_821_079_552, {
        "model_type": "phi3", **sizes(32064, 3072, 8192, 32, 32, 32, 4096), "auto_map": {"AutoConfig": "x"},
        "attention_bias": False, "embd_pdrop": 0.0, "hidden_act": "silu", "original_max_position_embeddings": 4096,
        "pad_token_id": 32000, "resid_pdrop": 0.0, "rms_norm_eps": 1e-5, "rope_scaling": None, "rope_theta": 10000.0,
        "sliding_window": 2047, "tie_word_embeddings": False,
    }),
    "Phi-3.5 mini": (3_821_079_552, {
        "model_type": "phi3", **sizes(32064, 3072, 8192, 32, 32, 32, 131072), "attention_bias": False,
        "embd_pdrop": 0.0, "hidden_act": "silu", "original_max_position_embeddings": 4096, "resid_pdrop": 0.0,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "sliding_window": 262144, "tie_word_embeddings": False,
        "rope_scaling": {"long_factor": [1.5] * 48, "short_factor": [1.0] * 48, "type": "longrope"},
    }),
    "Phi-4 mini": (3_836_021_760, {
        "model_type": "phi3", **sizes(200064, 3072, 8192, 32, 24, 8, 131072), "attention_bias": False,
        "embd_pdrop": 0.0, "full_attn_mod": 1, "hidden_act": "silu", "interpolate_factor": 1, "lm_head_bias": False,
        "mlp_bias": False, "original_max_position_embeddings": 4096, "partial_rotary_factor": 0.75,
        "resid_pdrop": 0.0, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "sliding_window": 262144,
        "rope_scaling": {"long_factor": [1.5] * 48, "short_factor": [1.0] * 48, "type": "longrope"},
        "tie_word_embeddings": True,
    }),
    "SmolLM3 3B": (3_075_098_624, {
        "model_type": "smollm3", **sizes(128256, 2048, 11008, 36, 16, 4, 65536), "attention_bias": False,
        "hidden_act": "silu", "layer_types": ["full_attention"] * 36, "max_window_layers": 28, "mlp_bias": False,
        "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 9, "pretraining_tp": 2, "rms_norm_eps": 1e-6,
        "rope_scaling": None, "rope_theta": 5000000.0, "sliding_window": None, "use_sliding_window": False,
        "pad_token_id": 128004,
    }),
    "OLMo 2 1B": (1_484_916_736, {
        "model_type": "olmo2", **sizes(100352, 2048, 8192, 16, 16, 16, 4096), "attention_bias": False,
        "hidden_act": "silu", "pad_token_id": 100277, "rms_norm_eps": 1e-6, "rope_scaling": None,
        "rope_theta": 500000, "tie_word_embeddings": False,
    }),
    "Mixtral 8x7B": (46_702_792_704, {
        "model_type": "mixtral", **sizes(32000, 4096, 14336, 32, 32, 8, 32768), "hidden_act": "silu",
        "num_experts_per_tok": 2, "num_local_experts": 8, "output_router_logits": False, "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": None, "tie_word_embeddings": False,
    }),
    "Qwen3 30B-A3B": (30_532_122_624, {
        "model_type": "qwen3_moe", **sizes(151936, 2048, 6144, 48, 32, 4, 40960), "attention_bias": False,
        "decoder_sparse_step": 1, "head_dim": 128, "hidden_act": "silu", "max_window_layers": 48,
        "mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": True, "num_experts": 128,
        "num_experts_per_tok": 8, "output_router_logits": False, "rms_norm_eps": 1e-6, "rope_scaling": None,
        "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": None,
        "tie_word_embeddings": False, "use_sliding_window": False,
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published(name: str) -> None:
    parameters, fields = PUBLISHED[name]
    config = BackboneConfig.from_hf({**USUAL, **fields})
    assert config.size == parameters
    written = hf_fields(config)
    assert BackboneConfig.from_hf(written) == config
    assert {key: written[key] for key in fields} == fields


def test_what_old_files_say_besides() -> None:
    """How to generate, and options that are the default."""
    _, fields = PUBLISHED["Llama 2 7B"]
    old = {"temperature": 0.9, "top_p": 0.6, "max_length": 4096, "do_sample": True, "max_sequence_length": 2048}
    more = {"hidden_act": "swish", "partial_rotary_factor": 1.0, "rope_theta": None}
    assert BackboneConfig.from_hf({**USUAL, **fields, **old, **more}).size == 6_738_415_616
    _, fields = PUBLISHED["Qwen3 30B-A3B"]
    BackboneConfig.from_hf({**USUAL, **fields, "use_qk_norm": True})


def test_every_family_has_one() -> None:
    assert {fields["model_type"] for _, fields in PUBLISHED.values()} == set(FAMILIES)


def of(name: str) -> BackboneConfig:
    return BackboneConfig.from_hf({**USUAL, **PUBLISHED[name][1]})


def test_what_the_options_mean() -> None:
    local, full = AttentionKind(512, Rope(10000.0)), AttentionKind(None, Rope(1000000.0))
    gemma = of("Gemma 3 1B")
    assert gemma.attention_kinds == (local, full)
    assert gemma.kind_of_layer == (0, 0, 0, 0, 0, 1) * 4 + (0, 0)
    assert (gemma.attention_scale, gemma.embedding_scale, gemma.norm_offset) == (256**-0.5, 1152**0.5, 1.0)
    assert gemma.tie_word_embeddings and gemma.post_norm and gemma.qk_norm == "head"
    assert of("Gemma 2B").hidden_act == "gelu_pytorch_tanh"
    assert of("Gemma 2 9B").kind_of_layer == (0, 1) * 21 and of("Gemma 2 9B").attention_kinds[0].window == 4096
    assert of("Qwen2.5 7B").attention_kinds == (AttentionKind(None, Rope(1000000.0)),)
    assert of("Qwen2.5 7B").biases == ("q_proj", "k_proj", "v_proj")
    assert of("Phi-3 mini 4k").attention_kinds[0].window == 2047
    rope = of("Phi-4 mini").attention_kinds[0].rope
    assert rope is not None and rope.rope_type == "longrope" and rope.dim(128) == 96
    smol = of("SmolLM3 3B")
    assert [smol.attention_kinds[kind].rope is None for kind in smol.kind_of_layer] == [False, False, False, True] * 9
    assert of("Llama 3.1 8B").eos_token_ids == (128001, 128008, 128009)
    assert of("Qwen3 30B-A3B").experts is not None and of("Qwen3 30B-A3B").experts.normalized
