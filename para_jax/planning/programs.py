"""The programs of tuning and decoding, compiled with abstract arrays.

This file has everything that planning knows about the arguments of these programs and their shardings.
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
from para_jax.data.packing import Shape, Sizes, micro_batches
from para_jax.decoding import loop
from para_jax.decoding.batches import EOS_SLOTS
from para_jax.decoding.sampling import Sampler
from para_jax.errors import ParaJaxError
from para_jax.planning.compiling import Program, compiled, shard_bytes
from para_jax.planning.job import Job
from para_jax.sharding import check_mesh, row_sharding, row_shards
from para_jax.training.places import Schedule, TenantLayout
from para_jax.training.programs import Parts
from para_jax.training.settings import Settings
from para_jax.training.shapes import TENANTS, Device, plan
from para_jax.training.state import Sums, TrainState, shardings, stack_settings, sums_sharding


def check(job: Job, mesh: Mesh) -> None:
    check_mesh(job.config, mesh)
    if job.mode == "decode" and job.rows % row_shards(mesh):
        raise ParaJaxError(
            f"{job.rows} rows cannot be sharded over data x fsdp = {row_shards(mesh)} devices; choose a multiple, or a "
            "mesh with a larger tensor axis"
        )


def mesh_or_none(mesh: Mesh) -> Mesh | None:
    """The mesh as the library uses it: None for one device."""
    return None if mesh.size == 1 else mesh


def backbone_shapes(job: Job, mesh: Mesh) -> Backbone:
    """The abstract backbone with the shardings of a loaded one; layers are stacked, as on accelerators."""
    kernel = attention(job, mesh.devices.flat[0]).kernel
    return _backbone(job.config, job.dtype, job.quantize, kernel, mesh)


def attention(job: Job, device: Any) -> Choice:
    """The attention kernel that loading chooses on this device. CPUs stand in for GPUs, without their kernels."""
    return choose("auto", job.config, jnp.dtype(job.dtype), device)


@lru_cache(maxsize=64)
def _backbone(config: BackboneConfig, dtype: Any, quantize: Any, kernel: Kernel, mesh: Mesh) -> Backbone:
    found = Backbone.abstract(config, dtype, True, quantize, kernel, mesh_or_none(mesh))
    # A single device has no mesh, but needs a sharding, because it is not this process's device.
    return found if mesh.size > 1 else _with_sharding(found, NamedSharding(mesh, P()))


def bank_shapes(job: Job) -> AdapterBank:
    layers = abstract_layers(job.method, job.config)
    stack = jax.tree.map(lambda x: jax.ShapeDtypeStruct((job.tenants, *x.shape), x.dtype), layers)
    return AdapterBank(job.config, (Group(job.method, job.names, stack),))


def _with_sharding(tree: Any, sharding: Any) -> Any:
    """A tree of abstract arrays with one sharding, or with a tree of shardings."""
    shardings_tree = jax.tree.map(lambda _: sharding, tree) if isinstance(sharding, NamedSharding) else sharding
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings_tree)


def compile_job(job: Job, mesh: Mesh) -> list[Program]:
    """Compiles the two programs of a tuning step, or prefill and, if prefill fits, the token loop.

    Raises ParaJaxError if the mesh does not fit the backbone or the rows.
    """
    check(job, mesh)
    return _training(job, mesh) if job.mode == "train" else _decoding(job, mesh)


class _AbstractLayout(TenantLayout):
    """A layout of abstract arrays, because no array can be on a device that does not exist here."""

    def on_devices(self, batch: Batch) -> Batch:
        return batch if self.mesh is None else _with_sharding(batch, row_sharding(self.mesh, self.groups))


@dataclass(frozen=True)
class Step:
    """How a tuning step is divided.

    Attributes:
      shape: the shape of its micro-batches.
      groups: the number of groups of rows, one for each device with rows.
    """

    shape: Shape
    groups: int
    micro_batches: int

    @property
    def slots(self) -> int:
        return self.micro_batches * self.groups * self.shape.tokens


def planned_step(job: Job, mesh: Mesh) -> Step:
    """The tuning step that `training.shapes` plans if every row is full and the step has all tenants."""
    layout, response = _AbstractLayout.of(mesh_or_none(mesh), job.tenants, job.rows), job.length // 2
    sizes = Sizes((job.length - 1,) * job.rows, (response,) * job.rows)  # the last token is only predicted
    kind: Literal["tpu", "gpu"] = "tpu" if mesh.devices.flat[0].platform == "tpu" else "gpu"
    return _step(sizes, -(-job.tenants // layout.shards), layout.groups, layout.shards > 1, job.device(kind))


@lru_cache(maxsize=256)
def _step(sizes: Sizes, places: int, groups: int, spread: bool, device: Device) -> Step:
    sample = [sizes] * len(range(0, places, -(-places // TENANTS)))
    (shape,) = plan([sample], groups, spread, max(sizes.tokens), max(sizes.targets), device).shapes
    return Step(shape, groups, sum(1 for _ in micro_batches([sizes] * places, [shape], 1 if spread else groups)))


def _training(job: Job, mesh: Mesh) -> list[Program]:
    """Compiles a micro-batch, while the moments stay in memory, and the update, while the backbone does."""
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
    layout = _AbstractLayout.of(mesh_or_none(mesh), job.tenants, job.rows)
    settings = dict.fromkeys(job.names, Settings())
    bank = jax.eval_shape(layout.shard_bank, bank_shapes(job))
    schedule, state = Schedule(bank, settings, layout), TrainState.shapes(bank)
    sums = Sums.shapes(bank, layout.groups, schedule.places)
    step_tenants = schedule.step_tenants(dict.fromkeys(job.names, 0), ())
    assert step_tenants is not None
    return Parts(
        backbone=backbone_shapes(job, mesh),
        layout=layout,
        state=_with_sharding(state, shardings(state, mesh, layout.shards)),
        rules=stack_settings(bank, settings),
        sums=_with_sharding(sums, sums_sharding(sums, bank, mesh)),
        slots=layout.slots(bank, step_tenants),
        places=schedule.places,
        shapes=[planned_step(job, mesh).shape],
        dev=False,
        remat=job.remat,
        seed=0,
    )


def _decoding(job: Job, mesh: Mesh) -> list[Program]:
    """Compiles prefill and the token loop as `decoding.generate` calls them, greedy, with tenants round-robin.

    Arguments from the host have no sharding; the compiler chooses one. The bank is on the first device, and the
    adapters that are gathered for the rows are sharded like the rows.
    """
    backbone, bank = backbone_shapes(job, mesh), bank_shapes(job)
    row_tenants = [job.names[i % job.tenants] for i in range(job.rows)]
    rows = jax.eval_shape(lambda bank: bank.rows(row_tenants), bank)
    if mesh.size > 1:
        rows = replace(rows, layers=_with_sharding(rows.layers, row_sharding(mesh, job.rows)))
    context = job.config.max_position_embeddings
    t, room = loop.bucket(job.length, context), loop.bucket(job.new_tokens, context)

    def shape(dtype: Any, *sizes: int) -> Any:
        return jax.ShapeDtypeStruct(sizes, dtype)

    prompts = loop.Prompts(shape(jnp.int32, job.rows, t), shape(jnp.bool_, job.rows, t))
    traced = loop.prefill.trace(backbone, prompts, rows, t + room)
    prefill, out_shardings = compiled("prefill", traced, (backbone, prompts, rows), mesh, held=shard_bytes(bank))
    if out_shardings is None:
        return [prefill]
    logits, state = _with_sharding(traced.out_info, out_shardings)
    ending = loop.Ending(shape(jnp.int32, job.rows), shape(jnp.int32, EOS_SLOTS))
    traced = loop.run.trace(backbone, logits, state, Sampler(None, None), ending, prompts, room)
    args = (backbone, logits, state, ending, prompts)
    return [prefill, compiled("decode", traced, args, mesh, held=shard_bytes((bank, rows)))[0]]
