"""config.json files of much used models, key for key, with their sizes cut: each is read."""

from __future__ import annotations

import logging
from typing import Any

import jax
import pytest

from para_jax import Backbone, BackboneConfig
from para_jax.families.table import FAMILIES
from para_jax.families.writing import hf_fields

SIZES = {
    "vocab_size": 160, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 4096,
}  # fmt: skip
GEMMA4: dict[str, Any] = {
    "attention_bias": False, "attention_dropout": 0.0, "attention_k_eq_v": False, "bos_token_id": 2,
    "dtype": "bfloat16", "eos_token_id": 1, "final_logit_softcapping": 30.0, "global_head_dim": 16, "head_dim": 8,
    "hidden_activation": "gelu_pytorch_tanh", "initializer_range": 0.02, "num_kv_shared_layers": 0,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    "num_global_key_value_heads": None, "pad_token_id": 0, "rms_norm_eps": 1e-06,
    "rope_parameters": {
        "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1000000.0, "rope_type": "proportional"},
        "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
    },
    "sliding_window": 512, "tie_word_embeddings": True, "use_bidirectional_attention": None, "use_cache": True,
}  # fmt: skip
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1,
    "eos_token_id": 2, "hidden_act": "silu", "initializer_range": 0.02, "model_type": "llama", "pretraining_tp": 1,
    "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.40.0", "use_cache": True,
}  # fmt: skip
LLAMA3_ROPE = {
    "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 2048,
    "rope_type": "llama3",
}  # fmt: skip
MISTRAL: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "initializer_range": 0.02, "model_type": "mistral", "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
    "sliding_window": 4096, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.34.0.dev0", "use_cache": True,
}  # fmt: skip
QWEN2: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
    "hidden_act": "silu", "initializer_range": 0.02, "max_window_layers": 28, "model_type": "qwen2",
    "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 131072, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.43.1", "use_cache": True, "use_sliding_window": False,
}  # fmt: skip
QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151645, "head_dim": 16, "hidden_act": "silu", "initializer_range": 0.02, "max_window_layers": 36,
    "model_type": "qwen3", "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True,
    "use_sliding_window": False,
}  # fmt: skip
QWEN3_MOE: dict[str, Any] = {
    **QWEN3, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "tie_word_embeddings": False,
    "decoder_sparse_step": 1, "max_window_layers": 48, "mlp_only_layers": [], "moe_intermediate_size": 24,
    "norm_topk_prob": True, "num_experts": 8, "num_experts_per_tok": 2, "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}  # fmt: skip
GEMMA: dict[str, Any] = {
    "architectures": ["GemmaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 2,
    "eos_token_id": 1, "head_dim": 16, "hidden_act": "gelu", "initializer_range": 0.02, "model_type": "gemma",
    "pad_token_id": 0, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 10000.0, "torch_dtype": "bfloat16",
    "transformers_version": "4.38.0.dev0", "use_cache": True,
}  # fmt: skip
GEMMA2: dict[str, Any] = {
    "architectures": ["Gemma2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "attn_logit_softcapping": 50.0, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": [1, 107],
    "final_logit_softcapping": 30.0, "head_dim": 16, "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh", "initializer_range": 0.02, "model_type": "gemma2", "pad_token_id": 0,
    "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096,
    "torch_dtype": "bfloat16", "transformers_version": "4.42.4", "use_cache": True,
}  # fmt: skip
GEMMA3: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "attn_logit_softcapping": None, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": [1, 106],
    "final_logit_softcapping": None, "head_dim": 16, "hidden_activation": "gelu_pytorch_tanh",
    "initializer_range": 0.02, "model_type": "gemma3_text", "pad_token_id": 0, "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000,
    "sliding_window": 512, "sliding_window_pattern": 6, "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0", "use_cache": True,
}  # fmt: skip
PHI3_CODE = {
    "AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
}  # fmt: skip
PHI3: dict[str, Any] = {
    "_name_or_path": "Phi-3-mini-4k-instruct", "architectures": ["Phi3ForCausalLM"], "attention_dropout": 0.0,
    "auto_map": PHI3_CODE, "bos_token_id": 1, "embd_pdrop": 0.0, "eos_token_id": 32000, "hidden_act": "silu",
    "initializer_range": 0.02, "model_type": "phi3", "original_max_position_embeddings": 4096, "pad_token_id": 32000,
    "resid_pdrop": 0.0, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0, "sliding_window": 2047,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.40.2", "use_cache": True,
    "attention_bias": False,
}  # fmt: skip
LONGROPE = {"long_factor": [1.1, 2.5, 4.0, 8.0], "short_factor": [1.0, 1.05, 1.1, 1.2]}
SMOLLM3: dict[str, Any] = {
    "architectures": ["SmolLM3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": None,
    "eos_token_id": 128012, "hidden_act": "silu", "initializer_range": 0.02, "layer_types": ["full_attention"] * 4,
    "max_window_layers": 28, "mlp_bias": False, "model_type": "smollm3", "no_rope_layer_interval": 4,
    "no_rope_layers": [1, 1, 1, 0], "pad_token_id": 128004, "pretraining_tp": 2, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 5000000.0, "sliding_window": None, "torch_dtype": "bfloat16",
    "transformers_version": "4.54.0.dev0", "use_cache": False, "use_sliding_window": False,
}  # fmt: skip
OLMO2: dict[str, Any] = {
    "architectures": ["Olmo2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "eos_token_id": 100257,
    "hidden_act": "silu", "initializer_range": 0.02, "model_type": "olmo2", "pad_token_id": 100277,
    "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 500000, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.47.0", "use_cache": True,
}  # fmt: skip
MIXTRAL: dict[str, Any] = {
    **MISTRAL, "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "attention_dropout": 0.0,
    "num_experts_per_tok": 2, "num_local_experts": 4, "output_router_logits": False, "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02, "sliding_window": None,
}  # fmt: skip
# What most files of 2025 have besides.
LATER: dict[str, Any] = {
    "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "initializer_range": 0.02, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "torch_dtype": "bfloat16",
    "transformers_version": "4.55.0", "use_cache": True,
}  # fmt: skip
COHERE: dict[str, Any] = {key: value for key, value in LATER.items() if key != "rms_norm_eps"} | {
    "layer_norm_eps": 1e-05,
    "logit_scale": 0.0625,
    "pad_token_id": 0,
    "bos_token_id": 5,
    "eos_token_id": 255001,
}
HUNYUAN: dict[str, Any] = {
    **LATER, "add_classification_head": False, "architectures": ["HunYuanDenseV1ForCausalLM"],
    "attention_head_dim": 8, "cla_share_factor": 2, "class_num": 0, "dense_list": [4096, 0], "eod_token_id": 127967,
    "enable_lm_head_fp32": True, "head_dim": 8, "im_end_id": 5, "mask_init_id": 12, "mlp_bias": False,
    "model_type": "hunyuan_v1_dense", "norm_type": "rms", "org_vocab_size": 160, "pad_id": 127961,
    "pad_token_id": 127961, "pool_type": "last", "pretraining_tp": 1, "sep_token_id": 127962, "text_end_id": 7,
    "rope_scaling": {"alpha": 1000.0, "beta_fast": 32, "beta_slow": 1, "factor": 1.0, "mscale": 1.0,
                     "mscale_all_dim": 1.0, "type": "dynamic"},
    "tie_word_embeddings": True, "use_cla": False, "use_qk_norm": True, "use_rotary_pos_emb": True,
}  # fmt: skip
# What transformers 4 wrote where a config was dumped with all of its defaults.
ALL_DEFAULTS = {
    "add_cross_attention": False, "bad_words_ids": None, "begin_suppress_tokens": None, "chunk_size_feed_forward": 0,
    "cross_attention_hidden_size": None, "decoder_start_token_id": None, "diversity_penalty": 0.0, "do_sample": False,
    "early_stopping": False, "encoder_no_repeat_ngram_size": 0, "exponential_decay_length_penalty": None,
    "finetuning_task": None, "forced_bos_token_id": None, "forced_eos_token_id": None,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "is_decoder": False, "is_encoder_decoder": False,
    "label2id": {"LABEL_0": 0, "LABEL_1": 1}, "length_penalty": 1.0, "max_length": 20, "min_length": 0,
    "no_repeat_ngram_size": 0, "num_beam_groups": 1, "num_beams": 1, "num_return_sequences": 1,
    "output_attentions": False, "output_hidden_states": False, "output_scores": False, "pad_token_id": None,
    "prefix": None, "problem_type": None, "pruned_heads": {}, "remove_invalid_values": False,
    "repetition_penalty": 1.0, "return_dict": True, "return_dict_in_generate": False, "sep_token_id": None,
    "suppress_tokens": None, "task_specific_params": None, "temperature": 1.0, "tf_legacy_loss": False,
    "tie_encoder_decoder": False, "tokenizer_class": None, "top_k": 50, "top_p": 1.0, "torchscript": False,
    "typical_p": 1.0, "use_bfloat16": False,
}  # fmt: skip

CODE = "auto_map (the code it names is not run)"
# Each: the fields that are not in `SIZES`, and the keys that no code reads.
MODELS: dict[str, tuple[dict[str, Any], list[str]]] = {
    # Llama
    "meta-llama/Llama-2-7b-hf": ({**LLAMA, "_name_or_path": "meta-llama/Llama-2-7b-hf", "torch_dtype": "float16"}, []),
    "meta-llama/Llama-2-7b-chat-hf": ({**LLAMA, "max_length": 4096, "pad_token_id": 0}, []),
    "meta-llama/Meta-Llama-3-8B-Instruct": (
        {**LLAMA, "bos_token_id": 128000, "eos_token_id": 128009, "rope_theta": 500000.0}, []),
    "meta-llama/Llama-3.1-8B-Instruct": (
        {**LLAMA, "eos_token_id": [128001, 128008, 128009], "mlp_bias": False, "rope_scaling": LLAMA3_ROPE}, []),
    "meta-llama/Llama-3.2-1B": (
        {**LLAMA, "head_dim": 8, "mlp_bias": False, "rope_scaling": {**LLAMA3_ROPE, "factor": 32.0},
         "tie_word_embeddings": True}, []),
    "unsloth/Llama-3.2-1B-Instruct": (
        {**LLAMA, "head_dim": 8, "mlp_bias": False, "pad_token_id": 128004, "rope_scaling": LLAMA3_ROPE,
         "unsloth_fixed": True}, []),
    "unsloth, saved by transformers 4.56": (
        {**LLAMA, "dtype": "bfloat16", "torch_dtype": "bfloat16", "unsloth_fixed": True, "unsloth_version": "2025.9.1"},
        []),
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": ({**LLAMA, "mlp_bias": False, "rope_scaling": LLAMA3_ROPE}, []),
    "deepseek-ai/deepseek-coder-1.3b-base": (
        {**LLAMA, "rope_scaling": {"factor": 4.0, "type": "linear"}, "rope_theta": 100000}, []),
    "lmsys/vicuna-7b-v1.5-16k": (
        {**LLAMA, "max_sequence_length": 16384, "rope_scaling": {"factor": 4.0, "type": "linear"}}, []),
    "huggyllama/llama-7b": ({**LLAMA, "max_sequence_length": 2048, "pad_token_id": 0}, []),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": ({**LLAMA}, []),
    "JackFram/llama-68m": ({**LLAMA, "bos_token_id": 0, "pad_token_id": 1, "rms_norm_eps": 1e-06}, []),
    "NousResearch/Yarn-Llama-2-7b-128k": (
        {**LLAMA, "_flash_attn_2_enabled": False, "auto_map": {"AutoModelForCausalLM": "modeling_llama_together_yarn"},
         "rope_scaling": {"factor": 32.0, "finetuned": True, "original_max_position_embeddings": 128, "type": "yarn"}},
        [CODE, "rope_scaling.finetuned"]),
    "HuggingFaceTB/SmolLM2-135M-Instruct": (
        {**LLAMA, "is_llama_config": True, "rope_interleaved": False, "mlp_bias": False, "pad_token_id": 2,
         "tie_word_embeddings": True, "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}}, []),
    "Qwen made a Llama": (
        {**LLAMA, "max_window_layers": 28, "use_sliding_window": False, "attention_bias": True}, ["max_window_layers"]),
    "a Llama with the layers' types": ({**LLAMA, "layer_types": ["full_attention"] * 4}, []),
    "dumped with all defaults": ({**LLAMA, **ALL_DEFAULTS}, []),
    # Mistral
    "mistralai/Mistral-7B-v0.1": ({**MISTRAL}, []),
    "mistralai/Mistral-7B-Instruct-v0.3": (
        {**MISTRAL, "attention_dropout": 0.0, "rope_theta": 1000000.0, "sliding_window": None}, []),
    "mistralai/Mistral-Nemo-Instruct-2407": (
        {**MISTRAL, "attention_dropout": 0.0, "head_dim": 16, "rope_theta": 1000000.0, "sliding_window": None}, []),
    "mistralai/Ministral-8B-Instruct-2410": ({**MISTRAL, "head_dim": 16, "sliding_window": 32768}, []),
    "HuggingFaceH4/zephyr-7b-beta": ({**MISTRAL, "_name_or_path": "data/zephyr", "pad_token_id": 2}, []),
    "NousResearch/Yarn-Mistral-7b-128k": (
        {**MISTRAL, "auto_map": {"AutoConfig": "configuration_mistral.MistralConfig"}, "max_sequence_length": 131072,
         "rope_scaling": {"factor": 16.0, "finetuned": True, "original_max_position_embeddings": 256, "type": "yarn"}},
        [CODE, "rope_scaling.finetuned"]),
    "intfloat/e5-mistral-7b-instruct": (
        {**MISTRAL, "architectures": ["MistralModel"], "pad_token_id": 2, "torch_dtype": "float16"}, []),
    # Qwen
    "Qwen/Qwen1.5-0.5B-Chat": (
        {**QWEN2, "max_window_layers": 21, "sliding_window": 32768, "tie_word_embeddings": True}, []),
    "Qwen/Qwen2-7B": ({**QWEN2, "eos_token_id": None, "use_mrope": False}, []),
    "Qwen/Qwen2.5-7B-Instruct": ({**QWEN2}, []),
    "Qwen/Qwen2.5, with YaRN for long texts": (
        {**QWEN2, "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 1024, "type": "yarn"}}, []),
    "Qwen/Qwen2.5-7B-Instruct-1M": (
        {**QWEN2, "dual_chunk_attention_config": {"chunk_size": 262144, "local_size": 8192},
         "sliding_window": 32768}, ["dual_chunk_attention_config"]),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": ({**QWEN2, "use_mrope": False, "max_window_layers": 21}, []),
    "a Qwen2 cut out of Qwen2-VL": (
        {**QWEN2, "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"}},
        ["rope_scaling.mrope_section"]),
    "Qwen2, saved by transformers 4.55": ({**QWEN2, "layer_types": ["full_attention"] * 4, "sliding_window": None}, []),
    "Qwen/Qwen3-0.6B": ({**QWEN3}, []),
    "Qwen/Qwen3-8B": ({**QWEN3, "tie_word_embeddings": False}, []),
    "Qwen/Qwen3-Embedding-0.6B": ({**QWEN3, "max_window_layers": 28}, []),
    "Qwen/Qwen3-30B-A3B": ({**QWEN3_MOE}, []),
    "Qwen/Qwen3-Coder-30B-A3B-Instruct": (
        {**QWEN3_MOE, "qkv_bias": False, "shared_expert_intermediate_size": 0, "use_qk_norm": True,
         "max_window_layers": 28, "rope_theta": 10000000}, []),
    # Gemma
    "google/gemma-2b": ({**GEMMA, "num_key_value_heads": 1}, []),
    "google/gemma-1.1-7b-it": ({**GEMMA, "hidden_activation": "gelu_pytorch_tanh"}, []),
    "google/gemma-2-2b-it": ({**GEMMA2}, []),
    "google/gemma-2-9b": ({**GEMMA2, "eos_token_id": 1, "sliding_window_size": 4096}, []),
    "unsloth/gemma-2-9b-it": ({**GEMMA2, "_attn_implementation": "eager", "unsloth_version": "2024.9"}, []),
    "google/gemma-3-1b-it": ({**GEMMA3}, []),
    "google/gemma-3-270m": (
        {**GEMMA3, "_sliding_window_pattern": 6, "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
         "use_bidirectional_attention": False, "eos_token_id": 1}, []),
    # Phi
    "microsoft/Phi-3-mini-4k-instruct": ({**PHI3}, [CODE]),
    "microsoft/Phi-3-mini-128k-instruct": (
        {**PHI3, "rope_scaling": {**LONGROPE, "type": "longrope"}, "sliding_window": 262144}, [CODE]),
    "microsoft/phi-4": (
        {key: value for key, value in PHI3.items() if key not in ("auto_map", "_name_or_path")}
        | {"bos_token_id": 100257, "eos_token_id": 100265, "rope_theta": 250000, "sliding_window": None}, []),
    "microsoft/Phi-4-mini-instruct": (
        {**PHI3, "full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False, "mlp_bias": False,
         "partial_rotary_factor": 0.75, "tie_word_embeddings": True, "sliding_window": 262144,
         "rope_scaling": {"long_factor": [1.0, 1.2, 1.5], "short_factor": [1.0, 1.0, 1.0], "type": "longrope"}},
        [CODE]),
    # SmolLM3, OLMo 2, Mixtral
    "HuggingFaceTB/SmolLM3-3B": ({**SMOLLM3}, []),
    "HuggingFaceTB/SmolLM3-3B, with YaRN": (
        {**SMOLLM3, "rope_scaling": {"factor": 2.0, "original_max_position_embeddings": 2048, "rope_type": "yarn"}},
        []),
    "allenai/OLMo-2-0425-1B": ({**OLMO2}, []),
    "allenai/OLMo-2-1124-7B-Instruct": ({**OLMO2, "bos_token_id": 100257, "_name_or_path": "x"}, []),
    "mistralai/Mixtral-8x7B-Instruct-v0.1": ({**MIXTRAL}, []),
    "mistralai/Mixtral-8x22B-v0.1": ({**MIXTRAL, "router_jitter_noise": 0.0, "head_dim": 8}, []),
    "cognitivecomputations/dolphin-2.5-mixtral-8x7b": (
        {**MIXTRAL, "_name_or_path": "mistralai/Mixtral-8x7B-v0.1", "eos_token_id": 32000, "use_cache": False}, []),
    "Mixtral as first published": ({**MIXTRAL, "sliding_window": 4096, "rope_theta": 1000000.0}, []),
    # Later families
    "allenai/Olmo-3-1025-7B": (
        {**LATER, "architectures": ["Olmo3ForCausalLM"], "model_type": "olmo3", "eos_token_id": 100257,
         "layer_types": ["sliding_attention"] * 3 + ["full_attention"], "pad_token_id": 100277, "sliding_window": 4096,
         "rope_scaling": {"attention_factor": 1.2079441541679836, "beta_fast": 32.0, "beta_slow": 1.0, "factor": 8.0,
                          "original_max_position_embeddings": 8192, "rope_type": "yarn"},
         "tie_word_embeddings": False}, []),
    "ibm-granite/granite-3.3-2b-instruct": (
        {**LATER, "architectures": ["GraniteForCausalLM"], "model_type": "granite", "attention_multiplier": 0.015625,
         "embedding_multiplier": 12.0, "logits_scaling": 8.0, "mlp_bias": False, "residual_multiplier": 0.22,
         "rope_scaling": None, "tie_word_embeddings": True, "pad_token_id": 0}, []),
    "zai-org/GLM-4-9B-0414": (
        {**LATER, "architectures": ["Glm4ForCausalLM"], "model_type": "glm4", "attention_bias": True, "head_dim": 8,
         "eos_token_id": [151329, 151336, 151338], "partial_rotary_factor": 0.5, "pad_token_id": 151329,
         "tie_word_embeddings": False}, []),
    "Qwen/Qwen1.5-MoE-A2.7B-Chat": (
        {**QWEN2, "architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "decoder_sparse_step": 1,
         "moe_intermediate_size": 24, "norm_topk_prob": False, "num_experts": 6, "num_experts_per_tok": 4,
         "output_router_logits": False, "router_aux_loss_coef": 0.001, "shared_expert_intermediate_size": 48}, []),
    "ByteDance-Seed/Seed-OSS-36B-Instruct": (
        {**LATER, "architectures": ["SeedOssForCausalLM"], "model_type": "seed_oss", "attention_bias": True,
         "attention_out_bias": False, "attention_dropout": 0.1, "head_dim": 8, "mlp_bias": False, "pretraining_tp": 1,
         "residual_dropout": 0.1, "rope_scaling": {"rope_type": "default"}, "tie_word_embeddings": False}, []),
    "arcee-ai/AFM-4.5B": (
        {**LATER, "architectures": ["ArceeForCausalLM"], "model_type": "arcee", "head_dim": 8, "hidden_act": "relu2",
         "mlp_bias": False, "tie_word_embeddings": False,
         "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 20.0, "mscale": 1.0,
                          "original_max_position_embeddings": 4096, "rope_type": "yarn", "type": "yarn"}}, []),
    "the text part of mistralai/Ministral-3-3B-Instruct-2512": (
        {key: value for key, value in LATER.items() if key not in ("attention_bias", "rope_theta")}
        | {"architectures": ["Ministral3ForCausalLM"], "model_type": "ministral3", "head_dim": 8,
           "sliding_window": None, "tie_word_embeddings": True,
           "rope_parameters": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 16.0, "llama_4_scaling_beta": 0.1,
                               "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 16384,
                               "rope_theta": 1000000.0, "rope_type": "yarn", "type": "yarn"}}, []),
    "LGAI-EXAONE/EXAONE-4.0-1.2B": (
        {key: value for key, value in LATER.items() if key != "attention_bias"}
        | {"architectures": ["Exaone4ForCausalLM"], "model_type": "exaone4", "head_dim": 8, "pad_token_id": 0,
           "layer_types": ["full_attention"] * 4, "rope_scaling": {**LLAMA3_ROPE}, "sliding_window": None,
           "sliding_window_pattern": None, "tie_word_embeddings": True}, []),
    "baidu/ERNIE-4.5-0.3B-PT": (
        {key: value for key, value in LATER.items() if key not in ("attention_bias", "attention_dropout")}
        | {"architectures": ["Ernie4_5ForCausalLM"], "model_type": "ernie4_5", "head_dim": 8, "pad_token_id": 0,
           "tie_word_embeddings": True, "use_bias": False}, []),
    "tencent/Hunyuan-1.8B-Instruct": (
        {**HUNYUAN},
        ["attention_head_dim", "cla_share_factor", "class_num", "dense_list",
         "enable_lm_head_fp32", "im_end_id", "mask_init_id", "norm_type", "org_vocab_size", "pad_id", "pool_type",
         "text_end_id", "use_rotary_pos_emb"]),
    "kyutai/helium-1-2b": (
        {**LATER, "architectures": ["HeliumForCausalLM"], "model_type": "helium", "head_dim": 8, "mlp_bias": False,
         "pad_token_id": 3, "rms_norm_eps": 1e-08, "tie_word_embeddings": False}, []),
    "CohereLabs/aya-expanse-8b": (
        {**COHERE, "architectures": ["CohereForCausalLM"], "model_type": "cohere", "model_max_length": 8192,
         "tie_word_embeddings": True, "use_qk_norm": False}, ["model_max_length"]),
    "CohereLabs/c4ai-command-r7b-12-2024": (
        {**COHERE, "architectures": ["Cohere2ForCausalLM"], "model_type": "cohere2", "cache_implementation": "hybrid",
         "head_dim": 8, "layer_switch": 4, "logit_scale": 0.25, "order_of_interleaved_layers": "local_attn_first",
         "position_embedding_type": "rope_gptj", "rope_scaling": None, "rotary_pct": 1.0, "sliding_window": 4096,
         "sliding_window_pattern": 4, "use_embedding_sharing": True, "use_gated_activation": True,
         "use_parallel_block": True, "use_parallel_embedding": True},
        ["layer_switch", "order_of_interleaved_layers", "position_embedding_type", "rotary_pct",
         "use_embedding_sharing", "use_gated_activation", "use_parallel_block", "use_parallel_embedding"]),
    "stabilityai/stablelm-2-1_6b": (
        {key: value for key, value in COHERE.items() if key not in ("attention_bias", "logit_scale", "pad_token_id")}
        | {"architectures": ["StableLmForCausalLM"], "model_type": "stablelm", "hidden_dropout": 0.0,
           "partial_rotary_factor": 0.25, "qk_layernorm": False, "rope_pct": 0.25,
           "tie_word_embeddings": False, "use_parallel_residual": False, "use_qkv_bias": True},
        ["rope_pct"]),
    "swiss-ai/Apertus-8B-Instruct-2509": (
        {**LATER, "architectures": ["ApertusForCausalLM"], "model_type": "apertus", "hidden_act": "xielu",
         "mlp_bias": False, "pad_token_id": 3, "post_norm": False, "qk_norm": True, "rope_scaling": {**LLAMA3_ROPE},
         "tie_word_embeddings": False}, ["qk_norm"]),
    "bigcode/starcoder2-3b": (
        {key: value for key, value in LATER.items() if key not in ("attention_bias", "rms_norm_eps")}
        | {"architectures": ["Starcoder2ForCausalLM"], "model_type": "starcoder2", "activation_function": "gelu",
           "embedding_dropout": 0.1, "hidden_act": "gelu_pytorch_tanh", "layer_norm_epsilon": 1e-05,
           "mlp_type": "default", "norm_epsilon": 1e-05, "norm_type": "layer_norm", "residual_dropout": 0.1,
           "sliding_window": 4096, "use_bias": True},
        ["activation_function", "layer_norm_epsilon", "mlp_type", "norm_type"]),
    "microsoft/phi-2": (
        {key: value for key, value in LATER.items() if key not in ("attention_bias", "rms_norm_eps")}
        | {"architectures": ["PhiForCausalLM"], "model_type": "phi", "embd_pdrop": 0.0, "hidden_act": "gelu_new",
           "layer_norm_eps": 1e-05, "partial_rotary_factor": 0.5, "qk_layernorm": False, "resid_pdrop": 0.1,
           "rope_scaling": None, "tie_word_embeddings": False}, []),
    "the text part of google/gemma-4-E2B-it": (
        {**GEMMA4, "model_type": "gemma4_text", "enable_moe_block": False, "hidden_size_per_layer_input": 8,
         "moe_intermediate_size": None, "num_experts": None, "num_kv_shared_layers": 2, "top_k_experts": None,
         "use_double_wide_mlp": True, "vocab_size_per_layer_input": 160}, []),
    "the text part of google/gemma-4-12B-it": (
        {**GEMMA4, "model_type": "gemma4_unified_text", "attention_k_eq_v": True, "num_global_key_value_heads": 1,
         "use_bidirectional_attention": "vision"}, []),
    # Older families, whose sizes have other names
    "EleutherAI/pythia-160m": (
        {"architectures": ["GPTNeoXForCausalLM"], "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "gelu",
         "hidden_size": 32, "initializer_range": 0.02, "intermediate_size": 48, "layer_norm_eps": 1e-05,
         "max_position_embeddings": 2048, "model_type": "gpt_neox", "num_attention_heads": 4, "num_hidden_layers": 4,
         "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False, "torch_dtype": "float16",
         "transformers_version": "4.24.0", "use_cache": True, "use_parallel_residual": True, "vocab_size": 160}, []),
    "openai-community/gpt2": (
        {"activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
         "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
         "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 32, "n_head": 4, "n_layer": 4,
         "n_positions": 1024, "resid_pdrop": 0.1, "summary_activation": None, "summary_first_dropout": 0.1,
         "summary_proj_to_labels": True, "summary_type": "cls_index", "summary_use_proj": True, "vocab_size": 160},
        []),
    "facebook/opt-125m": (
        {"_remove_final_layer_norm": False, "activation_dropout": 0.0, "activation_function": "relu",
         "architectures": ["OPTForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 2, "do_layer_norm_before": True,
         "dropout": 0.1, "eos_token_id": 2, "ffn_dim": 48, "hidden_size": 32, "init_std": 0.02, "layerdrop": 0.0,
         "max_position_embeddings": 2048, "model_type": "opt", "num_attention_heads": 4, "num_hidden_layers": 4,
         "pad_token_id": 1, "prefix": "</s>", "torch_dtype": "float16", "transformers_version": "4.21.0.dev0",
         "use_cache": True, "vocab_size": 160, "word_embed_proj_dim": 32}, []),
    "openai/gpt-oss-20b": (
        {key: value for key, value in LATER.items() if key not in ("bos_token_id", "torch_dtype")}
        | {"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "attention_bias": True,
           "eos_token_id": 200002, "experts_per_token": 4, "head_dim": 8, "initial_context_length": 4096,
           "layer_types": ["sliding_attention", "full_attention"] * 2, "num_experts_per_tok": 4,
           "num_local_experts": 32, "output_router_logits": False, "pad_token_id": 199999,
           "quantization_config": {
               "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router",
                                          "model.embed_tokens", "lm_head"], "quant_method": "mxfp4"},
           "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0,
                            "original_max_position_embeddings": 4096, "rope_type": "yarn", "truncate": False},
           "rope_theta": 150000, "router_aux_loss_coef": 0.9, "sliding_window": 128, "swiglu_limit": 7.0,
           "tie_word_embeddings": False}, ["experts_per_token", "initial_context_length"]),
    "a GPT-OSS with few options": (
        {**LATER, "model_type": "gpt_oss", "attention_bias": True, "head_dim": 8, "num_local_experts": 32,
         "sliding_window": 128, "unsloth_fixed": True}, []),
    "nanochat-students/nanochat-d20": (
        {key: value for key, value in LATER.items() if key != "rope_theta"}
        | {"architectures": ["NanoChatForCausalLM"], "model_type": "nanochat", "final_logit_softcapping": 15.0,
           "hidden_act": "relu2", "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
           "tie_word_embeddings": False}, []),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_published_config_is_read(name: str, caplog: pytest.LogCaptureFixture) -> None:
    fields, ignored = MODELS[name]
    fields = fields if "vocab_size" in fields else {**SIZES, **fields}
    with caplog.at_level(logging.WARNING):
        config = BackboneConfig.from_hf(fields, name)
    said = [record.getMessage() for record in caplog.records if record.name.startswith("para_jax")]
    reader = f"transformers' {FAMILIES[config.family].architecture}"
    assert said == [f"{name}: keys that {reader} does not read are ignored: {', '.join(ignored)}"] * bool(ignored)
    assert hf_fields(config).items() >= fields.items()
    assert sum(x.size for x in jax.tree.leaves(Backbone.abstract(config, "float32"))) == config.size


def test_every_family_is_there() -> None:
    assert {fields["model_type"] for fields, _ in MODELS.values()} == set(FAMILIES)
