"""The table of families. docs/families.md says how to add one.

One function reads the options of config.json for all families (`families/reading.py`). A family's entry has what no
option says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from para_jax.compat import GEMMA_ACTIVATIONS, SWIGLU
from para_jax.errors import ParaJaxError
from para_jax.families.architecture import ATTENTION_SITES, MLP_SITES, Experts, LayerKind, Names
from para_jax.families.kinds import gemma4_kinds

LLAMA_NAMES = Names()


@dataclass(frozen=True)
class Family:
    """One `model_type` of config.json.

    Attributes:
      models: published models, for the docs.
      architecture: transformers' model class.
      fields: fields of `Architecture`, either constant or a function of transformers' config.
      reads: the options that `fields` uses, in addition to those of all families.
      only: options with one supported setting.
      same: options that must equal another option.
      neutral: options that have no effect here, in addition to those of all families.
      activation: the option that names the feed-forward's activation; "" if there is none.
      activations: activations that only this family has.
      eps: the option for the epsilon of norms.
      options: the family's names of options that have another name in most families.
      optional: those of `options` that may be null.
      names: the tensor names that differ from Llama's.
      rope: the RoPE settings that only this family reads.
      kinds: makes the kinds of its layers from transformers' config and the kinds that all families have.
      packed: the quant_method values of `quantization_config` whose tensors are read (`convert/mxfp4.py`).
    """

    models: str
    architecture: str
    fields: Mapping[str, Any] | Callable[[Any], Mapping[str, Any]] = field(default_factory=dict)
    reads: tuple[str, ...] = ()
    only: Mapping[str, Any] = field(default_factory=dict)
    same: Mapping[str, str] = field(default_factory=dict)
    neutral: tuple[str, ...] = ()
    activation: str = "hidden_act"
    activations: tuple[str, ...] = ()
    eps: str = "rms_norm_eps"
    options: Mapping[str, str] = field(default_factory=dict)
    optional: tuple[str, ...] = ()
    names: Names = LLAMA_NAMES
    rope: tuple[str, ...] = ()
    kinds: Callable[[Any, Sequence[LayerKind]], Sequence[LayerKind]] = lambda config, kinds: kinds
    packed: tuple[str, ...] = ()


def _biases(attention: Any, out: Any, mlp: Any = False) -> tuple[str, ...]:
    """The projections with a bias: q, k and v if `attention`, o if `out`, and the feed-forward's if `mlp`."""
    return (*ATTENTION_SITES[: 3 * bool(attention)], *ATTENTION_SITES[3 : 3 + bool(out)], *(MLP_SITES if mlp else ()))


def _gemma(config: Any, **more: Any) -> dict[str, Any]:
    """Embeddings are multiplied by sqrt(d), and norm weights are stored minus one."""
    return {"norm_offset": 1.0, "embedding_scale": config.hidden_size**0.5, **more}


def _cohere(config: Any, **more: Any) -> dict[str, Any]:
    """Layer norms, and parallel attention and feed-forward."""
    scale = 1.0 if config.logit_scale is None else config.logit_scale
    return {"norm": "layer", "parallel": True, "rope_pairs": "neighbours", "logits_scale": scale, **more}


def _gpt_oss(config: Any) -> dict[str, Any]:
    """Attention sinks, and experts with biases and a clamped gate."""
    alpha, limit = (getattr(config, name, constant) for name, constant in SWIGLU.items())
    experts = Experts(
        config.num_local_experts, config.num_experts_per_tok, config.intermediate_size, normalized=True, biases=True,
        clamped=(alpha, limit),
    )  # fmt: skip
    return {"attention_sinks": True, "experts": experts}


