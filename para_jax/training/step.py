"""One step of fine-tuning: every tenant's loss and gradient in one pass over the frozen backbone.

The rows of a step stand in groups, one for each device that has rows (`data.batches.Batch`). Either every group has
the same tenants and a share of each one's rows, and adapters are whole on every device; or the adapters are spread
over the devices, every group has tenants of its own, and no gradient ever leaves its device.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from para_jax.adapters.adapter import named_leaves
from para_jax.adapters.bank import AdapterBank
from para_jax.adapters.rows import Rows
from para_jax.backbones.decoder import Backbone
from para_jax.backbones.options import Remat
from para_jax.data.batches import Batch
from para_jax.sharding import adapter_spec, split_rows
from para_jax.training import optimizer
from para_jax.training.loss import loss_of
from para_jax.training.optimizer import Settings

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Float, Int, Key


@partial(
    jax.tree_util.register_dataclass, data_fields=["step", "bank", "moments", "taken", "failed_at"], meta_fields=[]
)
@dataclass(frozen=True)
class TrainState:
    """All that training changes.

    Attributes:
      step: steps done.
      bank: the adapters, float32. A free slot is never trained.
      moments: for each group of the bank, its tenants' AdamW moments.
      taken: for each group, the steps that each of its tenants has taken, (slots,).
      failed_at: for each group, the step, counted from one, at which a tenant's gradient was no number; zero if
        none was. It has not changed since.
    """

    step: Int[Array, ""]
    bank: AdapterBank
    moments: tuple[Any, ...]
    taken: tuple[Int[Array, " slots"], ...]
    failed_at: tuple[Int[Array, " slots"], ...]

    @classmethod
    def create(cls, bank: AdapterBank, mesh: Mesh | None = None, shards: int = 1) -> TrainState:
        """The state before the first step. It copies the bank's arrays: steps donate them.

        With a mesh it lies on it, its tenants in `shards` parts (one, or as many as there are groups of rows).
        """
        moments = tuple(jax.vmap(optimizer.init)(group.stack) for group in bank.groups)
        zeros = [tuple(jnp.zeros((len(group.names),), jnp.int32) for group in bank.groups) for _ in range(2)]
        state = cls(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, bank), moments, *zeros)
        return state if mesh is None else jax.device_put(state, shardings(state, mesh, shards))

    def arranged(
        self, saved: TrainState, slots: Sequence[Sequence[str | None]], mesh: Mesh | None, shards: int
    ) -> TrainState:
        """A saved state whose tenants had other `slots`, by group of the bank, with them where they are in this one."""
        if [list(group.names) for group in self.bank.groups] == [list(names) for names in slots]:
            return saved

        def arrange(saved: TrainState) -> TrainState:
            groups = [
                moved((was.stack, moments, taken, failed_at), old, group.names)
                for group, was, moments, taken, failed_at, old in zip(
                    self.bank.groups, saved.bank.groups, saved.moments, saved.taken, saved.failed_at, slots, strict=True
                )
            ]
            bank = [replace(g, stack=stack) for g, (stack, *_) in zip(self.bank.groups, groups, strict=True)]
            _, *others = zip(*groups, strict=True)
            return TrainState(saved.step, replace(self.bank, groups=tuple(bank)), *others)

        where = None if mesh is None else shardings(self, mesh, shards)
        return jax.jit(arrange, out_shardings=where)(saved)


def moved(tree: Any, old: Sequence[str | None], new: Sequence[str | None]) -> Any:
    """Arrays whose first axis is the slots of `old`, as those of the slots of `new`; a free slot has zeros."""
    source = np.array([len(old) if name is None else old.index(name) for name in new], np.int32)
    return jax.tree.map(lambda x: x.at[source].get(mode="fill", fill_value=0), tree)


def shardings(state: TrainState, mesh: Mesh, shards: int) -> TrainState:
    """Where each array of a state lies: tenants apart if the adapters are spread, features as in the backbone."""
    tenants = ("data", "fsdp") if shards > 1 else None

    def of(name: str, x: Any) -> NamedSharding:
        return NamedSharding(mesh, adapter_spec(name, x.shape, mesh, tenants) if x.ndim else P())

    named = named_leaves(state)
    return jax.tree.unflatten(jax.tree.structure(state), [of(name, x) for name, x in named.items()])


@partial(jax.tree_util.register_dataclass, data_fields=["settings", "name"], meta_fields=[])
@dataclass(frozen=True)
class Rules:
    """How the tenants of one group of the bank are tuned: their settings, and a number of each one's name."""

    settings: Settings
    name: Int[np.ndarray, " slots"]


def stack_settings(bank: AdapterBank, settings: Mapping[str, Settings]) -> tuple[Rules, ...]:
    """The settings of each group's tenants, in the order of its slots. A free slot takes no steps."""
    return tuple(
        Rules(
            Settings.stack([Settings(steps=0) if name is None else settings[name] for name in group.names]),
            np.array([zlib.crc32((name or "").encode()) for name in group.names], np.uint32),
        )
        for group in bank.groups
    )


Slots = tuple["Int[np.ndarray, 'g n']", ...]


def slots_of(bank: AdapterBank, tenants: Sequence[str], groups: int = 1) -> Slots:
    """The places of these tenants in each group of the bank, for each of so many groups of rows.

    A tenant that is in another group of the bank has the number of slots there, which is past the last.
    """
    where = [
        [group.names.index(name) if name in group.names else len(group.names) for name in tenants]
        for group in bank.groups
    ]
    return tuple(np.tile(np.array(slots, np.int32), (groups, 1)) for slots in where)


