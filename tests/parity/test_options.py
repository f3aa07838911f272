"""Every option of a family's config class, changed once: our logits follow transformers', or the option is refused.

The sizes change together, since each of them is in the shape of a parameter: one program instead of ten.

All parameters and saved buffers are random, so that code which ignores one of them shows. An option that leaves our
architecture as it is has to leave transformers' logits as they are.
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig

from para_jax import Backbone, BackboneConfig, ParaJaxError
from para_jax.families.keys import defaults
from para_jax.families.kinds import of_most_layers
from para_jax.families.table import FAMILIES
from tests.helpers import families, family_fields
from tests.parity.models import TOLERANCE, plain

TIME = 11
# Another value of an option than that of tests/helpers.py; true and false are exchanged.
OTHER: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 64, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 16, "max_position_embeddings": 64, "hidden_act": "gelu",
    "hidden_activation": "silu", "rms_norm_eps": 0.3, "layer_norm_eps": 0.3, "norm_epsilon": 0.3,
    "sliding_window": 2, "sliding_window_pattern": 2, "max_window_layers": 0, "no_rope_layers": [0, 1],
    "no_rope_layer_interval": 2, "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 50.0},
    "layer_types": ["full_attention", "sliding_attention"], "query_pre_attn_scalar": 3, "attn_logit_softcapping": 0.7,
    "final_logit_softcapping": 0.7, "num_local_experts": 3, "num_experts": 3, "num_experts_per_tok": 1,
    "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8, "decoder_sparse_step": 2, "mlp_only_layers": [0],
    "embedding_multiplier": 0.4, "attention_multiplier": 0.9, "residual_multiplier": 0.3, "logits_scaling": 3.0,
    "logit_scale": 0.3, "original_max_position_embeddings": 4, "initializer_range": 0.5, "pad_token_id": 3,
    "bos_token_id": 3, "eos_token_id": 3, "eod_token_id": 3, "pretraining_tp": 2, "router_aux_loss_coef": 0.5,
    "router_jitter_noise": 0.5, "vocab_size_per_layer_input": 70, "hidden_size_per_layer_input": 4,
    "num_kv_shared_layers": 0, "swiglu_alpha": 0.7, "swiglu_limit": 0.5,
    "n_embd": 64, "n_inner": 40, "n_layer": 3, "n_head": 8, "n_positions": 64,
    "ffn_dim": 40, "word_embed_proj_dim": 16, "activation_function": "gelu", "layer_norm_epsilon": 0.3, "init_std": 0.5,
    "summary_type": "last", "summary_activation": "tanh",
}  # fmt: skip
# They change together: 8 heads of 8 features make up 64 in families where they have to.
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "num_local_experts", "num_experts", "moe_intermediate_size",
         "shared_expert_intermediate_size", "n_embd", "n_inner", "n_layer", "n_head", "ffn_dim")  # fmt: skip
# What a family takes in place of these.
OF_FAMILY: dict[str, dict[str, Any]] = {
    "gemma": {"hidden_act": "silu"},
    "gemma3_text": {"rope_parameters": {kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in
                                        (("full_attention", 50.0), ("sliding_attention", 20.0))}},
    "gemma4_text": {"rope_parameters": {"full_attention": {"rope_type": "proportional", "rope_theta": 50.0},
                                        "sliding_attention": {"rope_type": "default", "rope_theta": 20.0}},
                    "layer_types": ["full_attention", "sliding_attention"] * 2, "use_bidirectional_attention": "all",
                    "num_hidden_layers": 5, "vocab_size": 54, "num_global_key_value_heads": 1},
    "olmo3": {"rope_parameters": {kind: {"rope_type": "linear", "factor": 2.0, "rope_theta": theta} for kind, theta in
                                  (("full_attention", 50.0), ("sliding_attention", 20.0))}},
    "gpt_neox": {"hidden_act": "silu", "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 50.0,
                                     "partial_rotary_factor": 0.5}},  # its own activation is "gelu"
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0, "partial_rotary_factor": 0.5}},
    "ministral3": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 3,
                                       "llama_4_scaling_beta": 1.3, "rope_theta": 50.0}},
    "hunyuan_v1_dense": {"rope_parameters": {"rope_type": "dynamic", "alpha": 9.0, "rope_theta": 50.0, "factor": 1.0}},
}  # fmt: skip
OF_FAMILY["gemma4_unified_text"] = OF_FAMILY["gemma4_text"]
# What has to fit it: sizes of one head, or a value for each layer.
WITH: dict[str, dict[str, Any]] = {
    "num_attention_heads": {"head_dim": 8},
    "sliding_window": {"use_sliding_window": True},
    "max_window_layers": {"use_sliding_window": True},
    "layer_types": {"use_sliding_window": True, "sliding_window": 4},
    "enable_moe_block": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 8},
}  # fmt: skip


def other(family: str, key: str, value: Any) -> Any:
    """Another value of an option than this."""
    if key in OF_FAMILY.get(family, {}):
        return OF_FAMILY[family][key]
    if key in OTHER:
        return OTHER[key]
    return 0.25 if isinstance(value, float) or key.endswith(("dropout", "pdrop")) else not value


def options(family: str) -> list[str]:
    """Those of the class, without what every class has."""
    made: Any = CONFIG_MAPPING[family]
    base: Any = PretrainedConfig
    shared = {*defaults(base)} - {"tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"}
    return [key for key in defaults(made) if key not in shared and key != "use_cache"]


def random_model(family: str, fields: dict[str, Any]) -> Any:
    """transformers' model, whose parameters and saved buffers depend on their names and shapes alone."""
    made: Any = CONFIG_MAPPING[family]
    model = AutoModelForCausalLM.from_config(made(**json.loads(json.dumps(fields))), **plain(family)).eval()
    with torch.no_grad():
        for name, x in model.state_dict().items():
            rng = np.random.default_rng(zlib.crc32(name.encode()))
            near_one = "norm" in name or name.endswith(("scale", "layer_scalar"))
            x.copy_(torch.tensor(0.3 * rng.standard_normal(tuple(x.shape)) + (0.8 if near_one else 0.0)))
    return model


