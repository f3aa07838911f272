"""The methods there are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from para_jax.adapters.fanlora import FanLoraConfig
from para_jax.adapters.ia3 import IA3Config
from para_jax.adapters.lora import LoraConfig
from para_jax.adapters.method import from_fields
from para_jax.adapters.para import ParaConfig
from para_jax.errors import unknown

# Every method by the name that adapter_config.json and the command line use.
METHODS: dict[str, type[Any]] = {config.method: config for config in (ParaConfig, IA3Config, FanLoraConfig, LoraConfig)}
# Those that PEFT has, by what it calls them. FanLoRA is LoRA to it.
PEFT: dict[str, type[Any]] = {config.peft_type: config for config in (LoraConfig, IA3Config)}


def config_from_dict(method: str, fields: Mapping[str, Any]) -> Any:
    """The method's config with these fields as JSON has them. Raises ParaJaxError for an unknown name or option.

    >>> config_from_dict("para", {"r": 4, "target_modules": ["q_proj"]}).target_modules
    ('q_proj',)
    """
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    return from_fields(METHODS[method], fields)
