"""One step of fine-tuning: some micro-batches whose gradients are summed, then every tenant's update.

The rows of a step stand in groups, one for each device that has rows (`data.batches.Batch`). Either every group has
the same tenants and a share of their rows, and adapters are whole on every device; or the adapters are spread over the
devices, every group has tenants of its own, and no gradient ever leaves its device. Micro-batches come in the few
shapes that `training.shapes` plans, so `accumulate` is compiled once for each of them and `update` once.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from para_jax.adapters.bank import AdapterBank
from para_jax.adapters.rows import Rows
from para_jax.backbones.decoder import Backbone
from para_jax.backbones.options import Remat
from para_jax.backbones.packed import Segments
from para_jax.data.batches import Batch
from para_jax.sharding import split_rows
from para_jax.training import optimizer
from para_jax.training.loss import loss_of, sums_of
from para_jax.training.state import Rules, Slots, Sums, TrainState, shardings, sums_sharding

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Float, Int, Key


# In float16 each response token's loss is multiplied by it, and the gradient divided by it: those of hidden states
# would underflow. It is of a token and not of the mean over a tenant's tokens, of which there may be 4 or 4 million.
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
      bank, taken: of the state. They are read and not donated.
      rules: from `stack_settings`.
      sums: those of the micro-batches before it, which are donated.
      slots: for each group of the bank, which of its tenants is in each place, (g, n). A number past the last slot is
        none. With `shards` they count from the group's own first.
      shards: into how many parts the bank's tenants are spread: one, or g.
      remat: what the backward pass computes again instead of keeping it (`Backbone.forward`).
      seed: of what dropout drops, with the tenant's name, its step, the row of the step and the token.
    """
    (g, e), n = batch.place.shape, batch.count.shape[1]
    own, rows = _rows_of(backbone, bank, batch, slots, shards)
    if any(rows.rates):
        numbers = zip(rules, taken, own, strict=True)
        known: Any = [picked((rule.name, taken), s, shards, backbone.mesh) for rule, taken, s in numbers]
        name, step = (jnp.repeat(sum(x), batch.repeats) for x in zip(*known, strict=True))  # zero for other groups'
        rows = replace(rows, keys_bt=_token_keys(seed, name, step, batch))

    scale_gn = None
    if backbone.dtype == jnp.float16:
        scale_gn = LOSS_SCALE * jnp.maximum(jnp.asarray(batch.count), 1).astype(jnp.float32)

    def loss(layers: Any) -> tuple[Array, Array]:
        loss_gn = loss_of(backbone, replace(rows, layers=layers), batch, remat)
        return jnp.sum(loss_gn if scale_gn is None else scale_gn * loss_gn), loss_gn

    (_, loss_gn), gradient = jax.value_and_grad(loss, has_aux=True)(rows.layers)
    if scale_gn is not None:
        scale_ge = _entries(scale_gn, batch.place, 1)
        gradient = jax.tree.map(lambda x: x / scale_ge.reshape(-1, *[1] * (x.ndim - 1)), gradient)
    first, added = by_place(gradient, jnp.asarray(batch.place), n)

    def add(total: Array, part: Array) -> Array:
        total, part = total.reshape(g, n, *total.shape[1:]), part.reshape(g, e, *part.shape[1:])
        new = jax.vmap(lambda x, i, y: x.at[i].add(y, mode="drop", unique_indices=True))(total, first, part)
        return new.reshape(g * n, *new.shape[2:])

    after = Sums(jax.tree.map(add, sums.gradient, added), sums.loss + loss_gn)
    mesh = backbone.mesh
    return after if mesh is None else jax.lax.with_sharding_constraint(after, sums_sharding(after, bank, mesh))


def _entries(x_gn: Any, place_ge: Any, none: int) -> Array:
    """What each adapter entry (g, e) takes of its place, such as a slot; `none` where its place is past the last."""
    x_gn = jnp.pad(jnp.asarray(x_gn), [(0, 0), (0, 1)], constant_values=none)
    return jnp.take_along_axis(x_gn, jnp.asarray(place_ge), axis=1)


def _token_keys(seed: Any, name_b: Array, step_b: Array, batch: Batch) -> Key[Array, "b t"]:
    """A key of each token, whatever row and micro-batch it is in."""
    segments = Segments.of(batch.length, batch.tokens.shape[1])

    def key(name: Array, step: Array, item: Array, position: Array) -> Array:
        of_step = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), name), step)
        return jax.random.fold_in(jax.random.fold_in(of_step, item), position)

    item_bt = segments.each(jnp.asarray(batch.item))
    return jax.vmap(jax.vmap(key, in_axes=(None, None, 0, 0)))(name_b, step_b, item_bt, segments.position_bt)


