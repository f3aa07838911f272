"""What a decoder can be made of: the parts and sizes that families differ in, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

ATTENTION_SITES = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_SITES = ("gate_proj", "up_proj", "down_proj")
# The logical axes of an array; `para_jax/sharding.py` says which axis of a mesh each is split over, None over none.
Axis = Literal["vocab", "model", "kv_heads", "heads", "inner"]
Axes = tuple[Axis | None, ...]
# Those of each site's inputs and outputs.
SITE_AXES: dict[str, tuple[Axis, Axis]] = {
    "q_proj": ("model", "heads"),
    "k_proj": ("model", "kv_heads"),
    "v_proj": ("model", "kv_heads"),
    "o_proj": ("heads", "model"),
    "gate_proj": ("model", "inner"),
    "up_proj": ("model", "inner"),
    "down_proj": ("inner", "model"),
}
# The activations of feed-forwards, by their names in config.json; `backbones/block.py` has the functions.
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "gelu_new", "relu", "relu2", "swish")


class RopeOptions(NamedTuple):
    """The options that a type of RoPE has to have and may have, by transformers' names."""

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
    "longrope": RopeOptions(
        ("short_factor", "long_factor", "original_max_position_embeddings"), ("factor", "attention_factor")
    ),
}


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding.

    Attributes:
      theta: the base of the wavelengths.
      rope_type: how frequencies are stretched for long contexts, a type of transformers' (`backbones/rope.py`).
      partial_rotary_factor: the share of a head's features that is rotated.
      options: what the type needs to know, by transformers' names.
      query_scaling: (beta, n), where queries at position p are multiplied by 1 + beta log(1 + floor(p / n)).
    """

    theta: float = 10000.0
    rope_type: str = "default"
    partial_rotary_factor: float = 1.0
    options: tuple[tuple[str, Any], ...] = ()
    query_scaling: tuple[float, int] | None = None

    def dim(self, head_dim: int) -> int:
        """How many features of a head are turned."""
        return int(head_dim * self.partial_rotary_factor)


@dataclass(frozen=True)
class AttentionKind:
    """What layers of one model may differ in: how far back a token sees, and how positions are told.

    Attributes:
      window: a token sees itself and `window - 1` tokens before it; all, if None.
      rope: None where queries and keys have no positions (NoPE).
    """

    window: int | None = None
    rope: Rope | None = Rope()


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of the feed-forward block.

    Attributes:
      count, per_token: how many there are, and how many of them a token is sent to.
      width: the inner features of one.
      normalized: whether the weights of a token's experts are made to sum to one.
      shared: the inner features of the expert that every token goes through, times the sigmoid of a gate; 0 if there
        is none.
    """

    count: int
    per_token: int
    width: int
    normalized: bool
    shared: int = 0


class Names(NamedTuple):
    """What a family calls its tensors. `qkv` and `gate_up` are set where it keeps these in one; `expert` has the
    gate, up and down projections of one expert; `modules` is where it has a site, or a norm of ours, if not where
    Llama has it."""

    qkv: str = ""
    gate_up: str = ""
    router: str = ""
    experts: str = ""
    expert: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    modules: Mapping[str, str] = MappingProxyType({})


class Site(NamedTuple):
    """A projection `y = x W^T` with x (..., inputs) and y (..., outputs), and where it is in a layer.

    `linear` is False where one name stands for the projections of many experts, whose outputs may be scaled and
    nothing else: a token goes through several of them. `fused` is the place of the module that transformers has in its
    place, which may be one for several sites, whose outputs stand there in the order of `sites`; empty, if it is this.
    """

    inputs: int
    outputs: int
    path: str
    linear: bool = True
    fused: str = ""


@dataclass(frozen=True)
class Architecture:
    """All sizes and settings of a decoder: the fields of `BackboneConfig`, which documents them."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    attention_kinds: tuple[AttentionKind, ...] = (AttentionKind(),)
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
    qk_norm: Literal["none", "head", "all", "each"] = "none"
    qk_norm_last: bool = False
    pre_norm: bool = True
    post_norm: bool = False
    norm_offset: float = 0.0
    parallel: bool = False
    gated: bool = True
    rope_pairs: Literal["halves", "neighbours"] = "halves"
    attention_scale: float | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logits_scale: float = 1.0
    experts: Experts | None = None
    hf: str = field(default="", compare=False, repr=False)
