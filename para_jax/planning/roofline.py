"""How long a job's programs take at the least, and what that rests on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from para_jax.adapters.adapter import named_leaves
from para_jax.planning.chips import Chip
from para_jax.planning.compiling import Program, shard_bytes
from para_jax.planning.job import Job

# The shares of the vendor's figures that well-made programs reach.
EFFICIENCY = {"flops": 0.6, "hbm": 0.8, "links": 0.8}


def assumptions(chip: Chip) -> dict[str, Any]:
    """All that the estimates of time rest on."""
    return {
        "peak_flops": chip.flops,
        "hbm_bytes_per_second": chip.hbm_rate,
        "link_bytes_per_second": chip.link_rate,
        "source": chip.source,
        "efficiency": EFFICIENCY,
        "words": [
            "a program takes as long as the longer of its products and its memory traffic, and its collectives run "
            "after them",
            "memory traffic of a tuning step is the weights, once for each pass of each micro-batch, the sums of "
            "gradients, which each micro-batch reads and writes, and in the update all that training changes; while "
            "decoding it is the weights, all columns of the cache, and twice what the program's loops write of large "
            "buffers; activations are left out",
            "attention counts as if every token saw the whole row",
            "collectives are rings along one axis of a slice that closes; what a device sends is divided by its link "
            "rate",
            "every row is full, and the latter half of a row to tune on is its response",
        ],
    }


@dataclass(frozen=True)
class Time:
    """Seconds that one run of a program takes: a micro-batch, an update, a prefill, or one new token for every row.

    `tokens` is None for the parts of a tuning step, of which only the step counts its tokens.
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
        """What takes longest."""
        return max(("compute", "memory", "collectives"), key=lambda name: getattr(self, name))


def estimate(job: Job, program: Program, chip: Chip, backbone: Any, devices: int) -> Time:
    """The time of one of a job's programs, of which `backbone` is the shapes with their placements."""
    weights = read_bytes(backbone)
    read, tokens = {
        # Forward and backward, and forward once more where nothing was kept; the sums come and go.
        "micro_batch": (weights * job.passes + 2 * program.aliased, None),
        "update": (program.arguments + program.aliased + program.outputs, None),
        "prefill": (weights, job.rows * job.length),
        # Keys, values and Adjustments come back in their place; what is written is read again.
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
    """Bytes of weights that one pass reads on one device: split by `tensor`, and gathered over `fsdp`.

    Of embeddings apart from the head only a few rows are read.
    """
    leaves: dict[str, Any] = named_leaves(backbone)
    return sum(_gathered(x) for name, x in leaves.items() if name != "embed" or "head" not in leaves)


def _gathered(x: Any) -> int:
    fsdp = x.sharding.mesh.shape["fsdp"] if "fsdp" in x.sharding.spec else 1
    return shard_bytes(x) * fsdp
