"""Checks of values in config.json, alone and against each other, that transformers makes late or not at all."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from para_jax.errors import ParaJaxError, unknown
from para_jax.families.keys import SIZES

WHOLE = (
    *SIZES, "num_key_value_heads", "head_dim", "max_position_embeddings", "num_local_experts", "num_experts",
    "num_experts_per_tok", "moe_intermediate_size",
)  # fmt: skip
WHOLE_OR_ZERO = ("shared_expert_intermediate_size",)
ABOVE_ZERO = (
    "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping", "embedding_multiplier",
    "residual_multiplier", "attention_multiplier", "logits_scaling", "logit_scale",
)  # fmt: skip
EPS = ("rms_norm_eps", "layer_norm_eps", "norm_epsilon", "layer_norm_epsilon")
# torch's dtypes for weights. The value is only checked, because the files of weights have their own dtype.
DTYPES = (
    "float64", "double", "float32", "float", "float16", "half", "bfloat16", "float8_e4m3fn", "float8_e5m2",
)  # fmt: skip
# RoPE options that are not just a number above 0.
LISTS = ("short_factor", "long_factor")
FROM_ZERO = ("attention_factor", "mscale", "mscale_all_dim")


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number, and neither NaN nor infinite.

    >>> is_number(2), is_number(2.5), is_number(True), is_number("2"), is_number(float("inf"))
    (True, True, False, False, False)
    """
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_whole(value: Any, least: int = 1) -> bool:
    """Whether a JSON value is an integer of at least `least` that fits in int32.

    >>> is_whole(1), is_whole(0), is_whole(1.0), is_whole(True)
    (True, False, False, False)
    """
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**31


def check_values(fields: Mapping[str, Any], names: Mapping[str, str], optional: Collection[str] = ()) -> None:
    """Raises ParaJaxError for the first invalid value.

    Args:
      names: the family's names of options that have another name in most families.
      optional: the family's sizes that may be missing or null.
    """
    missing = [own for key in SIZES if fields.get(own := names.get(key, key)) is None and own not in optional]
    if missing:
        raise ParaJaxError(f"config.json lacks {', '.join(missing)}")
    for key in (names.get(key, key) for key in WHOLE):
        if fields.get(key) is not None and not is_whole(fields[key]):
            raise ParaJaxError(f"config.json has {key}={fields[key]!r}, which is not a whole number from 1")
    for key in WHOLE_OR_ZERO:
        if fields.get(key) is not None and not is_whole(fields[key], least=0):
            raise ParaJaxError(f"config.json has {key}={fields[key]!r}, which is not a whole number from 0")
    for key in ABOVE_ZERO:
        if fields.get(key) is not None and not (is_number(fields[key]) and fields[key] > 0):
            raise ParaJaxError(f"config.json has {key}={fields[key]!r}, which is not a number above 0")
    for key in EPS:
        eps = fields.get(key)
        if isinstance(eps, float) and not (is_number(eps) and eps >= 0):
            raise ParaJaxError(f"config.json has {key}={eps!r}, which is not a number from 0")
    for key in ("dtype", "torch_dtype"):
        if fields.get(key) is not None and fields[key] not in DTYPES:
            raise unknown(f"{key} in config.json", fields[key], DTYPES)
    for key in ("layer_types", "no_rope_layers"):
        each = fields.get(key)
        layers = fields[names.get("num_hidden_layers", "num_hidden_layers")]
        if each is not None and (not isinstance(each, list) or len(each) < layers):
            count = len(each) if isinstance(each, list) else repr(each)
            raise ParaJaxError(f"config.json has {count} {key} for {layers} layers")


def check_rope(kind: str, options: Mapping[str, Any], dim: int) -> None:
    """Raises ParaJaxError if a RoPE option is invalid, or the type cannot rotate `dim` features."""

    def invalid(key: str, why: str) -> ParaJaxError:
        return ParaJaxError(f"RoPE scaling of type {kind!r} in config.json has {key}={options[key]!r}, which is {why}")

    for key, value in options.items():
        if key in LISTS:
            if not (isinstance(value, list) and len(value) == dim // 2 and all(is_number(x) and x > 0 for x in value)):
                short = f"a list of {len(value)}" if isinstance(value, list) else repr(value)
                raise ParaJaxError(
                    f"RoPE scaling of type {kind!r} in config.json has {key} of {short}; it takes {dim // 2} numbers "
                    "above 0, one for each pair of features"
                )
        elif key == "truncate":
            if not isinstance(value, bool):
                raise invalid(key, "neither true nor false")
        elif key == "original_max_position_embeddings":
            if not is_whole(value):
                raise invalid(key, "not a whole number from 1")
        elif not is_number(value) or value < 0 or (value == 0 and key not in FROM_ZERO):
            raise invalid(key, "not a number from 0" if key in FROM_ZERO else "not a number above 0")
    if kind == "llama3" and options["high_freq_factor"] <= options["low_freq_factor"]:
        raise invalid("high_freq_factor", f"not above low_freq_factor={options['low_freq_factor']!r}")
    if dim < 2 or dim % 2 or (kind == "dynamic" and dim == 2):
        least = 4 if kind == "dynamic" else 2
        raise ParaJaxError(
            f"config.json makes RoPE of type {kind!r} rotate {dim} features, not an even number from {least}"
        )
