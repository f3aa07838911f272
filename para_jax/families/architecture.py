"""`Architecture`: a decoder as plain data, its sizes and the parts in which families differ.

`para_jax/config.py` adds what follows from these fields.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

ATTENTION_SITES = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_SITES = ("gate_proj", "up_proj", "down_proj")
# Logical axes of arrays. `para_jax/sharding.py` maps them to mesh axes; None is not sharded.
Axis = Literal["vocab", "model", "kv_heads", "heads", "inner"]
Axes = tuple[Axis | None, ...]
# The logical axes of each site's inputs and outputs.
SITE_AXES: dict[str, tuple[Axis, Axis]] = {
    "q_proj": ("model", "heads"),
    "k_proj": ("model", "kv_heads"),
    "v_proj": ("model", "kv_heads"),
    "o_proj": ("heads", "model"),
    "gate_proj": ("model", "inner"),
    "up_proj": ("model", "inner"),
    "down_proj": ("inner", "model"),
}
# Names of feed-forward activations in config.json; `backbones/block.py` has the functions.
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "gelu_new", "gelu_fast", "relu", "relu2", "swish")


class RopeOptions(NamedTuple):
    """The required and the optional options of a RoPE type, with transformers' names."""

    needs: tuple[str, ...] = ()
    may_have: tuple[str, ...] = ()


