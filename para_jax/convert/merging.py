"""An adapter that is the same for every prompt, taken into the backbone's weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from para_jax.adapters.adapter import Adapter, named_leaves
from para_jax.adapters.peft import peft_tensors
from para_jax.adapters.targets import peft_path
from para_jax.convert.checkpoint import W
from para_jax.errors import ParaJaxError
from para_jax.parameters import table

if TYPE_CHECKING:
    from jax import Array


def merge_adapter(backbone: W, adapter: Adapter) -> W:
    """The backbone with a LoRA or (IA)3 adapter in its weights, for export or for serving it alone.

        LoRA:   W' = W + scale * B A
        (IA)3:  W' = W with its rows multiplied by the vector, or its columns where the input is scaled

    Sums and products are taken in float32, from weights widened exactly to float32, and each new weight is rounded
    once, to the nearest in the backbone's dtype. In bfloat16 most of a small change is lost in that rounding: load
    the backbone in float32 to merge, and let `save_backbone` cast it. Weights that the adapter does not target are
    shared with the backbone given, which stays as it is; new ones have its placement on devices.

    Raises ParaJaxError for an adapter of another shape, one that makes a weight NaN or infinite, or one of a method
    that cannot be merged, as PARA cannot: its vectors depend on the prompt.

    >>> import jax.numpy as jnp
    >>> from para_jax import AdapterBank, Backbone, IA3Config, tiny_backbone_path
    >>> backbone = Backbone.from_pretrained(tiny_backbone_path())
    >>> bank = AdapterBank.create({"acme": IA3Config()}, backbone.config)
    >>> merged = merge_adapter(backbone, bank["acme"])
    >>> bool(jnp.all(merged(jnp.array([[5, 6]])) == backbone(jnp.array([[5, 6]]))))  # a fresh adapter is the identity
    True
    """
    config, shape = adapter.config, backbone.config
    if not config.peft_type:
        why = (
            "its vectors are made from each prompt, so no one set of weights does what it does"
            if config.reads_prompt
            else "only the methods that PEFT has are"
        )
        raise ParaJaxError(
            f"an adapter of method {config.method} cannot be merged: {why}. Serve it from a bank, or tune lora or ia3 "
            "to merge"
        )
    adapter.check(shape)
    if backbone.quantize is not None:
        raise ParaJaxError("a quantised backbone cannot be merged into; load it without quantize")
    tensors = peft_tensors(adapter, shape)
    leaves: dict[str, Any] = dict(named_leaves(backbone))
    method: Any = config
    for layer, modules in enumerate(method.modules(shape)):
        for entry in table(shape, layer):
            if not any(part.site in modules for part in entry.parts):
                continue
            name = f"blocks.{entry.name}" if backbone.stacked else f"blocks.{layer}.{entry.name}"
            if not isinstance(leaves[name], np.ndarray):
                leaves[name] = np.array(leaves[name])  # a copy to write to
            ours = leaves[name][layer] if backbone.stacked else leaves[name]
            merged = []
            for part, x in zip(entry.parts, entry.split(ours.astype(np.float32)), strict=True):
                if part.site in modules:
                    at = peft_path(layer, part.site, shape)
                    own = {name: tensors[f"{at}.{name}"] for name in method.places(layer, part.site, shape)}
                    with np.errstate(over="ignore", invalid="ignore"):  # which `_finite` looks for
                        x = _finite(at, x, method.merged(x, own, modules[part.site]))
                merged.append(x)
            ours[...] = entry.join(merged)
    placed = [_placed(x, old) for x, old in zip(leaves.values(), jax.tree.leaves(backbone), strict=True)]
    return jax.tree.unflatten(jax.tree.structure(backbone), placed)


def _finite(at: str, old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """The new weight. Raises ParaJaxError if it is the adapter that makes it NaN or infinite."""
    if not np.isfinite(new).all() and np.isfinite(old).all():
        raise ParaJaxError(
            f"the adapter cannot be merged: with it the weight of {at.removeprefix('base_model.model.')} is NaN or "
            "beyond float32. Its training diverged; take an earlier checkpoint, or tune it again with a lower learning "
            "rate"
        )
    return new


def _placed(x: np.ndarray | Array, old: Array) -> Array:
    return jax.device_put(x, old.sharding) if isinstance(x, np.ndarray) else x