def by_place(tree: Any, place_ge: Int[Array, "g e"], none: int) -> tuple[Int[Array, "g e"], Any]:
    """Sums the entries that have one place, which stand side by side: into the first of each, in a fixed order.

    Returns where each entry's sum goes: its place for the first entry of a place, and past the last, each its own, for
    all others. Entries are summed in pairs, then pairs of pairs. Nothing of one place reaches another, not even NaN.

    >>> where, sums = by_place(jnp.array([1.0, 2.0, 4.0]), jnp.array([[0, 0, 1]]), 2)
    >>> where.tolist(), sums.tolist()[0], sums.tolist()[2]
    ([[0, 4, 1]], 3.0, 4.0)
    """
    g, e = place_ge.shape
    distance = 1
    while distance < e:
        same = place_ge[:, :-distance] == place_ge[:, distance:]

        def add(x: Array, distance: int = distance, same: Array = same) -> Array:
            x = x.reshape(g, e, *x.shape[1:])
            own = same.reshape(*same.shape, *[1] * (x.ndim - 2))
            more = jnp.where(own, x[:, distance:], 0)
            x = x + jnp.pad(more, [(0, 0), (0, distance), *[(0, 0)] * (x.ndim - 2)])
            return x.reshape(g * e, *x.shape[2:])

        tree = jax.tree.map(add, tree)
        distance *= 2
    begins = jnp.pad(place_ge[:, 1:] != place_ge[:, :-1], [(0, 0), (1, 0)], constant_values=True)
    elsewhere = none + 1 + jnp.arange(e, dtype=place_ge.dtype)[None]
    return jnp.where(begins & (place_ge < none), place_ge, elsewhere), tree


@partial(jax.jit, static_argnames=("shards", "mesh"), donate_argnames=("state", "sums"))
def update(
    state: TrainState,
    rules: tuple[Rules, ...],
    sums: Sums,
    slots: Slots,
    shards: int = 1,
    mesh: Mesh | None = None,
) -> tuple[TrainState, Sums, dict[str, Float[Array, " n"]]]:
    """Takes the tenants of a step one step, each on its own loss: the mean over its response tokens.

    Args:
      rules, slots, shards: as in `accumulate`.
      sums: of all the step's micro-batches. They and the state are donated.
      mesh: where these lie.

    Returns the state after the step, sums of zero, and an array with a value for each place of: loss, grad_norm, lr.
    They are of the n places, or with `shards` of the g * n, group by group. No tenant's values depend on the others;
    one whose gradient is no number keeps what it was.
    """
    g, n = sums.loss.shape
    each = g * n if shards > 1 else n
    gradient, loss_gn = sums.gradient, sums.loss
    if shards == 1:  # a tenant's rows are in every group
        slots = tuple(s[:1] for s in slots)
        loss_gn = jnp.sum(loss_gn, axis=0, keepdims=True)
        gradient = jax.tree.map(lambda x: jnp.sum(x.reshape(g, n, *x.shape[1:]), axis=0), gradient)

    groups, moments, takens, failures = [], [], [], []
    report = {key: jnp.zeros((each,), jnp.float32) for key in ("grad_norm", "lr")}
    every = zip(state.bank.groups, state.moments, state.taken, state.failed_at, gradient, rules, slots, strict=True)
    for group, kept, taken, failed_at, own_gradient, rule, own in every:
        old = (group.stack, kept, taken, failed_at, rule.optimizer)
        stack_n, kept_n, taken_n, failed_n, settings_n = jax.tree.map(lambda x, s=own: _picked(x, s, shards), old)
        # What failed once goes on failing: it rests.
        settings_n = replace(settings_n, steps=jnp.where(failed_n > 0, 0, settings_n.steps))
        update_each = jax.vmap(partial(optimizer.update, decays_to=group.config.decays_to))
        stack_n, kept_n, said = update_each(settings_n, taken_n, stack_n, kept_n, own_gradient)
        running = taken_n < settings_n.steps
        failed_n = jnp.where(running & ~jnp.isfinite(said["grad_norm"]), state.step + 1, failed_n)
        new = (stack_n, kept_n, taken_n + running.astype(jnp.int32), failed_n)
        put = partial(_put, slots_gn=own, shards=shards)
        stack, kept, taken, failed_at = jax.tree.map(put, (group.stack, kept, taken, failed_at), new)
        groups.append(replace(group, stack=stack))
        moments.append(kept)
        takens.append(taken)
        failures.append(failed_at)
        mine = own.reshape(-1) < stack_size(group.stack) // shards
        report = {key: jnp.where(mine, said[key], x) for key, x in report.items()}
    bank = replace(state.bank, groups=tuple(groups))
    after = TrainState(state.step + 1, bank, tuple(moments), tuple(takens), tuple(failures))
    report = {"loss": loss_gn.reshape(each), **report}
    zeros = jax.tree.map(jnp.zeros_like, sums)
    if mesh is not None:
        after = jax.lax.with_sharding_constraint(after, shardings(after, mesh, shards))
        report = jax.lax.with_sharding_constraint(report, NamedSharding(mesh, P()))
        zeros = jax.lax.with_sharding_constraint(zeros, sums_sharding(zeros, bank, mesh))
    return after, zeros, report


