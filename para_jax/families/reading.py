"""Converts the fields of a config.json to an Architecture.

transformers' config class reads config.json, in the old or the new spelling, and fills in defaults.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from typing import Any

from para_jax.errors import ParaJaxError, one_line, unknown
from para_jax.families.architecture import ACTIVATIONS, ATTENTION_SITES, MLP_SITES, Architecture
from para_jax.families.checks import check_values
from para_jax.families.keys import CODE, ONLY, SIZES, Keys, defaults, rope_code_reads, sort_keys
from para_jax.families.kinds import layer_kinds, of_most_layers
from para_jax.families.table import FAMILIES
from para_jax.families.wrappers import QUANTIZED, Text, text_of

CONFIG = "config.json"


def architecture_from_hf(fields: Mapping[str, Any], name: str = "") -> Architecture:
    """Converts config.json's fields. Raises ParaJaxError for a family or an option that is not supported."""
    text = text_of(fields, name)
    family = text.own
    # From config.json alone: a default of the class is not an end token of the checkpoint.
    eos = as_token_ids(text.top["eos_token_id"], CONFIG)
    config = read_by_transformers(text)
    heads = config.num_attention_heads
    kv_heads = of_most_layers(config, "num_key_value_heads") or heads
    head_dim = of_most_layers(config, "head_dim") or config.hidden_size // heads
    act = getattr(config, family.activation) if family.activation else Architecture.hidden_act
    if act not in (*ACTIVATIONS, *family.activations):
        raise unknown(f"{family.activation} in config.json", act, (*ACTIVATIONS, *family.activations))
    kinds = family.kinds(config, layer_kinds(config, text.family, head_dim))
    different = tuple(dict.fromkeys(kinds))
    for heads_of in {kind.num_key_value_heads or kv_heads for kind in kinds}:
        if heads % heads_of:
            raise ParaJaxError(f"config.json has {heads} attention heads that {heads_of} key/value heads do not divide")
    biased = [*(ATTENTION_SITES if getattr(config, "attention_bias", False) else ())]
    biased += MLP_SITES if getattr(config, "mlp_bias", False) else ()
    scalar = getattr(config, "query_pre_attn_scalar", None)
    architecture = family.fields(config) if callable(family.fields) else family.fields
    experts = architecture.get("experts")
    if experts is not None and experts.per_token > experts.count:
        raise ParaJaxError(f"config.json sends a token to {experts.per_token} of {experts.count} experts")
    return Architecture(
        **{
            **{size: getattr(config, family.options.get(size, size)) for size in SIZES},
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "rms_norm_eps": getattr(config, family.eps, None),
            "layer_kinds": different,
            "kind_of_layer": () if len(different) == 1 else tuple(different.index(kind) for kind in kinds),
            "tie_word_embeddings": _from_top(text, config, "tie_word_embeddings") or False,
            "max_position_embeddings": config.max_position_embeddings,
            "bos_token_id": _from_top(text, config, "bos_token_id"),
            "eos_token_ids": eos,
            "name": name,
            "family": text.family,
            "hidden_act": act,
            "biases": tuple(biased),
            "attention_scale": None if scalar is None else scalar**-0.5,
            "attn_logit_softcapping": getattr(config, "attn_logit_softcapping", None),
            "final_logit_softcapping": getattr(config, "final_logit_softcapping", None),
            "hf": json.dumps(fields),
            **architecture,
        }
    )


def _from_top(text: Text, config: Any, key: str) -> Any:
    """The value of an option of FROM_TOP in config.json, or the default of the decoder's class."""
    return getattr(config, key, None) if text.wrapper is None or text.top[key] is None else text.top[key]


