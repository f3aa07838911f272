"""The very programs of tuning and decoding, with shapes in place of arrays.

All that knows how those programs are called, and how the library places what goes into them, is in this file.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from para_jax.adapters.adapter import abstract_layers
from para_jax.adapters.bank import AdapterBank, Group
from para_jax.backbones.choice import Choice, choose
from para_jax.backbones.decoder import Backbone
from para_jax.backbones.kernels import Kernel
from para_jax.config import BackboneConfig
from para_jax.data.batches import Batch
from para_jax.data.examples import Example
from para_jax.data.packing import Shape, Sizes, micro_batches
from para_jax.decoding import loop
from para_jax.decoding.batches import EOS_SLOTS
from para_jax.decoding.sampling import Sampler
from para_jax.errors import ParaJaxError
from para_jax.planning.compiling import Program, compiled, shard_bytes
from para_jax.planning.job import Job
from para_jax.sharding import check_mesh, row_sharding, row_shards
from para_jax.training.places import Layout, Schedule
from para_jax.training.programs import Parts
from para_jax.training.settings import Settings
from para_jax.training.shapes import TENANTS, Device, plan
from para_jax.training.state import Sums, TrainState, shardings, stack_settings, sums_sharding


def check(job: Job, mesh: Mesh) -> None:
    """Raises ParaJaxError if the mesh does not fit the backbone or the rows."""
    check_mesh(job.config, mesh)
    if job.mode == "decode" and job.rows % row_shards(mesh):
        raise ParaJaxError(
            f"{job.rows} rows cannot be spread over data x fsdp = {row_shards(mesh)} devices; choose a multiple, or a "
            "mesh with more of tensor"
        )


def own_mesh(mesh: Mesh) -> Mesh | None:
    """The mesh as the library has it: None on one device."""
    return None if mesh.size == 1 else mesh


def backbone_shapes(job: Job, mesh: Mesh) -> Backbone:
    """The backbone's shapes with the placements that loading gives them; layers stacked, as on accelerators."""
    kernel = attention(job, mesh.devices.flat[0]).kernel
    return _backbone(job.config, job.dtype, job.quantize, kernel, mesh)


def attention(job: Job, device: Any) -> Choice:
    """The attention kernel that loading chooses on such a device. CPUs stand for GPUs, and do not have theirs."""
    return choose("auto", job.config, jnp.dtype(job.dtype), device)


@lru_cache(maxsize=64)
def _backbone(config: BackboneConfig, dtype: Any, quantize: Any, kernel: Kernel, mesh: Mesh) -> Backbone:
    found = Backbone.abstract(config, dtype, True, quantize, kernel, own_mesh(mesh))
    # One device has no mesh, and has to be named all the same: it is not the one that is here.
    return found if mesh.size > 1 else _placed(found, NamedSharding(mesh, P()))


def bank_shapes(job: Job) -> AdapterBank:
    """The shapes of every tenant's adapter."""
    layers = abstract_layers(job.method, job.config)
    stack = jax.tree.map(lambda x: jax.ShapeDtypeStruct((job.tenants, *x.shape), x.dtype), layers)
    return AdapterBank(job.config, (Group(job.method, job.names, stack),))


def _placed(tree: Any, where: Any) -> Any:
    """The shapes of a tree with a placement, or with a tree of them."""
    wheres = jax.tree.map(lambda _: where, tree) if isinstance(where, NamedSharding) else where
    return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), tree, wheres)


def compile_job(job: Job, mesh: Mesh) -> list[Program]:
    """The two programs of a tuning step; or prefill, and the loop of decoding if prefill fits.

    Raises ParaJaxError if the mesh does not fit the backbone or the rows.
    """
    check(job, mesh)
    return _training(job, mesh) if job.mode == "train" else _decoding(job, mesh)


class _OfShapes(Layout):
    """A layout that places shapes: no array can be on a device that is not here."""

    def on_devices(self, batch: Batch) -> Batch:
        return batch if self.mesh is None else _placed(batch, row_sharding(self.mesh, self.groups))


