"""The families of Hugging Face checkpoints: what their config.json means here, and which tensors they have.

transformers' own config class reads config.json, in the old or the new spelling, and fills in what it leaves out.
Options are read by one function for all families; a family states what its code does and no option says. To add one,
see docs/families.md.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from para_jax.backbones.block import ACTIVATIONS
from para_jax.backbones.config import ATTENTION_SITES, CONFIG, MLP_SITES, BackboneConfig, Experts, as_token_ids
from para_jax.compat import GEMMA_ACTIVATIONS
from para_jax.convert.checks import check_values
from para_jax.convert.keys import CODE, ONLY, SIZES, Keys, rope_code_reads, sort_keys
from para_jax.convert.kinds import attention_kinds
from para_jax.convert.tables import Entry, Names, entries_of
from para_jax.errors import ParaJaxError, one_line, unknown

LLAMA_NAMES = Names()


@dataclass(frozen=True)
class Family:
    """One `model_type` of config.json.

    Attributes:
      models: what is published in it, for people.
      architecture: the class of transformers that has its weights.
      fields: those of `BackboneConfig` that no option says: always the same, or made from transformers' config.
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


def config_from_hf(fields: Mapping[str, Any], name: str = "") -> BackboneConfig:
    """What config.json's fields mean here. Raises ParaJaxError for a family or an option that is not supported."""
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        more = "; its text part alone is, as gemma3_text" if model_type == "gemma3" else ""
        raise ParaJaxError(
            f"{name or 'this checkpoint'} is of architecture {model_type!r}, which is not supported{more}. "
            f"Supported: {', '.join(FAMILIES)}"
        )
    family = FAMILIES[model_type]
    # What config.json does not say is no end token of the checkpoint, whatever the class has.
    eos = as_token_ids(fields.get("eos_token_id"), CONFIG)
    config = _read_by_transformers(model_type, family, fields)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % kv_heads:
        raise ParaJaxError(f"config.json has {heads} attention heads that {kv_heads} key/value heads do not divide")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    act = getattr(config, family.activation)
    if act not in ACTIVATIONS:
        raise unknown(f"{family.activation} in config.json", act, ACTIVATIONS)
    kinds = attention_kinds(config, model_type, head_dim)
    different = tuple(dict.fromkeys(kinds))
    biased = [*(ATTENTION_SITES if getattr(config, "attention_bias", False) else ())]
    biased += MLP_SITES if getattr(config, "mlp_bias", False) else ()
    scalar = getattr(config, "query_pre_attn_scalar", None)
    architecture = family.fields(config) if callable(family.fields) else family.fields
    experts = architecture.get("experts")
    if experts is not None and experts.per_token > experts.count:
        raise ParaJaxError(f"config.json sends a token to {experts.per_token} of {experts.count} experts")
    return BackboneConfig(
        **{
            **{size: getattr(config, size) for size in SIZES},
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "rms_norm_eps": config.rms_norm_eps,
            "attention_kinds": different,
            "kind_of_layer": () if len(different) == 1 else tuple(different.index(kind) for kind in kinds),
            "tie_word_embeddings": config.tie_word_embeddings,
            "max_position_embeddings": config.max_position_embeddings,
            "bos_token_id": config.bos_token_id,
            "eos_token_ids": eos,
            "name": name,
            "family": model_type,
            "hidden_act": act,
            "biases": tuple(biased),
            "attention_scale": None if scalar is None else scalar**-0.5,
            "attn_logit_softcapping": getattr(config, "attn_logit_softcapping", None),
            "final_logit_softcapping": getattr(config, "final_logit_softcapping", None),
            "hf": json.dumps(fields),
            **architecture,
        }
    )


