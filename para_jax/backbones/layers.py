"""The loop over a backbone's layers.

Unstacked layers are unrolled. Stacked layers are scanned: layers of one shape form a stack, and where the stacks
alternate, such as five layers of one shape and one of another, a scan runs over the repeated group of layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from para_jax.annotations import Array, Int
from para_jax.backbones.linear import SAVE_MATMULS
from para_jax.backbones.options import Remat
from para_jax.config import BackboneConfig
from para_jax.errors import unknown


class At(NamedTuple):
    """A layer, and where its arrays are.

    Attributes:
      number: the layer's number, traced if layers are stacked.
      kind: the index of its kind, traced if a scan runs over layers of several kinds.
      slot: the index of its arrays in a tuple, which has an entry for each stack, or for each unstacked layer.
      depth: the layer's index in its stack, traced; None for unstacked layers.
    """

    number: int | Int[Array, ""]
    kind: int | Int[Array, ""]
    slot: int
    depth: int | Int[Array, ""] | None

    def select(self, kinds: Sequence[Any]) -> Any:
        """The entry for the layer's kind."""
        if isinstance(self.kind, int):
            return kinds[self.kind]
        return jax.tree.map(lambda *x: jnp.stack(x)[self.kind], *kinds)

    def is_layer(self, number: int, then: Any, otherwise: Any) -> Any:
        """`then` if this is the layer with that number. Layers of other shapes than `otherwise` are not."""
        if jax.tree.map(jnp.shape, then) != jax.tree.map(jnp.shape, otherwise):
            return otherwise
        if isinstance(self.number, int):
            return then if self.number == number else otherwise
        return jax.tree.map(lambda x, y: jnp.where(self.number == number, x, y), then, otherwise)


class Group(NamedTuple):
    """Consecutive layers that a scan repeats: their stacks, and how often they are repeated."""

    first: int
    slots: tuple[int, ...]
    repeats: int


def place(config: BackboneConfig, stacked: bool, layer: int) -> At:
    """Where the arrays of a layer are."""
    kind = config.kind_of_layer[layer] if config.kind_of_layer else 0
    if not stacked:
        return At(layer, kind, layer, None)
    slot = next(i for i, stack in enumerate(config.stacks) if layer in stack.layers)
    return At(layer, kind, slot, config.stacks[slot].layers.index(layer))


