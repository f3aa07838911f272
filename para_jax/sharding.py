"""Meshes of devices, and which mesh axis each array axis is sharded over.

The table of parameters gives every weight logical axes. This module maps them to mesh axes:

    data    rows of a batch only
    fsdp    rows of a batch, and one axis of every large weight, which is gathered for its matmul
    tensor  heads and inner features, so that a matmul is sharded and its partial results are summed

All other shardings follow from these.

>>> parse_mesh("fsdp=4,tensor=2")
{'fsdp': 4, 'tensor': 2}
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from para_jax.annotations import Array, Float, Int
from para_jax.errors import ParaJaxError, check_known
from para_jax.families.architecture import Architecture, Axes
from para_jax.parameters import VOCABULARY

AXES = ("data", "fsdp", "tensor")

# The mesh axis that each logical axis of a weight is sharded over (`para_jax/parameters.py`).
MESH_AXES: Mapping[str | None, str] = {
    "vocab": "tensor",
    "kv_heads": "tensor",
    "heads": "tensor",
    "inner": "tensor",
    "model": "fsdp",
}


def parse_mesh(text: str) -> dict[str, int]:
    """Parses axis sizes such as `fsdp=8,tensor=2`. Raises ParaJaxError for another format or an unknown axis."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, equals, size = part.strip().partition("=")
        check_known("mesh axis", [name], AXES)
        if not equals or not size.isdigit() or int(size) < 1 or name in sizes:
            raise ParaJaxError(f"--mesh takes each axis once, with a size, as in fsdp=8,tensor=2; not {text!r}")
        sizes[name] = int(size)
    return sizes


def make_mesh(sizes: Mapping[str, int] | str, devices: Any = None) -> Mesh:
    """A mesh with these axis sizes. It has all axes of `AXES` in order; the size of an axis defaults to 1.

    Raises ParaJaxError unless the product of the sizes is the number of devices.
    """
    sizes = parse_mesh(sizes) if isinstance(sizes, str) else sizes
    check_known("mesh axis", sizes, AXES)
    devices = jax.devices() if devices is None else list(devices)
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    if int(np.prod(shape)) != len(devices):
        text = ",".join(f"{name}={size}" for name, size in sizes.items())
        raise ParaJaxError(f"a mesh of {text} has {int(np.prod(shape))} devices; there are {len(devices)}")
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def auto_mesh(config: Architecture, devices: int, tuning: bool = True) -> dict[str, int]:
    """Axis sizes that suit a backbone and a number of devices.

    For tuning, weights are sharded over as many devices as divide their features, and gathered one layer at a time: a
    step has enough tokens to pay for it. A decode step does not, so its matmuls are sharded over as many devices as
    divide the heads. The remaining factor of devices is the data axis.

    >>> from para_jax import BackboneConfig
    >>> llama_7b = BackboneConfig(32000, 4096, 11008, 32, 32, 32, 128)
    >>> auto_mesh(llama_7b, 8), auto_mesh(llama_7b, 64, tuning=False)
    ({'data': 1, 'fsdp': 8}, {'data': 2, 'tensor': 32})
    """
    axis, dims = ("fsdp", [config.hidden_size]) if tuning else ("tensor", [*_split_over_tensor(config).values()])
    largest = max(n for n in range(1, devices + 1) if not any(dim % n for dim in (devices, *dims)))
    return {"data": devices // largest, axis: largest}


def _split_over_tensor(config: Architecture) -> dict[str, int]:
    """The sizes that the tensor axis has to divide: those of layers of different kinds, by their common divisor."""
    inner = {kind.intermediate_size or config.intermediate_size for kind in config.layer_kinds}
    if config.experts is not None:
        inner = {config.experts.width, *(inner if config.experts.beside else ())}
    heads = {config.heads(kind)[0] for kind in config.layer_kinds}
    return {"key/value heads": math.gcd(*heads), "inner features": math.gcd(*inner)}


def own_mesh(mesh: Mesh) -> Mesh:
    """Converts a mesh with some of the axes in `AXES`, in any order and of any axis type, to one of `make_mesh`.

    The axes are Auto, because programs leave the sharding of intermediate values to the compiler; axes of jax.make_mesh
    are Explicit. A mesh that is set with `jax.set_mesh` must have Auto axes too. Raises ParaJaxError for an unknown
    axis.
    """
    check_known("mesh axis", map(str, mesh.axis_names), AXES)
    order = [mesh.axis_names.index(axis) for axis in AXES if axis in mesh.axis_names]
    devices = mesh.devices.transpose(order).reshape([mesh.shape.get(axis, 1) for axis in AXES])
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def check_mesh(config: Architecture, mesh: Mesh) -> None:
    """Raises ParaJaxError, with the nearest divisor, if a backbone cannot be sharded over this mesh."""
    tensor, fsdp = mesh.shape["tensor"], mesh.shape["fsdp"]
    over_tensor = [(what, size, "tensor", tensor) for what, size in _split_over_tensor(config).items()]
    for what, size, axis, parts in (*over_tensor, ("features", config.hidden_size, "fsdp", fsdp)):
        if size % parts:
            near = max(n for n in range(1, parts) if size % n == 0)
            raise ParaJaxError(f"{axis}={parts} does not divide the backbone's {size} {what}; choose {axis}={near}")


def spec(axes: Axes, shape: tuple[int, ...], mesh: Mesh) -> P:
    """The PartitionSpec of a weight, from its logical axes. Stacked weights have a leading layer axis.

    An axis whose size is not divisible by its mesh axis, such as an odd vocabulary, is replicated.

    >>> mesh = make_mesh("fsdp=1", jax.devices()[:1])
    >>> tuple(spec(("vocab", "model"), (64, 8), mesh)), tuple(spec(("model", "heads"), (4, 8, 8), mesh))
    (('tensor', 'fsdp'), (None, 'fsdp', 'tensor'))
    """
    layers = len(shape) - len(axes)
    found = [MESH_AXES.get(axis) for axis in axes]
    split = [
        axis if axis is not None and n % mesh.shape[axis] == 0 else None
        for axis, n in zip(found, shape[layers:], strict=True)
    ]
    return P(*[None] * layers, *split) if any(split) else P()


def adapter_spec(axes: Axes, shape: tuple[int, ...], mesh: Mesh, tenants: tuple[str, ...] | None) -> P:
    """The PartitionSpec of a stack of adapters (tenants, layers, ...), or of their moments.

    `axes` are the logical axes of a layer's array, or (). Axes that the backbone shards over `tensor` are sharded here
    too. All other axes are replicated, except the tenant axis, which is sharded over the mesh axes `tenants`.
    """
    layer_spec = spec(axes, shape[2:], mesh) if axes else P()
    split = [axis if axis == "tensor" else None for axis in layer_spec]
    return P(tenants, *[None] * (len(shape) - 1 - len(split)), *split) if shape else P()


def gathered(weight: Array, axes: Axes, mesh: Mesh) -> Array:
    """A weight gathered over `fsdp`."""
    kept = [None if axis == "fsdp" else axis for axis in spec(axes, weight.shape, mesh)]
    return jax.lax.with_sharding_constraint(weight, NamedSharding(mesh, P(*kept)))


def row_shards(mesh: Mesh | None) -> int:
    """The number of shards of the rows of a batch."""
    return 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]