def _read_by_transformers(model_type: str, family: Family, fields: Mapping[str, Any]) -> Any:
    """transformers' config object: both spellings made one, and what is left out filled in.

    Raises ParaJaxError for what config.json lacks, or has and is not understood; null and false turn an option off.
    """
    check_values(fields)
    for key in ("quantization_config", "compression_config"):
        if fields.get(key):
            raise ParaJaxError(f"config.json has a {key}; only float32, float16 and bfloat16 are read")
    for key, value in {**ONLY, **family.only}.items():
        if fields.get(key) is not None and fields[key] != value:
            raise ParaJaxError(f"config.json has {key}={fields[key]!r}; only {value!r} is supported")

    from transformers import CONFIG_MAPPING

    used, refused, _ = _keys(fields)
    if refused:
        raise ParaJaxError(
            f"config.json has {', '.join(f'{key}={value!r}' for key, value in refused.items())}, which is not "
            f"implemented for {family.architecture} and may change what it computes. If it does not, take it out of "
            "config.json"
        )
    try:
        return CONFIG_MAPPING[model_type](
            **copy.deepcopy({k: v for k, v in used.items() if not (k == "rope_theta" and v is None)})
        )
    except Exception as error:  # its checks raise errors of many kinds
        raise ParaJaxError(f"config.json is not understood by transformers: {one_line(error)}") from error


def _keys(fields: Mapping[str, Any]) -> Keys:
    """What becomes of the keys of a supported family's config.json."""
    from transformers import CONFIG_MAPPING

    model_type = fields["model_type"]
    family = FAMILIES[model_type]
    others = {key for other in FAMILIES.values() for key in other.only}
    return sort_keys(fields, CONFIG_MAPPING[model_type], {*family.neutral, *family.only}, others)


def ignored_line(fields: Mapping[str, Any], name: str = "") -> str | None:
    """What is said of the keys of a config.json that change nothing; None, if it has none.

    >>> ignored_line({"model_type": "qwen3", "use_mrope": False, "unk_token_id": 0})
    "config.json: keys that transformers' Qwen3ForCausalLM does not read are ignored: unk_token_id"
    """
    ignored = [f"{key} (the code it names is not run)" if key == CODE else key for key in _keys(fields).ignored]
    ignored += _ignored_of_rope(fields)
    if not ignored:
        return None
    reader = f"transformers' {FAMILIES[fields['model_type']].architecture}"
    return f"{name or 'config.json'}: keys that {reader} does not read are ignored: {', '.join(ignored)}"


def _ignored_of_rope(fields: Mapping[str, Any]) -> Iterator[str]:
    """The keys within RoPE's settings, for all layers or for a type of them, that no code of RoPE reads."""
    for at in ("rope_scaling", "rope_parameters"):
        settings = fields.get(at)
        for key, value in settings.items() if isinstance(settings, Mapping) else ():
            inner = value if isinstance(value, Mapping) else {}
            yield from (f"{at}.{key}.{name}" for name in inner if not rope_code_reads(name))
            if not inner and value is not None and not rope_code_reads(key):
                yield f"{at}.{key}"


def hf_fields(config: BackboneConfig) -> dict[str, Any]:
    """The fields of a config.json that transformers opens; inverse of `config_from_hf`.

    Raises ParaJaxError for a config that was changed after it was read: what it means in its family is not known.
    """
    if config.hf:
        fields = json.loads(config.hf)
        problem = "the config was changed after it was read; make the changes in config.json and read it"
    else:
        rope = config.attention_kinds[0].rope
        same = (
            *SIZES, "num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings",
            "bos_token_id", "hidden_act",
        )  # fmt: skip
        fields = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **{key: getattr(config, key) for key in same},
            "attention_bias": ATTENTION_SITES[0] in config.biases,
            "mlp_bias": MLP_SITES[0] in config.biases,
            "rope_parameters": rope and {"rope_theta": rope.theta, "rope_type": rope.rope_type, **dict(rope.options)},
        }
        problem = "only a Llama can be written from a config made by hand; read another from config.json"
    # Stop tokens may have come from generation_config.json.
    if replace(config_from_hf(fields), name=config.name, eos_token_ids=config.eos_token_ids) != config:
        raise ParaJaxError(problem)
    eos = config.eos_token_ids
    if not eos and config.hf:  # a key that is not there stays away
        return fields
    return {**fields, "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else list(eos)}


def entries(config: BackboneConfig, layer: int | None = None) -> list[Entry]:
    """The tensors of one layer, or with None those outside the layers."""
    return entries_of(config, FAMILIES[config.family].names, layer)
