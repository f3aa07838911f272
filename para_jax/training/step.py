"""One training step: `accumulate` sums the gradients of micro-batches, then `update` updates every tenant.

The rows of a step are in groups, one for each device with rows (`data.batches.Batch`). There are two layouts. Either
adapters are replicated, and every group has a share of every tenant's rows. Or tenants are sharded over the devices,
every group has its own tenants, and no gradient leaves its device. Micro-batches come in the few shapes that
`training.shapes` plans, so `accumulate` is compiled once for each shape and `update` once.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from para_jax.adapters.bank import AdapterBank
from para_jax.adapters.rows import Rows
from para_jax.annotations import Array, Float, Int, Key
from para_jax.backbones.decoder import Backbone
from para_jax.backbones.options import Remat
from para_jax.backbones.packed import Segments
from para_jax.data.batches import Batch
from para_jax.sharding import split_rows
from para_jax.training import optimizer
from para_jax.training.loss import nll_sums, tenant_losses
from para_jax.training.state import Rules, Slots, Sums, TrainState, shardings, sums_sharding

# In float16 the loss of each response token is scaled by this, because gradients of hidden states would underflow. The
# scale applies per token, not to the mean over a tenant's tokens: a tenant may have 4 or 4 million of them.
LOSS_SCALE = 128.0


@partial(jax.jit, static_argnames=("shards", "remat"), donate_argnames=("sums",))
def accumulate(
    backbone: Backbone,
    bank: AdapterBank,
    taken: tuple[Int[Array, " slots"], ...],
    rules: tuple[Rules, ...],
    sums: Sums,
    batch: Batch,
    slots: Slots,
    shards: int = 1,
    remat: Remat = "none",
    seed: int = 0,
) -> Sums:
    """Adds the losses and gradients of one micro-batch.

    Args:
      bank, taken: from the state; not donated.
      rules: from `stack_settings`.
      sums: the sums of the previous micro-batches; donated.
      slots: for each group of the bank, the slot of the tenant at each place, (g, n); an out-of-range slot for tenants
        of other groups. With `shards`, slots are relative to the shard.
      shards: the number of shards of the bank's tenants: 1, or g.
      remat: what the backward pass recomputes (`Backbone.forward`).
      seed: the seed of dropout. Keys also depend on the tenant's name, its step, the row in the step and the token.
    """
    (g, e), n = batch.place.shape, batch.count.shape[1]
    slots_ge, rows = _batch_rows(backbone, bank, batch, slots, shards)
    if any(rows.rates):
        by_group = zip(rules, taken, slots_ge, strict=True)
        gathered: Any = [gather_slots((rule.name, steps), s, shards, backbone.mesh) for rule, steps, s in by_group]
        # A tenant is in one group of the bank, and the other groups give zero.
        name, step = (jnp.repeat(sum(x), batch.repeats) for x in zip(*gathered, strict=True))
        rows = replace(rows, keys_bt=_token_keys(seed, name, step, batch))

    scale_gn = None
    if backbone.dtype == jnp.float16:
        scale_gn = LOSS_SCALE * jnp.maximum(jnp.asarray(batch.count), 1).astype(jnp.float32)

    def loss(layers: Any) -> tuple[Array, Array]:
        loss_gn = tenant_losses(backbone, replace(rows, layers=layers), batch, remat)
        return jnp.sum(loss_gn if scale_gn is None else scale_gn * loss_gn), loss_gn

    (_, loss_gn), gradient = jax.value_and_grad(loss, has_aux=True)(rows.layers)
    if scale_gn is not None:
        scale_ge = _by_adapter(scale_gn, batch.place, 1)
        gradient = jax.tree.map(lambda x: x / scale_ge.reshape(-1, *[1] * (x.ndim - 1)), gradient)
    index_ge, added = sum_by_place(gradient, jnp.asarray(batch.place), n)

    def add(total: Array, part: Array) -> Array:
        total, part = total.reshape(g, n, *total.shape[1:]), part.reshape(g, e, *part.shape[1:])
        new = jax.vmap(lambda x, i, y: x.at[i].add(y, mode="drop", unique_indices=True))(total, index_ge, part)
        return new.reshape(g * n, *new.shape[2:])

    new_sums = Sums(jax.tree.map(add, sums.gradient, added), sums.loss + loss_gn)
    if backbone.mesh is None:
        return new_sums
    return jax.lax.with_sharding_constraint(new_sums, sums_sharding(new_sums, bank, backbone.mesh))


def _by_adapter(x_gn: Any, place_ge: Any, fill: int) -> Array:
    """Gathers a value per place for each adapter (g, e) of a batch; `fill` where its place is out of range."""
    x_gn = jnp.pad(jnp.asarray(x_gn), [(0, 0), (0, 1)], constant_values=fill)
    return jnp.take_along_axis(x_gn, jnp.asarray(place_ge), axis=1)


def _token_keys(seed: Any, name_b: Array, step_b: Array, batch: Batch) -> Key[Array, "b t"]:
    """A key for each token. It does not depend on the packed row and micro-batch that the token is in."""
    segments = Segments.of(batch.length, batch.tokens.shape[1])

    def key(name: Array, step: Array, item: Array, position: Array) -> Array:
        step_key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), name), step)
        return jax.random.fold_in(jax.random.fold_in(step_key, item), position)

    item_bt = segments.each(jnp.asarray(batch.item))
    return jax.vmap(jax.vmap(key, in_axes=(None, None, 0, 0)))(name_b, step_b, item_bt, segments.position_bt)


def sum_by_place(tree: Any, place_ge: Int[Array, "g e"], places: int) -> tuple[Int[Array, "g e"], Any]:
    """Sums the entries of each place, which must be adjacent, into the first of them, in a fixed order.

    Returns the index to scatter each entry to: its place for the first entry of a place, and unique out-of-range
    indices for all others. The sum is a pairwise tree. No value reaches another place, not even NaN.

    >>> index, sums = sum_by_place(jnp.array([1.0, 2.0, 4.0]), jnp.array([[0, 0, 1]]), 2)
    >>> index.tolist(), sums.tolist()[0], sums.tolist()[2]
    ([[0, 4, 1]], 3.0, 4.0)
    """
    g, e = place_ge.shape
    distance = 1
    while distance < e:
        same = place_ge[:, :-distance] == place_ge[:, distance:]

        def add(x: Array, distance: int = distance, same: Array = same) -> Array:
            x = x.reshape(g, e, *x.shape[1:])
            mask = same.reshape(*same.shape, *[1] * (x.ndim - 2))
            shifted = jnp.where(mask, x[:, distance:], 0)
            x = x + jnp.pad(shifted, [(0, 0), (0, distance), *[(0, 0)] * (x.ndim - 2)])
            return x.reshape(g * e, *x.shape[2:])

        tree = jax.tree.map(add, tree)
        distance *= 2
    is_first = jnp.pad(place_ge[:, 1:] != place_ge[:, :-1], [(0, 0), (1, 0)], constant_values=True)
    out_of_range = places + 1 + jnp.arange(e, dtype=place_ge.dtype)[None]
    return jnp.where(is_first & (place_ge < places), place_ge, out_of_range), tree


@partial(jax.jit, static_argnames=("shards", "mesh"), donate_argnames=("state", "sums"))
def update(
    state: TrainState, rules: tuple[Rules, ...], sums: Sums, slots: Slots, shards: int = 1, mesh: Mesh | None = None
) -> tuple[TrainState, Sums, dict[str, Float[Array, " n"]]]:
    """Updates every tenant of a step on its own loss, the mean over its response tokens.

    Args:
      rules, slots, shards: as in `accumulate`.
      sums: the sums of all micro-batches of the step. They and the state are donated.
      mesh: the mesh that these are on.

    Returns the new state, zeroed sums, and a report: an array with a value for each place of loss, grad_norm and lr.
    There are n places, or g * n if `shards` > 1, group by group. A tenant's values do not depend on other tenants. A
    tenant whose gradient is NaN or infinite does not change.
    """
    g, n = sums.loss.shape
    places = g * n if shards > 1 else n
    gradient, loss_gn = sums.gradient, sums.loss
    if shards == 1:  # a tenant's rows are in every group
        slots = tuple(s[:1] for s in slots)
        loss_gn = jnp.sum(loss_gn, axis=0, keepdims=True)
        gradient = jax.tree.map(lambda x: jnp.sum(x.reshape(g, n, *x.shape[1:]), axis=0), gradient)

    groups, new_moments, new_taken, new_failed_at = [], [], [], []
    report = {key: jnp.zeros((places,), jnp.float32) for key in ("grad_norm", "lr")}
    by_group = zip(state.bank.groups, state.moments, state.taken, state.failed_at, gradient, rules, slots, strict=True)
    for group, moments, taken, failed_at, gradient_n, rule, slots_gn in by_group:
        old = (group.stack, moments, taken, failed_at)
        stack_n, moments_n, taken_n, failed_n, settings_n = jax.tree.map(
            lambda x, s=slots_gn: _gather_slots(x, s, shards), (*old, rule.optimizer)
        )
        # A tenant that failed once takes no more steps.
        settings_n = replace(settings_n, steps=jnp.where(failed_n > 0, 0, settings_n.steps))
        update_n = jax.vmap(partial(optimizer.update, decays_to=group.config.decays_to))
        stack_n, moments_n, report_n = update_n(settings_n, taken_n, stack_n, moments_n, gradient_n)
        running = taken_n < settings_n.steps
        failed_n = jnp.where(running & ~jnp.isfinite(report_n["grad_norm"]), state.step + 1, failed_n)
        new = (stack_n, moments_n, taken_n + running.astype(jnp.int32), failed_n)
        scatter = partial(_scatter_slots, slots_gn=slots_gn, shards=shards)
        stack, moments, taken, failed_at = jax.tree.map(scatter, old, new)
        groups.append(replace(group, stack=stack))
        new_moments.append(moments)
        new_taken.append(taken)
        new_failed_at.append(failed_at)
        in_group = slots_gn.reshape(-1) < stack_size(group.stack) // shards
        report = {key: jnp.where(in_group, report_n[key], x) for key, x in report.items()}
    bank = replace(state.bank, groups=tuple(groups))
    new_state = TrainState(state.step + 1, bank, tuple(new_moments), tuple(new_taken), tuple(new_failed_at))
    report = {"loss": loss_gn.reshape(places), **report}
    zeros = jax.tree.map(jnp.zeros_like, sums)
    if mesh is not None:
        new_state = jax.lax.with_sharding_constraint(new_state, shardings(new_state, mesh, shards))
        report = jax.lax.with_sharding_constraint(report, NamedSharding(mesh, P()))
        zeros = jax.lax.with_sharding_constraint(zeros, sums_sharding(zeros, bank, mesh))
    return new_state, zeros, report


@partial(jax.jit, static_argnames="shards")
def losses(backbone: Backbone, bank: AdapterBank, batch: Batch, slots: Slots, shards: int = 1) -> Float[Array, "g n"]:
    """The sum of the negative log-likelihoods of each place's targets, for each group of rows."""
    _, rows = _batch_rows(backbone, bank, batch, slots, shards)
    return nll_sums(backbone, rows, batch)