def read_by_transformers(text: Text) -> Any:
    """transformers' config object, with one spelling and with defaults.

    Raises ParaJaxError for a missing, invalid or unsupported option; null and false disable an option.
    """
    from transformers import CONFIG_MAPPING

    made: Any = CONFIG_MAPPING[text.made]
    fields = text.fields
    sizes = {size: defaults(made)[size] for size in SIZES} if text.sparse else {}
    check_values({**sizes, **fields}, text.own.options, text.own.optional)
    for key in QUANTIZED:
        _check_format(key, fields.get(key), text.own.packed)
    same = {key: fields.get(other) for key, other in text.own.same.items()}
    for key, value in {**ONLY, **text.only, **same}.items():
        if fields.get(key) is not None and fields[key] != value:
            raise ParaJaxError(f"config.json has {text.at}{key}={fields[key]!r}; only {value!r} is supported")
    used, refused, _ = _keys(text)
    if refused:
        shown = ", ".join(f"{text.at}{key}={value!r}" for key, value in refused.items())
        raise ParaJaxError(
            f"config.json has {shown}, which is not implemented for {text.architecture} and may change what it "
            "computes. If it does not, take it out of config.json"
        )
    try:
        return made(**copy.deepcopy({k: v for k, v in used.items() if not (k == "rope_theta" and v is None)}))
    except Exception as error:  # transformers' checks raise many types of errors
        raise ParaJaxError(f"config.json is not understood by transformers: {one_line(error)}") from error


def _check_format(key: str, value: Any, packed: tuple[str, ...]) -> None:
    """Raises ParaJaxError if an option of `QUANTIZED` names another format of weights than `packed`."""
    method = value.get("quant_method") if isinstance(value, Mapping) else None
    if value and method not in packed:
        of = "" if method is None else f" of quant_method {method!r}"
        *formats, last = ("float32", "float16", "bfloat16", *packed)
        raise ParaJaxError(f"config.json has a {key}{of}; only {', '.join(formats)} and {last} are read")


def _keys(text: Text) -> Keys:
    """The sorted keys of a decoder's options."""
    from transformers import CONFIG_MAPPING

    family = text.own
    others = {key for other in FAMILIES.values() for key in (*other.only, *other.reads)}
    own = {*text.neutral, *text.only, *family.same, *family.reads, *family.options.values()}
    own |= {family.activation, family.eps, *QUANTIZED}
    return sort_keys(text.fields, CONFIG_MAPPING[text.made], own, others)


def ignored_line(fields: Mapping[str, Any], name: str = "") -> str | None:
    """The warning that lists the ignored keys of a config.json; None if there are none.

    >>> ignored_line({"model_type": "qwen3", "use_mrope": False, "unk_token_id": 0})
    "config.json: keys that transformers' Qwen3ForCausalLM does not read are ignored: unk_token_id"
    """
    text = text_of(fields, name)
    ignored = [f"{key} (the code it names is not run)" if key == CODE else key for key in _keys(text).ignored]
    ignored += (key for key in _ignored_of_rope(text) if key.rpartition(".")[2] not in text.neutral)
    if not ignored:
        return None
    shown = ", ".join(f"{text.at}{key}" for key in ignored)
    return f"{name or 'config.json'}: keys that transformers' {text.architecture} does not read are ignored: {shown}"


def _ignored_of_rope(text: Text) -> Iterator[str]:
    """The keys of RoPE settings, for all layers or for a type of layer, that no RoPE code reads."""
    own = text.own.rope
    for at in ("rope_scaling", "rope_parameters"):
        settings = text.fields.get(at)
        for key, value in settings.items() if isinstance(settings, Mapping) else ():
            inner = value if isinstance(value, Mapping) else {}
            yield from (f"{at}.{key}.{name}" for name in inner if not rope_code_reads(name))
            if not inner and value is not None and not rope_code_reads(key) and key not in own:
                yield f"{at}.{key}"


def as_token_ids(value: Any, file: str) -> tuple[int, ...]:
    """Converts the token ids of a config file: one, a list, or null. Raises ParaJaxError with the file for others.

    >>> as_token_ids(2, "config.json"), as_token_ids([3, 4], "config.json"), as_token_ids(None, "config.json")
    ((2,), (3, 4), ())
    """
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise ParaJaxError(f"{file} has eos_token_id={value!r}, which is neither a token id nor a list of token ids")
    return tuple(dict.fromkeys(ids))
