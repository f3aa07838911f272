"""`Rows`: the adapters that `AdapterBank.rows` gathers for a batch. It makes the Adjustments of each layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from para_jax.adapters.adapter import in_stack
from para_jax.adapters.method import Prompt
from para_jax.adjustment import PER_ROW, Adjustment, Dropout, total
from para_jax.annotations import Array, Float, Int, Key
from para_jax.errors import ParaJaxError

# The tenant of a row: one name, None, or several names with adapter weights.
Tenant = str | None | Mapping[str, float]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["weights", "layers", "keys_bt"],
    meta_fields=["rates", "repeats", "composed"],
)
@dataclass(frozen=True)
class Rows:
    """The adapters of a batch's rows. Programs take these instead of the bank.

    Each adapter row serves `repeats` consecutive rows of the batch, so that rows of one tenant share one copy of its
    weights and their gradients are summed in a fixed order. Empty Rows are the identity, at no cost.

    Attributes:
      weights: for each configuration in use, each row's adapter weight; 0 for no adapter.
      layers: for each configuration in use, a method's layer with leaves (rows, layers, ...).
      rates: for each configuration in use, the dropout rate of its pairs' inputs in training.
      keys_bt: a random key for each token in training; None disables dropout.
      composed: whether a row takes more than one adapter.
    """

    weights: tuple[Float[Array, " rows"], ...] = ()
    layers: tuple[Any, ...] = ()
    rates: tuple[float, ...] = ()
    keys_bt: Key[Array, "b t"] | None = None
    repeats: int = 1
    composed: bool = False

    def of_stack(self, name: str) -> tuple[Any, ...]:
        """The part of `layers` for a stack of the backbone, with the layer axis first."""
        return jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tuple(in_stack(layers, name) for layers in self.layers))

    def prepare(self, layers: tuple[Any, ...], layer: int | Int[Array, ""], prompt: Prompt) -> Adjustment:
        """Prepares the adapters of layer number `layer`, of `of_stack`, for the whole batch.

        With a prompt mask (b, s, t), for s sequences packed in each row, offsets are (b, s, features).

        Raises ParaJaxError if the batch has another number of rows.
        """
        b = prompt.mask_t.shape[0]
        served = [weight.size * self.repeats for weight in self.weights]
        if any(count != b for count in served):
            raise ParaJaxError(f"a batch of {b} rows was given the adapters of {served[0]}")
        grouped = jax.tree.map(lambda x: x.reshape(b // self.repeats, self.repeats, *x.shape[1:]), prompt)

        def one(adapter: Any, prompt: Prompt) -> Adjustment:
            if prompt.mask_t.ndim == 2:  # a packed row
                per_mask = jax.vmap(lambda mask_t: one(adapter, replace(prompt, mask_t=mask_t)), out_axes=PER_ROW)
                return per_mask(prompt.mask_t)
            return adapter.prepare(prompt, layer)

        # Low-rank pairs do not depend on the prompt, so the rows that share a pair do not copy it.
        prepare = jax.vmap(jax.vmap(one, in_axes=(None, 0), out_axes=PER_ROW))
        adjustments = []
        for weight, adapters in zip(self.weights, layers, strict=True):
            prepared = prepare(adapters, grouped).per_row(lambda x: x.reshape(b, *x.shape[2:]))
            adjustments.append(prepared.weighted(jnp.repeat(weight, self.repeats)))
        adjustment = total(adjustments, disjoint=not self.composed)
        if self.keys_bt is None or not any(self.rates):
            return adjustment
        rate = jnp.zeros_like(self.weights[0])
        for weight, group_rate in zip(self.weights, self.rates, strict=True):
            rate = jnp.where(weight != 0, group_rate, rate)
        keys_bt = jax.vmap(jax.vmap(lambda key: jax.random.fold_in(key, layer)))(self.keys_bt)
        return replace(adjustment, dropout=Dropout(keys_bt, jnp.repeat(rate, self.repeats)))


def adapter_weights(tenant: Tenant) -> dict[str, float]:
    """The adapter weight of each tenant of a row.

    Raises ParaJaxError for an invalid tenant, or an adapter weight that is not a finite number.

    >>> adapter_weights("acme"), adapter_weights(None), adapter_weights({"acme": 0.5, "globex": 2})
    ({'acme': 1.0}, {}, {'acme': 0.5, 'globex': 2.0})
    """
    if tenant is None:
        return {}
    if isinstance(tenant, str):
        return {tenant: 1.0}
    if not isinstance(tenant, Mapping):
        raise ParaJaxError(f"a row's tenant is a name, None, or a dict of names and adapter weights, not {tenant!r}")
    for name, weight in tenant.items():
        if not isinstance(weight, Real) or isinstance(weight, bool) or not np.isfinite(weight):
            raise ParaJaxError(f"the adapter weight of {name!r} must be a finite number, not {weight!r}")
    return {name: float(weight) for name, weight in tenant.items()}
