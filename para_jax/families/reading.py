"""What the fields of a config.json mean here.

transformers' own config class reads config.json, in the old or the new spelling, and fills in what it leaves out.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from typing import Any

from para_jax.errors import ParaJaxError, one_line, unknown
from para_jax.families.architecture import ACTIVATIONS, ATTENTION_SITES, MLP_SITES, Architecture
from para_jax.families.checks import check_values
from para_jax.families.keys import CODE, ONLY, SIZES, Keys, rope_code_reads, sort_keys
from para_jax.families.kinds import attention_kinds
from para_jax.families.table import FAMILIES, Family

CONFIG = "config.json"


def architecture_from_hf(fields: Mapping[str, Any], name: str = "") -> Architecture:
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
    return Architecture(
        **{
            **{size: getattr(config, size) for size in SIZES},
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "rms_norm_eps": getattr(config, family.eps),
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
    others = {key for other in FAMILIES.values() for key in (*other.only, *other.reads)}
    own = {*family.neutral, *family.only, *family.reads, family.eps}
    return sort_keys(fields, CONFIG_MAPPING[model_type], own, others)


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
    own = FAMILIES[fields["model_type"]].rope
    for at in ("rope_scaling", "rope_parameters"):
        settings = fields.get(at)
        for key, value in settings.items() if isinstance(settings, Mapping) else ():
            inner = value if isinstance(value, Mapping) else {}
            yield from (f"{at}.{key}.{name}" for name in inner if not rope_code_reads(name))
            if not inner and value is not None and not rope_code_reads(key) and key not in own:
                yield f"{at}.{key}"


def as_token_ids(value: Any, file: str) -> tuple[int, ...]:
    """Token ids as config files have them: one, several, or none. Raises ParaJaxError, with the file, for others.

    >>> as_token_ids(2, "config.json"), as_token_ids([3, 4], "config.json"), as_token_ids(None, "config.json")
    ((2,), (3, 4), ())
    """
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise ParaJaxError(f"{file} has eos_token_id={value!r}, which is no token id and no list of token ids")
    return tuple(dict.fromkeys(ids))
