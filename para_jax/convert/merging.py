"""Merges an adapter that does not depend on the prompt into the backbone's weights."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import numpy as np

from para_jax.adapters.adapter import Adapter, named_leaves
from para_jax.adapters.peft import in_peft
from para_jax.adapters.targets import peft_path
from para_jax.convert.checkpoint import W
from para_jax.errors import ParaJaxError
from para_jax.parameters import leaf, table


def merge_adapter(backbone: W, adapter: Adapter) -> W:
    """The backbone with a LoRA or (IA)3 adapter merged into its weights, for export or for serving this adapter alone.

        LoRA:   W' = W + scale * B A
        (IA)3:  W' = W with its rows multiplied by the vector, or its columns if the input is scaled

    Weights are converted to float32 exactly, merged in float32, and rounded once, to the nearest value in the
    backbone's dtype. In bfloat16 this rounding loses most of a small change: load the backbone in float32 to merge, and
    let `save_backbone` cast it. The given backbone does not change. The result shares its weights that the adapter does
    not target; new weights have the same sharding.

    Raises ParaJaxError for an adapter that does not fit, one that makes a weight NaN or infinite, or one of a method
    that cannot be merged, such as PARA, whose vectors depend on the prompt.

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
            "its vectors depend on the prompt, so no fixed weights are equivalent"
            if config.reads_prompt
            else "only the methods that PEFT has can be"
        )
        raise ParaJaxError(
            f"an adapter of method {config.method} cannot be merged: {why}. Serve it from a bank, or tune lora or ia3 "
            "to merge"
        )
    adapter.check(shape)
    if backbone.quantize is not None:
        raise ParaJaxError("an adapter cannot be merged into a quantized backbone; load it without quantize")
    _, tensors = in_peft(adapter, shape)
    leaves: dict[str, Any] = dict(named_leaves(backbone))
    method: Any = config
    for layer, modules in enumerate(method.modules(shape)):
        for entry in table(shape, layer):
            if not any(part.site in modules for part in entry.parts):
                continue
            name, index = leaf(shape, backbone.stacked, layer, entry.name)
            if not isinstance(leaves[name], np.ndarray):
                leaves[name] = np.array(leaves[name])  # a writable copy
            ours = leaves[name] if index is None else leaves[name][index]
            merged = []
            for part, x in zip(entry.parts, entry.split(ours.astype(np.float32)), strict=True):
                if part.site in modules:
                    at = peft_path(layer, part.site, shape)
                    site_tensors = {name: tensors[f"{at}.{name}"] for name in method.places(layer, part.site, shape)}
                    with np.errstate(over="ignore", invalid="ignore"):  # `_check_finite` checks the result
                        one = partial(method.merged, tensors=site_tensors, module=modules[part.site])
                        x = _check_finite(at, x, np.stack([one(own) for own in x]) if part.leading else one(x))
                merged.append(x)
            ours[...] = entry.join(merged)
    pairs = zip(leaves.values(), jax.tree.leaves(backbone), strict=True)
    new = [jax.device_put(x, old.sharding) if isinstance(x, np.ndarray) else x for x, old in pairs]
    return jax.tree.unflatten(jax.tree.structure(backbone), new)


def _check_finite(at: str, old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Returns the new weight. Raises ParaJaxError if the adapter makes it NaN or infinite."""
    if not np.isfinite(new).all() and np.isfinite(old).all():
        raise ParaJaxError(
            f"the adapter cannot be merged: with it the weight of {at.removeprefix('base_model.model.')} is NaN or "
            "beyond float32. Its training diverged; use an earlier checkpoint, or tune it again with a lower learning "
            "rate"
        )
    return new