@lru_cache(maxsize=64)
def groups(slots: tuple[int, ...]) -> tuple[Group, ...]:
    """Splits the layers, given by their stacks, into groups that repeat as often as possible.

    >>> groups((0, 0, 1, 0, 0, 1, 1))
    (Group(first=0, slots=(0, 0, 1), repeats=2), Group(first=6, slots=(1,), repeats=1))
    """
    found, first = [], 0
    while first < len(slots):
        best = Group(first, slots[first : first + 1], 1)
        for length in range(1, (len(slots) - first) // 2 + 1):
            group, repeats = slots[first : first + length], 1
            while slots[first + repeats * length : first + (repeats + 1) * length] == group:
                repeats += 1
            if repeats > 1 and repeats * length > best.repeats * len(best.slots):
                best = Group(first, group, repeats)
        found.append(best)
        first += best.repeats * len(best.slots)
    return tuple(found)


def over_layers(
    config: BackboneConfig,
    stacked: bool,
    body: Callable[[Any, At, Any, Any], tuple[Any, Any]],
    carry: Any,
    weights: Sequence[Any],
    inputs: Sequence[Any],
    remat: Remat = "none",
) -> tuple[Any, tuple[Any, ...]]:
    """Calls `body(carry, at, weights, inputs) -> carry, outputs` for each layer.

    Weights, inputs and outputs have an entry for each stack, with a leading layer axis, or for each unstacked layer.
    """
    if remat not in get_args(Remat):
        raise unknown("remat", remat, get_args(Remat))
    checkpointed = partial(jax.checkpoint, policy=SAVE_MATMULS if remat == "products" else None)

    def call(slot: int, carry: Any, number: Any, kind: Any, depth: Any, weights: Any, inputs: Any) -> tuple[Any, Any]:
        def layer(carry: Any, number: Any, kind: Any, depth: Any, weights: Any, inputs: Any) -> tuple[Any, Any]:
            return body(carry, At(number, kind, slot, depth), weights, inputs)

        static = tuple(i for i, x in ((1, number), (2, kind), (3, depth)) if x is None or isinstance(x, int))
        run = layer if remat == "none" else checkpointed(layer, static_argnums=static)
        return run(carry, number, kind, depth, weights, inputs)

    kinds = config.kind_of_layer or (0,) * config.num_hidden_layers
    outputs: list[Any] = []
    if not stacked:
        for number, arrays in enumerate(zip(weights, inputs, strict=True)):
            carry, output = call(number, carry, number, kinds[number], None, *arrays)
            outputs.append(output)
        return carry, tuple(outputs)

    places = [place(config, True, layer) for layer in range(config.num_hidden_layers)]
    parts: list[list[Any]] = [[] for _ in config.stacks]
    for group in groups(tuple(at.slot for at in places)):
        carry, of_slots = _run_group(group, places, call, carry, weights, inputs)
        for slot, output in of_slots.items():
            parts[slot].append(output)
    return carry, tuple(x[0] if len(x) == 1 else jax.tree.map(lambda *y: jnp.concatenate(y), *x) for x in parts)


def _run_group(
    group: Group, places: Sequence[At], call: Any, carry: Any, weights: Sequence[Any], inputs: Sequence[Any]
) -> tuple[Any, dict[int, Any]]:
    """Runs all layers of a group. Returns the carry, and the outputs of each stack with a leading layer axis."""
    length, repeats = len(group.slots), group.repeats
    here = places[group.first : group.first + length * repeats]
    numbers, kinds, depths = (
        np.array([getattr(at, name) for at in here]).reshape(repeats, length) for name in ("number", "kind", "depth")
    )
    counts = {slot: group.slots.count(slot) for slot in dict.fromkeys(group.slots)}

    def grouped(slot: int, x: Array) -> Array:
        """The arrays of the group's layers in a stack, with an axis of repeats, and one of layers if there are more."""
        n, first = counts[slot] * repeats, int(depths.flat[group.slots.index(slot)])
        x = x if n == x.shape[0] else x[first : first + n]
        return x if counts[slot] == 1 else x.reshape(repeats, counts[slot], *x.shape[1:])

    arrays = {s: jax.tree.map(partial(grouped, s), (weights[s], inputs[s])) for s in counts}
    static_kinds = [int(column[0]) if len(set(column)) == 1 else None for column in kinds.T.tolist()]

    def step(carry: Any, given: Any) -> tuple[Any, dict[int, Any]]:
        numbers, kinds, depths, arrays = given
        outputs: dict[int, list[Any]] = {slot: [] for slot in counts}
        for i, slot in enumerate(group.slots):
            own, i_in_slot = arrays[slot], len(outputs[slot])
            if counts[slot] > 1:
                own = jax.tree.map(lambda x, j=i_in_slot: x[j], own)
            kind = kinds[i] if static_kinds[i] is None else static_kinds[i]
            carry, output = call(slot, carry, numbers[i], kind, depths[i], *own)
            outputs[slot].append(output)
        return carry, {
            slot: x[0] if len(x) == 1 else jax.tree.map(lambda *y: jnp.stack(y), *x) for slot, x in outputs.items()
        }

    given = (jnp.asarray(numbers), jnp.asarray(kinds), jnp.asarray(depths), arrays)
    if repeats == 1:
        carry, outputs = step(carry, jax.tree.map(lambda x: x[0], given))
        outputs = jax.tree.map(lambda x: x[None], outputs)
    else:
        carry, outputs = jax.lax.scan(step, carry, given)
    return carry, {
        slot: x if counts[slot] == 1 else jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:]), x)
        for slot, x in outputs.items()
    }
