"""A roofline estimate of the time of a job's programs, and its assumptions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from para_jax.adapters.adapter import named_leaves
from para_jax.planning.chips import Chip
from para_jax.planning.compiling import Program, shard_bytes
from para_jax.planning.job import Job

# The shares of the vendor's figures that efficient programs reach.
EFFICIENCY = {"flops": 0.6, "hbm": 0.8, "links": 0.8}


def assumptions(chip: Chip) -> dict[str, Any]:
    return {
        "peak_flops": chip.flops,
        "hbm_bytes_per_second": chip.hbm_rate,
        "link_bytes_per_second": chip.link_rate,
        "source": chip.source,
        "efficiency": EFFICIENCY,
        "words": [
            "a program takes the maximum of its matmul time and its memory time, and its collectives run after that",
            "the memory traffic of a tuning step is the weights, once for each pass of each micro-batch, the sums of "
            "gradients, which each micro-batch reads and writes, and the state of training in the update; while "
            "decoding it is the weights, all columns of the cache, and twice the large buffers that loops write; "
            "activations are left out",
            "attention counts as if every token attended to the full row",
            "collectives are rings along one axis of the slice, which wraps around; their time is the sent bytes over "
            "the link rate",
            "every row is full, and the second half of a tuning row is its response",
        ],
    }


@dataclass(frozen=True)
class Time:
    """Seconds of one run of a program: a micro-batch, an update, a prefill, or one new token for every row.

    `tokens` is None for micro-batches and updates; tokens are counted per tuning step.
    """

    compute: float
    memory: float
    collectives: float
    tokens: int | None

    @property
    def seconds(self) -> float:
        return max(self.compute, self.memory) + self.collectives

    @property
    def tokens_per_second(self) -> float | None:
        return None if self.tokens is None else self.tokens / self.seconds

    @property
    def bound(self) -> str:
        """The component that takes longest."""
        return max(("compute", "memory", "collectives"), key=lambda name: getattr(self, name))


def estimate(job: Job, program: Program, chip: Chip, backbone: Any, devices: int) -> Time:
    """The time of one of a job's programs. `backbone` has abstract arrays with shardings."""
    weights = read_bytes(backbone)
    read, tokens = {
        # Each pass reads the weights; the sums are read and written.
        "micro_batch": (weights * job.passes + 2 * program.aliased, None),
        "update": (program.arguments + program.aliased + program.outputs, None),
        "prefill": (weights, job.rows * job.length),
        # Keys, values and Adjustments are updated in place; what loops write is read again.
        "decode": (weights + program.aliased + 2 * program.written, job.rows),
    }[program.name]
    sent = sum(one.count * one.sent for one in program.collectives)
    return Time(
        compute=program.flops / devices / (chip.flops * EFFICIENCY["flops"]),
        memory=read / (chip.hbm_rate * EFFICIENCY["hbm"]),
        collectives=sent / (chip.link_rate * EFFICIENCY["links"]),
        tokens=tokens,
    )


def read_bytes(backbone: Any) -> int:
    """Bytes of weights that one pass reads on one device: sharded over `tensor`, and gathered over `fsdp`.

    Embeddings that are not tied to the head do not count, because only a few rows are read.
    """
    leaves: dict[str, Any] = named_leaves(backbone)
    read = [x for name, x in leaves.items() if name != "embed" or "head" not in leaves]
    return sum(shard_bytes(x) * (x.sharding.mesh.shape["fsdp"] if "fsdp" in x.sharding.spec else 1) for x in read)
