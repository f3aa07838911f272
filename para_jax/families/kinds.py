"""Reads the kinds of layers from a config.json: their windows, settings of RoPE, and sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from para_jax.compat import ADDED_ROPE
from para_jax.errors import ParaJaxError, unknown
from para_jax.families.architecture import ROPE_TYPES, LayerKind, Rope
from para_jax.families.checks import check_rope, is_number, is_whole
from para_jax.families.keys import rope_code_reads

# Families that support partial_rotary_factor.
PARTIAL = ("phi3", "glm4", "stablelm", "phi", "gpt_neox")


def layer_kinds(config: Any, model_type: str, head_dim: int) -> list[LayerKind]:
    """The kind of each layer. The window is for layers with "sliding_attention" in `layer_types`, by default all."""
    layers = config.num_hidden_layers
    if not hasattr(config, "rope_parameters"):
        return [LayerKind(None, None)] * layers
    window = config.sliding_window if hasattr(config, "sliding_window") else None
    if window == 0 and not getattr(config, "use_sliding_window", True):  # in Qwen2-MoE's class
        window = None
    if window is not None and not is_whole(window):
        raise ParaJaxError(f"config.json has sliding_window={window!r}, which is not a whole number from 1")
    types = getattr(config, "layer_types", None)
    uses_rope = getattr(config, "no_rope_layers", None) or [1] * layers
    types = types or ["full_attention" if window is None else "sliding_attention"] * layers
    known = ("full_attention", "sliding_attention")
    for kind in types:
        if kind not in known:
            raise unknown("entry of layer_types in config.json", kind, known)
    for value in uses_rope:
        if value not in (0, 1):
            raise ParaJaxError(f"config.json has {value!r} in no_rope_layers, which is neither 0 nor 1")
    if window is None and "sliding_attention" in types[:layers]:
        raise ParaJaxError("config.json has sliding_attention in layer_types, but no sliding_window")
    ropes = {
        kind: _rope(_parameters(config, kind, known), config, model_type, head_dim)
        for kind in dict.fromkeys(types[:layers])
    }
    # In these families, layers without a window have no RoPE.
    if model_type == "cohere2" or (model_type == "exaone4" and window is not None):
        uses_rope = [types[i] == "sliding_attention" for i in range(layers)]
    return [
        LayerKind(window if types[i] == "sliding_attention" else None, ropes[types[i]] if uses_rope[i] else None)
        for i in range(layers)
    ]


def of_most_layers(config: Any, name: str) -> Any:
    """An option, as it is for the layers that have no other value of their own; reading the attribute would raise."""
    return vars(config)[name] if name in vars(config) else getattr(config, name, None)


def gemma4_kinds(config: Any, kinds: Sequence[LayerKind]) -> list[LayerKind]:
    """Gemma 4's layers: sizes of the layers that see all tokens, and of those that share keys and values."""
    layers, types = config.num_hidden_layers, config.layer_types
    own = layers - config.num_kv_shared_layers
    found = []
    for i, kind in enumerate(kinds):
        sizes = {}
        for name in ("head_dim", "num_key_value_heads"):
            if (size := getattr(config.per_layer_config[i], name)) != of_most_layers(config, name):
                sizes[name] = size
        if i >= own:
            source = max((j for j in range(own) if types[j] == types[i]), default=None)
            if source is None:
                raise ParaJaxError(
                    f"config.json has num_kv_shared_layers={config.num_kv_shared_layers}, and no {types[i]} layer "
                    "before them to share with"
                )
            sizes["intermediate_size"] = 2 * config.intermediate_size if config.use_double_wide_mlp else None
            found.append(replace(kind, **sizes, values="shared", shares=source))
        else:
            tied = config.attention_k_eq_v and types[i] == "full_attention"
            found.append(replace(kind, **sizes, values="keys" if tied else "own"))
    return found


