"""The families of Hugging Face checkpoints: what their config.json means here, and which tensors they have.

transformers' own config class reads config.json, in the old or the new spelling, and fills in what it leaves out.
Options are read by one function for all families; a family states what its code does and no option says. To add one,
see docs/families.md.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from para_jax.backbones.block import ACTIVATIONS
from para_jax.backbones.config import (
    ATTENTION_SITES,
    MLP_SITES,
    AttentionKind,
    BackboneConfig,
    Experts,
    Rope,
    as_token_ids,
)
from para_jax.backbones.rope import TYPES
from para_jax.convert.keys import CODE, ONLY, SIZES, Keys, sort_keys
from para_jax.convert.tables import Entry, Names, entries_of
from para_jax.errors import ParaJaxError, unknown

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
    "gemma": Family("Gemma 1", "GemmaForCausalLM", _gemma, only=BOTH_WAYS, neutral=("hidden_activation",)),
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
    if model_type not in FAMILIES:
        more = "; its text part alone is, as gemma3_text" if model_type == "gemma3" else ""
        raise ParaJaxError(
            f"{name or 'this checkpoint'} is of architecture {model_type!r}, which is not supported{more}. "
            f"Supported: {', '.join(FAMILIES)}"
        )
    family = FAMILIES[model_type]
    config = _read_by_transformers(model_type, family, fields)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % kv_heads:
        raise ParaJaxError(f"config.json has {heads} attention heads that {kv_heads} key/value heads do not divide")
    act = getattr(config, family.activation)
    if act not in ACTIVATIONS:
        raise unknown("hidden_act in config.json", act, ACTIVATIONS)
    kinds = _attention_kinds(config, model_type)
    different = tuple(dict.fromkeys(kinds))
    biased = [*(ATTENTION_SITES if getattr(config, "attention_bias", False) else ())]
    biased += MLP_SITES if getattr(config, "mlp_bias", False) else ()
    scalar = getattr(config, "query_pre_attn_scalar", None)
    architecture = family.fields(config) if callable(family.fields) else family.fields
    return BackboneConfig(
        **{
            **{size: getattr(config, size) for size in SIZES},
            "num_key_value_heads": kv_heads,
            "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
            "rms_norm_eps": config.rms_norm_eps,
            "attention_kinds": different,
            "kind_of_layer": () if len(different) == 1 else tuple(different.index(kind) for kind in kinds),
            "tie_word_embeddings": config.tie_word_embeddings,
            "max_position_embeddings": config.max_position_embeddings,
            "bos_token_id": config.bos_token_id,
            "eos_token_ids": as_token_ids(config.eos_token_id),
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
    missing = [key for key in SIZES if fields.get(key) is None]
    if missing:
        raise ParaJaxError(f"config.json lacks {', '.join(missing)}")
    for key in ("quantization_config", "compression_config"):
        if fields.get(key):
            raise ParaJaxError(f"config.json has a {key}; only float32, float16 and bfloat16 are read")
    for key in (*SIZES, "num_key_value_heads", "head_dim"):
        size = fields.get(key)
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise ParaJaxError(f"config.json has {key}={size!r}, which is no whole number from 1")
    for key, value in {**ONLY, **family.only}.items():
        if fields.get(key) is not None and fields[key] != value:
            raise ParaJaxError(f"config.json has {key}={fields[key]!r}; only {value!r} is supported")
    for key in ("layer_types", "no_rope_layers"):
        each = fields.get(key)
        if each is not None and (not isinstance(each, list) or len(each) < fields["num_hidden_layers"]):
            count = len(each) if isinstance(each, list) else repr(each)
            raise ParaJaxError(f"config.json has {count} {key} for {fields['num_hidden_layers']} layers")

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
        raise ParaJaxError(f"config.json is not understood by transformers: {error}") from error


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
    if not ignored:
        return None
    reader = f"transformers' {FAMILIES[fields['model_type']].architecture}"
    return f"{name or 'config.json'}: keys that {reader} does not read are ignored: {', '.join(ignored)}"


def _attention_kinds(config: Any, model_type: str) -> list[AttentionKind]:
    """Each layer's. Windows are of the layers that `layer_types` names, or of all where there is no such option."""
    layers = config.num_hidden_layers
    window = config.sliding_window if hasattr(config, "sliding_window") else None
    types = getattr(config, "layer_types", None)
    turned = getattr(config, "no_rope_layers", None) or [1] * layers
    types = types or ["full_attention" if window is None else "sliding_attention"] * layers
    known = ("full_attention", "sliding_attention")
    for kind in types:
        if kind not in known:
            raise unknown("entry of layer_types in config.json", kind, known)
    if window is None and "sliding_attention" in types[:layers]:
        raise ParaJaxError("config.json has sliding_attention in layer_types and no sliding_window for it")
    each = {kind: _rope(_parameters(config, kind, known), config, model_type) for kind in dict.fromkeys(types[:layers])}
    return [
        AttentionKind(window if types[i] == "sliding_attention" else None, each[types[i]] if turned[i] else None)
        for i in range(layers)
    ]


def _parameters(config: Any, layer_type: str, known: Sequence[str]) -> Mapping[str, Any]:
    """The rope_parameters of layers of a type, which may be those of all layers."""
    ropes = {key: value for key, value in config.rope_parameters.items() if value is not None}
    of_types = [key for key in ropes if key in known]
    beside = [key for key in ropes if key not in known]
    if not of_types:
        return ropes
    if beside or not isinstance(ropes.get(layer_type), Mapping):
        raise ParaJaxError(
            f"rope_parameters in config.json are for {', '.join(of_types)}{' beside ' if beside else ''}"
            f"{', '.join(beside)}; give one set of them for all layers, or one for each type of layer there is"
        )
    return ropes[layer_type]


def _rope(parameters: Mapping[str, Any], config: Any, model_type: str) -> Rope:
    rope = {key: value for key, value in parameters.items() if value is not None and key != "type"}
    theta, kind, share = (rope.pop(key, None) for key in ("rope_theta", "rope_type", "partial_rotary_factor"))
    # Gemma 3's class leaves it beside rope_parameters.
    share = share or getattr(config, "partial_rotary_factor", None) or 1.0
    if not isinstance(theta, int | float) or theta <= 0:
        raise ParaJaxError(f"config.json has rope_theta={theta!r}, which is no number above 0")
    if kind not in TYPES:
        raise unknown("rope_type in config.json", kind, TYPES)
    if share != 1 and model_type != "phi3":
        raise ParaJaxError(f"config.json has partial_rotary_factor={share}, which {model_type} has no code for")
    if kind == "default":
        rope.pop("original_max_position_embeddings", None)
    missing = [key for key in TYPES[kind].needs if key not in rope]
    extra = [key for key in rope if key not in (*TYPES[kind].needs, *TYPES[kind].may_have)]
    if missing or extra:
        raise ParaJaxError(
            f"RoPE scaling of type {kind!r} in config.json takes {[*TYPES[kind].needs, *TYPES[kind].may_have]}; "
            f"missing {missing}, not understood {extra}"
        )
    options = tuple((key, tuple(value) if isinstance(value, list) else value) for key, value in sorted(rope.items()))
    return Rope(float(theta), kind, float(share), options)


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
    return {**fields, "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else list(eos)}


def entries(config: BackboneConfig, layer: int | None = None) -> list[Entry]:
    """The tensors of one layer, or with None those outside the layers."""
    return entries_of(config, FAMILIES[config.family].names, layer)