def rows_axes(mesh: Mesh, rows: int) -> tuple[str, ...] | None:
    """The mesh axes that this number of rows is sharded over; None if it is not divisible."""
    return None if rows % row_shards(mesh) else ("data", "fsdp")


def row_sharding(mesh: Mesh, rows: int) -> NamedSharding:
    """The sharding of arrays whose first axis is rows; replicated if the number of rows is not divisible."""
    return NamedSharding(mesh, P(rows_axes(mesh, rows)))


def embedded(embed_vd: Float[Array, "v d"], tokens_bt: Int[Array, "b t"], mesh: Mesh | None) -> Float[Array, "b t d"]:
    """The embeddings of tokens, with rows sharded over the mesh.

    The table is not moved. Every device looks up its shard of features, for all rows of its `data` shard, and then the
    devices along `fsdp` exchange features for rows (all-to-all). With `split_rows` alone the compiler would replicate
    the embeddings of all rows on every device.
    """
    if mesh is None:
        return embed_vd[tokens_bt]
    rows = None if rows_axes(mesh, tokens_bt.shape[0]) is None else "data"
    features = spec(VOCABULARY, embed_vd.shape, mesh)[1]
    tokens_bt = jax.lax.with_sharding_constraint(tokens_bt, NamedSharding(mesh, P(rows)))
    local_btd = jax.lax.with_sharding_constraint(embed_vd[tokens_bt], NamedSharding(mesh, P(rows, None, features)))
    return split_rows(local_btd, mesh)


def split_rows(x: Float[Array, "b ..."], mesh: Mesh | None) -> Float[Array, "b ..."]:
    """Constrains an array to be sharded over rows, and replicated on its other axes. Without a mesh it does nothing.

    Without this constraint the compiler may shard a matmul over features and gather activations, instead of gathering
    the weights of one layer.
    """
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, row_sharding(mesh, x.shape[0]))
