"""Prompt-Aware Representation Adjustment (Liu et al., EMNLP 2024 industry track, arXiv 2502.01033).

A vector generator in each Transformer layer reads the hidden states of the prompt once. It makes the vectors that scale
the outputs of Q, V and the up projection of that layer for every token. `ParaLayer` has the poolers:

    h = Pooler(H_prompt)        l = g(h W_down) W_up (+ b_up)        y' = (1 + l_site) * y

docs/method.md lists what the paper states and what this library chose.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from para_jax.adapters.method import BackboneShape, Prompt, as_targets, check_targets
from para_jax.adjustment import Adjustment
from para_jax.annotations import Array, Bool, Float, Int
from para_jax.errors import ParaJaxError, check_known
from para_jax.families.architecture import Axes

Pooling = Literal["last", "mean", "max", "attention"]
Activation = Literal["gelu", "relu", "silu", "rational"]
Reading = Literal["hidden", "normed"]
Scaled = Literal["all", "response"]

# A least-squares fit of the rational activation to GeLU on [-5, 5], with a maximum error of 0.0033.
RATIONAL_NUMERATOR = (0.0, 0.526309, 0.441216, 0.138235, 0.021213, 0.002016, 0.000126)
RATIONAL_DENOMINATOR = (0.209368, 0.044434, 0.106093, -0.01746, 0.001598)


@dataclass(frozen=True)
class ParaConfig:
    """Hyper-parameters of PARA.

    Attributes:
      r: the width of the generator's bottleneck.
      target_modules: the scaled sites, by their Hugging Face names.
      pooling: how the prompt's hidden states are pooled to one vector: the last token's, their mean, their maximum, or
        learned attention over the prompt (MiLoRA, arXiv 2410.18035).
      activation: g; "rational" is the learned rational function of PEDRO (arXiv 2409.17834), one per layer.
      normalize: whether the pooled vector is divided by its root mean square, so that its scale does not depend on the
        depth of the layer.
      bias: whether the generator's up-projection has a bias, a part of the scale that does not depend on the prompt.
      read: the generator's input: the layer's input ("hidden"), or the same after the layer's norm ("normed").
      scale: the tokens that are scaled: "all", or the prompt's last token and all after it ("response"), from which the
        response is predicted. Keys and values of the other prompt tokens are then the backbone's.
      init_std: the initial standard deviation of W_down. W_up is initially zero, so a fresh adapter is the identity.

    Raises ParaJaxError for an invalid value.

    >>> ParaConfig(r=8, pooling="mean").target_modules
    ('q_proj', 'v_proj', 'up_proj')
    """

    method: ClassVar[str] = "para"
    reads_prompt: ClassVar[bool] = True
    decays_to: ClassVar[float] = 0.0
    dropout: ClassVar[float] = 0.0
    peft_type: ClassVar[str] = ""

    r: int = 12
    target_modules: tuple[str, ...] = ("q_proj", "v_proj", "up_proj")
    pooling: Pooling = "last"
    activation: Activation = "gelu"
    normalize: bool = True
    bias: bool = False
    read: Reading = "hidden"
    scale: Scaled = "all"
    init_std: float = 0.02

    def __post_init__(self) -> None:
        if not isinstance(self.r, int) or isinstance(self.r, bool) or self.r < 1:
            raise ParaJaxError(f"r must be a whole number from 1, not {self.r!r}")
        choices = {"pooling": Pooling, "activation": Activation, "read": Reading, "scale": Scaled}
        for name, choice in choices.items():
            check_known(name, [getattr(self, name)], get_args(choice))
        for name in ("normalize", "bias"):
            if not isinstance(getattr(self, name), bool):
                raise ParaJaxError(f"{name} must be true or false, not {getattr(self, name)!r}")
        std = self.init_std
        if not isinstance(std, int | float) or isinstance(std, bool) or not 0 <= std < math.inf:
            raise ParaJaxError(f"init_std must be a number from 0, not {std!r}")
        object.__setattr__(self, "target_modules", as_targets(self.target_modules))

    def modules(self, shape: BackboneShape) -> tuple[Mapping[str, None], ...]:
        """The scaled sites of each layer: the targets that it has. Raises ParaJaxError for an unknown site."""
        check_targets(self.target_modules, shape)
        layers = range(shape.num_hidden_layers)
        return tuple(dict.fromkeys(s for s in self.target_modules if s in shape.sites_of(i)) for i in layers)

    def layer(self, shape: BackboneShape, rngs: nnx.Rngs, layer: Int[Array, ""] | int = 0) -> ParaLayer:
        check_targets(self.target_modules, shape)
        return ParaLayer(self, shape, rngs)

    def size(self, shape: BackboneShape) -> int:
        """The number of parameters.

        >>> from para_jax import BackboneConfig
        >>> llama_7b = BackboneConfig(32000, 4096, 11008, 32, 32, 32, 128)
        >>> ParaConfig(r=12).size(llama_7b)
        8945664
        """
        d, total = shape.hidden_size, 0
        for layer, sites in enumerate(self.modules(shape)):
            widths = sum(shape.sites_of(layer)[site].outputs for site in sites)
            total += d * self.r + self.r * widths + widths * self.bias + d * (self.pooling == "attention")
            total += (len(RATIONAL_NUMERATOR) + len(RATIONAL_DENOMINATOR)) * (self.activation == "rational")
        return total

    @classmethod
    def usual(cls, shape: BackboneShape) -> Mapping[str, ParaConfig]:
        """The rank of the published adapters."""
        return {"para r=12": cls(r=12)}

    def axes(self, name: str) -> Axes:
        """No axis is sharded, because arrays concatenate the outputs of several sites."""
        return ()


class ParaLayer(nnx.Module):
    """The vector generator of one layer of one tenant, in float32.

    Parameters: `down` (d, r), `up` (r, sum of the sites' outputs), and with the matching options `bias`
    (sum of outputs,), `query` (d,) of the attention pooler, `numerator` (7,) and `denominator` (5,) of the
    rational activation.
    """

    def __init__(self, config: ParaConfig, shape: BackboneShape, rngs: nnx.Rngs):
        d = shape.hidden_size
        self.config = config
        self.sites = tuple(site for site in config.target_modules if site in shape.sites)
        self.widths = tuple(shape.sites[site].outputs for site in self.sites)
        self.down = nnx.Param(config.init_std * jax.random.normal(rngs.params(), (d, config.r), jnp.float32))
        self.up = nnx.Param(jnp.zeros((config.r, sum(self.widths)), jnp.float32))
        if config.bias:
            self.bias = nnx.Param(jnp.zeros((sum(self.widths),), jnp.float32))
        if config.pooling == "attention":
            self.query = nnx.Param(jnp.zeros((d,), jnp.float32))
        if config.activation == "rational":
            self.numerator = nnx.Param(jnp.array(RATIONAL_NUMERATOR, jnp.float32))
            self.denominator = nnx.Param(jnp.array(RATIONAL_DENOMINATOR, jnp.float32))

    def prepare(self, prompt: Prompt, layer: Int[Array, ""] | int = 0) -> Adjustment:
        """Reads one prompt at this layer and makes its scale vectors, in float32.

        Only tokens in the prompt's mask are read, at any positions. With an empty mask, the pooled vector is zero.
        """
        read_td = prompt.hidden_td if self.config.read == "hidden" else prompt.normed_td
        pooled_d = self._pool(read_td.astype(jnp.float32), prompt.mask_t)
        if self.config.normalize:
            pooled_d = pooled_d * jax.lax.rsqrt(jnp.mean(jnp.square(pooled_d)) + 1e-6)
        offsets = self._activate(pooled_d @ self.down[...]) @ self.up[...]
        if self.config.bias:
            offsets = offsets + self.bias[...]
        ends = [sum(self.widths[: i + 1]) for i in range(len(self.widths) - 1)]
        by_site = dict(zip(self.sites, jnp.split(offsets, ends), strict=True)) if self.sites else {}
        return Adjustment(by_site) if self.config.scale == "all" else Adjustment(later=by_site)

    def _pool(self, hidden_td: Float[Array, "t d"], mask_t: Bool[Array, " t"]) -> Float[Array, " d"]:
        # `where`, because the other tokens may be NaN, and 0 * NaN is not 0. All uses are reductions, so that the
        # masks of several sequences in a packed row do not copy its tokens.
        kept_td = jnp.where(mask_t[:, None], hidden_td, 0)
        if self.config.pooling == "last":
            last_d = hidden_td[jnp.max(jnp.where(mask_t, jnp.arange(mask_t.size), 0))]
            return jnp.where(jnp.any(mask_t), last_d, 0)
        if self.config.pooling == "max":
            highest_d = jnp.max(jnp.where(mask_t[:, None], hidden_td, -jnp.inf), axis=0)
            return jnp.where(jnp.any(mask_t), highest_d, 0)
        if self.config.pooling == "mean":
            weight_t = mask_t.astype(jnp.float32)
        else:
            score_t = jnp.where(mask_t, jnp.sum(kept_td * self.query[...][None], axis=1), -jnp.inf)
            weight_t = jnp.exp(score_t - jnp.max(score_t, initial=jnp.finfo(jnp.float32).min))
        return jnp.sum(weight_t[:, None] * kept_td, axis=0) / jnp.maximum(jnp.sum(weight_t), 1e-9)

    def _activate(self, x: Float[Array, " r"]) -> Float[Array, " r"]:
        if self.config.activation == "gelu":
            return jax.nn.gelu(x, approximate=False)
        if self.config.activation == "relu":
            return jax.nn.relu(x)
        if self.config.activation == "silu":
            return jax.nn.silu(x)
        return rational(x, self.numerator[...], self.denominator[...])


def rational(x: Float[Array, "*n"], numerator: Float[Array, "7"], denominator: Float[Array, "5"]) -> Float[Array, "*n"]:
    """Ra(x) = sum_{j=0..6} a_j x^j / (1 + |sum_{i=1..5} b_i x^i|), PEDRO's learned activation.

    >>> rational(jnp.zeros(1), jnp.array(RATIONAL_NUMERATOR), jnp.array(RATIONAL_DENOMINATOR)).tolist()
    [0.0]
    """
    divisor = jnp.polyval(jnp.append(denominator[::-1], 0.0), x)
    return jnp.polyval(numerator[::-1], x) / (1 + jnp.abs(divisor))