def _gemma4(config: Any) -> dict[str, Any]:
    """Norms of values, embeddings for each layer, and experts beside a dense feed-forward."""
    if config.use_bidirectional_attention == "all":
        raise ParaJaxError("config.json has use_bidirectional_attention='all', which is not implemented")
    experts, width = None, getattr(config, "hidden_size_per_layer_input", 0)
    if getattr(config, "enable_moe_block", False):
        experts = Experts(config.num_experts, config.top_k_experts, config.moe_intermediate_size, True, beside=True)
    return {
        "embedding_scale": config.hidden_size**0.5,
        "post_norm": True,
        "qk_norm": "head",
        "attention_scale": 1.0,
        "value_norm": True,
        "layer_scale": True,
        "per_layer_inputs": (config.vocab_size_per_layer_input, width) if width else None,
        "experts": experts,
    }


GEMMA4: dict[str, Any] = {
    "fields": _gemma4,
    "reads": (
        "global_head_dim", "num_global_key_value_heads", "per_layer_config", "attention_k_eq_v", "num_kv_shared_layers",
        "use_double_wide_mlp", "hidden_size_per_layer_input", "vocab_size_per_layer_input", "enable_moe_block",
        "top_k_experts", "use_bidirectional_attention",
    ),
    "activation": "hidden_activation",
    "kinds": gemma4_kinds,
    "names": Names(router="router.proj", experts="experts", expert=None),
}  # fmt: skip
BOTH_WAYS = {"use_bidirectional_attention": False}
FAMILIES: dict[str, Family] = {
    "llama": Family("Llama 2, 3, 3.1 to 3.3; SmolLM, SmolLM2; Yi; TinyLlama", "LlamaForCausalLM"),
    "mistral": Family("Mistral 7B, Mistral Nemo, Mistral Small", "MistralForCausalLM"),
    "qwen2": Family("Qwen2, Qwen2.5", "Qwen2ForCausalLM", {"biases": ATTENTION_SITES[:3]}),
    "qwen3": Family("Qwen3", "Qwen3ForCausalLM", {"qk_norm": "head"}),
    "gemma": Family(
        "Gemma 1",
        "GemmaForCausalLM",
        lambda c: _gemma(c, hidden_act=GEMMA_ACTIVATIONS.get(c.hidden_act, c.hidden_act)),
        only=BOTH_WAYS,
        neutral=("hidden_activation",),
    ),
    "gemma2": Family(
        "Gemma 2",
        "Gemma2ForCausalLM",
        lambda c: _gemma(c, post_norm=True),
        only=BOTH_WAYS,
        neutral=("hidden_act", "sliding_window_size"),
        activation="hidden_activation",
    ),
    "gemma3_text": Family(
        "Gemma 3, text only",
        "Gemma3ForCausalLM",
        # transformers' code ignores attn_logit_softcapping.
        lambda c: _gemma(c, post_norm=True, qk_norm="head", attn_logit_softcapping=None),
        only=BOTH_WAYS,
        neutral=("hidden_act", "sliding_window_pattern", "_sliding_window_pattern", "rope_local_base_freq"),
        activation="hidden_activation",
    ),
    "gemma4_text": Family("Gemma 4 E2B, E4B, 26B-A4B, 31B, text only", "Gemma4ForCausalLM", **GEMMA4),
    "gemma4_unified_text": Family("Gemma 4 12B, text only", "Gemma4UnifiedForCausalLM", **GEMMA4),
    "phi3": Family(
        "Phi-3 mini and medium, Phi-3.5 mini, Phi-4, Phi-4 mini",
        "Phi3ForCausalLM",
        only={"full_attn_mod": 1, "interpolate_factor": 1},
        # transformers copies original_max_position_embeddings into rope_parameters.
        neutral=("resid_pdrop", "embd_pdrop", "original_max_position_embeddings"),
        names=Names(qkv="self_attn.qkv_proj", gate_up="mlp.gate_up_proj"),
    ),
    "smollm3": Family("SmolLM3", "SmolLM3ForCausalLM", neutral=("no_rope_layer_interval", "max_window_layers")),
    "olmo2": Family("OLMo 2", "Olmo2ForCausalLM", {"pre_norm": False, "post_norm": True, "qk_norm": "all"}),
    "mixtral": Family(
        "Mixtral 8x7B, 8x22B",
        "MixtralForCausalLM",
        lambda c: {"experts": Experts(c.num_local_experts, c.num_experts_per_tok, c.intermediate_size, True)},
        neutral=("router_jitter_noise",),
        names=Names(router="block_sparse_moe.gate", experts="block_sparse_moe.experts", expert=("w1", "w3", "w2")),
    ),
    "qwen3_moe": Family(
        "Qwen3 30B-A3B, 235B-A22B",
        "Qwen3MoeForCausalLM",
        lambda c: {
            "qk_norm": "head",
            "experts": Experts(c.num_experts, c.num_experts_per_tok, c.moe_intermediate_size, c.norm_topk_prob),
        },
        only={"mlp_only_layers": [], "decoder_sparse_step": 1, "use_qk_norm": True},
        neutral=("max_window_layers",),
        names=Names(router="mlp.gate", experts="mlp.experts"),
    ),
    "olmo3": Family("OLMo 3, 3.1", "Olmo3ForCausalLM", {"pre_norm": False, "post_norm": True, "qk_norm": "all"}),
    "granite": Family(
        "Granite 3.0 to 3.3, Granite 4.0 without Mamba",
        "GraniteForCausalLM",
        lambda c: {
            "embedding_scale": c.embedding_multiplier,
            "attention_scale": c.attention_multiplier,
            "residual_scale": c.residual_multiplier,
            "logits_scale": 1 / c.logits_scaling,
        },
        reads=("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"),
    ),
    "glm4": Family(
        "GLM-4-0414 9B, 32B; GLM-Z1",
        "Glm4ForCausalLM",
        lambda c: {"post_norm": True, "rope_pairs": "neighbours", "biases": _biases(c.attention_bias, False)},
        names=Names(
            gate_up="mlp.gate_up_proj",
            modules={
                "attention_post_norm": "post_self_attn_layernorm",
                "mlp_norm": "post_attention_layernorm",
                "mlp_post_norm": "post_mlp_layernorm",
            },
        ),
    ),
    "qwen2_moe": Family(
        "Qwen1.5 MoE A2.7B, Qwen2 57B-A14B",
        "Qwen2MoeForCausalLM",
        lambda c: {
            "biases": _biases(c.qkv_bias, False),
            "experts": Experts(
                c.num_experts,
                c.num_experts_per_tok,
                c.moe_intermediate_size,
                c.norm_topk_prob,
                c.shared_expert_intermediate_size,
            ),
        },
        reads=("qkv_bias", "shared_expert_intermediate_size"),
        only={"mlp_only_layers": [], "decoder_sparse_step": 1},
        neutral=("max_window_layers",),
        names=Names(router="mlp.gate", experts="mlp.experts"),
    ),
    "seed_oss": Family(
        "Seed-OSS 36B",
        "SeedOssForCausalLM",
        lambda c: {"biases": _biases(c.attention_bias, c.attention_out_bias, c.mlp_bias)},
        reads=("attention_out_bias",),
        neutral=("residual_dropout",),
    ),
    "arcee": Family("AFM 4.5B", "ArceeForCausalLM", {"gated": False}),
    "ministral3": Family("the text part of Ministral 3", "Ministral3ForCausalLM", rope=("llama_4_scaling_beta",)),
    "exaone4": Family(
        "EXAONE 4.0",
        "Exaone4ForCausalLM",
        {"pre_norm": False, "post_norm": True, "qk_norm": "head"},
        neutral=("sliding_window_pattern",),
    ),
    "ernie4_5": Family(
        "ERNIE 4.5 0.3B",
        "Ernie4_5ForCausalLM",
        lambda c: {"rope_pairs": "neighbours", "biases": _biases(c.use_bias, c.use_bias, c.use_bias)},
        reads=("use_bias",),
    ),
    "hunyuan_v1_dense": Family(
        "Hunyuan 0.5B to 7B",
        "HunYuanDenseV1ForCausalLM",
        {"qk_norm": "head", "qk_norm_last": True},
        only={"use_qk_norm": True},
        neutral=("eod_token_id",),
        names=Names(modules={"q_norm": "self_attn.query_layernorm", "k_norm": "self_attn.key_layernorm"}),
        rope=("alpha",),
    ),
    "helium": Family(
        "Helium 1",
        "HeliumForCausalLM",
        lambda c: {"rope_pairs": "neighbours", "biases": _biases(c.attention_bias, False, c.mlp_bias)},
    ),
    "cohere": Family(
        "Command R, R+, also 08-2024; Aya 23, Aya Expanse",
        "CohereForCausalLM",
        lambda c: _cohere(c, qk_norm="each" if c.use_qk_norm else "none"),
        reads=("logit_scale", "use_qk_norm"),
        eps="layer_norm_eps",
    ),
    "cohere2": Family(
        "Command R7B, Command A",
        "Cohere2ForCausalLM",
        lambda c: _cohere(c),
        reads=("logit_scale",),
        neutral=("sliding_window_pattern",),
        eps="layer_norm_eps",
    ),
    "stablelm": Family(
        "StableLM 2 1.6B, 12B; StableLM 3B; Stable Code",
        "StableLmForCausalLM",
        lambda c: {
            "norm": "layer",
            "biases": ("norm", *_biases(c.use_qkv_bias, False)),
            "parallel": c.use_parallel_residual,
            "qk_norm": "each" if c.qk_layernorm else "none",
        },
        reads=("use_qkv_bias", "use_parallel_residual", "qk_layernorm"),
        neutral=("hidden_dropout",),
        eps="layer_norm_eps",
        names=Names(
            modules={
                "q_norm": "self_attn.q_layernorm.norms.{head}",
                "k_norm": "self_attn.k_layernorm.norms.{head}",
            }
        ),
    ),
    "apertus": Family(
        "Apertus 8B, 70B",
        "ApertusForCausalLM",
        {"gated": False, "qk_norm": "head"},
        activations=("xielu",),
        names=Names(modules={"attention_norm": "attention_layernorm", "mlp_norm": "feedforward_layernorm"}),
    ),
    "starcoder2": Family(
        "StarCoder2 3B, 7B, 15B",
        "Starcoder2ForCausalLM",
        lambda c: {
            "norm": "layer",
            "gated": False,
            "biases": ("norm", *_biases(c.use_bias, c.use_bias, c.use_bias)),
        },
        reads=("use_bias",),
        neutral=("residual_dropout", "embedding_dropout"),
        eps="norm_epsilon",
        names=Names(modules={"up_proj": "mlp.c_fc", "down_proj": "mlp.c_proj"}),
    ),
    "phi": Family(
        "Phi-1, Phi-1.5, Phi-2",
        "PhiForCausalLM",
        lambda c: {
            "norm": "layer",
            "gated": False,
            "parallel": True,
            "qk_norm": "head" if c.qk_layernorm else "none",
            "biases": ("norm", "lm_head", *_biases(True, True, True), *(("qk_norm",) if c.qk_layernorm else ())),
        },
        reads=("qk_layernorm",),
        neutral=("resid_pdrop", "embd_pdrop"),
        eps="layer_norm_eps",
        names=Names(
            modules={
                "o_proj": "self_attn.dense",
                "up_proj": "mlp.fc1",
                "down_proj": "mlp.fc2",
                "q_norm": "self_attn.q_layernorm",
                "k_norm": "self_attn.k_layernorm",
                "norm": "final_layernorm",
            }
        ),
    ),
    "gpt_neox": Family(
        "Pythia, GPT-NeoX 20B, Dolly 2",
        "GPTNeoXForCausalLM",
        lambda c: {
            "norm": "layer",
            "gated": False,
            "parallel": c.use_parallel_residual,
            "parallel_norms": True,
            "biases": ("norm", *_biases(c.attention_bias, c.attention_bias, True)),
        },
        reads=("use_parallel_residual",),
        # transformers puts the last two into rope_parameters.
        neutral=(
            "hidden_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "rotary_pct",
            "rotary_emb_base",
        ),
        eps="layer_norm_eps",
        names=Names(
            qkv="attention.query_key_value",
            by_head=True,
            modules={
                "o_proj": "attention.dense",
                "up_proj": "mlp.dense_h_to_4h",
                "down_proj": "mlp.dense_4h_to_h",
                "norm": "final_layer_norm",
            },
            stem="gpt_neox",
            embed="embed_in",
            head="embed_out",
            spare=("rotary_emb.inv_freq", "attention.bias", "attention.masked_bias"),
        ),
    ),
    "gpt2": Family(
        "GPT-2, DistilGPT-2, DialoGPT, Cerebras-GPT",
        "GPT2LMHeadModel",
        lambda c: {
            "norm": "layer",
            "gated": False,
            "biases": ("norm", *_biases(True, True, True)),
            "intermediate_size": 4 * c.n_embd if c.n_inner is None else c.n_inner,
            "position_offset": 0,
            "attention_scale": None if c.scale_attn_weights else 1.0,
        },
        reads=("scale_attn_weights",),
        only={"scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
        # How attention is rounded, and what other classes put on top of it.
        neutral=(
            "reorder_and_upcast_attn", "resid_pdrop", "embd_pdrop", "attn_pdrop", "n_ctx", "summary_type",
            "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout",
            "summary_last_dropout", "classifier_dropout", "hidden_dropout",
        ),
        activation="activation_function",
        eps="layer_norm_epsilon",
        options={
            "hidden_size": "n_embd",
            "intermediate_size": "n_inner",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "max_position_embeddings": "n_positions",
        },
        optional=("n_inner",),
        names=Names(
            qkv="attn.c_attn",
            modules={
                "o_proj": "attn.c_proj",
                "up_proj": "mlp.c_fc",
                "down_proj": "mlp.c_proj",
                "attention_norm": "ln_1",
                "mlp_norm": "ln_2",
                "norm": "ln_f",
            },
            stem="transformer",
            layers="h",
            embed="wte",
            positions="wpe",
            transposed=True,
            spare=("attn.bias", "attn.masked_bias"),
        ),
    ),
    "opt": Family(
        "OPT 125M to 66B, without 350M",
        "OPTForCausalLM",
        lambda c: {
            "norm": "layer",
            "norm_weights": c.layer_norm_elementwise_affine,
            "rms_norm_eps": 1e-5,
            "gated": False,
            "biases": (
                *(("norm",) if c.layer_norm_elementwise_affine else ()),
                *_biases(c.enable_bias, c.enable_bias, c.enable_bias),
            ),
            "position_offset": 2,
        },
        reads=("enable_bias", "layer_norm_elementwise_affine"),
        only={"do_layer_norm_before": True, "_remove_final_layer_norm": False},
        same={"word_embed_proj_dim": "hidden_size"},
        neutral=("dropout", "activation_dropout", "layerdrop"),
        activation="activation_function",
        eps="",
        options={"intermediate_size": "ffn_dim"},
        names=Names(
            modules={
                "o_proj": "self_attn.out_proj",
                "up_proj": "fc1",
                "down_proj": "fc2",
                "attention_norm": "self_attn_layer_norm",
                "mlp_norm": "final_layer_norm",
                "norm": "final_layer_norm",
            },
            stem="model.decoder",
            positions="embed_positions",
        ),
    ),
    "nanochat": Family(
        "nanochat d20 to d34",
        "NanoChatForCausalLM",
        {"norm_weights": False, "embedding_norm": True, "qk_norm": "head", "qk_norm_last": True, "gated": False},
        names=Names(modules={"up_proj": "mlp.fc1", "down_proj": "mlp.fc2"}),
    ),
    "gpt_oss": Family(
        "GPT-OSS 20B, 120B",
        "GptOssForCausalLM",
        _gpt_oss,
        reads=tuple(SWIGLU),
        activation="",
        names=Names(router="mlp.router", experts="mlp.experts", expert=None, interleaved=True),
        packed=("mxfp4",),
    ),
}  # fmt: skip
