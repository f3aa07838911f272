"""One step of fine-tuning: every tenant's loss and gradient in one pass over the frozen backbone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax

from para_jax.adapters.bank import AdapterBank
from para_jax.backbones.decoder import Backbone
from para_jax.data.batches import Batch
from para_jax.training import optimizer
from para_jax.training.optimizer import Settings

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Float, Int


@partial(jax.tree_util.register_dataclass, data_fields=["step", "bank", "moments"], meta_fields=[])
@dataclass(frozen=True)
class TrainState:
    """All that training changes: the steps done, the adapters, and for each group of the bank its moments.

    The bank has no free slots, and its leaves are float32.
    """

    step: Int[Array, ""]
    bank: AdapterBank
    moments: tuple[Any, ...]

    @classmethod
    def create(cls, bank: AdapterBank) -> TrainState:
        """The state before the first step. It takes the bank's arrays over: steps donate them."""
        moments = tuple(jax.vmap(optimizer.init)(group.stack) for group in bank.groups)
        return cls(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, bank), moments)


def stack_settings(bank: AdapterBank, settings: Mapping[str, Settings]) -> tuple[Settings, ...]:
    """The settings of each group's tenants, in the order of its slots."""
    return tuple(Settings.stack([settings[str(name)] for name in group.names]) for group in bank.groups)


@partial(jax.jit, static_argnames=("tenants", "remat"), donate_argnames=("state",))
def train_step(
    backbone: Backbone,
    state: TrainState,
    settings: tuple[Settings, ...],
    batch: Batch,
    tenants: tuple[str, ...],
    remat: bool = True,
) -> tuple[TrainState, dict[str, Float[Array, "n"]]]:
    """Takes every tenant one step on its own loss, the mean over its response tokens in the batch.

    Args:
      settings: from `stack_settings`.
      tenants: the names in the order of the batch.
      remat: recompute layers in the backward pass instead of keeping their activations.

    Returns the state after the step (the one given is donated) and by name an array with a value for each of
    `tenants`: loss, grad_norm, lr. No tenant's values depend on the others.
    """

    def micro_batch(carry: tuple[Any, Array], part: Any) -> tuple[tuple[Any, Array], None]:
        gradient, loss_n = carry
        (_, part_n), part_gradient = jax.value_and_grad(loss_of, argnums=1, has_aux=True)(
            backbone, state.bank, part, batch.target_count, tenants, remat
        )
        return (jax.tree.map(jnp.add, gradient, part_gradient), loss_n + part_n), None

    parts = (
        batch.tokens,
        batch.length,
        batch.prompt_length,
        batch.target_place,
        batch.target_token,
        batch.target_mask,
    )
    start = (jax.tree.map(jnp.zeros_like, state.bank), jnp.zeros((len(tenants),), jnp.float32))
    (gradient, loss_n), _ = jax.lax.scan(micro_batch, start, parts)

    groups, moments = [], []
    reports: dict[str | None, dict[str, Array]] = {}
    for group, kept, slope, rule in zip(state.bank.groups, state.moments, gradient.groups, settings, strict=True):
        one = jax.vmap(optimizer.update, in_axes=(0, None, 0, 0, 0))
        stack, after, report = one(rule, state.step, group.stack, kept, slope.stack)
        groups.append(type(group)(group.config, group.names, stack))
        moments.append(after)
        reports |= {name: jax.tree.map(lambda x, i=i: x[i], report) for i, name in enumerate(group.names)}
    bank = AdapterBank(state.bank.shape, tuple(groups))
    by_tenant = {key: jnp.stack([reports[name][key] for name in tenants]) for key in ("grad_norm", "lr")}
    return TrainState(state.step + 1, bank, tuple(moments)), {"loss": loss_n, **by_tenant}


def loss_of(
    backbone: Backbone,
    bank: AdapterBank,
    part: Any,
    count_n: Int[Array, "n"],
    tenants: tuple[str, ...],
    remat: bool,
) -> tuple[Float[Array, ""], Float[Array, "n"]]:
    """The sum of the tenants' losses in one micro-batch, whose gradient is each tenant's own, and the losses.

    Only response tokens reach the head: with a vocabulary of 4096 and short answers it would cost more than the
    layers.
    """
    tokens_bt, length_b, prompt_length_b, place_nk, token_nk, mask_nk = part
    b, t = tokens_bt.shape
    n = len(tenants)
    column = jnp.arange(t)[None]
    mask_bt, prompt_mask_bt = column < length_b[:, None], column < prompt_length_b[:, None]
    rows = bank.rows(tenants, repeats=b // n)
    hidden, _, _ = backbone.forward(tokens_bt, mask_bt, prompt_mask_bt, rows, remat=remat)
    hidden_nkd = jnp.take_along_axis(hidden.reshape(n, (b // n) * t, -1), place_nk[..., None], axis=1)
    nll_nk = optax.softmax_cross_entropy_with_integer_labels(backbone.logits(hidden_nkd), token_nk)
    # Each tenant's tokens are one row of this sum: the order is fixed, and one tenant's NaN stays its own.
    loss_n = jnp.sum(jnp.where(mask_nk, nll_nk, 0), axis=1) / jnp.maximum(count_n, 1).astype(jnp.float32)
    return jnp.sum(loss_n), loss_n
