"""One step of fine-tuning: every tenant's loss and gradient in one pass over the frozen backbone."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax

from para_jax.adapters.bank import AdapterBank, Rows
from para_jax.backbones.decoder import Backbone
from para_jax.data.batches import Batch
from para_jax.training import optimizer
from para_jax.training.optimizer import Settings

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Float, Int, Key


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
    remat: bool = False,
    seed: int = 0,
) -> tuple[TrainState, dict[str, Float[Array, "n"]]]:
    """Takes every tenant one step on its own loss, the mean over its response tokens in the batch.

    Args:
      settings: from `stack_settings`.
      tenants: the names in the order of the batch.
      remat: recompute layers in the backward pass instead of keeping their activations.
      seed: of what dropout drops, with the step, the tenant's name and the row.

    Returns the state after the step (the one given is donated) and by name an array with a value for each of
    `tenants`: loss, grad_norm, lr. No tenant's values depend on the others.
    """
    micro_batches, b = batch.length.shape

    def micro_batch(carry: tuple[Any, Array], part: Any) -> tuple[tuple[Any, Array], None]:
        gradient, loss_n = carry
        index, part = part
        keys_b = _row_keys(seed, tenants, state.step * micro_batches + index, b)
        (_, part_n), part_gradient = jax.value_and_grad(loss_of, argnums=1, has_aux=True)(
            backbone, state.bank, part, tenants, keys_b, remat
        )
        return (jax.tree.map(jnp.add, gradient, part_gradient), loss_n + part_n), None

    # Every micro-batch divides by the count of the whole.
    counts = jnp.broadcast_to(batch.target_count, (micro_batches, len(tenants)))
    parts = (jnp.arange(micro_batches), replace(batch, target_count=counts))  # type: ignore[arg-type]
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


def _row_keys(seed: int | Int[Array, ""], tenants: tuple[str, ...], turn: Int[Array, ""], b: int) -> Key[Array, "b"]:
    """A random key for every row, which depends on its tenant's name and its place among the tenant's rows only."""
    key = jax.random.fold_in(jax.random.key(seed), turn)
    of_tenant = jax.vmap(partial(jax.random.fold_in, key))(
        jnp.array([zlib.crc32(n.encode()) for n in tenants], jnp.uint32)
    )
    rows = jnp.arange(b // len(tenants))
    return jax.vmap(lambda k: jax.vmap(partial(jax.random.fold_in, k))(rows))(of_tenant).reshape(b)


def loss_of(
    backbone: Backbone,
    bank: AdapterBank,
    part: Batch,
    tenants: tuple[str, ...],
    keys_b: Key[Array, "b"] | None = None,
    remat: bool = False,
) -> tuple[Float[Array, ""], Float[Array, "n"]]:
    """The sum of the tenants' losses in one micro-batch, whose gradient is each tenant's own, and the losses.

    `part` is a Batch without its leading axis. Padding reaches attention only, and only response tokens reach the
    head: with a vocabulary of 4096 and short answers it would cost more than the layers.
    """
    b, n = part.tokens.shape[0], len(tenants)
    rows = replace(bank.rows(tenants, repeats=b // n), keys_b=keys_b)
    nll_k = target_nll(backbone, rows, part, remat)
    # Each tenant's tokens are one row of this sum: the order is fixed, and one tenant's NaN stays its own.
    own_nk = part.target_tenant[None] == jnp.arange(n)[:, None]
    loss_n = jnp.sum(jnp.where(own_nk, nll_k[None], 0), axis=1) / jnp.maximum(part.target_count, 1).astype(jnp.float32)
    return jnp.sum(loss_n), loss_n


def target_nll(backbone: Backbone, rows: Rows, part: Batch, remat: bool = False) -> Float[Array, "k"]:
    """The negative log-likelihood of each of `part`'s targets; where `target_tenant` is none, it means nothing."""
    b, t = part.tokens.shape
    column = jnp.arange(t)[None]
    mask_bt, prompt_mask_bt = column < part.length[:, None], column < part.prompt_length[:, None]
    hidden, _, _ = backbone.forward(
        jnp.asarray(part.tokens), mask_bt, prompt_mask_bt, rows, remat=remat, flat=part.line
    )
    hidden_1kd = hidden.reshape(b * t, -1)[part.target_place][None]
    return optax.softmax_cross_entropy_with_integer_labels(backbone.logits(hidden_1kd)[0], part.target_token)