def logits(model: Any) -> np.ndarray:
    with torch.inference_mode():
        return model(tokens(model.config.vocab_size)).logits.numpy()


def tokens(vocabulary: int) -> torch.Tensor:
    return torch.tensor(np.random.default_rng(0).integers(0, min(vocabulary, 40), (2, TIME)))


def ours(model: Any, fields: dict[str, Any], folder: Path) -> np.ndarray:
    """Ours of a folder with these fields as config.json, beside what transformers saves."""
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(fields))
    backbone = Backbone.from_pretrained(folder, dtype="float32", stacked=True)
    return np.asarray(backbone(jnp.asarray(tokens(model.config.vocab_size).numpy())))


def close(x: np.ndarray, y: np.ndarray) -> bool:
    return x.shape == y.shape and bool(np.abs(x - y).max() < TOLERANCE * np.abs(y).max())


def with_others(family: str, keys: list[str], fields: dict[str, Any], config: PretrainedConfig) -> dict[str, Any]:
    """A config.json with other values of these options, and what has to fit them."""
    made: Any = CONFIG_MAPPING[family]
    changed = dict(fields)
    for key in keys:
        changed |= {k: v for k, v in WITH.get(key, {}).items() if hasattr(made, k)}
        changed[key] = other(family, key, of_most_layers(config, key))
    for each, more in (("layer_types", "full_attention"), ("no_rope_layers", 1)):
        if "num_hidden_layers" in keys and each in fields:
            changed[each] = [*fields[each], more]
    if "rope_parameters" in keys:
        changed = {key: value for key, value in changed.items() if key not in ("rope_theta", "rotary_pct")}
    if family == "helium":  # whose heads make up hidden_size
        heads = changed["num_attention_heads"]
        if "head_dim" in keys:
            changed["hidden_size"] = changed["head_dim"] * heads
        else:
            changed["head_dim"] = changed["hidden_size"] // heads
    return changed


@pytest.mark.parametrize("family", families())
def test_every_option(family: str, tmp_path: Path) -> None:
    fields = {**family_fields(family), "pad_token_id": 0}
    before, shape = random_model(family, fields), BackboneConfig.from_hf(fields)
    usual = logits(before)
    assert close(ours(before, fields, tmp_path / "before"), usual)
    followed: set[str] = set()
    sizes = [key for key in SIZES if key in options(family)]
    for keys in (sizes, *([key] for key in options(family) if key not in SIZES)):
        changed = with_others(family, keys, fields, before.config)
        try:
            config = BackboneConfig.from_hf(changed)
        except ParaJaxError as error:
            assert keys != sizes and keys[0] in str(error)
            continue
        model = random_model(family, changed)
        if dataclasses.replace(config, hf=shape.hf, eos_token_ids=shape.eos_token_ids) == shape:
            assert close(logits(model), usual), f"{keys} changes transformers' logits and not ours"
        else:
            assert close(ours(model, changed, tmp_path / keys[0]), logits(model)), keys
            followed |= {*keys}
    layers = FAMILIES[family].options.get("num_hidden_layers", "num_hidden_layers")
    positions = {"rope_parameters"} & {*options(family)}
    activation = {FAMILIES[family].activation} - {""}
    assert {"vocab_size", layers, *positions, *activation} <= followed