@partial(jax.jit, static_argnames=("shards", "remat"), donate_argnames=("state",))
def train_step(
    backbone: Backbone,
    state: TrainState,
    rules: tuple[Rules, ...],
    batch: Batch,
    slots: Slots,
    shards: int = 1,
    remat: Remat = "none",
    seed: int = 0,
) -> tuple[TrainState, dict[str, Float[Array, " n"]]]:
    """Takes the tenants of a batch one step, each on its own loss: the mean over its response tokens.

    Args:
      rules: from `stack_settings`.
      slots: for each group of the bank, which of its tenants those of the batch are, (g, n): the batch's, group by
        group of rows. A number past the last slot is none. With `shards` they count from the group's own first.
      shards: into how many parts the bank's tenants are spread: one, or g.
      remat: what the backward pass computes again instead of keeping it (`Backbone.forward`).
      seed: of what dropout drops, with the tenant's name, its step and the row.

    Returns the state after the step (the one given is donated) and an array with a value for each tenant of the
    batch of: loss, grad_norm, lr. They are those of the n tenants, or with `shards` of the g * n, group by group. No
    tenant's values depend on the others; one whose gradient is no number keeps what it was.
    """
    micro_batches, b = batch.length.shape
    g, n = batch.target_count.shape
    spread, each = shards > 1, (g * n if shards > 1 else n)
    count_gn = jnp.asarray(batch.target_count)
    if not spread:
        count_gn = jnp.broadcast_to(jnp.sum(count_gn, axis=0), (g, n))

    stacks = [group.stack for group in state.bank.groups]
    layers = tuple(picked(stack, s, shards, backbone.mesh) for stack, s in zip(stacks, slots, strict=True))
    there: list[Any] = [s < stack_size(x) // shards for x, s in zip(stacks, slots, strict=True)]
    rates = tuple(getattr(group.config, "lora_dropout", 0.0) for group in state.bank.groups)
    rows = Rows(tuple(x.reshape(-1).astype(jnp.float32) for x in there), layers, rates, repeats=b // (g * n))

    def key_of_row(index: Array) -> Key[Array, " b"]:
        # Rows count through the step, however it is divided: g parts of each micro-batch, or one if spread.
        own = jnp.arange(b // (g * n))[None, None]
        group = jnp.zeros((g, 1, 1), own.dtype) if spread else jnp.arange(g)[:, None, None]
        row = (index * (1 if spread else g) + group) * own.size + own
        numbers = zip(rules, state.taken, slots, strict=True)
        known: Any = [picked((rule.name, taken), s, shards, backbone.mesh) for rule, taken, s in numbers]
        name = sum(a for a, _ in known).reshape(g, n, 1)  # zero for those of other groups
        taken = sum(b for _, b in known).reshape(g, n, 1)

        def key(name: Array, taken: Array, row: Array) -> Array:
            of_step = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), name), taken)
            return jax.random.fold_in(of_step, row)

        shape = (g, n, own.size)
        return jax.vmap(key)(*(jnp.broadcast_to(x, shape).reshape(b) for x in (name, taken, row)))

    def micro_batch(carry: tuple[Any, Array], index: Array) -> tuple[tuple[Any, Array], None]:
        gradient, loss_gn = carry
        part = batch.micro_batch(index)
        keys_b = key_of_row(index) if any(rates) else None

        def loss(layers: Any) -> tuple[Array, Array]:
            part_gn = loss_of(backbone, replace(rows, layers=layers, keys_b=keys_b), part, count_gn, remat)
            return jnp.sum(part_gn), part_gn

        (_, part_gn), slope = jax.value_and_grad(loss, has_aux=True)(layers)
        return (jax.tree.map(jnp.add, gradient, slope), loss_gn + part_gn), None

    start = (jax.tree.map(jnp.zeros_like, layers), jnp.zeros((g, n), jnp.float32))
    (gradient, loss_gn), _ = jax.lax.scan(micro_batch, start, jnp.arange(micro_batches))

    if not spread:  # a tenant's rows are in every group
        slots = tuple(s[:1] for s in slots)
        loss_gn = jnp.sum(loss_gn, axis=0, keepdims=True)
        gradient = jax.tree.map(lambda x: jnp.sum(x.reshape(g, n, *x.shape[1:]), axis=0), gradient)

    groups, moments, takens, failures = [], [], [], []
    report = {key: jnp.zeros((each,), jnp.float32) for key in ("grad_norm", "lr")}
    every = zip(state.bank.groups, state.moments, state.taken, state.failed_at, gradient, rules, slots, strict=True)
    for group, kept, taken, failed_at, slope, rule, own in every:
        old = (group.stack, kept, taken, failed_at, rule.settings)
        stack_n, kept_n, taken_n, failed_n, settings_n = jax.tree.map(lambda x, s=own: _picked(x, s, shards), old)
        # What failed once goes on failing: it rests.
        settings_n = replace(settings_n, steps=jnp.where(failed_n > 0, 0, settings_n.steps))
        stack_n, kept_n, said = jax.vmap(optimizer.update)(settings_n, taken_n, stack_n, kept_n, slope)
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
    if backbone.mesh is not None:
        after = jax.lax.with_sharding_constraint(after, shardings(after, backbone.mesh, shards))
        report = jax.lax.with_sharding_constraint(report, NamedSharding(backbone.mesh, P()))
    return after, report


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
