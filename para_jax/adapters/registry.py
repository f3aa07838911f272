"""The available methods."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from para_jax.adapters.bias import BiasConfig
from para_jax.adapters.fanlora import FanLoraConfig
from para_jax.adapters.ia3 import IA3Config
from para_jax.adapters.lora import LoraConfig
from para_jax.adapters.method import MethodConfig, from_fields
from para_jax.adapters.para import ParaConfig
from para_jax.config import read_json
from para_jax.errors import ParaJaxError, check_known

# Every method, by its name in adapter_config.json and on the command line.
METHODS: dict[str, type[Any]] = {
    config.method: config for config in (ParaConfig, IA3Config, BiasConfig, FanLoraConfig, LoraConfig)
}
# The methods that PEFT has, by PEFT's names. FanLoRA is LoRA in PEFT: LoraConfig is last above and wins.
PEFT: dict[str, type[Any]] = {config.peft_type: config for config in METHODS.values() if config.peft_type}


def config_from_dict(method: str, fields: Mapping[str, Any]) -> Any:
    """A method's config from JSON fields. Raises ParaJaxError for an unknown name or option.

    >>> config_from_dict("para", {"r": 4, "target_modules": ["q_proj"]}).target_modules
    ('q_proj',)
    """
    check_known("method", [method], METHODS)
    return from_fields(METHODS[method], fields)


def config_of(method: str | Path | MethodConfig) -> Any:
    """A method's config, from its name (with the defaults), from a JSON file, or unchanged if it is a config.

    A file is {"method": NAME} with options, such as the fanlora.json of `para-jax fanlora`. Raises ParaJaxError for an
    unknown name or option, and for a file without "method".

    >>> config_of("lora").r, config_of(ParaConfig(r=4)).r
    (8, 4)
    """
    if not isinstance(method, str | Path):
        return method
    if Path(method).suffix != ".json":
        return config_from_dict(str(method), {})
    fields = read_json(Path(method))
    if not isinstance(fields.get("method"), str):
        raise ParaJaxError(f'{method} has no "method"; write one of {", ".join(METHODS)}')
    return config_from_dict(fields.pop("method"), fields)
