"""Meshes of devices, and which axis of every array is split over which axis of a mesh.

The table of parameters gives every weight logical axes; here is where each of them goes:

    data    rows of a batch only
    fsdp    rows of a batch, and one axis of every large weight, which is gathered for its product
    tensor  heads and inner features, so that a product is split and its parts are summed

Everything else takes its placement from these.

>>> parse_mesh("fsdp=4,tensor=2")
{'fsdp': 4, 'tensor': 2}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from para_jax.errors import ParaJaxError, unknown
from para_jax.families.architecture import Architecture, Axes
from para_jax.parameters import VOCABULARY

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Float, Int

AXES = ("data", "fsdp", "tensor")

# Which axis of a mesh each logical axis of a weight is split over (`para_jax/parameters.py`).
MESH_AXES: Mapping[str | None, str] = {
    "vocab": "tensor",
    "kv_heads": "tensor",
    "heads": "tensor",
    "inner": "tensor",
    "model": "fsdp",
}


def parse_mesh(text: str) -> dict[str, int]:
    """Axis sizes from `fsdp=8,tensor=2`. Raises ParaJaxError for another form or an unknown axis."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, equals, size = part.strip().partition("=")
        if name not in AXES:
            raise unknown("mesh axis", name, AXES)
        if not equals or not size.isdigit() or int(size) < 1 or name in sizes:
            raise ParaJaxError(f"--mesh takes each axis once, with a size, as in fsdp=8,tensor=2; not {text!r}")
        sizes[name] = int(size)
    return sizes


