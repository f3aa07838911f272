"""The config.json of a backbone, as transformers opens it."""

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
    """The fields of a config.json that transformers opens; inverse of `architecture_from_hf`.

    What was read out of a wrapper comes out as it was, or with `text_only` as a model of the decoder's family.

    Raises ParaJaxError for a config that was changed after it was read: what it means in its family is not known.
    """
    wrapped = wrapper_of(config) is not None
    if wrapped and text_only:
        fields = _text_alone(config)
    elif config.hf:
        fields = json.loads(config.hf)
    else:
        fields = _of_llama(config)
    # Stop tokens may have come from generation_config.json.
    read = replace(architecture_from_hf(fields), name=config.name, eos_token_ids=config.eos_token_ids)
    if any(getattr(read, field.name) != getattr(config, field.name) for field in fields_of(read) if field.compare):
        raise ParaJaxError(
            "the config was changed after it was read; make the changes in config.json and read it"
            if config.hf
            else "only a Llama can be written from a config made by hand; read another from config.json"
        )
    eos = config.eos_token_ids
    # A key that is not there stays away, and a wrapper's stays what it was: its generation_config.json goes with it.
    if (not eos and config.hf) or (wrapped and not text_only):
        return fields
    return {**fields, "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else list(eos)}


def _of_llama(config: Architecture) -> dict[str, Any]:
    rope = config.attention_kinds[0].rope
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
    """The options of a wrapper's decoder as those of a model of its family, with none left to a class's defaults."""
    from transformers import CONFIG_MAPPING, PretrainedConfig

    text = text_of(json.loads(config.hf))
    made: Any = CONFIG_MAPPING[text.family]
    base: Any = PretrainedConfig
    options = {*defaults(made)} - {*defaults(base), "eos_token_id"}  # which the caller puts there
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
    """A config.json that says this dtype, of its parts too where they say any.

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
