"""One entry for each family of checkpoints. docs/families.md says how to add one.

Options of config.json are read by one function for all families (`families/reading.py`); a family states what its code
does and no option says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from para_jax.compat import GEMMA_ACTIVATIONS
from para_jax.families.architecture import ATTENTION_SITES, Experts, Names

LLAMA_NAMES = Names()


@dataclass(frozen=True)
class Family:
    """One `model_type` of config.json.

    Attributes:
      models: what is published in it, for people.
      architecture: the class of transformers that has its weights.
      fields: those of `Architecture` that no option says: always the same, or made from transformers' config.
      only: options of which one setting is supported.
      neutral: options that change nothing here, beside those of every family.
      activation: the option that names the feed-forward's.
      names: what its tensors are called, where that differs from Llama's.
    """

    models: str
    architecture: str
    fields: Mapping[str, Any] | Callable[[Any], Mapping[str, Any]] = field(default_factory=dict)
    only: Mapping[str, Any] = field(default_factory=dict)
    neutral: tuple[str, ...] = ()
    activation: str = "hidden_act"
    names: Names = LLAMA_NAMES


def _gemma(config: Any, **more: Any) -> dict[str, Any]:
    """Embeddings times sqrt(d), and norms whose weights are stored as their distance from one."""
    return {"norm_offset": 1.0, "embedding_scale": config.hidden_size**0.5, **more}


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
        lambda c: _gemma(c, post_norm=True, qk_norm="head"),
        only=BOTH_WAYS,
        neutral=("hidden_act", "sliding_window_pattern", "_sliding_window_pattern", "rope_local_base_freq"),
        activation="hidden_activation",
    ),
    "phi3": Family(
        "Phi-3 mini and medium, Phi-3.5 mini, Phi-4, Phi-4 mini",
        "Phi3ForCausalLM",
        only={"full_attn_mod": 1, "interpolate_factor": 1},
        # transformers puts the last into rope_parameters.
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
}  # fmt: skip
