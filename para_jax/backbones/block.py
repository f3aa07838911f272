"""One Transformer layer, for every family: norms, projections and activations as the config says."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from para_jax.backbones import rope
from para_jax.backbones.config import BackboneConfig, Experts
from para_jax.backbones.linear import QUANTIZED, dequantized, product, rms_norm
from para_jax.sharding import gathered, rows_axes

if TYPE_CHECKING:
    from jax import Array
    from jax.sharding import Mesh
    from jaxtyping import Float, Int

Activation = Callable[[Any], Any]
# A projection, and its scales if it is in few bits.
Weight = tuple["Array", "Array | None"]
ACTIVATIONS: dict[str, Activation] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "swish": jax.nn.silu,
}


class Block(nnx.Module):
    """One Transformer layer. Weights, with k key/value heads of g query heads each, hd features a head:

    attention_norm (d,), qkv (k, g + 2, hd, d), out (d, k * g * hd), mlp_norm (d,), gate_up (2, f, d), down (d, f).

    Each is (outputs, inputs) in its last axis. With `quantize` these projections are whole numbers of few bits, and
    qkv_scale, out_scale, gate_up_scale and down_scale (..., groups) are what to multiply them by.

    Where the config asks for them: attention_post_norm and mlp_post_norm (d,); q_norm and k_norm, (hd,) or as wide
    as all heads; qkv_bias (k, g + 2, hd), out_bias (d,), gate_up_bias (2, f), down_bias (d,). With e experts: router
    (e, d), gate_up (e, 2, f, d), down (e, d, f).
    """

    def __init__(
        self,
        config: BackboneConfig,
        dtype: jnp.dtype,
        key: Array,
        quantize: str | None = None,
        mesh: Mesh | None = None,
    ):
        """Random weights; `mesh` has the devices that share them."""
        d, f, hd, k = config.hidden_size, config.intermediate_size, config.head_dim, config.num_key_value_heads
        g = config.num_attention_heads // k
        keys = jax.random.split(key, 4)

        def normal(key: Array, *shape: int) -> nnx.Param:
            return nnx.Param((0.02 * jax.random.normal(key, shape, jnp.float32)).astype(dtype))

        def norm(size: int) -> nnx.Param:
            return nnx.Param(jnp.full((size,), 1.0 - config.norm_offset, dtype))

        def zeros(*shape: int) -> nnx.Param:
            return nnx.Param(jnp.zeros(shape, dtype))

        self.config, self.mesh = config, mesh
        if config.pre_norm:
            self.attention_norm, self.mlp_norm = norm(d), norm(d)
        if config.post_norm:
            self.attention_post_norm, self.mlp_post_norm = norm(d), norm(d)
        if config.qk_norm != "none":
            heads = (1, 1) if config.qk_norm == "head" else (k * g, k)
            self.q_norm, self.k_norm = norm(heads[0] * hd), norm(heads[1] * hd)
        shapes = {"qkv": (k, g + 2, hd, d), "out": (d, k * g * hd)}
        if "q_proj" in config.biases:
            self.qkv_bias = zeros(k, g + 2, hd)
        if "o_proj" in config.biases:
            self.out_bias = zeros(d)
        if config.experts is None:
            shapes |= {"gate_up": (2, f, d), "down": (d, f)}
            if "up_proj" in config.biases:
                self.gate_up_bias, self.down_bias = zeros(2, f), zeros(d)
        else:
            e, f = config.experts.count, config.experts.width
            self.router = normal(jax.random.fold_in(key, 4), e, d)
            shapes |= {"gate_up": (e, 2, f, d), "down": (e, d, f)}
        for (name, shape), one in zip(shapes.items(), keys, strict=True):
            if quantize is None:
                setattr(self, name, normal(one, *shape))
            else:
                bits = QUANTIZED[quantize]
                whole = jax.random.randint(one, shape, -bits.most, bits.most + 1, jnp.int8).astype(bits.dtype)
                scale = jnp.full((*shape[:-1], bits.groups(shape[-1])), 0.035 / bits.most, jnp.float32)
                setattr(self, name, nnx.Param(whole))
                setattr(self, f"{name}_scale", nnx.Param(scale))

    def __call__(
        self,
        x_btd: Float[Array, "b t d"],
        adjust: Callable[[str, Array, Array], Array],
        angles: tuple[Float[Array, "b t rotated"], Float[Array, "b t rotated"]],
        attend: Callable[[Array, Array, Array], Array],
    ) -> Float[Array, "b t d"]:
        """One layer.

        `adjust` takes a site's name, its input and its output and returns the output adjusted. `attend` takes
        q (b, t, k, g, hd) and k, v (b, t, k, hd) of these tokens and returns (b, t, k * g * hd).
        """
        c = self.config
        b, t, _ = x_btd.shape
        k, hd = c.num_key_value_heads, c.head_dim
        g = c.num_attention_heads // k

        normed = self.attention_input(x_btd)
        # Splitting and not indexing: the gradient of a split is one concatenation.
        q, k_, v = jnp.split(self._product("qkv", normed), [g, g + 1], axis=-2)
        q = self._heads("q_norm", adjust("q_proj", normed, q.reshape(b, t, -1)))
        k_ = self._heads("k_norm", adjust("k_proj", normed, k_.reshape(b, t, -1)))
        v = adjust("v_proj", normed, v.reshape(b, t, -1)).reshape(b, t, k, hd)
        q = rope.rotate(q, *angles).reshape(b, t, k, g, hd)
        mixed = attend(q, rope.rotate(k_, *angles), v)
        out = adjust("o_proj", mixed, self._product("out", mixed))
        x_btd = x_btd + (self._norm("attention_post_norm", out) if c.post_norm else out)

        normed = self._norm("mlp_norm", x_btd) if c.pre_norm else x_btd
        out = self._dense(normed, adjust) if c.experts is None else self._mixture(normed, adjust, c.experts)
        return x_btd + (self._norm("mlp_post_norm", out) if c.post_norm else out)

    def attention_input(self, x_btd: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """What the attention projections see of the residual stream."""
        return self._norm("attention_norm", x_btd) if self.config.pre_norm else x_btd

    def _norm(self, name: str, x: Array) -> Array:
        return rms_norm(x, getattr(self, name)[...], self.config.rms_norm_eps, self.config.norm_offset)

    def _weight(self, name: str) -> Weight:
        scale = getattr(self, f"{name}_scale", None)
        return getattr(self, name)[...], None if scale is None else scale[...]

    def _product(self, name: str, x: Float[Array, "b t i"]) -> Float[Array, "b t *o"]:
        """x through one of the projections, its bias included."""
        y, bias = product(x, *self._weight(name), flat=self.mesh is None), getattr(self, f"{name}_bias", None)
        return y if bias is None else y + jnp.expand_dims(bias[...], (0, 1))

    def _heads(self, norm: str, x_btf: Float[Array, "b t features"]) -> Float[Array, "b t heads hd"]:
        """Queries or keys by heads, normed as the family does."""
        x = self._norm(norm, x_btf) if self.config.qk_norm == "all" else x_btf
        x = x.reshape(*x.shape[:2], -1, self.config.head_dim)
        return self._norm(norm, x) if self.config.qk_norm == "head" else x

    def _dense(self, normed: Array, adjust: Callable[[str, Array, Array], Array]) -> Array:
        # Split before the halves are laid end to end: on a mesh each device has a part of both.
        gate, up = (x[:, :, 0] for x in jnp.split(self._product("gate_up", normed), 2, axis=2))
        gate, up = adjust("gate_proj", normed, gate), adjust("up_proj", normed, up)
        inner = ACTIVATIONS[self.config.hidden_act](gate) * up
        return adjust("down_proj", inner, self._product("down", inner))

    def _mixture(self, normed: Array, adjust: Callable[[str, Array, Array], Array], experts: Experts) -> Array:
        """Every token goes through its likeliest experts; the up projection of all of them is scaled alike."""
        # A scale and no product of this token alone: taken of ones, in float32, which has no rounding to lose.
        scale = adjust("up_proj", normed, jnp.ones((*normed.shape[:2], experts.width), jnp.float32))
        chance = jax.nn.softmax(product(normed, self.router[...], dtype=jnp.float32), axis=-1)
        # Backward, the products are there, and the rest is made again from the weights as they are stored: the form
        # that a product reads would be kept of every layer, a second copy of the backbone.
        products = jax.checkpoint_policies.save_only_these_names("experts")
        through = jax.checkpoint(partial(self._through_experts, experts=experts), policy=products)
        return through(normed, scale, chance, self._weight("gate_up"), self._weight("down")).astype(normed.dtype)

    def _through_experts(
        self, x_btd: Array, scale_btf: Array, chance_bte: Array, gate_up: Weight, down: Weight, experts: Experts
    ) -> Float[Array, "b t d"]:
        """`mixture` on the devices that there are."""

        def ready(name: str, weight: Array, scale: Array | None) -> Array:
            weight = weight if self.mesh is None else gathered(weight, name, self.mesh)
            return weight if scale is None else dequantized(weight, scale, x_btd.dtype)

        of = partial(mixture, experts=experts, act=ACTIVATIONS[self.config.hidden_act])
        given = x_btd, scale_btf, chance_bte, ready("gate_up", *gate_up), ready("down", *down)
        if self.mesh is None:
            return of(*given)
        # Each device sorts the tokens of its own rows and has its part of every expert. Left to itself, the compiler
        # sorts the tokens of all devices, and gives each of them all.
        rows, part = rows_axes(self.mesh, x_btd.shape[0]), P(None, None, "tensor")
        return jax.shard_map(
            lambda *given: jax.lax.psum(of(*given), "tensor"),
            mesh=self.mesh, in_specs=(P(rows), P(rows, None, "tensor"), P(rows), part, part), out_specs=P(rows),
        )(*given)  # fmt: skip


def mixture(
    x_btd: Float[Array, "b t d"],
    scale_btf: Float[Array, "b t f"],
    chance_bte: Float[Array, "b t e"],
    gate_up: Float[Array, "e 2 f d"],
    down: Float[Array, "e d f"],
    experts: Experts,
    act: Activation,
) -> Float[Array, "b t d"]:
    """The weighted sum of what each token's likeliest experts say, their up projections scaled; in float32."""
    b, t, d = x_btd.shape
    weight, expert = jax.lax.top_k(chance_bte, experts.per_token)
    if experts.normalized:
        weight = weight / jnp.sum(weight, axis=-1, keepdims=True)

    # Token copies stand in the order of their experts, so that each expert is one product over its own.
    expert_n = expert.reshape(-1)
    order_n = jnp.argsort(expert_n, stable=True)
    source_n = order_n // experts.per_token
    sizes = jnp.bincount(expert_n, length=experts.count)
    x = x_btd.reshape(b * t, d)[source_n]
    gate, up = jnp.split(grouped_product(x, gate_up.reshape(experts.count, -1, d), sizes), 2, axis=-1)
    up = (up * scale_btf.reshape(b * t, -1)[source_n]).astype(x.dtype)
    inner = act(gate.astype(x.dtype)) * up
    out = grouped_product(inner, down, sizes) * weight.reshape(-1)[order_n][:, None]
    place_n = jnp.zeros_like(order_n).at[order_n].set(jnp.arange(order_n.size, dtype=order_n.dtype))
    return jnp.sum(out[place_n].reshape(b, t, experts.per_token, d), axis=2)


def grouped_product(
    x: Float[Array, "n i"], weights: Float[Array, "e o i"], sizes: Int[Array, " e"]
) -> Float[Array, "n o"]:
    """x W_e^T with the first `sizes[0]` rows of x for the first weight, and so on; float32 sums and output."""
    numbers = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (2,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
    )
    out = jax.lax.ragged_dot_general(x, weights, sizes, numbers, preferred_element_type=jnp.float32)
    return checkpoint_name(out, "experts")
