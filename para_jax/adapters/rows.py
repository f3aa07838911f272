"""The adapters of a batch's rows, prepared a layer at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from numbers import Real
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from para_jax.adapters.method import Prompt
from para_jax.adjustment import PER_ROW, Adjustment, Dropout, total
from para_jax.errors import ParaJaxError

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Float, Int, Key

# A row of a batch: one tenant, none, or several with strengths.
Tenant = str | None | Mapping[str, float]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["strengths", "layers", "keys_bt"],
    meta_fields=["rates", "repeats", "composed"],
)
@dataclass(frozen=True)
class Rows:
    """The adapters of a batch's rows: all that a program sees of a bank.

    Each adapter row serves `repeats` consecutive rows of the batch, so that rows of one tenant share one copy of its
    weights and their gradients are summed in a fixed order. With no entries this is the identity, at no cost.

    Attributes:
      strengths: for each configuration in use, how much of its adapter each row takes; 0 where it takes none.
      layers: for each configuration, a method's layer with leaves (rows, layers, ...).
      rates: for each configuration in use, the dropout of its pairs' inputs while training.
      keys_bt: a random key for each token, only while training: without them nothing is ever dropped.
      composed: whether a row takes more than one adapter.
    """

    strengths: tuple[Float[Array, " rows"], ...] = ()
    layers: tuple[Any, ...] = ()
    rates: tuple[float, ...] = ()
    keys_bt: Key[Array, "b t"] | None = None
    repeats: int = 1
    composed: bool = False

    def per_layer(self) -> tuple[Any, ...]:
        """`layers` with the layer axis in front, as a loop over the backbone's layers wants it."""
        return jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), self.layers)

    def prepare(self, layers: tuple[Any, ...], layer: int | Int[Array, ""], prompt: Prompt) -> Adjustment:
        """Prepares the adapters of layer number `layer`, one entry of `per_layer`, for the whole batch.

        With a prompt mask (b, s, t), of s sequences packed in each row, offsets are (b, s, features).

        Raises ParaJaxError if these are not the rows of this batch.
        """
        b = prompt.mask_t.shape[0]
        served = [strength.size * self.repeats for strength in self.strengths]
        if any(count != b for count in served):
            raise ParaJaxError(f"a batch of {b} rows was given the adapters of {served[0]}")
        grouped = jax.tree.map(lambda x: x.reshape(b // self.repeats, self.repeats, *x.shape[1:]), prompt)

        def one(adapter: Any, prompt: Prompt) -> Adjustment:
            if prompt.mask_t.ndim == 2:  # of several sequences in the row
                each = jax.vmap(lambda mask_t: one(adapter, replace(prompt, mask_t=mask_t)), out_axes=PER_ROW)
                return each(prompt.mask_t)
            return adapter.prepare(prompt, layer)

        # Low-rank pairs do not depend on the prompt, and stay one for all the rows that share them.
        prepare = jax.vmap(jax.vmap(one, in_axes=(None, 0), out_axes=PER_ROW))
        adjustments = []
        for strength, adapters in zip(self.strengths, layers, strict=True):
            made = prepare(adapters, grouped).per_row(lambda x: x.reshape(b, *x.shape[2:]))
            adjustments.append(made.weighted(jnp.repeat(strength, self.repeats)))
        adjustment = total(adjustments, disjoint=not self.composed)
        if self.keys_bt is None or not any(self.rates):
            return adjustment
        rate = jnp.zeros_like(self.strengths[0])
        for strength, own in zip(self.strengths, self.rates, strict=True):
            rate = jnp.where(strength != 0, own, rate)
        keys_bt = jax.vmap(jax.vmap(lambda key: jax.random.fold_in(key, layer)))(self.keys_bt)
        return replace(adjustment, dropout=Dropout(keys_bt, jnp.repeat(rate, self.repeats)))


def strengths_of(tenant: Tenant) -> dict[str, float]:
    """A row's adapters and how much of each it takes.

    Raises ParaJaxError for what is no tenant, or a strength that is no finite number.

    >>> strengths_of("acme"), strengths_of(None), strengths_of({"acme": 0.5, "globex": 2})
    ({'acme': 1.0}, {}, {'acme': 0.5, 'globex': 2.0})
    """
    if tenant is None:
        return {}
    if isinstance(tenant, str):
        return {tenant: 1.0}
    if not isinstance(tenant, Mapping):
        raise ParaJaxError(f"a row's tenant is a name, None, or a dict of names and strengths, not {tenant!r}")
    for name, strength in tenant.items():
        if not isinstance(strength, Real) or isinstance(strength, bool) or not np.isfinite(strength):
            raise ParaJaxError(f"the strength of {name!r} must be a finite number, not {strength!r}")
    return {name: float(strength) for name, strength in tenant.items()}
