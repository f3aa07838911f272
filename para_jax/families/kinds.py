"""The kinds of attention that the layers of a config.json have: windows, and settings of RoPE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from para_jax.compat import ADDED_ROPE
from para_jax.errors import ParaJaxError, unknown
from para_jax.families.architecture import ROPE_TYPES, AttentionKind, Rope
from para_jax.families.checks import check_rope, is_number, is_whole
from para_jax.families.keys import rope_code_reads

# Families whose code rotates a part of a head's features.
PARTIAL = ("phi3", "glm4", "stablelm", "phi")


def attention_kinds(config: Any, model_type: str, head_dim: int) -> list[AttentionKind]:
    """Each layer's. Windows are of the layers that `layer_types` names, or of all where there is no such option."""
    layers = config.num_hidden_layers
    window = config.sliding_window if hasattr(config, "sliding_window") else None
    if window == 0 and not getattr(config, "use_sliding_window", True):  # as Qwen2-MoE's class has it
        window = None
    if window is not None and not is_whole(window):
        raise ParaJaxError(f"config.json has sliding_window={window!r}, which is no whole number from 1")
    types = getattr(config, "layer_types", None)
    turned = getattr(config, "no_rope_layers", None) or [1] * layers
    types = types or ["full_attention" if window is None else "sliding_attention"] * layers
    known = ("full_attention", "sliding_attention")
    for kind in types:
        if kind not in known:
            raise unknown("entry of layer_types in config.json", kind, known)
    for rotates in turned:
        if rotates not in (0, 1):
            raise ParaJaxError(f"config.json has {rotates!r} in no_rope_layers, which is neither 0 nor 1")
    if window is None and "sliding_attention" in types[:layers]:
        raise ParaJaxError("config.json has sliding_attention in layer_types and no sliding_window for it")
    each = {
        kind: _rope(_parameters(config, kind, known), config, model_type, head_dim)
        for kind in dict.fromkeys(types[:layers])
    }
    # Layers that see all tokens have no positions in these, if there are others.
    if model_type == "cohere2" or (model_type == "exaone4" and window is not None):
        turned = [types[i] == "sliding_attention" for i in range(layers)]
    return [
        AttentionKind(window if types[i] == "sliding_attention" else None, each[types[i]] if turned[i] else None)
        for i in range(layers)
    ]


def _parameters(config: Any, layer_type: str, known: Sequence[str]) -> Mapping[str, Any]:
    """The rope_parameters of layers of a type, which may be those of all layers."""
    ropes = {key: value for key, value in config.rope_parameters.items() if value is not None}
    of_types = [key for key in ropes if key in known]
    beside = [key for key, value in ropes.items() if key not in known and (key, value) != ADDED_ROPE]
    if not of_types:
        return ropes
    if beside or not isinstance(ropes.get(layer_type), Mapping):
        raise ParaJaxError(
            f"rope_parameters in config.json are for {', '.join(of_types)}{' beside ' if beside else ''}"
            f"{', '.join(beside)}; give one set of them for all layers, or one for each type of layer there is"
        )
    return ropes[layer_type]


def _rope(parameters: Mapping[str, Any], config: Any, model_type: str, head_dim: int) -> Rope:
    rope = {key: value for key, value in parameters.items() if value is not None and key != "type"}
    theta, kind, share = (rope.pop(key, None) for key in ("rope_theta", "rope_type", "partial_rotary_factor"))
    # Gemma 3's class leaves it beside rope_parameters.
    share = share or getattr(config, "partial_rotary_factor", None) or 1.0
    if not is_number(theta) or theta <= 0:
        raise ParaJaxError(f"config.json has rope_theta={theta!r}, which is no number above 0")
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        raise unknown("rope_type in config.json", kind, ROPE_TYPES)
    if not is_number(share) or not 0 < share <= 1:
        raise ParaJaxError(f"config.json has partial_rotary_factor={share!r}, which is no number above 0 and up to 1")
    if share != 1 and model_type not in PARTIAL:
        raise ParaJaxError(f"config.json has partial_rotary_factor={share}, which {model_type} has no code for")
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
    check_rope(kind, options, Rope(partial_rotary_factor=share).dim(head_dim))
    frozen = tuple((key, tuple(value) if isinstance(value, list) else value) for key, value in options.items())
    return Rope(float(theta), kind, float(share), frozen, scaling)


def _query_scaling(rope: dict[str, Any]) -> tuple[float, int]:
    """What queries are multiplied by as positions grow; its own options are taken out of those of RoPE."""
    rope.pop("max_position_embeddings", None)  # which nothing reads here
    beta, length = rope.pop("llama_4_scaling_beta", None), rope.get("original_max_position_embeddings", 0)
    if not is_number(beta) or beta < 0:
        raise ParaJaxError(f"config.json has llama_4_scaling_beta={beta!r}, which is no number from 0")
    if not is_whole(length):
        raise ParaJaxError("config.json has llama_4_scaling_beta and no original_max_position_embeddings for it")
    return float(beta), length


def _alpha(theta: float, alpha: Any, head_dim: int) -> float:
    """The base that a fixed `alpha` makes of RoPE's."""
    if not is_number(alpha) or alpha <= 0 or head_dim < 4:
        raise ParaJaxError(f"RoPE scaling in config.json has alpha={alpha!r}, which is no number above 0")
    return theta * alpha ** (head_dim / (head_dim - 2))