def _full(job: Job) -> Example:
    return Example.of((0,) * (job.length - job.length // 2), (0,) * (job.length // 2))


@dataclass(frozen=True)
class Step:
    """How a tuning step is divided.

    Attributes:
      shape: of its micro-batches.
      groups: of rows in each: as many as there are devices with rows.
      micro_batches: how many there are.
    """

    shape: Shape
    groups: int
    micro_batches: int

    @property
    def slots(self) -> int:
        """Token slots of the step, on all devices."""
        return self.micro_batches * self.groups * self.shape.tokens


def step_of(job: Job, mesh: Mesh) -> Step:
    """The tuning step as `training.shapes` plans it when every row is full and all tenants have their turn."""
    layout, full = _OfShapes.of(own_mesh(mesh), job.tenants, job.rows), _full(job)
    sizes = Sizes((full.ids.size,) * job.rows, (int(full.response_ids.size),) * job.rows)
    kind: Literal["tpu", "gpu"] = "tpu" if mesh.devices.flat[0].platform == "tpu" else "gpu"
    return _step(sizes, -(-job.tenants // layout.shards), layout.groups, layout.shards > 1, job.device(kind))


@lru_cache(maxsize=256)
def _step(sizes: Sizes, places: int, groups: int, spread: bool, device: Device) -> Step:
    seen = [sizes] * len(range(0, places, -(-places // TENANTS)))
    (shape,) = plan([seen], groups, spread, max(sizes.tokens), max(sizes.targets), device).shapes
    found = micro_batches([sizes] * places, [shape], 1 if spread else groups)
    return Step(shape, groups, sum(1 for _ in found))


def _training(job: Job, mesh: Mesh) -> list[Program]:
    """A micro-batch, while the moments wait for the update, and the update, while the backbone waits for the next."""
    parts = training_parts(job, mesh)
    calls, state = parts.calls(), parts.state
    programs = {
        "micro_batch": ("micro-batch 0", (state.moments, state.failed_at, state.step)),
        "update": ("update", parts.backbone),
    }
    return [
        compiled(name, calls[call](), calls[call].args, mesh, held=shard_bytes(held))[0]
        for name, (call, held) in programs.items()
    ]


def training_parts(job: Job, mesh: Mesh) -> Parts:
    """What `training.loop` compiles a run's programs for, with shapes in place of arrays."""
    layout, settings = _OfShapes.of(own_mesh(mesh), job.tenants, job.rows), dict.fromkeys(job.names, Settings())
    bank = jax.eval_shape(layout.divided, bank_shapes(job))
    schedule, state = Schedule(bank, settings, layout), TrainState.shapes(bank)
    sums = Sums.shapes(bank, layout.groups, schedule.places)
    seating = schedule.seating(dict.fromkeys(job.names, 0), ())
    assert seating is not None
    return Parts(
        backbone=backbone_shapes(job, mesh),
        layout=layout,
        state=_placed(state, shardings(state, mesh, layout.shards)),
        rules=stack_settings(bank, settings),
        sums=_placed(sums, sums_sharding(sums, bank, mesh)),
        slots=layout.slots(bank, seating),
        places=schedule.places,
        shapes=[step_of(job, mesh).shape],
        dev=False,
        remat=job.remat,
        seed=0,
    )


def _decoding(job: Job, mesh: Mesh) -> list[Program]:
    """Prefill and the token loop as `decoding.generate` calls them, greedy and with tenants in turn.

    What the host hands over has no placement, and the compiler chooses one. The bank is whole on the first device; what
    is gathered of it for the rows is where the rows are.
    """
    backbone, bank = backbone_shapes(job, mesh), bank_shapes(job)
    of_rows = [job.names[i % job.tenants] for i in range(job.rows)]
    rows = jax.eval_shape(lambda bank: bank.rows(of_rows), bank)
    if mesh.size > 1:
        rows = replace(rows, layers=_placed(rows.layers, row_sharding(mesh, job.rows)))
    context = job.config.max_position_embeddings
    t, room = loop.bucket(job.length, context), loop.bucket(job.new_tokens, context)

    def shape(dtype: Any, *sizes: int) -> Any:
        return jax.ShapeDtypeStruct(sizes, dtype)

    prompts = loop.Prompts(shape(jnp.int32, job.rows, t), shape(jnp.bool_, job.rows, t))
    traced = loop.prefill.trace(backbone, prompts, rows, t + room)
    prefill, places = compiled("prefill", traced, (backbone, prompts, rows), mesh, held=shard_bytes(bank))
    if places is None:
        return [prefill]
    logits, state = _placed(traced.out_info, places)
    ending = loop.Ending(shape(jnp.int32, job.rows), shape(jnp.int32, EOS_SLOTS))
    traced = loop.run.trace(backbone, logits, state, Sampler(None, None), ending, prompts, room)
    given = (backbone, logits, state, ending, prompts)
    return [prefill, compiled("decode", traced, given, mesh, held=shard_bytes((bank, rows)))[0]]
