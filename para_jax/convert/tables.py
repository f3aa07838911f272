"""Which Hugging Face tensors make which of ours: one invertible table serves loading, saving and merging."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from para_jax.backbones.config import ATTENTION_SITES, MLP_SITES, BackboneConfig


class Names(NamedTuple):
    """What a family calls its tensors. `qkv` and `gate_up` are set where it keeps these in one; `expert` has the
    gate, up and down projections of one expert."""

    qkv: str = ""
    gate_up: str = ""
    router: str = ""
    experts: str = ""
    expert: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")


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
class Entry:
    """One of our tensors: its parts joined along `axis`, and then reshaped if `reshaped` says so."""

    name: str
    parts: tuple[Part, ...]
    axis: int = 0
    reshaped: tuple[int, ...] = ()

    @property
    def joined(self) -> tuple[int, ...]:
        first = self.parts[0].view
        width = sum(part.view[self.axis] for part in self.parts)
        return (*first[: self.axis], width, *first[self.axis + 1 :])

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
            asked[self.axis] = slice(0, self.joined[self.axis])
        flat = out.reshape([x.stop - x.start for x in asked])
        wanted, before = asked[self.axis], 0
        for x, part in zip(parts, self.parts, strict=True):
            start, stop = max(wanted.start, before), min(wanted.stop, before + part.view[self.axis])
            if start < stop:
                there, here = list(asked), [slice(None)] * flat.ndim
                there[self.axis] = slice(start - before, stop - before)
                here[self.axis] = slice(start - wanted.start, stop - wanted.start)
                flat[tuple(here)] = x.reshape(part.view)[tuple(there)]
            before += part.view[self.axis]

    def split(self, ours: np.ndarray) -> list[np.ndarray]:
        """Theirs from ours, a part each; inverse of `join`."""
        ends = np.cumsum([part.view[self.axis] for part in self.parts])[:-1]
        pieces = np.split(ours.reshape(self.joined), ends, self.axis)
        return [x.reshape(part.shape) for part, x in zip(self.parts, pieces, strict=True)]

    def tensors(self, ours: np.ndarray) -> dict[str, np.ndarray]:
        """Their whole tensors: the parts of one are all in one entry, in order."""
        found: dict[str, list[np.ndarray]] = {}
        for part, x in zip(self.parts, self.split(ours), strict=True):
            found.setdefault(part.name, []).append(x)
        return {name: xs[0] if len(xs) == 1 else np.concatenate(xs) for name, xs in found.items()}


def entries_of(config: BackboneConfig, names: Names, layer: int | None = None) -> list[Entry]:
    """The entries of one layer, or with None those outside the layers."""
    if layer is not None:
        return list(_layer(config, names, f"model.layers.{layer}"))
    d, v = config.hidden_size, config.vocab_size
    found = [_whole("embed", "model.embed_tokens", v, d), _whole("norm", "model.norm", d)]
    return found if config.tie_word_embeddings else [*found, _whole("head", "lm_head", v, d)]


def _whole(ours: str, theirs: str, *shape: int, site: str = "") -> Entry:
    return Entry(ours, (Part(f"{theirs}.weight", shape, shape, site=site),))


def _layer(config: BackboneConfig, names: Names, at: str) -> Iterator[Entry]:
    d, f, hd, k = config.hidden_size, config.intermediate_size, config.head_dim, config.num_key_value_heads
    g = config.num_attention_heads // k

    # With norms behind a layer's halves, the one before the second half has another name than in Llama.
    if config.pre_norm:
        yield _whole("attention_norm", f"{at}.input_layernorm", d)
        yield _whole("mlp_norm", f"{at}.{'pre_feedforward' if config.post_norm else 'post_attention'}_layernorm", d)
    if config.post_norm:
        yield _whole("attention_post_norm", f"{at}.post_attention_layernorm", d)
        yield _whole("mlp_post_norm", f"{at}.post_feedforward_layernorm", d)
    if config.qk_norm != "none":
        heads = (1, 1) if config.qk_norm == "head" else (k * g, k)
        for x, count in zip("qk", heads, strict=True):
            yield _whole(f"{x}_norm", f"{at}.self_attn.{x}_norm", count * hd)

    sizes = {"q_proj": g, "k_proj": 1, "v_proj": 1}
    paths = {site: f"{at}.{'self_attn' if site in ATTENTION_SITES else 'mlp'}.{site}" for site in config.sites}
    paths |= {"gate_proj": f"{at}.mlp.gate_proj"}
    views: dict[str, tuple[int, ...]] = {site: (k, n, hd) for site, n in sizes.items()}
    yield _fused("qkv", f"{at}.{names.qkv}" if names.qkv else "", paths, views, (d,), axis=1)
    yield _whole("out", f"{at}.self_attn.o_proj", d, k * g * hd, site="o_proj")
    if "q_proj" in config.biases:
        yield _fused("qkv_bias", "", paths, views, (), axis=1)
    if "o_proj" in config.biases:
        yield _bias("out_bias", paths["o_proj"], d)

    if config.experts is not None:
        yield from _experts(config, names, at)
        return
    views = {site: (1, f) for site in MLP_SITES[:2]}
    yield _fused("gate_up", f"{at}.{names.gate_up}" if names.gate_up else "", paths, views, (d,), axis=0)
    yield _whole("down", f"{at}.mlp.down_proj", d, f, site="down_proj")
    if "up_proj" in config.biases:
        yield _fused("gate_up_bias", "", paths, views, (), axis=0)
        yield _bias("down_bias", paths["down_proj"], d)


def _bias(ours: str, theirs: str, size: int) -> Entry:
    site = theirs.rpartition(".")[2]
    return Entry(ours, (Part(f"{theirs}.bias", (size,), (size,), site=site),))


def _fused(
    ours: str,
    theirs: str,
    paths: Mapping[str, str],
    views: Mapping[str, tuple[int, ...]],
    inputs: tuple[int, ...],
    axis: int,
) -> Entry:
    """Several projections in one tensor of ours: each a tensor of theirs, or the rows of one tensor named `theirs`."""
    kind = "weight" if inputs else "bias"
    total, start, parts = sum(math.prod(view) for view in views.values()), 0, []
    for site, view in views.items():
        size = math.prod(view)
        rows = (start, start + size, total) if theirs else None
        parts.append(Part(f"{theirs or paths[site]}.{kind}", (size, *inputs), (*view, *inputs), rows, site))
        start += size
    return Entry(ours, tuple(parts), axis)


def _experts(config: BackboneConfig, names: Names, at: str) -> Iterator[Entry]:
    """The router, and each kind of projection of all experts in one tensor."""
    assert config.experts is not None
    d, count, f = config.hidden_size, config.experts.count, config.experts.width
    gate, up, down = names.expert
    yield _whole("router", f"{at}.{names.router}", count, d)

    def part(expert: int, name: str, site: str, *shape: int) -> Part:
        return Part(f"{at}.{names.experts}.{expert}.{name}.weight", shape, (1, *shape), site=site)

    both = [part(e, name, site, f, d) for e in range(count) for name, site in ((gate, "gate_proj"), (up, "up_proj"))]
    yield Entry("gate_up", tuple(both), reshaped=(count, 2, f, d))
    yield Entry("down", tuple(part(e, down, "down_proj", d, f) for e in range(count)))
