"""The shapes of a run's micro-batches, planned before its first step from the lengths of its rows.

A step runs as many micro-batches as its rows need, all of one shape (on a CPU one or two shapes), and then one update.
So a run compiles few programs, which are known at its start. The planner packs a sample of the run's steps into each
candidate set of shapes, and takes the cheapest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from para_jax.checks import COUNT
from para_jax.config import BackboneConfig
from para_jax.data.examples import Example, Examples
from para_jax.data.order import Mixture, order
from para_jax.data.packing import Shape, Sizes, micro_batches, pack_step
from para_jax.training.places import Schedule, TenantLayout
from para_jax.training.settings import Settings

# Candidate row lengths as multiples of the longest sequence: of one shape, and of the shorter of two shapes.
LENGTHS = (1, 1.25, 1.5, 1.75, 2, 2.5, 3, 4, 5, 6, 8, 12, 16)
SHORTER = (1 / 12, 1 / 8, 1 / 6, 1 / 5, 1 / 4, 1 / 3, 2 / 5, 1 / 2, 2 / 3, 4 / 5)
FREE = 2**30  # no limit


@dataclass(frozen=True)
class Device:
    """The cost model of a device.

    Attributes:
      shapes: the maximum number of micro-batch shapes in a run.
      multiple: row lengths are a multiple of this.
      tokens: the maximum number of token slots of a group in a micro-batch, unless one sequence is longer.
      overhead: the fixed cost of a micro-batch, in tokens.
      compiling: the cost of compiling one more shape, in tokens.
      attention: the row length at which attention costs as much as all matmuls.
    """

    shapes: int
    multiple: int
    tokens: int
    overhead: int
    compiling: float
    attention: float

    @classmethod
    def of(cls, config: BackboneConfig, tokens: int | None = None, backend: str | None = None) -> Device:
        """The model for this backbone on JAX's default device; `tokens` is the user's limit.

        A CPU compiles a second shape in seconds, and is slow on long packed rows. An accelerator reads all weights for
        every micro-batch, and its attention kernels skip masked blocks.
        """
        cpu = (backend or jax.default_backend()) == "cpu"
        heads, hd = config.num_attention_heads, config.head_dim
        linear = 2 * sum(site.inputs * site.outputs for site in config.sites.values())
        # About 5 seconds for one layer, at 150 GFLOP/s.
        compiling = 5 * 150e9 / (2 * linear * config.num_hidden_layers)
        # A CPU makes about ten passes over the attention scores.
        attention = linear / (4 * heads * hd + 400 * heads) if cpu else linear / (2 * heads * hd)
        if tokens is not None:
            tokens = COUNT.check("micro_batch_tokens", tokens)
        if cpu:
            return cls(2, 16, tokens or 1024, 96, compiling, attention)
        return cls(1, 128, tokens or 8192, 128, 0, attention)

    def cost(self, rows: np.ndarray | int, length: int) -> np.ndarray | float:
        return self.overhead + rows * length * (1 + length / self.attention)


@dataclass(frozen=True)
class Plan:
    """The shapes of a run, sorted by length and rows, and their efficiency on the sample.

    Attributes:
      padding: the share of token slots that are padding.
      pairs: computed query-key pairs divided by needed ones.
    """

    shapes: tuple[Shape, ...]
    padding: float
    pairs: float

    def __str__(self) -> str:
        words = " and ".join(f"{shape.rows} x {shape.length}" for shape in self.shapes)
        return f"micro-batches of {words} tokens, {100 * self.padding:.0f} % of them padding"


# The sample has at most this many steps, and this many tenant steps in total.
STEPS, TENANTS = 48, 128


def plan_run(
    examples: Mapping[str, Sequence[Example]],
    dev: Mapping[str, Sequence[Example]],
    settings: Mapping[str, Settings],
    layout: TenantLayout,
    schedule: Schedule,
    seed: int,
    device: Device,
) -> Plan:
    """Plans a run from the lengths of its rows, its tenants and its mesh. Deterministic."""
    shard = max(schedule.shards, key=len)
    every = max(1, -(-len(shard) // TENANTS))
    names = shard[::every][: schedule.places]
    count = max(1, min(STEPS, TENANTS // len(names)))

    train = {name: (rows.lengths, rows.target_counts) for name, rows in _as_arrays(examples).items()}

    def sample(name: str, i: int) -> Sizes:
        (lengths, targets), step = train[name], i * settings[name].steps // count
        rows = order(seed, name, examples[name], range(step * layout.rows, (step + 1) * layout.rows))
        return Sizes(lengths[rows].tolist(), targets[rows].tolist())

    steps = [[sample(name, i) for name in names] for i in range(count)]
    held_out = [(rows.lengths, rows.target_counts) for rows in _as_arrays(dev).values()]
    longest, targets = (max(int(x.max()) for x in xs) for xs in zip(*train.values(), *held_out, strict=True))
    run = schedule.steps_left(dict.fromkeys(examples, 0), ())
    return plan(steps, layout.groups, layout.shards > 1, longest, targets, device, run)


def _as_arrays(examples: Mapping[str, Sequence[Example]]) -> dict[str, Examples | Mixture]:
    return {name: rows if isinstance(rows, Mixture) else Examples.of(rows) for name, rows in examples.items()}


def plan(
    steps: Sequence[Sequence[Sizes]],
    groups: int,
    spread: bool,
    longest: int,
    targets: int,
    device: Device,
    run: int = 1000,
) -> Plan:
    """The cheapest shapes for steps like these.

    Args:
      steps: a sample of steps, each with the sizes of each tenant's rows; with `spread` only tenants of one group.
      groups: the number of groups that the rows of a step are distributed over.
      longest, targets: the maximum numbers of tokens and of targets of any row of the run.
      run: the number of steps of the run, over which a second shape must pay for its compilation.
    """
    shared, second = 1 if spread else groups, device.compiling * len(steps) / run
    best: tuple[float, list[Shape]] | None = None
    for lengths in _candidates(steps, longest, device):
        free = [Shape(1, length, FREE, FREE) for length in lengths]
        packed = [pack_step(step, free) for step in steps]
        cost, shapes = second * (len(lengths) - 1), []
        for at, length in enumerate(lengths):
            counts = np.array([-(-len(rows[at]) // shared) for rows in packed])
            if not counts.any():
                counts[:] = 1
            rows_cost, rows = _rows(counts, length, device, second if device.shapes > len(lengths) else None)
            cost += rows_cost
            segments = max((len(row.items) for step in packed for row in step[at]), default=1)
            shapes += [Shape(r, length, segments, FREE) for r in rows]
        if best is None or cost < best[0]:
            best = cost, shapes
    assert best is not None
    return _with_targets(steps, best[1], shared, targets, device.multiple)


def _candidates(steps: Sequence[Sequence[Sizes]], longest: int, device: Device) -> Iterator[tuple[int, ...]]:
    def rounded(length: float) -> int:
        return -(-int(np.ceil(length)) // device.multiple) * device.multiple

    least = rounded(longest)
    most = max(least, device.tokens)
    yield from ((n,) for n in dict.fromkeys(rounded(least * part) for part in LENGTHS) if n <= most)
    if device.shapes == 1:
        return
    sample = np.array([n for step in steps for sizes in step for n in sizes.tokens])
    for short in dict.fromkeys(rounded(least * part) for part in SHORTER):
        if short < least and np.mean(sample <= short) > 0.3:
            yield from ((short, n) for n in dict.fromkeys((least, rounded(1.5 * least))) if n <= most)


def _rows(counts: np.ndarray, length: int, device: Device, second: float | None) -> tuple[float, list[int]]:
    """The number of rows of the cheapest shape of this length for steps with `counts` rows, and the cost.

    If `second`, the cost of another shape, is given, two shapes with different numbers of rows may be chosen.
    """
    most = max(1, min(device.tokens // length, int(counts.max())))
    each = np.arange(1, most + 1)
    single = np.sum(-(-counts[:, None] // each), axis=0) * device.cost(each, length)
    at = int(np.argmin(single))
    best: tuple[float, list[int]] = float(single[at]), [at + 1]
    for small in range(1, most if second is not None else 1):
        large = each[small:]
        assert second is not None
        times = np.maximum(0, -(-(counts[:, None] - small) // large))
        rest = counts[:, None] > times * large
        both = np.sum(times, 0) * device.cost(large, length) + np.sum(rest, 0) * device.cost(small, length)
        at = int(np.argmin(both))
        if both[at] + second < best[0]:
            best = float(both[at] + second), [small, int(large[at])]
    return best


def _with_targets(
    steps: Sequence[Sequence[Sizes]], shapes: list[Shape], shared: int, targets: int, multiple: int
) -> Plan:
    """The shapes with room for the targets of the sample's micro-batches, and of any single row."""
    most, slots, tokens, computed, needed = [targets] * len(shapes), 0, 0, 0, 0
    for step in steps:
        for at, dealt in micro_batches(step, shapes, shared):
            most[at] = max(most[at], *(sum(row.targets for row in rows) for rows in dealt))
            slots += shared * shapes[at].tokens
            computed += shared * shapes[at].tokens * shapes[at].length
        tokens += sum(sum(sizes.tokens) for sizes in step)
        needed += sum(n * (n + 1) // 2 for sizes in step for n in sizes.tokens)
    room = [-(-n // multiple) * multiple for n in most]
    return Plan(
        tuple(shape._replace(targets=n) for shape, n in zip(shapes, room, strict=True)),
        1 - tokens / max(slots, 1),
        computed / max(needed, 1),
    )