def _parameters(config: Any, layer_type: str, known: Sequence[str]) -> Mapping[str, Any]:
    """The rope_parameters for a type of layer, or those for all layers."""
    ropes = {key: value for key, value in config.rope_parameters.items() if value is not None}
    typed = [key for key in ropes if key in known]
    untyped = [key for key, value in ropes.items() if key not in known and (key, value) != ADDED_ROPE]
    if not typed:
        return ropes
    if untyped or not isinstance(ropes.get(layer_type), Mapping):
        raise ParaJaxError(
            f"rope_parameters in config.json has {', '.join(typed)}{' and ' if untyped else ''}{', '.join(untyped)}; "
            "give one set of parameters for all layers, or one for each type of layer"
        )
    return ropes[layer_type]


def _rope(parameters: Mapping[str, Any], config: Any, model_type: str, head_dim: int) -> Rope:
    rope = {key: value for key, value in parameters.items() if value is not None and key != "type"}
    theta, kind, share = (rope.pop(key, None) for key in ("rope_theta", "rope_type", "partial_rotary_factor"))
    # Gemma 3's class leaves it outside of rope_parameters.
    share = share or getattr(config, "partial_rotary_factor", None) or 1.0
    if not is_number(theta) or theta <= 0:
        raise ParaJaxError(f"config.json has rope_theta={theta!r}, which is not a number above 0")
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        raise unknown("rope_type in config.json", kind, ROPE_TYPES)
    if not is_number(share) or not 0 < share <= 1:
        raise ParaJaxError(f"config.json has partial_rotary_factor={share!r}, which is not a number above 0 up to 1")
    if kind == "default" and model_type.startswith("gemma4"):
        share = 1.0  # its class does not look at it
    if share != 1 and model_type not in PARTIAL and kind != "proportional":
        raise ParaJaxError(f"config.json has partial_rotary_factor={share}, which {model_type} does not support")
    scaling = _query_scaling(rope) if model_type == "ministral3" else None
    if model_type == "hunyuan_v1_dense" and kind == "dynamic" and rope.get("alpha"):
        theta, kind, rope = _alpha(theta, rope["alpha"], head_dim), "default", {}
    if kind == "default":
        rope.pop("original_max_position_embeddings", None)
    missing = [key for key in ROPE_TYPES[kind].needs if key not in rope]
    known = (*ROPE_TYPES[kind].needs, *ROPE_TYPES[kind].may_have)
    extra = [key for key in rope if key not in known and rope_code_reads(key)]
    if missing or extra:
        raise ParaJaxError(
            f"RoPE scaling of type {kind!r} in config.json takes {[*known]}; missing {missing}, not understood {extra}"
        )
    options = {key: rope[key] for key in sorted(rope) if key in known}
    check_rope(kind, options, Rope(rope_type=kind, partial_rotary_factor=share).dim(head_dim))
    frozen = tuple((key, tuple(value) if isinstance(value, list) else value) for key, value in options.items())
    return Rope(float(theta), kind, float(share), frozen, scaling, backwards=model_type == "nanochat")


def _query_scaling(rope: dict[str, Any]) -> tuple[float, int]:
    """`Rope.query_scaling`. Removes its options from those of RoPE."""
    rope.pop("max_position_embeddings", None)  # not used here
    beta, length = rope.pop("llama_4_scaling_beta", None), rope.get("original_max_position_embeddings", 0)
    if not is_number(beta) or beta < 0:
        raise ParaJaxError(f"config.json has llama_4_scaling_beta={beta!r}, which is not a number from 0")
    if not is_whole(length):
        raise ParaJaxError("config.json has llama_4_scaling_beta, but no original_max_position_embeddings")
    return float(beta), length


def _alpha(theta: float, alpha: Any, head_dim: int) -> float:
    """RoPE's base with a fixed NTK factor `alpha`."""
    if not is_number(alpha) or alpha <= 0 or head_dim < 4:
        raise ParaJaxError(f"RoPE scaling in config.json has alpha={alpha!r}, which is not a number above 0")
    return theta * alpha ** (head_dim / (head_dim - 2))