def _batch_rows(
    backbone: Backbone, bank: AdapterBank, batch: Batch, slots: Slots, shards: int
) -> tuple[tuple[Int[Array, "g e"], ...], Rows]:
    """The slot of each of a batch's adapters in each group of the bank, and the adapters of its rows."""
    stacks = [group.stack for group in bank.groups]
    slots_ge = tuple(_by_adapter(s, batch.place, stack_size(x)) for s, x in zip(slots, stacks, strict=True))
    layers = tuple(gather_slots(stack, s, shards, backbone.mesh) for stack, s in zip(stacks, slots_ge, strict=True))
    in_group: list[Any] = [s < stack_size(x) // shards for x, s in zip(stacks, slots_ge, strict=True)]
    rates = tuple(group.config.dropout for group in bank.groups)
    adapter_weights = tuple(x.reshape(-1).astype(jnp.float32) for x in in_group)
    return slots_ge, Rows(adapter_weights, layers, rates, repeats=batch.repeats)


@jax.jit
def copy_arrays(tree: Any) -> Any:
    """A copy of all arrays, which stays valid when the originals are donated."""
    return jax.tree.map(jnp.copy, tree)


@partial(jax.jit, static_argnames="mesh")
def tenant_adapter(stack: Any, slot: Int[np.ndarray, ""], mesh: Mesh | None = None) -> Any:
    """One tenant's adapter weights, replicated on every device."""
    one = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, slot, keepdims=False), stack)
    return one if mesh is None else jax.lax.with_sharding_constraint(one, NamedSharding(mesh, P()))