@partial(jax.jit, static_argnames="shards")
def losses(backbone: Backbone, bank: AdapterBank, batch: Batch, slots: Slots, shards: int = 1) -> Float[Array, "g n"]:
    """The sum of the negative log-likelihoods of each place's targets, by group of rows."""
    _, rows = _rows_of(backbone, bank, batch, slots, shards)
    return sums_of(backbone, rows, batch)


def _rows_of(
    backbone: Backbone, bank: AdapterBank, batch: Batch, slots: Slots, shards: int
) -> tuple[tuple[Int[Array, "g e"], ...], Rows]:
    """The slot of each adapter entry in each group of the bank, and the adapters of a batch's rows."""
    stacks = [group.stack for group in bank.groups]
    own = tuple(_entries(s, batch.place, stack_size(x)) for s, x in zip(slots, stacks, strict=True))
    layers = tuple(picked(stack, s, shards, backbone.mesh) for stack, s in zip(stacks, own, strict=True))
    there: list[Any] = [s < stack_size(x) // shards for x, s in zip(stacks, own, strict=True)]
    rates = tuple(group.config.dropout for group in bank.groups)
    strengths = tuple(x.reshape(-1).astype(jnp.float32) for x in there)
    return own, Rows(strengths, layers, rates, repeats=batch.repeats)


@jax.jit
def copied(tree: Any) -> Any:
    """A copy of all arrays, which nobody else will donate."""
    return jax.tree.map(jnp.copy, tree)


@partial(jax.jit, static_argnames="mesh")
def adapter_of(stack: Any, slot: Int[np.ndarray, ""], mesh: Mesh | None = None) -> Any:
    """One tenant's weights, whole on every device."""
    one = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, slot, keepdims=False), stack)
    return one if mesh is None else jax.lax.with_sharding_constraint(one, NamedSharding(mesh, P()))


def stack_size(stack: Any) -> int:
    """How many slots a stack has."""
    return jax.tree.leaves(stack)[0].shape[0]


def picked(tree: Any, slots_gn: Any, shards: int, mesh: Mesh | None) -> Any:
    """The entries of these slots, for the rows that they serve: each group's on its own devices."""
    return jax.tree.map(lambda x: split_rows(_picked(x, slots_gn, shards), mesh), tree)


def _picked(x: Any, slots_gn: Any, shards: int) -> Array:
    """The entries of these slots, group by group, and zeros for a slot past the end.

    No row gets the weights of a tenant that is not its own. Masked out later, they could still reach its gradient,
    because zero times NaN is NaN.
    """
    x = jnp.asarray(x)
    own = x.reshape(shards, -1, *x.shape[1:])
    if shards == 1:
        picked = own[0].at[slots_gn].get(mode="fill", fill_value=0)
    else:  # each of its own part: nothing moves between devices
        picked = jax.vmap(lambda x, s: x.at[s].get(mode="fill", fill_value=0))(own, slots_gn)
    return picked.reshape(-1, *x.shape[1:])


def _put(x: Array, new: Array, slots_gn: Array, shards: int) -> Array:
    """x with the entries of these slots replaced; a slot past the end is none."""
    own = x.reshape(shards, -1, *x.shape[1:])
    new = new.reshape(shards, -1, *new.shape[1:])
    slots_gn = jnp.asarray(slots_gn)
    return jax.vmap(lambda x, s, y: x.at[s].set(y, mode="drop"))(own, slots_gn, new).reshape(x.shape)
