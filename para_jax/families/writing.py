"""The config.json of a backbone, as transformers opens it."""

from __future__ import annotations

import json
from dataclasses import fields as fields_of
from dataclasses import replace
from typing import Any

from para_jax.errors import ParaJaxError
from para_jax.families.architecture import ATTENTION_SITES, MLP_SITES, Architecture
from para_jax.families.keys import SIZES
from para_jax.families.reading import architecture_from_hf


def hf_fields(config: Architecture) -> dict[str, Any]:
    """The fields of a config.json that transformers opens; inverse of `architecture_from_hf`.

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
    read = replace(architecture_from_hf(fields), name=config.name, eos_token_ids=config.eos_token_ids)
    if any(getattr(read, field.name) != getattr(config, field.name) for field in fields_of(read) if field.compare):
        raise ParaJaxError(problem)
    eos = config.eos_token_ids
    if not eos and config.hf:  # a key that is not there stays away
        return fields
    return {**fields, "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else list(eos)}
