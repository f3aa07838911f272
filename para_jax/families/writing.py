"""Writes a backbone's config.json for transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields as fields_of
from dataclasses import replace
from typing import Any

from para_jax.errors import ParaJaxError
from para_jax.families.architecture import ATTENTION_SITES, MLP_SITES, Architecture
from para_jax.families.keys import SIZES, defaults
from para_jax.families.reading import architecture_from_hf, read_by_transformers
from para_jax.families.wrappers import text_of, wrapper_of


def hf_fields(config: Architecture, text_only: bool = False) -> dict[str, Any]:
    """The fields of a config.json for transformers; inverse of `architecture_from_hf`.

    For the decoder of a wrapper, these are the wrapper's, or with `text_only` those of a model of the decoder's family.

    Raises ParaJaxError for a config that was changed after it was read, because it may not be valid for its family.
    """
    wrapped = wrapper_of(config) is not None
    if wrapped and text_only:
        fields = _text_alone(config)
    elif config.hf:
        fields = json.loads(config.hf)
    else:
        fields = _of_llama(config)
    # End tokens may come from generation_config.json.
    read = replace(architecture_from_hf(fields), name=config.name, eos_token_ids=config.eos_token_ids)
    if any(getattr(read, field.name) != getattr(config, field.name) for field in fields_of(read) if field.compare):
        raise ParaJaxError(
            "the config was changed after it was read; make the changes in config.json and read it"
            if config.hf
            else "a config made by hand can only be saved if it is a Llama's; read other families from config.json"
        )
    eos = config.eos_token_ids
    # Do not add a missing key, and do not change a wrapper's, because its generation_config.json is copied.
    if (not eos and config.hf) or (wrapped and not text_only):
        return fields
    return {**fields, "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else list(eos)}


def _of_llama(config: Architecture) -> dict[str, Any]:
    rope = config.layer_kinds[0].rope
    same = (
        *SIZES, "num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings",
        "bos_token_id", "hidden_act",
    )  # fmt: skip
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{key: getattr(config, key) for key in same},
        "attention_bias": ATTENTION_SITES[0] in config.biases,
        "mlp_bias": MLP_SITES[0] in config.biases,
        "rope_parameters": rope and {"rope_theta": rope.theta, "rope_type": rope.rope_type, **dict(rope.options)},
    }


def _text_alone(config: Architecture) -> dict[str, Any]:
    """The options of a wrapper's decoder as a model of its family, with all defaults written out."""
    from transformers import CONFIG_MAPPING, PretrainedConfig

    text = text_of(json.loads(config.hf))
    made: Any = CONFIG_MAPPING[text.family]
    base: Any = PretrainedConfig
    # The caller adds eos_token_id.
    options = {*defaults(made), *text.own.reads} - {*defaults(base), "eos_token_id"}
    given = {key: value for key, value in read_by_transformers(text).to_dict().items() if key in options}
    rope = {k: v for k, v in given["rope_parameters"].items() if k not in ("type", *text.neutral)}
    return {
        **given,
        "architectures": [text.own.architecture],
        "model_type": text.family,
        "rope_parameters": rope,
        **{key: getattr(config, key) for key in ("tie_word_embeddings", "bos_token_id")},
    }


def with_dtype(fields: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Sets the dtype in a config.json, and in its nested configs that have one.

    >>> with_dtype({"torch_dtype": "float32", "vision_config": {"dtype": "float32"}}, "float16")
    {'vision_config': {'dtype': 'float16'}, 'dtype': 'float16'}
    """
    old = ("torch_dtype", "dtype")
    parts = {
        key: with_dtype(value, dtype) if isinstance(value, Mapping) and any(name in value for name in old) else value
        for key, value in fields.items()
        if key not in old
    }
    return {**parts, "dtype": dtype}
