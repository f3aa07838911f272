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

from para_jax.families.architecture import MLP_SITES, Architecture, Axes, Axis, Names, Site
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
    norm = _norms(config, "norm", f"model.{names_of(config).modules.get('norm', 'norm')}", d)
    bias = (_bias("head_bias", "lm_head", v),) if "lm_head" in config.biases else ()
    return (embed, *norm, *(() if config.tie_word_embeddings else (head,)), *bias)


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

    Of experts it is the up projection, which one vector scales in all of them; or, where a token goes through a shared
    expert too, the shared one's.
    """
    d, f, names = config.hidden_size, config.intermediate_size, names_of(config)
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim

    def site(name: str, inputs: int, outputs: int, at: str) -> Site:
        return Site(inputs, outputs, f"{at}.{name}", fused=names.modules.get(name, ""))

    attention = {
        "q_proj": Site(d, q, "self_attn.q_proj", fused=names.qkv),
        "k_proj": Site(d, kv, "self_attn.k_proj", fused=names.qkv),
        "v_proj": Site(d, kv, "self_attn.v_proj", fused=names.qkv),
        "o_proj": site("o_proj", q, d, "self_attn"),
    }
    mlp = "mlp"
    if config.experts is not None:
        if not config.experts.shared:
            up = Site(d, config.experts.width, "mlp.experts.up_proj", linear=False)
            return {**attention, "up_proj": up}
        mlp, f = "mlp.shared_expert", config.experts.shared
    if not config.gated:
        return {**attention, "up_proj": site("up_proj", d, f, mlp), "down_proj": site("down_proj", f, d, mlp)}
    return {
        **attention,
        "gate_proj": Site(d, f, f"{mlp}.gate_proj", fused=names.gate_up),
        "up_proj": Site(d, f, f"{mlp}.up_proj", fused=names.gate_up),
        "down_proj": site("down_proj", f, d, mlp),
    }


def names_of(config: Architecture) -> Names:
    """What the family calls its tensors."""
    return FAMILIES[config.family].names


def _whole(
    ours: str, theirs: str, shape: tuple[int, ...], axes: Axes, site: str = "", quantizable: bool = False
) -> Parameter:
    return Parameter(ours, (Part(f"{theirs}.weight", shape, shape, site=site),), axes, quantizable=quantizable)


def _norm(ours: str, theirs: str, *shape: int) -> Parameter:
    """The weights of a norm, which are a tensor for each head if `theirs` has a place for the head's number."""
    if "{head}" in theirs:
        heads, own = range(shape[0]), shape[1:]
        parts = tuple(Part(f"{theirs.format(head=head)}.weight", own, (1, *own)) for head in heads)
    else:
        parts = (Part(f"{theirs}.weight", shape, shape),)
    return Parameter(ours, parts, (None,) * len(shape), "norm")


def _norms(config: Architecture, ours: str, theirs: str, size: int) -> Iterator[Parameter]:
    """A norm of all features, and its bias if the family's have one."""
    yield _norm(ours, theirs, size)
    if "norm" in config.biases:
        yield _bias(f"{ours}_bias", theirs, size)


