"""Attention kernels for prompts and training. choice.py selects the kernel of a backbone.

    plain   XLA (attention.py), on all devices
    cudnn   cuDNN flash attention via jax.nn.dot_product_attention: NVIDIA GPUs from Ampere on, bfloat16, heads of up to
            128 features (256 from Hopper on), neither soft-capping nor sinks
    splash  JAX's Pallas kernel for TPUs; interpreted on a CPU, which is slow and for tests

Decode steps always use plain attention, because a kernel gains nothing for one query per row.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from para_jax.backbones.attention import Seen, attention
from para_jax.sharding import rows_axes

if TYPE_CHECKING:
    from jax import Array
    from jax.sharding import Mesh
    from jaxtyping import Float


Kernel = Literal["plain", "cudnn", "splash"]
LANES = 128  # in a TPU vector; splash pads heads to a multiple of it
TILE = 512  # block size of splash for queries and keys; rows of up to TILE tokens use LANES


def prompt_attention(
    kernel: Kernel,
    q_btkgh: Float[Array, "b t k g hd"],
    k_bksh: Float[Array, "b k t hd"],
    v_bksh: Float[Array, "b k t hd"],
    seen: Seen,
    scale: float,
    softcap: float | None = None,
    mesh: Mesh | None = None,
    sinks_kg: Float[Array, "k g"] | None = None,
) -> Float[Array, "b t kghd"]:
    """Attention where queries and keys have the same columns, beginning with the first.

    Rows and key/value heads are sharded over `mesh` as in the backbone. The outputs of padding, which nothing reads,
    differ between kernels.
    """
    if kernel == "cudnn":
        return fused(q_btkgh, k_bksh, v_bksh, seen, scale, "cudnn")
    if kernel == "splash":
        if mesh is None:
            return splash(q_btkgh, k_bksh, v_bksh, seen, scale, softcap, sinks_kg)
        # XLA shards jnp code, but not a Pallas kernel.
        rows = rows_axes(mesh, q_btkgh.shape[0])
        by_head = P(rows, "tensor")
        return jax.shard_map(
            lambda q, k, v, valid, segment, sinks: splash(
                q, k, v, seen._replace(valid_bs=valid, segment_bt=segment), scale, softcap, sinks
            ),
            mesh=mesh, in_specs=(P(rows, None, "tensor"), by_head, by_head, P(rows), P(rows), P("tensor")),
            out_specs=P(rows, None, "tensor"), check_vma=False,
        )(q_btkgh, k_bksh, v_bksh, seen.valid_bs, seen.segment_bt, sinks_kg)  # fmt: skip
    return attention(q_btkgh, k_bksh, v_bksh, seen, scale, softcap, sinks_kg)


def fused(
    q_btkgh: Array, k_bksh: Array, v_bksh: Array, seen: Seen, scale: float, implementation: Literal["cudnn", "xla"]
) -> Array:
    """Attention via jax.nn.dot_product_attention, which needs right-padded rows or an explicit mask."""
    b, t, k, g, hd = q_btkgh.shape
    if seen.segment_bt is not None:
        # Let padding see itself, because the result of a query without keys is undefined.
        mask_bts = seen.mask() | jnp.eye(t, dtype=bool)[None]
        mixed = jax.nn.dot_product_attention(
            q_btkgh.reshape(b, t, k * g, hd), k_bksh.swapaxes(1, 2), v_bksh.swapaxes(1, 2), mask=mask_bts[:, None],
            scale=scale, implementation=implementation,
        )  # fmt: skip
        return mixed.reshape(b, t, -1)
    first_b = jnp.argmax(seen.valid_bs, axis=1)
    length_b = jnp.sum(seen.valid_bs, axis=1, dtype=jnp.int32)

    def roll(x_bt: Array, shift_b: Array) -> Array:
        source_bt = (jnp.arange(t)[None] + shift_b[:, None]) % t
        return jnp.take_along_axis(x_bt, source_bt.reshape(b, t, *[1] * (x_bt.ndim - 2)), axis=1)

    q, k_, v = (
        roll(x, first_b) for x in (q_btkgh.reshape(b, t, k * g, hd), k_bksh.swapaxes(1, 2), v_bksh.swapaxes(1, 2))
    )
    mixed = jax.nn.dot_product_attention(
        q, k_, v, scale=scale, is_causal=True, query_seq_lengths=length_b, key_value_seq_lengths=length_b,
        local_window_size=None if seen.window is None else (seen.window - 1, 0), implementation=implementation,
    )  # fmt: skip
    return roll(mixed, -first_b).reshape(b, t, -1)


def splash(
    q_btkgh: Array, k_bksh: Array, v_bksh: Array, seen: Seen, scale: float, softcap: float | None = None,
    sinks_kg: Array | None = None,
) -> Array:  # fmt: skip
    """Attention via JAX's splash attention. Padding is its own segment, so that no token sees it."""
    # Imported here, because Pallas is slow to import and not available on every platform.
    from jax.experimental.pallas.ops.tpu import splash_attention as sa

    b, t, k, g, hd = q_btkgh.shape
    tile = TILE if t > TILE else LANES
    size, width = -(-t // tile) * tile, -(-hd // LANES) * LANES

    def padded(x: Array) -> Array:
        return jnp.pad(x, [(0, 0), (0, 0), (0, size - t), (0, width - hd)])

    q = padded((q_btkgh * scale).astype(q_btkgh.dtype).reshape(b, t, k * g, hd).swapaxes(1, 2))
    segment = seen.valid_bs if seen.segment_bt is None else jnp.where(seen.valid_bs, 1 + seen.segment_bt, 0)
    segment = jnp.pad(segment.astype(jnp.int32), [(0, 0), (0, size - t)])
    shape = (size, size)
    mask = sa.CausalMask(shape) if seen.window is None else sa.LocalMask(shape, (seen.window - 1, 0), 0)
    tiles = sa.BlockSizes(tile, tile, tile, tile, tile, tile, tile, tile)
    make = partial(
        sa.make_splash_mha_single_device, sa.MultiHeadMask([mask] * (k * g)), block_sizes=tiles,
        attn_logits_soft_cap=softcap,
    )  # fmt: skip

    def run(interpret: bool, q: Array, k: Array, v: Array, segment: Array, sinks: Array | None) -> Any:
        kernel = make(interpret=interpret)

        def one(q: Array, k: Array, v: Array, ids: Array) -> Any:
            return kernel(q, k, v, segment_ids=sa.SegmentIds(ids, ids), sinks=sinks)

        return jax.vmap(one)(q, k, v, segment)

    arguments = (q, padded(k_bksh), padded(v_bksh), segment, None if sinks_kg is None else sinks_kg.reshape(-1))
    mixed = jax.lax.platform_dependent(*arguments, cpu=partial(run, True), default=partial(run, False))
    return mixed[..., :t, :hd].swapaxes(1, 2).reshape(b, t, -1)