ROPE_TYPES: dict[str, RopeOptions] = {
    "default": RopeOptions(),
    "linear": RopeOptions(("factor",)),
    "dynamic": RopeOptions(("factor",)),
    "llama3": RopeOptions(("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")),
    "yarn": RopeOptions(
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
    "proportional": RopeOptions(may_have=("factor",)),
    "longrope": RopeOptions(
        ("short_factor", "long_factor", "original_max_position_embeddings"), ("factor", "attention_factor")
    ),
}


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding.

    Attributes:
      theta: the base of the wavelengths.
      rope_type: transformers' type of scaling for long contexts (`backbones/rope.py`).
      partial_rotary_factor: the fraction of a head's features that is rotated.
      options: the options of the type, with transformers' names.
      query_scaling: (beta, n) multiplies queries at position p by 1 + beta log(1 + floor(p / n)).
      backwards: whether features are rotated by the negative angles.
    """

    theta: float = 10000.0
    rope_type: str = "default"
    partial_rotary_factor: float = 1.0
    options: tuple[tuple[str, Any], ...] = ()
    query_scaling: tuple[float, int] | None = None
    backwards: bool = False

    def dim(self, head_dim: int) -> int:
        """The number of a head's features that are rotated. Proportional RoPE rotates the others by zero."""
        return head_dim if self.rope_type == "proportional" else int(head_dim * self.partial_rotary_factor)


@dataclass(frozen=True)
class LayerKind:
    """What the layers of one model may differ in.

    Attributes:
      window: the number of tokens that a token attends to, itself included; None for all.
      rope: None for queries and keys without positions (NoPE).
      head_dim, num_key_value_heads, intermediate_size: sizes of these layers; None for the model's.
      values: "own" values have a projection; "keys" are the keys before their norm; "shared" keys and values are those
        of the layer `shares`.
      shares: the last earlier layer of the same attention with keys and values, if they are shared.
    """

    window: int | None = None
    rope: Rope | None = Rope()
    head_dim: int | None = None
    num_key_value_heads: int | None = None
    intermediate_size: int | None = None
    values: Literal["own", "keys", "shared"] = "own"
    shares: int | None = None

    @property
    def shape(self) -> LayerKind:
        """The kind without what array shapes do not depend on: layers of one shape are stacked."""
        return replace(self, window=None, rope=None)


@dataclass(frozen=True)
class Experts:
    """A mixture of experts instead of the feed-forward.

    Attributes:
      count, per_token: the number of experts, and the number that each token is routed to.
      width: the inner features of each expert.
      normalized: whether the router probabilities of a token's experts are normalized to sum to one.
      shared: the inner features of the shared expert, which every token uses and a sigmoid gate scales; 0 for none.
      beside: whether a layer has a dense feed-forward too, whose output is added. Router and experts then read the
        residual stream, each with a norm, and the weights of a token's experts have a factor for each expert.
      biases: whether the router and all projections of the experts have biases.
      clamped: (alpha, limit) of GPT-OSS's gate (`backbones/experts.py`) instead of the activation; None if there is
        none.
    """

    count: int
    per_token: int
    width: int
    normalized: bool
    shared: int = 0
    beside: bool = False
    biases: bool = False
    clamped: tuple[float, float] | None = None


class Names(NamedTuple):
    """The names of a family's tensors.

    Attributes:
      qkv, gate_up: the fused modules, if any.
      by_head: whether the outputs of `qkv` are ordered by head: query, key and value of the first head, and so on.
      expert: the gate, up and down projections of an expert; None if one tensor has those of all experts.
      interleaved: whether these tensors are (experts, inputs, outputs), and the outputs of gate and up take turns.
      modules: the modules of sites and norms whose names differ from Llama's; "norm" is the final norm.
      stem, layers: the path of the decoder, and the name of its list of layers.
      embed, positions: the embeddings of tokens, and of positions if they are learned.
      head: the output layer, which is outside the decoder.
      transposed: whether the weights of projections are (inputs, outputs).
      spare: endings of the names of tensors in old checkpoints that no code reads, such as masks.
    """

    qkv: str = ""
    gate_up: str = ""
    router: str = ""
    experts: str = ""
    expert: tuple[str, str, str] | None = ("gate_proj", "up_proj", "down_proj")
    interleaved: bool = False
    modules: Mapping[str, str] = MappingProxyType({})
    by_head: bool = False
    stem: str = "model"
    layers: str = "layers"
    embed: str = "embed_tokens"
    positions: str = ""
    head: str = "lm_head"
    transposed: bool = False
    spare: tuple[str, ...] = ("rotary_emb.inv_freq",)


class Stack(NamedTuple):
    """The layers whose arrays have the same shapes, which are stacked on a leading axis.

    Attributes:
      name: empty if all layers are in one stack, else `layers_N` with the number N of the first layer.
      layers: the numbers of the layers, ascending.
    """

    name: str
    layers: tuple[int, ...]


class Site(NamedTuple):
    """A projection `y = x W^T` with x (..., inputs) and y (..., outputs), and its path in a layer.

    `linear` is False if the site stands for the projections of many experts, whose outputs may only be scaled. `fused`
    is the path of transformers' module if it differs; it may hold several sites, with their outputs in site order. With
    `heads` above 1, every head has its outputs in this order. `transposed` is whether transformers stores W^T.
    """

    inputs: int
    outputs: int
    path: str
    linear: bool = True
    fused: str = ""
    heads: int = 1
    transposed: bool = False


def all_sites(of_layers: Iterable[Mapping[str, Site]]) -> dict[str, Site]:
    """The sites that any layer has, in the usual order."""
    found: dict[str, Site] = {}
    for sites in of_layers:
        found = {**sites, **found}
    order = (*ATTENTION_SITES, *MLP_SITES)
    return {name: found[name] for name in sorted(found, key=order.index)}


@dataclass(frozen=True)
class Architecture:
    """The sizes and settings of a decoder. `BackboneConfig` documents the fields."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    layer_kinds: tuple[LayerKind, ...] = (LayerKind(),)
    kind_of_layer: tuple[int, ...] = ()
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 2048
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    name: str = ""
    family: str = "llama"
    hidden_act: str = "silu"
    biases: tuple[str, ...] = ()
    norm: Literal["rms", "layer"] = "rms"
    norm_weights: bool = True
    embedding_norm: bool = False
    qk_norm: Literal["none", "head", "all", "each"] = "none"
    qk_norm_last: bool = False
    pre_norm: bool = True
    post_norm: bool = False
    norm_offset: float = 0.0
    parallel: bool = False
    parallel_norms: bool = False
    gated: bool = True
    rope_pairs: Literal["halves", "neighbours"] = "halves"
    position_offset: int | None = None
    attention_scale: float | None = None
    attn_logit_softcapping: float | None = None
    attention_sinks: bool = False
    final_logit_softcapping: float | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logits_scale: float = 1.0
    experts: Experts | None = None
    value_norm: bool = False
    layer_scale: bool = False
    per_layer_inputs: tuple[int, int] | None = None
    hf: str = field(default="", compare=False, repr=False)

    def kind(self, layer: int) -> LayerKind:
        """The kind of a layer."""
        return self.layer_kinds[self.kind_of_layer[layer] if self.kind_of_layer else 0]

    def heads(self, kind: LayerKind) -> tuple[int, int, int]:
        """The key/value heads of layers of a kind, the query heads for each, and the features of a head."""
        k = kind.num_key_value_heads or self.num_key_value_heads
        return k, self.num_attention_heads // k, kind.head_dim or self.head_dim
