"""One table of a backbone's weights: the name, shape, logical axes, initial values and Hugging Face tensors of each.

Whatever handles weights derives from it: initialization, sharding, loading, saving, merging, quantizing, counting and
planning. A weight that is not in it does not exist.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from para_jax.families.architecture import ATTENTION_SITES, MLP_SITES, Architecture, Axes, Names, Site
from para_jax.families.table import FAMILIES

VOCABULARY: Axes = ("vocab", "model")  # of the embeddings, and of the head


@dataclass(frozen=True)
class Part:
    """A Hugging Face tensor, or some rows of one.

    Attributes:
      shape: of the part.
      view: the shape in which it is joined with its neighbours.
      rows: the first and last of the tensor's rows and how many it has, where the family fuses several.
      site: the projection whose weight it is.
    """

    name: str
    shape: tuple[int, ...]
    view: tuple[int, ...]
    rows: tuple[int, int, int] | None = None
    site: str = ""

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""
        return self.shape if self.rows is None else (self.rows[2], *self.shape[1:])

    def of(self, tensor: np.ndarray) -> np.ndarray:
        """The part of its tensor."""
        return tensor if self.rows is None else tensor[self.rows[0] : self.rows[1]]


@dataclass(frozen=True)
class Parameter:
    """One weight of ours: its parts joined along an axis, and then reshaped if `reshaped` says so.

    Attributes:
      name: within its layer, such as `qkv`; or `embed`, `norm` and `head`, outside the layers.
      axes: the logical axis of each of its axes.
      init: "normal" is N(0, 0.02), "zeros" is for biases, and "norm" makes a norm's factors one.
      quantizable: whether it may be kept in int8 or int4. Its scales are then named `scale`.
    """

    name: str
    parts: tuple[Part, ...]
    axes: Axes
    init: Literal["normal", "zeros", "norm"] = "normal"
    quantizable: bool = False
    joined_along: int = 0
    reshaped: tuple[int, ...] = ()

    @property
    def scale(self) -> str:
        """The name of its scales, where it is quantized."""
        return f"{self.name}{SCALE}"

    @property
    def joined(self) -> tuple[int, ...]:
        first = self.parts[0].view
        width = sum(part.view[self.joined_along] for part in self.parts)
        return (*first[: self.joined_along], width, *first[self.joined_along + 1 :])

    @property
    def shape(self) -> tuple[int, ...]:
        """Of our tensor."""
        return self.reshaped or self.joined

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def join(self, parts: list[np.ndarray]) -> np.ndarray:
        """Ours from theirs."""
        ours = np.empty(self.shape, np.result_type(*parts))
        self.block(parts, tuple(slice(0, n) for n in self.shape), out=ours)
        return ours

    def block(self, parts: list[np.ndarray], place: tuple[slice, ...], out: np.ndarray) -> None:
        """Writes what `join` has at `place` into `out`, cast to its dtype, and reads no more of theirs than that.

        Axes that `reshaped` makes of the joined one have to be whole in `place`.
        """
        made_of = len(self.shape) - len(self.joined)
        assert all(x.stop - x.start == n for x, n in zip(place[:made_of], self.shape, strict=False))
        asked = list(place[made_of:])
        if made_of:
            asked[self.joined_along] = slice(0, self.joined[self.joined_along])
        flat = out.reshape([x.stop - x.start for x in asked])
        wanted, before = asked[self.joined_along], 0
        for x, part in zip(parts, self.parts, strict=True):
            start, stop = max(wanted.start, before), min(wanted.stop, before + part.view[self.joined_along])
            if start < stop:
                there, here = list(asked), [slice(None)] * flat.ndim
                there[self.joined_along] = slice(start - before, stop - before)
                here[self.joined_along] = slice(start - wanted.start, stop - wanted.start)
                flat[tuple(here)] = x.reshape(part.view)[tuple(there)]
            before += part.view[self.joined_along]

    def split(self, ours: np.ndarray) -> list[np.ndarray]:
        """Theirs from ours, a part each; inverse of `join`."""
        ends = np.cumsum([part.view[self.joined_along] for part in self.parts])[:-1]
        pieces = np.split(ours.reshape(self.joined), ends, self.joined_along)
        return [x.reshape(part.shape) for part, x in zip(self.parts, pieces, strict=True)]

    def tensors(self, ours: np.ndarray) -> dict[str, np.ndarray]:
        """Their whole tensors: the parts of one are all in one entry, in order."""
        found: dict[str, list[np.ndarray]] = {}
        for part, x in zip(self.parts, self.split(ours), strict=True):
            found.setdefault(part.name, []).append(x)
        return {name: xs[0] if len(xs) == 1 else np.concatenate(xs) for name, xs in found.items()}


SCALE = "_scale"


def table(config: Architecture, layer: int | None = None) -> tuple[Parameter, ...]:
    """The weights of one layer, or with None those outside the layers.

    >>> from para_jax import BackboneConfig
    >>> small = BackboneConfig(64, 8, 16, 2, 2, 1, 4)
    >>> [(p.name, p.shape, p.axes) for p in table(small, 0)][2:4]
    [('qkv', (1, 4, 4, 8), ('kv_heads', None, None, 'model')), ('out', (8, 8), ('model', 'heads'))]
    >>> [part.name for part in table(small, 1)[2].parts][0]
    'model.layers.1.self_attn.q_proj.weight'
    """
    if layer is not None:
        return tuple(_layer(config, f"model.layers.{layer}"))
    d, v = config.hidden_size, config.vocab_size
    embed = _whole("embed", "model.embed_tokens", (v, d), VOCABULARY)
    head = _whole("head", "lm_head", (v, d), VOCABULARY)
    return (embed, _norm("norm", "model.norm", d), *(() if config.tie_word_embeddings else (head,)))


@lru_cache(maxsize=64)
def axes(config: Architecture) -> Mapping[str, Axes]:
    """The logical axes of every weight by its name, those of the scales of quantized ones included."""
    every = [*table(config), *table(config, 0)]
    scales = {p.scale: (*p.axes[:-1], None) for p in every if p.quantizable}  # one for each group of inputs
    return {p.name: p.axes for p in every} | scales


def size(config: Architecture) -> int:
    """The number of parameters."""
    layers = range(config.num_hidden_layers)
    return sum(p.size for p in table(config)) + sum(p.size for layer in layers for p in table(config, layer))


def sites(config: Architecture) -> Mapping[str, Site]:
    """The projections of a layer that adapters may adjust, by Hugging Face name.

    Of experts it is the up projection, which one vector scales in all of them.
    """
    d, f, names = config.hidden_size, config.intermediate_size, names_of(config)
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    attention = {
        "q_proj": Site(d, q, "self_attn.q_proj", fused=names.qkv),
        "k_proj": Site(d, kv, "self_attn.k_proj", fused=names.qkv),
        "v_proj": Site(d, kv, "self_attn.v_proj", fused=names.qkv),
        "o_proj": Site(q, d, "self_attn.o_proj"),
    }
    if config.experts is not None:
        up = Site(d, config.experts.width, "mlp.experts.up_proj", linear=False)
        return {**attention, "up_proj": up}
    return {
        **attention,
        "gate_proj": Site(d, f, "mlp.gate_proj", fused=names.gate_up),
        "up_proj": Site(d, f, "mlp.up_proj", fused=names.gate_up),
        "down_proj": Site(f, d, "mlp.down_proj"),
    }


def names_of(config: Architecture) -> Names:
    """What the family calls its tensors."""
    return FAMILIES[config.family].names


def _whole(
    ours: str, theirs: str, shape: tuple[int, ...], axes: Axes, site: str = "", quantizable: bool = False
) -> Parameter:
    return Parameter(ours, (Part(f"{theirs}.weight", shape, shape, site=site),), axes, quantizable=quantizable)


def _norm(ours: str, theirs: str, size: int) -> Parameter:
    return Parameter(ours, (Part(f"{theirs}.weight", (size,), (size,)),), (None,), "norm")


def _layer(config: Architecture, at: str) -> Iterator[Parameter]:
    d, hd, k = config.hidden_size, config.head_dim, config.num_key_value_heads
    g, names = config.num_attention_heads // k, names_of(config)

    # With norms behind a layer's halves, the one before the second half has another name than in Llama.
    if config.pre_norm:
        yield _norm("attention_norm", f"{at}.input_layernorm", d)
        yield _norm("mlp_norm", f"{at}.{'pre_feedforward' if config.post_norm else 'post_attention'}_layernorm", d)
    if config.post_norm:
        yield _norm("attention_post_norm", f"{at}.post_attention_layernorm", d)
        yield _norm("mlp_post_norm", f"{at}.post_feedforward_layernorm", d)
    if config.qk_norm != "none":
        heads = (1, 1) if config.qk_norm == "head" else (k * g, k)
        for x, count in zip("qk", heads, strict=True):
            yield _norm(f"{x}_norm", f"{at}.self_attn.{x}_norm", count * hd)

    paths = {site: f"{at}.self_attn.{site}" for site in ATTENTION_SITES}
    views = {"q_proj": (k, g, hd), "k_proj": (k, 1, hd), "v_proj": (k, 1, hd)}
    fused = f"{at}.{names.qkv}" if names.qkv else ""
    yield _fused("qkv", fused, paths, views, ("kv_heads", None, None, "model"), joined_along=1, inputs=d)
    yield _whole("out", paths["o_proj"], (d, k * g * hd), ("model", "heads"), "o_proj", quantizable=True)
    if "q_proj" in config.biases:
        yield _fused("qkv_bias", "", paths, views, ("kv_heads", None, None), joined_along=1)
    if "o_proj" in config.biases:
        yield _bias("out_bias", paths["o_proj"], d)
    yield from _dense(config, at) if config.experts is None else _experts(config, at)


def _dense(config: Architecture, at: str) -> Iterator[Parameter]:
    d, f, names = config.hidden_size, config.intermediate_size, names_of(config)
    paths = {site: f"{at}.mlp.{site}" for site in MLP_SITES}
    views = {site: (1, f) for site in MLP_SITES[:2]}
    fused = f"{at}.{names.gate_up}" if names.gate_up else ""
    yield _fused("gate_up", fused, paths, views, (None, "inner", "model"), inputs=d)
    yield _whole("down", paths["down_proj"], (d, f), ("model", "inner"), "down_proj", quantizable=True)
    if "up_proj" in config.biases:
        yield _fused("gate_up_bias", "", paths, views, (None, "inner"))
        yield _bias("down_bias", paths["down_proj"], d)


def _experts(config: Architecture, at: str) -> Iterator[Parameter]:
    """The router, and each kind of projection of all experts in one tensor."""
    assert config.experts is not None
    d, count, f, names = config.hidden_size, config.experts.count, config.experts.width, names_of(config)
    gate, up, down = names.expert
    yield _whole("router", f"{at}.{names.router}", (count, d), (None, None))

    def part(expert: int, name: str, site: str, *shape: int) -> Part:
        return Part(f"{at}.{names.experts}.{expert}.{name}.weight", shape, (1, *shape), site=site)

    both = [part(e, name, site, f, d) for e in range(count) for name, site in ((gate, "gate_proj"), (up, "up_proj"))]
    shape = (count, 2, f, d)
    yield Parameter("gate_up", tuple(both), (None, None, "inner", "model"), quantizable=True, reshaped=shape)
    every = tuple(part(e, down, "down_proj", d, f) for e in range(count))
    yield Parameter("down", every, (None, "model", "inner"), quantizable=True)


def _bias(ours: str, theirs: str, size: int) -> Parameter:
    site = theirs.rpartition(".")[2]
    return Parameter(ours, (Part(f"{theirs}.bias", (size,), (size,), site=site),), (None,), "zeros")


def _fused(
    ours: str,
    theirs: str,
    paths: Mapping[str, str],
    views: Mapping[str, tuple[int, ...]],
    axes: Axes,
    joined_along: int = 0,
    inputs: int | None = None,
) -> Parameter:
    """Several projections in one tensor of ours, or their biases if they have no `inputs`.

    Each is a tensor of theirs, or the rows of one tensor named `theirs`.
    """
    kind, behind = ("bias", ()) if inputs is None else ("weight", (inputs,))
    total, start, parts = sum(math.prod(view) for view in views.values()), 0, []
    for site, view in views.items():
        size = math.prod(view)
        rows = (start, start + size, total) if theirs else None
        parts.append(Part(f"{theirs or paths[site]}.{kind}", (size, *behind), (*view, *behind), rows, site))
        start += size
    init: Literal["normal", "zeros"] = "zeros" if inputs is None else "normal"
    return Parameter(ours, tuple(parts), axes, init, inputs is not None, joined_along)
