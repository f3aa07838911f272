"""An adapter that is the same for every prompt, taken into the backbone's weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from para_jax.adapters.bank import Adapter, named_leaves
from para_jax.adapters.ia3 import IA3Config
from para_jax.adapters.lora import LoraConfig
from para_jax.adapters.peft import PREFIX, peft_tensors
from para_jax.adapters.targets import module_path
from para_jax.backbones.decoder import Backbone
from para_jax.convert import tables
from para_jax.errors import ParaJaxError

if TYPE_CHECKING:
    from jax import Array


def merge_adapter(backbone: Backbone, adapter: Adapter) -> Backbone:
    """The backbone with a LoRA or (IA)3 adapter in its weights, for export or for serving it alone.

        LoRA:   W' = W + scale * B A
        (IA)3:  W' = W with its rows multiplied by the vector, or its columns where the input is scaled

    Sums and products are taken in float32, from weights widened exactly to float32, and each new weight is rounded
    once, to the nearest in the backbone's dtype. In bfloat16 most of a small change is lost in that rounding: load
    the backbone in float32 to merge, and let `save_backbone` cast it. Weights that the adapter does not target are
    shared with the backbone given, which stays as it is; new ones have its placement on devices.

    Raises ParaJaxError for an adapter of another shape, or of PARA, which cannot be merged: its vectors depend on
    the prompt.

    >>> import jax.numpy as jnp
    >>> from para_jax import AdapterBank, IA3Config, tiny_backbone_path
    >>> backbone = Backbone.from_pretrained(tiny_backbone_path())
    >>> bank = AdapterBank.create({"acme": IA3Config()}, backbone.config)
    >>> merged = merge_adapter(backbone, bank["acme"])
    >>> bool(jnp.all(merged(jnp.array([[5, 6]])) == backbone(jnp.array([[5, 6]]))))  # a fresh adapter is the identity
    True
    """
    config, shape = adapter.config, backbone.config
    if not isinstance(config, LoraConfig | IA3Config):
        raise ParaJaxError(
            f"an adapter of method {config.method} cannot be merged: its vectors are made from each prompt, so no one "
            "set of weights does what it does. Serve it from a bank, or tune lora or ia3 to merge"
        )
    adapter.check(shape)
    tensors = peft_tensors(adapter, shape)
    leaves: dict[str, Any] = dict(named_leaves(backbone))
    for layer, modules in enumerate(config.modules(shape)):
        scales = {f"{module_path(layer, site, shape)}.weight": _scale(modules, site) for site in modules}
        for entry in tables.llama(shape, layer):
            if not any(part.name in scales for part in entry.parts):
                continue
            name = f"blocks.{entry.name}" if backbone.stacked else f"blocks.{layer}.{entry.name}"
            if not isinstance(leaves[name], np.ndarray):
                leaves[name] = np.array(leaves[name])  # a copy to write to
            ours = leaves[name][layer] if backbone.stacked else leaves[name]
            parts = entry.split(ours.astype(np.float32))
            merged = [_merged(part, x, tensors, scales.get(part)) for part, x in parts.items()]
            ours[...] = entry.join(merged)
    placed = [_placed(x, old) for x, old in zip(leaves.values(), jax.tree.leaves(backbone), strict=True)]
    return jax.tree.unflatten(jax.tree.structure(backbone), placed)


def _scale(modules: Any, site: str) -> float:
    return modules[site].scale if isinstance(modules, Mapping) else 1.0


def _merged(name: str, weight: np.ndarray, tensors: Mapping[str, np.ndarray], scale: float | None) -> np.ndarray:
    """One projection's float32 weight, whose PEFT tensors broadcast against it as they are."""
    at = f"{PREFIX}.{name.removesuffix('.weight')}"
    if scale is None:
        return weight
    if f"{at}.ia3_l" in tensors:
        return weight * tensors[f"{at}.ia3_l"]
    return weight + np.float32(scale) * (tensors[f"{at}.lora_B.weight"] @ tensors[f"{at}.lora_A.weight"])


def _placed(x: np.ndarray | Array, old: Array) -> Array:
    return jax.device_put(x, old.sharding) if isinstance(x, np.ndarray) else x
