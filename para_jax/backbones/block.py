"""One Transformer layer for all families. The config selects norms, projections and activations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

from para_jax.backbones import rope
from para_jax.backbones.experts import Projections, clamped_swiglu, gated, through_experts
from para_jax.backbones.linear import Weight, layer_norm, matmul, rms_norm
from para_jax.backbones.options import wide
from para_jax.config import BackboneConfig
from para_jax.families.architecture import Experts, LayerKind
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
    "gelu_fast": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "swish": jax.nn.silu,
}
Adjust = Callable[[str, "Array", "Array"], "Array"]  # (site, input, output) -> adjusted output


@dataclass(frozen=True)
class Block:
    """One Transformer layer. Its weights have the names and shapes of `para_jax.parameters.table`.

    With k key/value heads, g query heads per key/value head, and hd features per head, most layers have

    attention_norm (d,), qkv (k, g + 2, hd, d), out (d, k * g * hd), mlp_norm (d,), gate_up (2, f, d), down (d, f).

    The last axes are (outputs, inputs). Quantized projections have scales, such as `qkv_scale` (k, g + 2, hd, groups).
    Layers without gates have up (f, d) instead of gate_up. Layers with e experts have router (e, d), gate_up
    (e, 2, f, d) and down (e, d, f); with a shared expert, also shared_router (1, d), shared_gate_up and shared_down.
    Layers with attention sinks have sinks (k, g).
    `kind` has the layer's sizes; `dtype` is that of matmul inputs; `mesh` is what the weights are sharded over.
    """

    config: BackboneConfig
    kind: LayerKind
    weights: Mapping[str, nnx.Param]
    dtype: jnp.dtype
    mesh: Mesh | None = None

    @property
    def shares(self) -> int:
        """The number of the layer whose keys and values this one takes."""
        assert self.kind.shares is not None
        return self.kind.shares

    @property
    def sinks(self) -> Float[Array, "k g"] | None:
        """The attention sink of each query head, if the family has them."""
        return self.weights["sinks"][...] if self.config.attention_sinks else None

    def attention_input(self, x_btd: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """The input of the q, k and v projections."""
        normed = self._norm("attention_norm", x_btd) if self.config.pre_norm else x_btd
        return normed.astype(self.dtype)

    def queries_keys_values(
        self, normed_btd: Float[Array, "b t d"], adjust: Adjust, angles: rope.Angles
    ) -> tuple[Float[Array, "b t k g hd"], tuple[Float[Array, "b k t hd"], Float[Array, "b k t hd"]] | None]:
        """What attention takes: the queries, and the keys and values; None in layers that share those of another.

        `adjust` takes a site's name, input and output, and returns the adjusted output.
        """
        (k, g, hd), (b, t, _) = self.config.heads(self.kind), normed_btd.shape
        # Split, because its gradient is one concatenation; the gradient of indexing is not.
        ends = {"own": [g, g + 1], "keys": [g], "shared": []}[self.kind.values]
        q, *others = jnp.split(self._project("qkv", normed_btd), ends, axis=-2)
        q = self._split_heads("q_norm", adjust("q_proj", normed_btd, q.reshape(b, t, -1)))
        q = self._rotate("q_norm", q, angles)
        if angles.query_scale is not None:
            q = (q * angles.query_scale[:, :, None, None]).astype(q.dtype)
        q = q.reshape(b, t, k, g, hd)
        if self.kind.values == "shared":
            return q, None
        flat = adjust("k_proj", normed_btd, others[0].reshape(b, t, -1))
        values = flat if self.kind.values == "keys" else adjust("v_proj", normed_btd, others[1].reshape(b, t, -1))
        values = values.reshape(b, t, k, hd)
        if self.config.value_norm:
            values = rms_norm(values, None, self.config.rms_norm_eps)
        keys = self._rotate("k_norm", self._split_heads("k_norm", flat), angles)
        return q, (keys.swapaxes(1, 2), values.swapaxes(1, 2))

    def after_attention(
        self,
        x_btd: Float[Array, "b t d"],
        normed_btd: Float[Array, "b t d"],
        mixed: Float[Array, "b t kghd"],
        adjust: Adjust,
        layer_input: Float[Array, "b t p"] | None = None,
    ) -> Float[Array, "b t d"]:
        """The output of the layer, from its input, the input of attention, and the output of attention.

        With float16, the residual stream is float32 (`Backbone.residual_dtype`). Layers without gates also call
        `adjust` for `down_proj.input`, which can only be scaled. `layer_input` is the layer's own input, in families
        that have one.
        """
        c = self.config
        out = adjust("o_proj", mixed, self._project("out", mixed, x_btd.dtype))
        if c.parallel:
            if c.parallel_norms:
                normed_btd = self._norm("mlp_norm", x_btd).astype(self.dtype)
            out = out + self._feed_forward(normed_btd, x_btd, adjust)
            x_btd = x_btd + self._residual("attention_post_norm", out)
        else:
            x_btd = x_btd + self._residual("attention_post_norm", out)
            normed_btd = (self._norm("mlp_norm", x_btd) if c.pre_norm else x_btd).astype(self.dtype)
            x_btd = x_btd + self._residual("mlp_post_norm", self._feed_forward(normed_btd, x_btd, adjust))
        if layer_input is not None:
            inner = self._project("input_gate", x_btd.astype(self.dtype))
            inner = gated(FUNCTIONS[c.hidden_act], inner, layer_input.astype(self.dtype))
            x_btd = x_btd + self._norm("input_norm", self._project("input_out", inner, x_btd.dtype))
        return x_btd * self.weights["layer_scale"][0].astype(x_btd.dtype) if c.layer_scale else x_btd

    def _norm(self, name: str, x: Array) -> Array:
        weight, bias = (self.weights.get(key) for key in (name, f"{name}_bias"))
        return norm(self.config, x, None if weight is None else weight[...], None if bias is None else bias[...])

    def _residual(self, name: str, out: Array) -> Array:
        """The output of attention or feed-forward as it is added to the residual stream: normed and scaled."""
        c = self.config
        out = self._norm(name, out) if c.post_norm else out
        return out if c.residual_scale == 1 else out * jnp.asarray(c.residual_scale, out.dtype)

    def _weight(self, name: str) -> Weight:
        scale = self.weights.get(f"{name}{SCALE}")
        return self.weights[name][...], None if scale is None else scale[...]

    def _project(self, name: str, x: Float[Array, "b t i"], dtype: Any = None) -> Float[Array, "b t *o"]:
        """A projection with its bias. The dtype defaults to x's."""
        y, bias = matmul(x, *self._weight(name), dtype, self.mesh is None), self.weights.get(f"{name}_bias")
        return y if bias is None else y + jnp.expand_dims(bias[...].astype(y.dtype), (0, 1))

    def _split_heads(self, name: str, x_btf: Float[Array, "b t features"]) -> Float[Array, "b t heads hd"]:
        """Splits queries or keys into heads and applies their norm if it comes before RoPE."""
        c = self.config
        x = self._norm(name, x_btf) if c.qk_norm == "all" else x_btf
        x = x.reshape(*x.shape[:2], -1, self.kind.head_dim or c.head_dim)
        return self._norm(name, x) if c.qk_norm in ("head", "each") and not c.qk_norm_last else x

    def _rotate(self, name: str, x: Float[Array, "b t heads hd"], angles: rope.Angles) -> Float[Array, "b t heads hd"]:
        """Applies RoPE to queries or keys, and their norm if it comes after RoPE."""
        c = self.config
        x = rope.rotate(x, angles.cos, angles.sin, c.rope_pairs) if any(kind.rope for kind in c.layer_kinds) else x
        return self._norm(name, x) if c.qk_norm_last else x

    def _feed_forward(self, normed: Array, x: Array, adjust: Adjust) -> Array:
        """The feed-forward of the normed residual stream x."""
        c, dtype = self.config, x.dtype
        if c.experts is None:
            return self._dense("", normed, adjust, dtype)
        if c.experts.beside:
            dense = self._norm("dense_post_norm", self._dense("dense_", normed, adjust, dtype))
            routed = rms_norm(x, None, c.rms_norm_eps) * self.weights["router_scale"][...].astype(dtype)[None, None]
            routed = (routed * jnp.asarray(c.hidden_size**-0.5, dtype)).astype(self.dtype)
            normed = self._norm("experts_norm", x).astype(self.dtype)
            return dense + self._norm("experts_post_norm", self._mixture(c.experts, normed, routed, None, dtype))
        if not c.experts.shared:
            return self._mixture(c.experts, normed, normed, adjust, dtype)
        gate = jax.nn.sigmoid(matmul(normed, self.weights["shared_router"][...], dtype=jnp.float32))
        shared = self._dense("shared_", normed, adjust, dtype)
        return self._mixture(c.experts, normed, normed, None, dtype) + shared * gate.astype(dtype)

    def _dense(self, prefix: str, normed: Array, adjust: Adjust, dtype: Any) -> Array:
        act = partial(xielu, self.weights["act"][...]) if "act" in self.weights else FUNCTIONS[self.config.hidden_act]
        if self.config.gated:
            # Split the axis of size 2, not a concatenated one: on a mesh each device holds a shard of gate and up.
            gate, up = (x[:, :, 0] for x in jnp.split(self._project(f"{prefix}gate_up", normed), 2, axis=2))
            gate, up = adjust("gate_proj", normed, gate), adjust("up_proj", normed, up)
            inner = gated(act, gate, up)
        else:
            up = adjust("up_proj", normed, self._project("up", normed))
            inner = act(up.astype(wide(up.dtype))).astype(up.dtype)
            inner = adjust("down_proj.input", inner, inner)
        return adjust("down_proj", inner, self._project(f"{prefix}down", inner, dtype))

    def _mixture(self, experts: Experts, normed: Array, routed: Array, adjust: Adjust | None, dtype: Any) -> Array:
        """Applies the top-k experts of each token to `normed`; the router reads `routed`.

        `adjust` scales the up projections of all experts alike.
        """
        # Applied to ones, `adjust` gives the scale itself. It is float32, so that nothing is rounded.
        scale = jnp.ones((*normed.shape[:2], experts.width), jnp.float32)
        scale = scale if adjust is None else adjust("up_proj", normed, scale)
        # Not `_project`, for which `router_scale` would be the scale of a quantized weight.
        score = matmul(routed, self.weights["router"][...], dtype=jnp.float32)
        score = score + self.weights["router_bias"][...].astype(jnp.float32)[None, None] if experts.biases else score
        probability = jax.nn.softmax(score, axis=-1)
        usual = partial(gated, FUNCTIONS[self.config.hidden_act])
        inner = usual if experts.clamped is None else partial(clamped_swiglu, *experts.clamped)
        biases = [self.weights[f"{x}_bias"][...] if experts.biases else None for x in ("gate_up", "down")]
        weights = Projections(self._weight("gate_up"), self._weight("down"), *biases)
        factor = self.weights["expert_scale"][...] if experts.beside else None
        return through_experts(normed, probability, scale, factor, weights, experts, inner, self.mesh).astype(dtype)


def xielu(parameters: Float[Array, "4"], x: Float[Array, "*b f"]) -> Float[Array, "*b f"]:
    """xIELU (Huang and Schlag, arXiv 2411.13010) with the trained parameters (alpha_p, alpha_n, beta, eps).

    >>> round(float(xielu(jnp.array([0.0, 0.0, 0.5, 0.0]), jnp.array([2.0]))[0]), 3)
    3.773
    """
    alpha_p, alpha_n, beta, eps = parameters.astype(x.dtype)
    negative = (jnp.expm1(jnp.minimum(x, eps)) - x) * (beta + jax.nn.softplus(alpha_n))
    return jnp.where(x > 0, jax.nn.softplus(alpha_p) * x * x, negative) + beta * x


def norm(config: BackboneConfig, x: Array, weight: Array | None, bias: Array | None = None) -> Array:
    if config.norm == "layer":
        return layer_norm(x, weight, bias, config.rms_norm_eps)
    return rms_norm(x, weight, config.rms_norm_eps, config.norm_offset)
