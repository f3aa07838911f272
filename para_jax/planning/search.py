"""The meshes and batches to try, the most promising first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from jax.sharding import Mesh

from para_jax.errors import ParaJaxError
from para_jax.planning.chips import Chip
from para_jax.planning.compiling import shard_bytes
from para_jax.planning.job import Job
from para_jax.planning.programs import backbone_shapes, check, planned_step
from para_jax.planning.roofline import EFFICIENCY, read_bytes
from para_jax.sharding import make_mesh


@dataclass(frozen=True)
class Candidate:
    """A job and a mesh to compile it for.

    Attributes:
      weights: bytes of the backbone on one device.
      guess: a lower bound of seconds per token: matmuls, reading weights, and sending weights and activations.
    """

    job: Job
    mesh: Mesh
    weights: int
    guess: float

    @property
    def name(self) -> str:
        return mesh_name(self.mesh)


def mesh_name(mesh: Mesh) -> str:
    """A mesh in the format of `--mesh`: `fsdp=8,tensor=2`."""
    return ",".join(f"{axis}={n}" for axis, n in mesh.shape.items() if n > 1) or "data=1"


def candidates(jobs: Sequence[Job], devices: Sequence[Any], chip: Chip) -> list[Candidate]:
    """Every mesh of these devices that fits the backbone and the rows of a job, sorted by `guess`.

    Raises ParaJaxError, with one mesh's reason, if there is none.
    """
    found, problems, n = [], [], len(devices)
    sizes = [(data, fsdp) for data in range(1, n + 1) for fsdp in range(1, n + 1) if n % (data * fsdp) == 0]
    for job, (data, fsdp) in product(jobs, sizes):
        mesh = make_mesh({"data": data, "fsdp": fsdp, "tensor": n // (data * fsdp)}, devices)
        try:
            check(job, mesh)
        except ParaJaxError as error:
            problems.append(f"{mesh_name(mesh)}: {error}")
            continue
        found.append(candidate(job, mesh, chip))
    if not found:
        raise ParaJaxError(f"no mesh of {len(devices)} devices fits; {problems[-1]}")
    return sorted(found, key=lambda one: one.guess)


def candidate(job: Job, mesh: Mesh, chip: Chip) -> Candidate:
    """A job on a mesh, with estimates that need no compilation."""
    backbone = backbone_shapes(job, mesh)
    c, read = job.config, read_bytes(backbone)
    training = job.mode == "train"
    tokens = slots = job.rows * (job.tenants * job.length if training else 1)
    passes = reads = job.passes if training else 1
    if training:  # empty groups and padding are computed too
        step = planned_step(job, mesh)
        slots, reads = step.slots, passes * step.micro_batches
    fsdp, tensor = mesh.shape["fsdp"], mesh.shape["tensor"]
    compute = 2 * passes * slots * c.size / mesh.size / (chip.flops * EFFICIENCY["flops"])
    memory = reads * read / (chip.hbm_rate * EFFICIENCY["hbm"])
    # Weights are gathered over fsdp; over tensor, activations are summed twice per layer.
    local_tokens = passes * slots / (mesh.shape["data"] * fsdp)
    sums = 2 * 2 * c.num_hidden_layers * local_tokens * c.hidden_size * 2 * (tensor - 1) / tensor
    sent = reads * read * (fsdp - 1) / fsdp + sums
    guess = max(compute, memory) + sent / (chip.link_rate * EFFICIENCY["links"])
    return Candidate(job, mesh, shard_bytes(backbone), guess / tokens)


def remedies(job: Job, mesh: Mesh, devices: Sequence[Any], chip: Chip) -> Iterator[tuple[str, Candidate]]:
    """Changes that save memory: less at once, then fewer bits a weight, then another mesh."""
    for text, changed in _changes(job, mesh):
        try:
            check(changed, mesh)
        except ParaJaxError:
            continue
        yield text, candidate(changed, mesh, chip)
    current = candidate(job, mesh, chip)
    for other in candidates([job], devices, chip):
        if other.weights < current.weights:
            yield f"--mesh {other.name}", other
            return


def _changes(job: Job, mesh: Mesh) -> Iterator[tuple[str, Job]]:
    if job.mode == "train":
        if job.remat != "layers":
            yield "--remat layers", replace(job, remat="layers")
        shape = planned_step(job, mesh).shape
        if shape.rows > 1:  # half, and the minimum
            for n in dict.fromkeys([shape.tokens // 2, shape.length]):
                yield f"--micro-batch-tokens {n}", replace(job, micro_batch_tokens=n)
    elif job.rows > 1:
        yield f"--rows {job.rows // 2}", replace(job, rows=job.rows // 2)
    if job.quantize is None:
        yield "--quantize int8", replace(job, quantize="int8")
    if job.quantize != "int4":
        yield "--quantize int4", replace(job, quantize="int4")