def stack_size(stack: Any) -> int:
    return jax.tree.leaves(stack)[0].shape[0]


def gather_slots(tree: Any, slots_gn: Any, shards: int, mesh: Mesh | None) -> Any:
    """Gathers these slots, and shards them over the mesh like rows."""
    return jax.tree.map(lambda x: split_rows(_gather_slots(x, slots_gn, shards), mesh), tree)


def _gather_slots(x: Any, slots_gn: Any, shards: int) -> Array:
    """Gathers these slots, group by group; zeros for an out-of-range slot.

    No row gets another tenant's weights. Masking them later is not enough, because zero times NaN is NaN.
    """
    x = jnp.asarray(x)
    by_shard = x.reshape(shards, -1, *x.shape[1:])
    if shards == 1:
        gathered = by_shard[0].at[slots_gn].get(mode="fill", fill_value=0)
    else:  # within each shard: nothing moves between devices
        gathered = jax.vmap(lambda x, s: x.at[s].get(mode="fill", fill_value=0))(by_shard, slots_gn)
    return gathered.reshape(-1, *x.shape[1:])


def _scatter_slots(x: Array, new: Array, slots_gn: Array, shards: int) -> Array:
    """x with these slots replaced by `new`; out-of-range slots are dropped."""
    by_shard = x.reshape(shards, -1, *x.shape[1:])
    new = new.reshape(shards, -1, *new.shape[1:])
    slots_gn = jnp.asarray(slots_gn)
    return jax.vmap(lambda x, s, y: x.at[s].set(y, mode="drop"))(by_shard, slots_gn, new).reshape(x.shape)