def _layer(config: Architecture, at: str) -> Iterator[Parameter]:
    d, hd, k = config.hidden_size, config.head_dim, config.num_key_value_heads
    g, names = config.num_attention_heads // k, names_of(config)

    # With norms behind a layer's halves, the one before the second half has another name than in Llama.
    usual = {
        "attention_norm": "input_layernorm",
        "mlp_norm": f"{'pre_feedforward' if config.post_norm else 'post_attention'}_layernorm",
        "attention_post_norm": "post_attention_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
    }
    own = [*(("attention_norm",) if config.pre_norm else ())]
    own += ["mlp_norm"] if config.pre_norm and not config.parallel else []
    own += ["attention_post_norm", "mlp_post_norm"] if config.post_norm else []
    for name in own:
        yield from _norms(config, name, f"{at}.{names.modules.get(name, usual[name])}", d)
    for x, heads in zip("qk", (k * g, k), strict=True) if config.qk_norm != "none" else ():
        shape = {"head": (hd,), "all": (heads * hd,), "each": (heads, hd)}[config.qk_norm]
        yield _norm(f"{x}_norm", f"{at}.{names.modules.get(f'{x}_norm', f'self_attn.{x}_norm')}", *shape)
        if "qk_norm" in config.biases:
            yield _bias(f"{x}_norm_bias", f"{at}.{names.modules[f'{x}_norm']}", hd)

    paths = {name: f"{at}.{site.fused or site.path}" for name, site in sites(config).items()}
    views = {"q_proj": (k, g, hd), "k_proj": (k, 1, hd), "v_proj": (k, 1, hd)}
    fused = f"{at}.{names.qkv}" if names.qkv else ""
    yield _fused("qkv", fused, paths, views, ("kv_heads", None, None, "model"), joined_along=1, inputs=d)
    yield _whole("out", paths["o_proj"], (d, k * g * hd), ("model", "heads"), "o_proj", quantizable=True)
    if "q_proj" in config.biases:
        yield _fused("qkv_bias", "", paths, views, ("kv_heads", None, None), joined_along=1)
    if "o_proj" in config.biases:
        yield _bias("out_bias", paths["o_proj"], d, "o_proj")
    if config.experts is None:
        yield from _dense(config, at, paths, config.intermediate_size)
        return
    yield from _experts(config, at)
    if config.experts.shared:
        yield _whole("shared_router", f"{at}.mlp.shared_expert_gate", (1, d), (None, None))
        yield from _dense(config, at, paths, config.experts.shared, "shared_")


def _dense(config: Architecture, at: str, paths: Mapping[str, str], f: int, prefix: str = "") -> Iterator[Parameter]:
    d, gate_up = config.hidden_size, names_of(config).gate_up
    if config.gated:
        views = {site: (1, f) for site in MLP_SITES[:2]}
        fused = f"{at}.{gate_up}" if gate_up else ""
        yield _fused(f"{prefix}gate_up", fused, paths, views, (None, "inner", "model"), inputs=d)
    else:
        yield _whole("up", paths["up_proj"], (f, d), ("inner", "model"), "up_proj", quantizable=True)
        if config.hidden_act == "xielu":
            numbers = [f"{at}.mlp.act_fn.{name}" for name in ("alpha_p", "alpha_n", "beta", "eps")]
            shapes: list[tuple[int, ...]] = [(1,), (1,), (), ()]
            parts = tuple(Part(name, shape, (1,)) for name, shape in zip(numbers, shapes, strict=True))
            yield Parameter("act", parts, (None,), "zeros")
    yield _whole(f"{prefix}down", paths["down_proj"], (d, f), ("model", "inner"), "down_proj", quantizable=True)
    if "up_proj" in config.biases:
        if config.gated:
            yield _fused(f"{prefix}gate_up_bias", "", paths, views, (None, "inner"))
        else:
            yield _bias("up_bias", paths["up_proj"], f, "up_proj", "inner")
        yield _bias(f"{prefix}down_bias", paths["down_proj"], d, "down_proj")


def _experts(config: Architecture, at: str) -> Iterator[Parameter]:
    """The router, and each kind of projection of all experts in one tensor."""
    experts, names, d = config.experts, names_of(config), config.hidden_size
    assert experts is not None
    count, f, shared = experts.count, experts.width, experts.shared
    gate, up, down = names.expert
    yield _whole("router", f"{at}.{names.router}", (count, d), (None, None))

    def part(expert: int, name: str, site: str, *shape: int) -> Part:
        # The sites are those of a shared expert, if there is one.
        return Part(f"{at}.{names.experts}.{expert}.{name}.weight", shape, (1, *shape), site="" if shared else site)

    both = [part(e, name, site, f, d) for e in range(count) for name, site in ((gate, "gate_proj"), (up, "up_proj"))]
    shape = (count, 2, f, d)
    yield Parameter("gate_up", tuple(both), (None, None, "inner", "model"), quantizable=True, reshaped=shape)
    every = tuple(part(e, down, "down_proj", d, f) for e in range(count))
    yield Parameter("down", every, (None, "model", "inner"), quantizable=True)


def _bias(ours: str, theirs: str, size: int, site: str = "", axis: Axis | None = None) -> Parameter:
    return Parameter(ours, (Part(f"{theirs}.bias", (size,), (size,), site=site),), (axis,), "zeros")


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