def make_mesh(sizes: Mapping[str, int] | str, devices: Any = None) -> Mesh:
    """A mesh with these axis sizes, one where an axis is not named; its axes are all there, in the order of `AXES`.

    Raises ParaJaxError unless the sizes' product is the number of devices.
    """
    sizes = parse_mesh(sizes) if isinstance(sizes, str) else sizes
    for name in sizes:
        if name not in AXES:
            raise unknown("mesh axis", name, AXES)
    devices = jax.devices() if devices is None else list(devices)
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    if int(np.prod(shape)) != len(devices):
        asked = ",".join(f"{name}={size}" for name, size in sizes.items())
        raise ParaJaxError(f"a mesh of {asked} has {int(np.prod(shape))} devices; there are {len(devices)}")
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def auto_mesh(config: Architecture, devices: int, tuning: bool = True) -> dict[str, int]:
    """Axis sizes that suit a backbone and so many devices.

    While tuning, weights are split over all devices, as far as their features divide, and gathered a layer at a time:
    a step has tokens enough to pay for it. A step of decoding has not, so its products are split over as many
    devices as there are heads for. What is left over takes rows only.

    >>> from para_jax import BackboneConfig
    >>> llama_7b = BackboneConfig(32000, 4096, 11008, 32, 32, 32, 128)
    >>> auto_mesh(llama_7b, 8), auto_mesh(llama_7b, 64, tuning=False)
    ({'data': 1, 'fsdp': 8}, {'data': 2, 'tensor': 32})
    """
    inner = config.intermediate_size if config.experts is None else config.experts.width
    sizes = {"fsdp": [config.hidden_size]} if tuning else {"tensor": [config.num_key_value_heads, inner]}
    ((axis, wholes),) = sizes.items()
    most = max(n for n in range(1, devices + 1) if not any(whole % n for whole in (devices, *wholes)))
    return {"data": devices // most, axis: most}


def own_mesh(mesh: Mesh) -> Mesh:
    """A mesh of some of our axes, in any order and of any axis type, as one of `make_mesh` on the same devices.

    Programs leave the placement of what is between to the compiler, so its axes are Auto; those of jax.make_mesh are
    Explicit. If `jax.set_mesh` is in force, it has to be with a mesh of Auto axes. Raises ParaJaxError for an axis
    that is none of ours.
    """
    for name in mesh.axis_names:
        if name not in AXES:
            raise unknown("mesh axis", str(name), AXES)
    order = [mesh.axis_names.index(axis) for axis in AXES if axis in mesh.axis_names]
    devices = mesh.devices.transpose(order).reshape([mesh.shape.get(axis, 1) for axis in AXES])
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def check_mesh(config: Architecture, mesh: Mesh) -> None:
    """Raises ParaJaxError, naming the size and its nearest divisor, if a backbone cannot be split so."""
    tensor, fsdp = mesh.shape["tensor"], mesh.shape["fsdp"]
    inner = config.intermediate_size if config.experts is None else config.experts.width
    for what, size, axis, parts in (
        ("key/value heads", config.num_key_value_heads, "tensor", tensor),
        ("inner features", inner, "tensor", tensor),
        ("features", config.hidden_size, "fsdp", fsdp),
    ):
        if size % parts:
            near = max(n for n in range(1, parts) if size % n == 0)
            raise ParaJaxError(f"{axis}={parts} does not divide the backbone's {size} {what}; choose {axis}={near}")


def spec(axes: Axes, shape: tuple[int, ...], mesh: Mesh) -> P:
    """Where the axes of a weight go, by its logical axes; stacked weights have the layers in front.

    An axis that its mesh axis does not divide, such as an odd vocabulary, is whole on every device.

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
    """Where the axes of a stack of adapters (tenants, layers, ...), or of their moments, go.

    `axes` are the logical axes of a layer's array, () if none of them is split. Those that the backbone splits over
    `tensor` are split so here; all else is whole, but for the tenants, which may be spread.
    """
    own = spec(axes, shape[2:], mesh) if axes else P()
    split = [axis if axis == "tensor" else None for axis in own]
    return P(tenants, *[None] * (len(shape) - 1 - len(split)), *split) if shape else P()


def gathered(weight: Array, axes: Axes, mesh: Mesh) -> Array:
    """A weight that is whole over `fsdp`."""
    kept = [None if axis == "fsdp" else axis for axis in spec(axes, weight.shape, mesh)]
    return jax.lax.with_sharding_constraint(weight, NamedSharding(mesh, P(*kept)))


def row_shards(mesh: Mesh | None) -> int:
    """Into how many parts the rows of a batch are split."""
    return 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]


def rows_axes(mesh: Mesh, rows: int) -> tuple[str, ...] | None:
    """The mesh axes that this many rows are split over: none, if they do not divide."""
    return None if rows % row_shards(mesh) else ("data", "fsdp")


def row_sharding(mesh: Mesh, rows: int) -> NamedSharding:
    """Of arrays whose first axis is so many rows: split, or whole everywhere if they do not divide."""
    return NamedSharding(mesh, P(rows_axes(mesh, rows)))


def embedded(embed_vd: Float[Array, "v d"], tokens_bt: Int[Array, "b t"], mesh: Mesh | None) -> Float[Array, "b t d"]:
    """The embeddings of tokens, with the rows split over the mesh.

    The table stays where it is. Every device looks up the features that it has, for all rows of its part of `data`,
    and the devices of `fsdp` then exchange features for rows. Only `split_rows` after the lookup would go wrong: the
    compiler would make the embeddings of all rows whole on every device.
    """
    if mesh is None:
        return embed_vd[tokens_bt]
    rows = None if rows_axes(mesh, tokens_bt.shape[0]) is None else "data"
    features = spec(VOCABULARY, embed_vd.shape, mesh)[1]
    tokens_bt = jax.lax.with_sharding_constraint(tokens_bt, NamedSharding(mesh, P(rows)))
    own = jax.lax.with_sharding_constraint(embed_vd[tokens_bt], NamedSharding(mesh, P(rows, None, features)))
    return split_rows(own, mesh)


def split_rows(x: Float[Array, "b ..."], mesh: Mesh | None) -> Float[Array, "b ..."]:
    """Tells the compiler that rows are split over the mesh and all else is whole, if there is a mesh.

    Without it, the compiler may split a product over the features of its rows and gather those, where it is to
    gather the weights of one layer.
    """
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, row_sharding(mesh, x.shape[0]))
