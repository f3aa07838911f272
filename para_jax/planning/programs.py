"""The very programs of tuning and decoding, with shapes in place of arrays.

All that knows how those programs are called, and how the library places what goes into them, is in this file.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from para_jax.adapters.adapter import abstract_layers, named_leaves
from para_jax.adapters.bank import AdapterBank, Group
from para_jax.backbones.config import BackboneConfig
from para_jax.backbones.decoder import Backbone
from para_jax.data.batches import OF_MICRO_BATCHES, pad
from para_jax.data.examples import Example
from para_jax.decoding import loop
from para_jax.decoding.generate import EOS_SLOTS
from para_jax.decoding.sampling import Sampler
from para_jax.errors import ParaJaxError
from para_jax.planning.compiling import Program, compiled, shard_bytes
from para_jax.planning.job import Job
from para_jax.sharding import check_mesh, row_sharding, row_shards, spec
from para_jax.training.optimizer import Settings
from para_jax.training.places import NOTHING, Layout, Schedule
from para_jax.training.step import TrainState, shardings, stack_settings, train_step


def check(job: Job, mesh: Mesh) -> None:
    """Raises ParaJaxError if the mesh does not fit the backbone or the rows."""
    check_mesh(job.config, mesh)
    if job.mode == "train":
        _layout(job, mesh)
    elif job.rows % row_shards(mesh):
        raise ParaJaxError(
            f"{job.rows} rows cannot be spread over data x fsdp = {row_shards(mesh)} devices; choose a multiple, or a "
            "mesh with more of tensor"
        )


def own_mesh(mesh: Mesh) -> Mesh | None:
    """The mesh as the library has it: None on one device."""
    return None if mesh.size == 1 else mesh


def backbone_shapes(job: Job, mesh: Mesh) -> Backbone:
    """The backbone's shapes with the placements that loading gives them; layers stacked, as on accelerators."""
    # CPUs stand for GPUs, and do not have their kernel.
    kernel = "splash" if mesh.devices.flat[0].platform == "tpu" else "plain"
    tree = _backbone(job.config, job.dtype, job.quantize, kernel, own_mesh(mesh))
    leaves = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec(name, x.shape, mesh)))
        for name, x in named_leaves(tree).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


@lru_cache(maxsize=16)
def _backbone(config: BackboneConfig, dtype: Any, quantize: Any, kernel: Any, mesh: Mesh | None) -> Backbone:
    make = partial(Backbone, config, dtype=dtype, stacked=True, quantize=quantize, attention=kernel, mesh=mesh)
    return jax.eval_shape(make, jax.random.key(0))


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
    """The tuning step; or prefill, and the loop of decoding if prefill fits.

    Raises ParaJaxError if the mesh does not fit the backbone or the rows.
    """
    check(job, mesh)
    return _training(job, mesh) if job.mode == "train" else _decoding(job, mesh)


def _layout(job: Job, mesh: Mesh) -> Layout:
    return Layout.of(own_mesh(mesh), job.tenants, job.rows, job.micro_batches)


def _training(job: Job, mesh: Mesh) -> list[Program]:
    given, options = training_arguments(job, mesh)
    traced = train_step.trace(*given, **options)
    return [compiled("train_step", traced, given, mesh)[0]]


def training_arguments(job: Job, mesh: Mesh) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What `training.loop` calls `train_step` with when all tenants have their turn and every row is full."""
    layout, settings = _layout(job, mesh), dict.fromkeys(job.names, Settings())
    bank = jax.eval_shape(layout.divided, bank_shapes(job))
    rules = stack_settings(bank, settings)
    state = jax.eval_shape(TrainState.create, bank)
    state = _placed(state, shardings(state, mesh, layout.shards))
    homes = Schedule(bank, settings, layout).turn(dict.fromkeys(job.names, 0), ())
    assert homes is not None
    response = job.length // 2
    full = Example.of((0,) * (job.length - response), (0,) * response)
    rows = [[[NOTHING if name is None else full] * job.rows for name in home] for home in homes]
    batch = pad(layout.parts(rows), layout.groups)
    # As `Layout.batch` places it.
    by_row, by_group = NamedSharding(mesh, P(None, ("data", "fsdp"))), NamedSharding(mesh, P(("data", "fsdp")))
    divided = {name: _placed(getattr(batch, name), by_row) for name in OF_MICRO_BATCHES}
    batch = replace(batch, **divided, target_count=_placed(batch.target_count, by_group))
    given = (backbone_shapes(job, mesh), state, rules, batch, layout.slots(bank, homes))
    return given, {"shards": layout.shards, "remat": job.remat, "seed": 0}


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
