"""One Transformer layer, for every family: norms, projections and activations as the config says."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

from para_jax.backbones import rope
from para_jax.backbones.config import BackboneConfig, Experts
from para_jax.backbones.experts import gated, through_experts
from para_jax.backbones.linear import QUANTIZED, Weight, product, rms_norm

if TYPE_CHECKING:
    from jax import Array
    from jax.sharding import Mesh
    from jaxtyping import Float

Activation = Callable[[Any], Any]
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
                scale = jnp.full((*shape[:-1], bits.groups(shape[-1])), 0.035 / bits.most, bits.scale_dtype)
                setattr(self, name, nnx.Param(whole))
                setattr(self, f"{name}_scale", nnx.Param(scale))

    @property
    def dtype(self) -> jnp.dtype:
        """Of matmuls' inputs. Weights may be quantized; norms are in it always."""
        return (self.attention_norm if self.config.pre_norm else self.attention_post_norm).dtype

    def __call__(
        self,
        x_btd: Float[Array, "b t d"],
        adjust: Callable[[str, Array, Array], Array],
        angles: tuple[Float[Array, "b t rotated"], Float[Array, "b t rotated"]],
        attend: Callable[[Array, Array, Array], Array],
    ) -> Float[Array, "b t d"]:
        """One layer. In float16 the residual stream, and what is added to it, is float32 (`Backbone.residual_dtype`).

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
        out = adjust("o_proj", mixed, self._product("out", mixed, x_btd.dtype))
        x_btd = x_btd + (self._norm("attention_post_norm", out) if c.post_norm else out)

        normed = (self._norm("mlp_norm", x_btd) if c.pre_norm else x_btd).astype(self.dtype)
        feed_forward = self._dense if c.experts is None else partial(self._mixture, c.experts)
        out = feed_forward(normed, adjust, x_btd.dtype)
        return x_btd + (self._norm("mlp_post_norm", out) if c.post_norm else out)

    def attention_input(self, x_btd: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """What the attention projections see of the residual stream."""
        normed = self._norm("attention_norm", x_btd) if self.config.pre_norm else x_btd
        return normed.astype(self.dtype)

    def _norm(self, name: str, x: Array) -> Array:
        return rms_norm(x, getattr(self, name)[...], self.config.rms_norm_eps, self.config.norm_offset)

    def _weight(self, name: str) -> Weight:
        scale = getattr(self, f"{name}_scale", None)
        return getattr(self, name)[...], None if scale is None else scale[...]

    def _product(self, name: str, x: Float[Array, "b t i"], dtype: Any = None) -> Float[Array, "b t *o"]:
        """x through one of the projections, its bias included; in x's dtype unless one is given."""
        y, bias = product(x, *self._weight(name), dtype, self.mesh is None), getattr(self, f"{name}_bias", None)
        return y if bias is None else y + jnp.expand_dims(bias[...].astype(y.dtype), (0, 1))

    def _heads(self, norm: str, x_btf: Float[Array, "b t features"]) -> Float[Array, "b t heads hd"]:
        """Queries or keys by heads, normed as the family does."""
        x = self._norm(norm, x_btf) if self.config.qk_norm == "all" else x_btf
        x = x.reshape(*x.shape[:2], -1, self.config.head_dim)
        return self._norm(norm, x) if self.config.qk_norm == "head" else x

    def _dense(self, normed: Array, adjust: Callable[[str, Array, Array], Array], dtype: Any) -> Array:
        # Split before the halves are laid end to end: on a mesh each device has a part of both.
        gate, up = (x[:, :, 0] for x in jnp.split(self._product("gate_up", normed), 2, axis=2))
        gate, up = adjust("gate_proj", normed, gate), adjust("up_proj", normed, up)
        inner = gated(ACTIVATIONS[self.config.hidden_act], gate, up)
        return adjust("down_proj", inner, self._product("down", inner, dtype))

    def _mixture(
        self, experts: Experts, normed: Array, adjust: Callable[[str, Array, Array], Array], dtype: Any
    ) -> Array:
        """Every token goes through its likeliest experts; the up projection of all of them is scaled alike."""
        # A scale and no product of this token alone: taken of ones, in float32, which has no rounding to lose.
        scale = adjust("up_proj", normed, jnp.ones((*normed.shape[:2], experts.width), jnp.float32))
        chance = jax.nn.softmax(product(normed, self.router[...], dtype=jnp.float32), axis=-1)
        act, weights = ACTIVATIONS[self.config.hidden_act], (self._weight("gate_up"), self._weight("down"))
        return through_experts(normed, chance, scale, *weights, experts, act, self.mesh).astype(dtype)
