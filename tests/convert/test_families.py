"""config.json files as they are published, in the spelling of their time: understood, and models of their size."""

from __future__ import annotations

import dataclasses
import logging
import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from para_jax import BackboneConfig, ParaJaxError
from para_jax.backbones.block import FUNCTIONS
from para_jax.families.architecture import ACTIVATIONS, Experts, LayerKind, Rope
from para_jax.families.keys import NEUTRAL, OF_MODELS, ONLY, READ, reads
from para_jax.families.reading import architecture_from_hf, ignored_line
from para_jax.families.table import FAMILIES
from para_jax.families.writing import hf_fields

USUAL = {"architectures": ["X"], "attention_dropout": 0.0, "initializer_range": 0.02, "transformers_version": "4.44.0",
         "torch_dtype": "bfloat16", "use_cache": True, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip


def sizes(vocabulary: int, d: int, f: int, layers: int, heads: int, kv: int, context: int) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary, "hidden_size": d, "intermediate_size": f, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv, "max_position_embeddings": context,
    }  # fmt: skip


GPT_OSS: dict[str, Any] = {
    **sizes(201088, 2880, 2880, 0, 64, 8, 131072), "attention_bias": True, "eos_token_id": 200002,
    "head_dim": 64, "hidden_act": "silu", "num_experts_per_tok": 4, "output_router_logits": False,
    "pad_token_id": 199999,
    "quantization_config": {"modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router",
                                                       "model.embed_tokens", "lm_head"], "quant_method": "mxfp4"},
    "rms_norm_eps": 1e-5, "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "truncate": False,
                                           "original_max_position_embeddings": 4096, "rope_type": "yarn"},
    "rope_theta": 150000, "router_aux_loss_coef": 0.9, "sliding_window": 128, "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
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
    "OLMo 3 7B": (7_298_011_136, {
        "model_type": "olmo3", **sizes(100278, 4096, 11008, 32, 32, 32, 65536), "attention_bias": False,
        "hidden_act": "silu", "layer_types": [*["sliding_attention"] * 3, "full_attention"] * 8,
        "pad_token_id": 100277,
        "rms_norm_eps": 1e-6, "rope_theta": 500000, "sliding_window": 4096, "tie_word_embeddings": False,
        "rope_scaling": {"attention_factor": 1.2079441541679836, "beta_fast": 32.0, "beta_slow": 1.0, "factor": 8.0,
                         "original_max_position_embeddings": 8192, "rope_type": "yarn"},
    }),
    "Granite 3.3 2B": (2_533_539_840, {
        "model_type": "granite", **sizes(49159, 2048, 8192, 40, 32, 8, 131072), "attention_bias": False,
        "attention_multiplier": 0.015625, "embedding_multiplier": 12.0, "hidden_act": "silu", "logits_scaling": 8.0,
        "mlp_bias": False, "residual_multiplier": 0.22, "rms_norm_eps": 1e-5, "rope_scaling": None,
        "rope_theta": 10000000.0, "tie_word_embeddings": True,
    }),
    "GLM-4 9B 0414": (9_400_279_040, {
        "model_type": "glm4", **sizes(151552, 4096, 13696, 40, 32, 2, 32768), "attention_bias": True, "head_dim": 128,
        "hidden_act": "silu", "partial_rotary_factor": 0.5, "pad_token_id": 151329, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "tie_word_embeddings": False, "eos_token_id": [151329, 151336, 151338],
    }),
    "Qwen1.5 MoE A2.7B": (14_315_784_192, {
        "model_type": "qwen2_moe", **sizes(151936, 2048, 5632, 24, 16, 16, 8192), "decoder_sparse_step": 1,
        "hidden_act": "silu", "max_window_layers": 21, "moe_intermediate_size": 1408, "norm_topk_prob": False,
        "num_experts": 60, "num_experts_per_tok": 4, "output_router_logits": False, "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "shared_expert_intermediate_size": 5632,
        "sliding_window": 32768, "tie_word_embeddings": False, "use_sliding_window": False,
    }),
    "Seed-OSS 36B": (36_151_104_512, {
        "model_type": "seed_oss", **sizes(155136, 5120, 27648, 64, 80, 8, 524288), "attention_bias": True,
        "attention_out_bias": False, "head_dim": 128, "hidden_act": "silu", "mlp_bias": False, "pretraining_tp": 1,
        "residual_dropout": 0.1, "rms_norm_eps": 1e-6, "rope_scaling": {"rope_type": "default"},
        "rope_theta": 10000000.0, "tie_word_embeddings": False,
    }),
    "AFM 4.5B": (4_619_184_640, {
        "model_type": "arcee", **sizes(128004, 2560, 18432, 36, 20, 4, 65536), "attention_bias": False, "head_dim": 128,
        "hidden_act": "relu2", "mlp_bias": False, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 20.0, "mscale": 1.0,
                         "original_max_position_embeddings": 4096, "rope_type": "yarn", "type": "yarn"},
        "tie_word_embeddings": False,
    }),
    "Ministral 3 3B": (3_429_006_336, {
        "model_type": "ministral3", **sizes(131072, 3072, 9216, 26, 32, 8, 262144), "head_dim": 128,
        "hidden_act": "silu", "rms_norm_eps": 1e-5, "sliding_window": None, "tie_word_embeddings": True,
        "rope_parameters": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 16.0, "llama_4_scaling_beta": 0.1,
                            "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 16384,
                            "rope_theta": 1000000.0, "rope_type": "yarn", "type": "yarn"},
    }),
    "EXAONE 4.0 32B": (32_003_216_384, {
        "model_type": "exaone4", **sizes(102400, 5120, 27392, 64, 40, 8, 131072), "head_dim": 128, "hidden_act": "silu",
        "layer_types": [*["sliding_attention"] * 3, "full_attention"] * 16, "rms_norm_eps": 1e-5,
        "rope_scaling": {"factor": 16.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                         "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        "rope_theta": 1000000, "sliding_window": 4096, "sliding_window_pattern": "LLLG", "tie_word_embeddings": False,
    }),
    "ERNIE 4.5 0.3B": (360_748_032, {
        "model_type": "ernie4_5", **sizes(103424, 1024, 3072, 18, 16, 2, 131072), "head_dim": 128, "hidden_act": "silu",
        "pad_token_id": 0, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": True, "use_bias": False,
    }),
    "Hunyuan 1.8B": (1_791_080_448, {
        "model_type": "hunyuan_v1_dense", **sizes(120818, 2048, 6144, 32, 16, 4, 262144), "attention_bias": False,
        "head_dim": 128, "hidden_act": "silu", "mlp_bias": False, "pad_token_id": 120002, "rms_norm_eps": 1e-5,
        "rope_scaling": {"alpha": 1000.0, "beta_fast": 32, "beta_slow": 1, "factor": 1.0, "mscale": 1.0,
                         "mscale_all_dim": 1.0, "type": "dynamic"},
        "rope_theta": 10000.0, "tie_word_embeddings": True, "use_qk_norm": True,
    }),
    "Helium 1 preview 2B": (2_172_643_840, {
        "model_type": "helium", **sizes(48000, 2560, 7040, 24, 20, 20, 4096), "attention_bias": False, "head_dim": 128,
        "hidden_act": "silu", "mlp_bias": False, "pad_token_id": 3, "rms_norm_eps": 1e-8, "rope_theta": 100000.0,
        "tie_word_embeddings": False,
    }),
    "Aya 23 8B": (8_028_033_024, {
        "model_type": "cohere", **sizes(256000, 4096, 14336, 32, 32, 8, 8192), "attention_bias": False,
        "hidden_act": "silu", "layer_norm_eps": 1e-5, "logit_scale": 0.0625, "pad_token_id": 0, "rope_theta": 10000.0,
        "use_qk_norm": False,
    }),
    "Command R7B": (8_028_033_024, {
        "model_type": "cohere2", **sizes(256000, 4096, 14336, 32, 32, 8, 8192), "attention_bias": False,
        "cache_implementation": "hybrid", "head_dim": 128, "hidden_act": "silu", "layer_norm_eps": 1e-5,
        "logit_scale": 0.25, "pad_token_id": 0, "rope_theta": 50000.0, "sliding_window": 4096,
        "sliding_window_pattern": 4,
    }),
    "StableLM 2 1.6B": (1_644_515_328, {
        "model_type": "stablelm", **sizes(100352, 2048, 5632, 24, 32, 32, 4096), "hidden_act": "silu",
        "hidden_dropout": 0.0, "layer_norm_eps": 1e-5, "partial_rotary_factor": 0.25, "qk_layernorm": False,
        "rope_scaling": None, "rope_theta": 10000, "tie_word_embeddings": False, "use_parallel_residual": False,
        "use_qkv_bias": True,
    }),
    "Apertus 8B": (8_053_338_240, {
        "model_type": "apertus", **sizes(131072, 4096, 21504, 32, 32, 8, 65536), "attention_bias": False,
        "hidden_act": "xielu", "mlp_bias": False, "pad_token_id": 3, "post_norm": False, "qk_norm": True,
        "rms_norm_eps": 1e-5, "rope_theta": 12000000,
        "rope_scaling": {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                         "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        "tie_word_embeddings": False,
    }),
    "StarCoder2 3B": (3_030_371_328, {
        "model_type": "starcoder2", **sizes(49152, 3072, 12288, 30, 24, 2, 16384), "embedding_dropout": 0.1,
        "hidden_act": "gelu_pytorch_tanh", "norm_epsilon": 1e-5, "residual_dropout": 0.1,
        "rope_theta": 999999.4420358813, "sliding_window": 4096, "use_bias": True,
    }),
    "Phi-2": (2_779_683_840, {
        "model_type": "phi", **sizes(51200, 2560, 10240, 32, 32, 32, 2048), "embd_pdrop": 0.0, "hidden_act": "gelu_new",
        "layer_norm_eps": 1e-5, "partial_rotary_factor": 0.4, "qk_layernorm": False, "resid_pdrop": 0.1,
        "rope_scaling": None, "rope_theta": 10000.0, "tie_word_embeddings": False,
    }),
    "Pythia 160M": (162_322_944, {
        "model_type": "gpt_neox", "vocab_size": 50304, "hidden_size": 768, "intermediate_size": 3072,
        "num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 2048, "hidden_act": "gelu",
        "layer_norm_eps": 1e-5, "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False,
        "use_parallel_residual": True,
    }),
    "GPT-2": (124_439_808, {
        "model_type": "gpt2", "vocab_size": 50257, "activation_function": "gelu_new", "attn_pdrop": 0.1,
        "embd_pdrop": 0.1, "layer_norm_epsilon": 1e-5, "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12,
        "n_positions": 1024, "resid_pdrop": 0.1, "summary_activation": None, "summary_first_dropout": 0.1,
        "summary_proj_to_labels": True, "summary_type": "cls_index", "summary_use_proj": True,
    }),
    "OPT 125M": (125_239_296, {
        "model_type": "opt", "vocab_size": 50272, "_remove_final_layer_norm": False, "activation_function": "relu",
        "do_layer_norm_before": True, "dropout": 0.1, "ffn_dim": 3072, "hidden_size": 768, "init_std": 0.02,
        "layerdrop": 0.0, "max_position_embeddings": 2048, "num_attention_heads": 12, "num_hidden_layers": 12,
        "pad_token_id": 1, "prefix": "</s>", "word_embed_proj_dim": 768,
    }),
    # As transformers counts them, for its class's sizes.
    "Gemma 4 of the default sizes": (5_657_561_630, {
        "model_type": "gemma4_text", "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6,
        **sizes(262144, 2304, 9216, 30, 8, 4, 131072), "head_dim": 256, "global_head_dim": 512, "sliding_window": 512,
        "num_kv_shared_layers": 10, "use_double_wide_mlp": True, "hidden_size_per_layer_input": 256,
        "vocab_size_per_layer_input": 262144, "tie_word_embeddings": True,
    }),
    "Gemma 4 Unified of the default sizes": (2_969_470_750, {
        "model_type": "gemma4_unified_text", "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6,
        **sizes(262144, 2304, 9216, 30, 8, 4, 262144), "head_dim": 256, "global_head_dim": 512, "sliding_window": 1024,
        "attention_k_eq_v": True, "num_global_key_value_heads": 1, "tie_word_embeddings": True,
    }),
    "GPT-OSS 20B": (20_914_757_184, {
        "model_type": "gpt_oss", **GPT_OSS, "num_hidden_layers": 24, "num_local_experts": 32,
        "layer_types": ["sliding_attention", "full_attention"] * 12,
    }),
    "GPT-OSS 120B": (116_829_156_672, {
        "model_type": "gpt_oss", **GPT_OSS, "num_hidden_layers": 36, "num_local_experts": 128,
        "layer_types": ["sliding_attention", "full_attention"] * 18,
    }),
    "nanochat d20": (560_988_160, {
        "model_type": "nanochat", **sizes(65536, 1280, 5120, 20, 10, 10, 2048), "attention_bias": False,
        "final_logit_softcapping": 15.0, "hidden_act": "relu2", "pad_token_id": 1, "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, "tie_word_embeddings": False,
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


# Keys that published files have besides, their values, and those of them that no code reads.
BESIDES: list[tuple[str, dict[str, Any], list[str]]] = [
    ("Llama 2 7B", {"_name_or_path": "x", "pad_token_id": -1, "max_sequence_length": 2048, "head_dim": None}, []),
    ("Llama 2 7B", {"_model_name_or_path": "x", "attn_bias": False, "unk_token_id": 0},
     ["_model_name_or_path", "unk_token_id"]),
    ("Llama 3.2 1B", {"unsloth_fixed": True, "unsloth_version": "2025.3", "_attn_implementation_autoset": True}, []),
    ("Llama 3.1 8B", {"tokenizer_class": "LlamaTokenizerFast", "attn_implementation": "sdpa", "num_labels": 3}, []),
    ("Llama 3.1 8B", {"_attn_implementation": "sdpa", "output_attentions": True, "initializer_range": 2.0}, []),
    ("SmolLM2 135M", {"rope_interleaved": True}, ["rope_interleaved"]),
    ("Mistral 7B v0.3", {"use_flash_attention": True, "mlp_bias": False, "torchscript": True}, ["use_flash_attention"]),
    # Of vLLM; transformers attends to all tokens.
    ("Qwen2.5 7B", {"dual_chunk_attention_config": {"chunk_size": 262144}}, ["dual_chunk_attention_config"]),
    ("Qwen2.5 7B", {"is_causal": True, "attention_bias": None, "seq_length": 8}, ["seq_length"]),
    ("Qwen3 8B", {"attention_chunk_size": None, "per_layer_config": None, "is_encoder_decoder": False}, []),
    ("Gemma 2B", {"hidden_activation": None, "use_bidirectional_attention": None}, []),
    ("Gemma 2 9B", {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}, "unk_token_id": 3},
     ["unk_token_id"]),
    ("Gemma 3 1B", {"_sliding_window_pattern": 6, "use_bidirectional_attention": False}, []),
    ("Phi-3 mini 4k", {"auto_map": {"AutoConfig": "x"}}, ["auto_map (the code it names is not run)"]),
    ("Phi-4 mini", {"auto_map": {}, "lm_head_bias": False, "mlp_bias": False}, []),
    ("SmolLM3 3B", {"cache_implementation": "hybrid", "layer_types": None}, []),
    ("OLMo 2 1B", {"clip_qkv": None, "init_device": "cpu"}, ["init_device"]),
    ("Mixtral 8x7B", {"router_jitter_noise": 0.01, "num_experts": 8, "head_dim": None}, []),
    ("EXAONE 4.0 32B", {"attn_implementation": "sdpa"}, []),
    ("Hunyuan 1.8B", {"attention_head_dim": 128, "use_cla": False, "cla_share_factor": 2, "eod_token_id": 120020},
     ["attention_head_dim", "cla_share_factor"]),
    ("Command R7B", {"position_embedding_type": "rope_gptj", "use_qk_norm": False, "rotary_pct": 1.0},
     ["position_embedding_type", "rotary_pct"]),
    ("Qwen3 30B-A3B", {"use_qk_norm": True, "qkv_bias": False, "shared_expert_intermediate_size": 0}, []),
    ("GPT-2", {"task_specific_params": {"text-generation": {"do_sample": True}}, "n_inner": None}, []),
    ("Pythia 160M", {"attention_bias": True, "attention_probs_dropout_prob": 0.1, "rope_ratio": 2}, ["rope_ratio"]),
    ("OPT 125M", {"activation_dropout": 0.1, "enable_bias": True}, []),
    ("GPT-OSS 20B", {"hidden_act": "tanh", "experts_per_token": 4, "initial_context_length": 4096},
     ["experts_per_token", "initial_context_length"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "besides", "ignored"), BESIDES)
def test_what_published_files_say_besides(
    caplog: pytest.LogCaptureFixture, name: str, besides: dict[str, Any], ignored: list[str]
) -> None:
    """It changes nothing, and one line names the keys that no code reads."""
    parameters, fields = PUBLISHED[name]
    usual = {key: value for key, value in {**USUAL, **fields}.items() if key != "auto_map"}
    plain = BackboneConfig.from_hf(usual)
    with caplog.at_level(logging.WARNING):
        config = BackboneConfig.from_hf({**usual, **besides}, "their/model")
    assert config.size == parameters and config == dataclasses.replace(plain, name="their/model")
    architecture = FAMILIES[config.family].architecture
    line = f"their/model: keys that transformers' {architecture} does not read are ignored: {', '.join(ignored)}"
    assert [record.getMessage() for record in caplog.records if record.name.startswith("para_jax")] == [line] * bool(
        ignored
    )
    assert hf_fields(config) == {**usual, **besides}


# What matters, in families that lack it.
MATTERS: list[tuple[str, dict[str, Any], str]] = [
    ("Qwen2.5 7B", {"is_causal": False}, "is_causal=False; only True"),
    ("Llama 2 7B", {"is_encoder_decoder": True}, "is_encoder_decoder=True; only False"),
    ("Llama 2 7B", {"compression_config": {"format": "int"}}, "compression_config; only float32"),
    # Of another family, which transformers' caches look at, and of none.
    ("Llama 2 7B", {"sliding_window": 8}, "sliding_window=8, which is not implemented for LlamaForCausalLM"),
    ("Llama 2 7B", {"attention_chunk_size": 8}, "attention_chunk_size=8"),
    ("Llama 2 7B", {"num_experts": 8}, "num_experts=8"),
    ("Llama 2 7B", {"alibi": True}, "alibi=True"),
    ("Qwen2.5 7B", {"attention_bias": True}, "attention_bias=True"),
    ("Mistral 7B v0.3", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
    ("Llama 3.1 8B", {"residual_multiplier": 0.22}, "residual_multiplier=0.22, which is not implemented"),
    ("Qwen1.5 MoE A2.7B", {"decoder_sparse_step": 2}, "decoder_sparse_step=2; only 1"),
    ("Hunyuan 1.8B", {"use_qk_norm": False}, "use_qk_norm=False; only True"),
    ("OPT 125M", {"do_layer_norm_before": False}, "do_layer_norm_before=False; only True"),
    ("OPT 125M", {"word_embed_proj_dim": 512}, "word_embed_proj_dim=512; only 768"),
    ("OPT 125M", {"ffn_dim": None}, "config.json lacks ffn_dim"),
    ("GPT-2", {"n_embd": 768.0}, "n_embd=768.0, which is not a whole number"),
    ("GPT-2", {"n_positions": 0}, "n_positions=0, which is not a whole number"),
    ("GPT-2", {"n_layer": None}, "config.json lacks n_layer"),
    ("GPT-2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True; only False"),
    ("GPT-2", {"add_cross_attention": True}, "add_cross_attention=True; only False"),
    ("Ministral 3 3B", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "llama_4_scaling_beta=None"),
    # transformers' base class reads these.
    ("Qwen3 8B", {"per_layer_config": {"3": {"sliding_window": 8}}}, "per_layer_config="),
    ("Qwen3 30B-A3B", {"num_experts": 4, "num_local_experts": 8}, "num_local_experts=8, which are two"),
    ("Qwen3 8B", {"text_config": {"hidden_size": 8}}, "text_config="),
    ("Mistral 7B v0.3", {"original_max_position_embeddings": 8}, "original_max_position_embeddings=8"),
    # What is in settings of RoPE is read, wherever they stand.
    ("Gemma 3 1B", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5, which gemma3_text does not support"),
    ("Gemma 3 1B", {"rope_parameters": {"rope_theta": 1.0}}, "full_attention, sliding_attention and rope_theta"),
    ("Gemma 2 9B", {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "config.json has full_attention"),
    ("Llama 2 7B", {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "full_attention and rope_theta"),
    ("Llama 2 7B", {"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 8}}, "understood ['beta_fast']"),
    ("Llama 2 7B", {"rope_parameters": {"rope_theta": 1e4, "rope_type": None}}, "rope_type in config.json None"),
    ("Llama 2 7B", {"rope_parameters": {"rope_theta": 1e4, "factor": 8.0}}, "not understood ['factor']"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "besides", "says"), MATTERS)
def test_what_matters_and_is_not_implemented(name: str, besides: dict[str, Any], says: str) -> None:
    with pytest.raises(ParaJaxError, match=re.escape(says)):
        BackboneConfig.from_hf({**USUAL, **PUBLISHED[name][1], **besides})


def test_an_option_that_a_later_class_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its default is as good as its absence; any other value, false too, may matter."""
    import transformers

    class LaterConfig(transformers.LlamaConfig):
        gated_norm: bool = False
        scaled_residual: bool = True

        def __post_init__(self, **kwargs: Any) -> None:
            self.gain = kwargs.pop("old_gain", None)
            super().__post_init__(**kwargs)

    monkeypatch.setitem(transformers.CONFIG_MAPPING._extra_content, "llama", LaterConfig)
    fields = {**USUAL, **PUBLISHED["Llama 2 7B"][1]}
    ok = {**fields, "gated_norm": False, "scaled_residual": True, "old_gain": None, "other": 1}
    assert architecture_from_hf(ok) == architecture_from_hf(fields)
    assert str(ignored_line(ok)).endswith("are ignored: other")
    for key, value in (("gated_norm", True), ("scaled_residual", False), ("old_gain", 2.0)):
        with pytest.raises(ParaJaxError, match=f"{key}={value}, which is not implemented"):
            architecture_from_hf({**fields, key: value})


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_that_models_read_is_known(family: str) -> None:
    """transformers' models look at options that its classes do not have; a new one has to be put into a list here."""
    from transformers import CONFIG_MAPPING

    made = CONFIG_MAPPING[family]
    general = ["modeling_utils", "masking_utils", "cache_utils", "modeling_rope_utils"]
    own = made.__module__.replace("configuration_", "modeling_")
    names: set[str] = set()
    for module in (own, *(f"transformers.{name}" for name in general)):
        spec = find_spec(module)
        assert spec is not None and spec.origin is not None
        text = Path(spec.origin).read_text()
        names |= set(re.findall(r'(?:get|has)attr\([\w.]*config, "(\w+)"', text))
        names |= set(re.findall(r"config\.(\w+)(?!\w*\()", text)) if module == own else set()
    # Other parts of a model, whose options are in the same file.
    classes = [x for x in vars(import_module(made.__module__)).values() if isinstance(x, type)]
    others = [x for x in classes if x is not made and x.__module__ == made.__module__]
    names -= {name for name in names if any(reads(other, name) for other in others)}
    # Images, how programs are compiled, and layers that are no attention.
    names -= {"mm_tokens_per_image", "image_token_id", "vision_config", "compile_config", "number_of_conv_states"}
    of_family = {*FAMILIES[family].only, *FAMILIES[family].neutral}
    assert not {name for name in names - READ - NEUTRAL - OF_MODELS - set(ONLY) - of_family if not reads(made, name)}


def test_every_family_has_one() -> None:
    assert {fields["model_type"] for _, fields in PUBLISHED.values()} == set(FAMILIES)


def of(name: str) -> BackboneConfig:
    return BackboneConfig.from_hf({**USUAL, **PUBLISHED[name][1]})


def test_what_the_options_mean() -> None:
    local, full = LayerKind(512, Rope(10000.0)), LayerKind(None, Rope(1000000.0))
    gemma = of("Gemma 3 1B")
    assert gemma.layer_kinds == (local, full)
    assert gemma.kind_of_layer == (0, 0, 0, 0, 0, 1) * 4 + (0, 0)
    assert (gemma.attention_scale, gemma.embedding_scale, gemma.norm_offset) == (256**-0.5, 1152**0.5, 1.0)
    assert gemma.tie_word_embeddings and gemma.post_norm and gemma.qk_norm == "head"
    assert of("Gemma 2B").hidden_act == "gelu_pytorch_tanh"
    assert of("Gemma 2 9B").kind_of_layer == (0, 1) * 21 and of("Gemma 2 9B").layer_kinds[0].window == 4096
    assert of("Qwen2.5 7B").layer_kinds == (LayerKind(None, Rope(1000000.0)),)
    assert of("Qwen2.5 7B").biases == ("q_proj", "k_proj", "v_proj")
    assert of("Phi-3 mini 4k").layer_kinds[0].window == 2047
    rope = of("Phi-4 mini").layer_kinds[0].rope
    assert rope is not None and rope.rope_type == "longrope" and rope.dim(128) == 96
    smol = of("SmolLM3 3B")
    assert [smol.layer_kinds[kind].rope is None for kind in smol.kind_of_layer] == [False, False, False, True] * 9
    assert of("Llama 3.1 8B").eos_token_ids == (128001, 128008, 128009)
    olmo = of("OLMo 3 7B")
    assert [kind.rope and kind.rope.rope_type for kind in olmo.layer_kinds] == ["default", "yarn"]
    assert of("GLM-4 9B 0414").biases == ("q_proj", "k_proj", "v_proj")
    for name in ("EXAONE 4.0 32B", "Command R7B"):
        kinds = [of(name).layer_kinds[kind] for kind in of(name).kind_of_layer]
        assert len(kinds) == of(name).num_hidden_layers
        assert [(kind.window, kind.rope is None) for kind in kinds[:4]] == [(4096, False)] * 3 + [(None, True)]
    hunyuan, ministral = (of(name).layer_kinds[0].rope for name in ("Hunyuan 1.8B", "Ministral 3 3B"))
    assert hunyuan == Rope(10000.0 * 1000.0 ** (128 / 126))
    assert ministral is not None and ministral.query_scaling == (0.1, 16384)
    oss = of("GPT-OSS 20B")
    assert oss.attention_sinks and oss.biases == ("q_proj", "k_proj", "v_proj", "o_proj")
    assert oss.experts == Experts(32, 4, 2880, True, biases=True, clamped=(1.702, 7.0))
    assert [kind.window for kind in oss.layer_kinds] == [128, None]
    pythia, gpt2, opt, nanochat = (of(name) for name in ("Pythia 160M", "GPT-2", "OPT 125M", "nanochat d20"))
    assert pythia.layer_kinds[0].rope == Rope(10000.0, partial_rotary_factor=0.25)
    assert (gpt2.intermediate_size, gpt2.max_position_embeddings, gpt2.position_offset) == (3072, 1024, 0)
    assert gpt2.tie_word_embeddings and gpt2.layer_kinds == (LayerKind(None, None),)
    assert (opt.position_offset, opt.rms_norm_eps, opt.hidden_act) == (2, 1e-5, "relu")
    assert nanochat.layer_kinds[0].rope == Rope(10000.0, backwards=True)
    assert of("Qwen3 30B-A3B").experts is not None and of("Qwen3 30B-A3B").experts.normalized


def test_what_config_json_may_name_is_implemented() -> None:
    """The names that are read stand at the bottom of the package, and what they mean stands above."""
    assert {*ACTIVATIONS} == {*FUNCTIONS}
