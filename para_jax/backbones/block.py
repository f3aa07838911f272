"""One Transformer layer, for every family: norms, projections and activations as the config says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

from para_jax.backbones import rope
from para_jax.backbones.experts import gated, through_experts
from para_jax.backbones.linear import Weight, layer_norm, product, rms_norm
from para_jax.backbones.options import wide
from para_jax.config import BackboneConfig
from para_jax.families.architecture import Experts
from para_jax.parameters import SCALE

if TYPE_CHECKING:
    from jax import Array
    from jax.sharding import Mesh
    from jaxtyping import Float

FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "swish": jax.nn.silu,
}


Adjust = Callable[[str, "Array", "Array"], "Array"]


@dataclass(frozen=True)
class Block:
    """One Transformer layer. Its weights have the names and shapes of `para_jax.parameters.table`.

    With k key/value heads of g query heads each, and hd features a head, most layers have

    attention_norm (d,), qkv (k, g + 2, hd, d), out (d, k * g * hd), mlp_norm (d,), gate_up (2, f, d), down (d, f).

    Each is (outputs, inputs) in its last axes. Where a projection is quantized, `qkv_scale` (k, g + 2, hd, groups) and
    so on are what its integers are multiplied by. Without gates there is up (f, d) in place of gate_up. With e experts
    there are router (e, d), gate_up (e, 2, f, d) and down (e, d, f), and with a shared one shared_router (1, d),
    shared_gate_up and shared_down. `mesh` has the devices that share the weights, `dtype` is that of matmuls' inputs.
    """

    config: BackboneConfig
    weights: Mapping[str, nnx.Param]
    dtype: jnp.dtype
    mesh: Mesh | None = None

    def __call__(
        self,
        x_btd: Float[Array, "b t d"],
        adjust: Adjust,
        angles: rope.Angles,
        attend: Callable[[Array, Array, Array], Array],
    ) -> Float[Array, "b t d"]:
        """One layer. In float16 the residual stream, and what is added to it, is float32 (`Backbone.residual_dtype`).

        `adjust` takes a site's name, its input and its output and returns the output adjusted; without gates also
        `down_proj.input`, which can only be scaled. `attend` takes q (b, t, k, g, hd) and k, v (b, t, k, hd) of these
        tokens and returns (b, t, k * g * hd).
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
        q = self._rotated("q_norm", q, angles)
        if angles.query_scale is not None:
            q = (q * angles.query_scale[:, :, None, None]).astype(q.dtype)
        mixed = attend(q.reshape(b, t, k, g, hd), self._rotated("k_norm", k_, angles), v)
        out = adjust("o_proj", mixed, self._product("out", mixed, x_btd.dtype))
        if c.parallel:
            return x_btd + self._added("attention_post_norm", out + self._feed_forward(normed, adjust, x_btd.dtype))
        x_btd = x_btd + self._added("attention_post_norm", out)
        normed = (self._norm("mlp_norm", x_btd) if c.pre_norm else x_btd).astype(self.dtype)
        return x_btd + self._added("mlp_post_norm", self._feed_forward(normed, adjust, x_btd.dtype))

    def attention_input(self, x_btd: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """What the attention projections see of the residual stream."""
        normed = self._norm("attention_norm", x_btd) if self.config.pre_norm else x_btd
        return normed.astype(self.dtype)

    def _norm(self, name: str, x: Array) -> Array:
        bias = self.weights.get(f"{name}_bias")
        return norm(self.config, x, self.weights[name][...], None if bias is None else bias[...])

    def _added(self, name: str, out: Array) -> Array:
        """What a half of the layer adds to the residual stream."""
        c = self.config
        out = self._norm(name, out) if c.post_norm else out
        return out if c.residual_scale == 1 else out * jnp.asarray(c.residual_scale, out.dtype)

    def _weight(self, name: str) -> Weight:
        scale = self.weights.get(f"{name}{SCALE}")
        return self.weights[name][...], None if scale is None else scale[...]

    def _product(self, name: str, x: Float[Array, "b t i"], dtype: Any = None) -> Float[Array, "b t *o"]:
        """x through one of the projections, its bias included; in x's dtype unless one is given."""
        y, bias = product(x, *self._weight(name), dtype, self.mesh is None), self.weights.get(f"{name}_bias")
        return y if bias is None else y + jnp.expand_dims(bias[...].astype(y.dtype), (0, 1))

    def _heads(self, name: str, x_btf: Float[Array, "b t features"]) -> Float[Array, "b t heads hd"]:
        """Queries or keys by heads, normed if that comes before the rotation."""
        c = self.config
        x = self._norm(name, x_btf) if c.qk_norm == "all" else x_btf
        x = x.reshape(*x.shape[:2], -1, c.head_dim)
        return self._norm(name, x) if c.qk_norm in ("head", "each") and not c.qk_norm_last else x

    def _rotated(self, name: str, x: Float[Array, "b t heads hd"], angles: rope.Angles) -> Float[Array, "b t heads hd"]:
        """Queries or keys by their positions, normed if that comes behind."""
        x = rope.rotate(x, angles.cos, angles.sin, self.config.rope_pairs)
        return self._norm(name, x) if self.config.qk_norm_last else x

    def _feed_forward(self, normed: Array, adjust: Adjust, dtype: Any) -> Array:
        c = self.config
        if c.experts is None:
            return self._dense("", normed, adjust, dtype)
        if not c.experts.shared:
            return self._mixture(c.experts, normed, adjust, dtype)
        share = jax.nn.sigmoid(product(normed, self.weights["shared_router"][...], dtype=jnp.float32))
        shared = self._dense("shared_", normed, adjust, dtype)
        return self._mixture(c.experts, normed, None, dtype) + shared * share.astype(dtype)

    def _dense(self, prefix: str, normed: Array, adjust: Adjust, dtype: Any) -> Array:
        act = partial(xielu, self.weights["act"][...]) if "act" in self.weights else FUNCTIONS[self.config.hidden_act]
        if self.config.gated:
            # Split before the halves are laid end to end: on a mesh each device has a part of both.
            gate, up = (x[:, :, 0] for x in jnp.split(self._product(f"{prefix}gate_up", normed), 2, axis=2))
            gate, up = adjust("gate_proj", normed, gate), adjust("up_proj", normed, up)
            inner = gated(act, gate, up)
        else:
            up = adjust("up_proj", normed, self._product("up", normed))
            inner = act(up.astype(wide(up.dtype))).astype(up.dtype)
            inner = adjust("down_proj.input", inner, inner)
        return adjust("down_proj", inner, self._product(f"{prefix}down", inner, dtype))

    def _mixture(self, experts: Experts, normed: Array, adjust: Adjust | None, dtype: Any) -> Array:
        """Every token goes through its likeliest experts; with `adjust`, the up projection of all is scaled alike."""
        # A scale and no product of this token alone: taken of ones, in float32, which has no rounding to lose.
        scale = jnp.ones((*normed.shape[:2], experts.width), jnp.float32)
        scale = scale if adjust is None else adjust("up_proj", normed, scale)
        chance = jax.nn.softmax(product(normed, self.weights["router"][...], dtype=jnp.float32), axis=-1)
        act, weights = FUNCTIONS[self.config.hidden_act], (self._weight("gate_up"), self._weight("down"))
        return through_experts(normed, chance, scale, *weights, experts, act, self.mesh).astype(dtype)


def xielu(numbers: Float[Array, "4"], x: Float[Array, "*b f"]) -> Float[Array, "*b f"]:
    """xIELU (Huang and Schlag, arXiv 2411.13010), whose numbers (alpha_p, alpha_n, beta, eps) are trained.

    >>> round(float(xielu(jnp.array([0.0, 0.0, 0.5, 0.0]), jnp.array([2.0]))[0]), 3)
    3.773
    """
    alpha_p, alpha_n, beta, eps = numbers.astype(x.dtype)
    below = (jnp.expm1(jnp.minimum(x, eps)) - x) * (beta + jax.nn.softplus(alpha_n))
    return jnp.where(x > 0, jax.nn.softplus(alpha_p) * x * x, below) + beta * x


def norm(config: BackboneConfig, x: Array, weight: Array, bias: Array | None = None) -> Array:
    """The family's kind of norm."""
    if config.norm == "layer":
        return layer_norm(x, weight, bias, config.rms_norm_eps)
    return rms_norm(x, weight, config.rms_norm_eps, config.norm_offset)
