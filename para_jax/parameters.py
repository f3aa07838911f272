"""The table of a backbone's weights: each one's name, shape, logical axes, initializer and Hugging Face tensors.

Initialization, sharding, loading, saving, merging, quantizing, counting and planning all derive from this table. A name
that is not in it is an error.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Literal

import numpy as np

from para_jax.families.architecture import MLP_SITES, Architecture, Axes, Axis, LayerKind, Names, Site, Stack
from para_jax.families.table import FAMILIES

VOCABULARY: Axes = ("vocab", "model")  # axes of the embedding and of the head


@dataclass(frozen=True)
class Part:
    """A Hugging Face tensor, or some rows of a fused one.

    Attributes:
      view: the shape it is concatenated in.
      rows: for a fused tensor, the start and stop row of this part and the tensor's number of rows.
      site: the projection that the part belongs to.
      heads: the number of equal blocks of a fused tensor, for which `rows` is given.
      leading: the number of axes before that of rows, such as the axis of experts.
      transposed: whether the tensor is the transposed weight.
    """

    name: str
    shape: tuple[int, ...]
    view: tuple[int, ...]
    rows: tuple[int, int, int] | None = None
    site: str = ""
    heads: int = 1
    leading: int = 0
    transposed: bool = False

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The shape of the whole tensor."""
        at, shape = self.leading, self.shape
        if self.rows is not None:
            shape = (*shape[:at], self.heads * self.rows[2], *shape[at + 1 :])
        return (*shape[:-2], shape[-1], shape[-2]) if self.transposed else shape

    def of(self, tensor: np.ndarray) -> np.ndarray:
        """Slices the part out of its tensor. The result is a view where NumPy has one."""
        x, at = tensor.swapaxes(-1, -2) if self.transposed else tensor, self.leading
        if self.rows is None:
            return x
        start, stop, total = self.rows
        blocks = x.reshape(*x.shape[:at], self.heads, total, *x.shape[at + 1 :])
        return blocks[(slice(None),) * (at + 1) + (slice(start, stop),)].reshape(self.shape)

    def whole(self, parts: list[np.ndarray]) -> np.ndarray:
        """The tensor that has these parts, in order; inverse of `of`."""
        x, at = parts[0], self.leading
        if len(parts) > 1:
            before, after = x.shape[:at], x.shape[at + 1 :]
            x = np.concatenate([part.reshape(*before, self.heads, -1, *after) for part in parts], at + 1)
            x = x.reshape(*before, -1, *after)
        return x.swapaxes(-1, -2) if self.transposed else x


@dataclass(frozen=True)
class Parameter:
    """One weight of the backbone: its parts concatenated along the axis `joined_along`.

    Attributes:
      name: the name in its layer, such as `qkv`, or outside the layers, such as `embed`.
      axes: the logical name of each array axis.
      init: "normal" is N(0, 0.02), "zeros" is for biases, and "norm" sets the factors of a norm to one.
      quantizable: whether it may be stored as int8 or int4, with scales in the weight named `scale`.
      reshaped: the shape after concatenation, if it differs.
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
        """The name of its scales if it is quantized."""
        return f"{self.name}{SCALE}"

    @property
    def joined(self) -> tuple[int, ...]:
        """The shape after concatenation, before `reshaped`."""
        first = self.parts[0].view
        width = sum(part.view[self.joined_along] for part in self.parts)
        return (*first[: self.joined_along], width, *first[self.joined_along + 1 :])

    @property
    def shape(self) -> tuple[int, ...]:
        return self.reshaped or self.joined

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def join(self, parts: list[np.ndarray]) -> np.ndarray:
        """Concatenates the parts into the weight."""
        weight = np.empty(self.shape, np.result_type(*parts))
        self.block(parts, tuple(slice(0, n) for n in self.shape), out=weight)
        return weight

    def block(self, parts: list[np.ndarray], place: tuple[slice, ...], out: np.ndarray) -> None:
        """Writes the block `join(parts)[place]` into `out`, cast to its dtype. Only this block of the parts is read.

        If `reshaped` splits the concatenated axis, `place` must cover the resulting axes in full.
        """
        added = len(self.shape) - len(self.joined)
        assert all(x.stop - x.start == n for x, n in zip(place[:added], self.shape, strict=False))
        wanted = list(place[added:])
        if added:
            wanted[self.joined_along] = slice(0, self.joined[self.joined_along])
        flat = out.reshape([x.stop - x.start for x in wanted])
        along, offset = wanted[self.joined_along], 0
        for x, part in zip(parts, self.parts, strict=True):
            start, stop = max(along.start, offset), min(along.stop, offset + part.view[self.joined_along])
            if start < stop:
                source, target = list(wanted), [slice(None)] * flat.ndim
                source[self.joined_along] = slice(start - offset, stop - offset)
                target[self.joined_along] = slice(start - along.start, stop - along.start)
                flat[tuple(target)] = x.reshape(part.view)[tuple(source)]
            offset += part.view[self.joined_along]

    def split(self, weight: np.ndarray) -> list[np.ndarray]:
        """Splits the weight into its parts; inverse of `join`."""
        ends = np.cumsum([part.view[self.joined_along] for part in self.parts])[:-1]
        pieces = np.split(weight.reshape(self.joined), ends, self.joined_along)
        return [x.reshape(part.shape) for part, x in zip(self.parts, pieces, strict=True)]

    def tensors(self, weight: np.ndarray) -> dict[str, np.ndarray]:
        """The Hugging Face tensors of the weight. All parts of a fused tensor are in the same weight, in order."""
        found: dict[str, list[np.ndarray]] = {}
        for part, x in zip(self.parts, self.split(weight), strict=True):
            found.setdefault(part.name, []).append(x)
        whole = {part.name: part.whole for part in self.parts}
        return {name: whole[name](xs) for name, xs in found.items()}


SCALE = "_scale"


def table(config: Architecture, layer: int | None = None) -> tuple[Parameter, ...]:
    """The weights of one layer, or those outside the layers if `layer` is None.

    >>> from para_jax import BackboneConfig
    >>> small = BackboneConfig(64, 8, 16, 2, 2, 1, 4)
    >>> [(p.name, p.shape, p.axes) for p in table(small, 0)][2:4]
    [('qkv', (1, 4, 4, 8), ('kv_heads', None, None, 'model')), ('out', (8, 8), ('model', 'heads'))]
    >>> [part.name for part in table(small, 1)[2].parts][0]
    'model.layers.1.self_attn.q_proj.weight'
    """
    d, v, names = config.hidden_size, config.vocab_size, names_of(config)
    if layer is not None:
        at = f"{names.stem}.{names.layers}.{layer}"
        return tuple(_layer(config, config.kind(layer), at, sites(config, layer)))
    found = [_single("embed", f"{names.stem}.{names.embed}", (v, d), VOCABULARY)]
    if config.position_offset is not None:
        rows = config.max_position_embeddings + config.position_offset
        found.append(_single("positions", f"{names.stem}.{names.positions}", (rows, d), VOCABULARY))
    found += _norms(config, "norm", f"{names.stem}.{names.modules.get('norm', 'norm')}", d)
    if not config.tie_word_embeddings:
        found.append(_single("head", names.head, (v, d), VOCABULARY))
    if "lm_head" in config.biases:
        found.append(_bias("head_bias", names.head, v))
    if config.per_layer_inputs:
        found += _per_layer_inputs(config)
    return tuple(found)


@lru_cache(maxsize=64)
def axes(config: Architecture) -> Mapping[str, Axes]:
    """The logical axes of every weight and every scale, by name."""
    every = [*table(config), *(p for stack in stacks(config) for p in table(config, stack.layers[0]))]
    scales = {p.scale: (*p.axes[:-1], None) for p in every if p.quantizable}  # the last axis is groups of inputs
    return {p.name: p.axes for p in every} | scales


def size(config: Architecture) -> int:
    """The number of parameters."""
    layers = range(config.num_hidden_layers)
    return sum(p.size for p in table(config)) + sum(p.size for layer in layers for p in table(config, layer))


@lru_cache(maxsize=64)
def stacks(config: Architecture) -> tuple[Stack, ...]:
    """The layers by the shapes of their arrays, in the order of their first layers.

    >>> from para_jax import BackboneConfig
    >>> stacks(BackboneConfig(64, 8, 16, 2, 2, 1, 4))
    (Stack(name='', layers=(0, 1)),)
    """
    by_shape: dict[LayerKind, list[int]] = {}
    for layer in range(config.num_hidden_layers):
        by_shape.setdefault(config.kind(layer).shape, []).append(layer)
    name = "" if len(by_shape) == 1 else "layers_{}"
    return tuple(Stack(name.format(layers[0]), tuple(layers)) for layers in by_shape.values())


def leaf(config: Architecture, stacked: bool, layer: int, name: str) -> tuple[str, int | None]:
    """The name of the array with a layer's weight in a backbone, and the layer's place in it if it is stacked."""
    if not stacked:
        return f"blocks.{layer}.{name}", None
    stack = next(stack for stack in stacks(config) if layer in stack.layers)
    return f"blocks.{stack.name}{'.' if stack.name else ''}{name}", stack.layers.index(layer)


def sites(config: Architecture, layer: int) -> Mapping[str, Site]:
    """The projections of a layer that adapters may adjust, by Hugging Face name.

    For a mixture of experts, these are the projections of the shared expert, or of a dense feed-forward beside the
    experts. If there is neither, it is the up projection, which one vector scales in all experts.
    """
    kind, names = config.kind(layer), names_of(config)
    d, f = config.hidden_size, kind.intermediate_size or config.intermediate_size
    k, g, hd = config.heads(kind)
    q, kv = k * g * hd, k * hd

    heads = config.num_key_value_heads if names.by_head else 1

    def site(name: str, inputs: int, outputs: int, at: str, fused: str = "", heads: int = 1) -> Site:
        place = fused or names.modules.get(name, "")
        return Site(inputs, outputs, f"{at}.{name}", fused=place, heads=heads, transposed=names.transposed)

    attention = {
        "q_proj": site("q_proj", d, q, "self_attn", names.qkv, heads),
        "k_proj": site("k_proj", d, kv, "self_attn", names.qkv, heads),
        "v_proj": site("v_proj", d, kv, "self_attn", names.qkv, heads),
        "o_proj": site("o_proj", q, d, "self_attn"),
    }
    attention = {name: site for name, site in attention.items() if name not in LACKS[kind.values]}
    mlp = "mlp"
    if config.experts is not None and not config.experts.beside:
        if not config.experts.shared:
            up = Site(d, config.experts.width, "mlp.experts.up_proj", linear=False)
            return {**attention, "up_proj": up}
        mlp, f = "mlp.shared_expert", config.experts.shared
    if not config.gated:
        return {**attention, "up_proj": site("up_proj", d, f, mlp), "down_proj": site("down_proj", f, d, mlp)}
    return {
        **attention,
        "gate_proj": site("gate_proj", d, f, mlp, names.gate_up),
        "up_proj": site("up_proj", d, f, mlp, names.gate_up),
        "down_proj": site("down_proj", f, d, mlp),
    }


# The projections that a layer does not have, by where its values come from.
LACKS: dict[str, tuple[str, ...]] = {"own": (), "keys": ("v_proj",), "shared": ("k_proj", "v_proj")}


def names_of(config: Architecture) -> Names:
    """The tensor names of the config's family."""
    return FAMILIES[config.family].names


def _single(
    name: str, module: str, shape: tuple[int, ...], axes: Axes, site: str = "", transposed: bool = False
) -> Parameter:
    """The weight of one Hugging Face module, which is a projection if there is a `site`."""
    part = Part(f"{module}.weight", shape, shape, site=site, transposed=transposed)
    return Parameter(name, (part,), axes, quantizable=bool(site))


def _norm(name: str, module: str, *shape: int) -> Parameter:
    """The weight of a norm. If `module` contains "{head}", every head has its own tensor."""
    if "{head}" in module:
        heads, own = range(shape[0]), shape[1:]
        parts = tuple(Part(f"{module.format(head=head)}.weight", own, (1, *own)) for head in heads)
    else:
        parts = (Part(f"{module}.weight", shape, shape),)
    return Parameter(name, parts, (None,) * len(shape), "norm")


def _norms(config: Architecture, name: str, module: str, size: int) -> Iterator[Parameter]:
    """A norm over all features, with its weight and its bias if the family has them."""
    if config.norm_weights:
        yield _norm(name, module, size)
    if "norm" in config.biases:
        yield _bias(f"{name}_bias", module, size)


def _per_layer_inputs(config: Architecture) -> Iterator[Parameter]:
    """The inputs of every layer: a second embedding, and a projection of the first."""
    assert config.per_layer_inputs is not None
    vocabulary, width = config.per_layer_inputs
    every, d = config.num_hidden_layers * width, config.hidden_size
    yield _single("layer_embed", "model.embed_tokens_per_layer", (vocabulary, every), VOCABULARY)
    yield _single("layer_inputs", "model.per_layer_model_projection", (every, d), (None, "model"))
    yield _norm("layer_inputs_norm", "model.per_layer_projection_norm", width)


def _layer(config: Architecture, kind: LayerKind, at: str, sites: Mapping[str, Site]) -> Iterator[Parameter]:
    d, (k, g, hd), names = config.hidden_size, config.heads(kind), names_of(config)

    usual = {
        "attention_norm": "input_layernorm",
        "mlp_norm": f"{'pre_feedforward' if config.post_norm else 'post_attention'}_layernorm",
        "attention_post_norm": "post_attention_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
    }
    present = ["attention_norm"] if config.pre_norm else []
    present += ["mlp_norm"] if config.pre_norm and (config.parallel_norms or not config.parallel) else []
    present += ["attention_post_norm", "mlp_post_norm"] if config.post_norm else []
    for name in present:
        yield from _norms(config, name, f"{at}.{names.modules.get(name, usual[name])}", d)
    normed = {"q": k * g, **({} if kind.values == "shared" else {"k": k})}
    for x, heads in normed.items() if config.qk_norm != "none" and config.norm_weights else ():
        shape = {"head": (hd,), "all": (heads * hd,), "each": (heads, hd)}[config.qk_norm]
        yield _norm(f"{x}_norm", f"{at}.{names.modules.get(f'{x}_norm', f'self_attn.{x}_norm')}", *shape)
        if "qk_norm" in config.biases:
            yield _bias(f"{x}_norm_bias", f"{at}.{names.modules[f'{x}_norm']}", hd)

    paths = {name: f"{at}.{site.fused or site.path}" for name, site in sites.items()}
    views = {"q_proj": (k, g, hd), "k_proj": (k, 1, hd), "v_proj": (k, 1, hd)}
    views = {site: view for site, view in views.items() if site in paths}
    qkv = partial(_fused, fused=f"{at}.{names.qkv}" if names.qkv else "", paths=paths, views=views, joined_along=1,
                  heads=k if names.by_head else 1, transposed=names.transposed)  # fmt: skip
    yield qkv("qkv", axes=("kv_heads", None, None, "model"), inputs=d)
    yield _single("out", paths["o_proj"], (d, k * g * hd), ("model", "heads"), "o_proj", names.transposed)
    if "q_proj" in config.biases:
        yield qkv("qkv_bias", axes=("kv_heads", None, None))
    if "o_proj" in config.biases:
        yield _bias("out_bias", paths["o_proj"], d, "o_proj")
    if config.attention_sinks:
        yield Parameter("sinks", (Part(f"{at}.self_attn.sinks", (k * g,), (k, g)),), ("kv_heads", None))
    if config.layer_scale:
        yield Parameter("layer_scale", (Part(f"{at}.layer_scalar", (1,), (1,)),), (None,), "norm")
    if config.per_layer_inputs:
        width = config.per_layer_inputs[1]
        yield _single("input_gate", f"{at}.per_layer_input_gate", (width, d), (None, "model"))
        yield _single("input_out", f"{at}.per_layer_projection", (d, width), ("model", None))
        yield _norm("input_norm", f"{at}.post_per_layer_input_norm", d)
    f, experts = kind.intermediate_size or config.intermediate_size, config.experts
    if experts is None:
        yield from _dense(config, at, paths, f)
        return
    yield from _experts(config, at)
    if experts.shared:
        yield _single("shared_router", f"{at}.mlp.shared_expert_gate", (1, d), (None, None))
        yield from _dense(config, at, paths, experts.shared, "shared_")
    if experts.beside:
        yield from _dense(config, at, paths, f, "dense_")
        yield _norm("dense_post_norm", f"{at}.post_feedforward_layernorm_1", d)
        yield _norm("experts_norm", f"{at}.pre_feedforward_layernorm_2", d)
        yield _norm("experts_post_norm", f"{at}.post_feedforward_layernorm_2", d)
        for name, theirs, n in (("router_scale", "scale", d), ("expert_scale", "per_expert_scale", experts.count)):
            yield Parameter(name, (Part(f"{at}.router.{theirs}", (n,), (n,)),), (None,), "norm")


def _dense(config: Architecture, at: str, paths: Mapping[str, str], f: int, prefix: str = "") -> Iterator[Parameter]:
    d, gate_up, transposed = config.hidden_size, names_of(config).gate_up, names_of(config).transposed
    if config.gated:
        views = {site: (1, f) for site in MLP_SITES[:2]}
        fused = f"{at}.{gate_up}" if gate_up else ""
        yield _fused(f"{prefix}gate_up", fused, paths, views, (None, "inner", "model"), inputs=d)
    else:
        yield _single("up", paths["up_proj"], (f, d), ("inner", "model"), "up_proj", transposed)
        if config.hidden_act == "xielu":
            numbers = [f"{at}.mlp.act_fn.{name}" for name in ("alpha_p", "alpha_n", "beta", "eps")]
            shapes: list[tuple[int, ...]] = [(1,), (1,), (), ()]
            parts = tuple(Part(name, shape, (1,)) for name, shape in zip(numbers, shapes, strict=True))
            yield Parameter("act", parts, (None,), "zeros")
    yield _single(f"{prefix}down", paths["down_proj"], (d, f), ("model", "inner"), "down_proj", transposed)
    if "up_proj" in config.biases:
        if config.gated:
            yield _fused(f"{prefix}gate_up_bias", "", paths, views, (None, "inner"))
        else:
            yield _bias("up_bias", paths["up_proj"], f, "up_proj", "inner")
        yield _bias(f"{prefix}down_bias", paths["down_proj"], d, "down_proj")


def _experts(config: Architecture, at: str) -> Iterator[Parameter]:
    """The router, and two weights that hold the projections of all experts."""
    experts, names, d = config.experts, names_of(config), config.hidden_size
    assert experts is not None
    count, f, other_sites = experts.count, experts.width, experts.shared or experts.beside
    axes_in: Axes = (None, None, "inner", "model")
    axes_out: Axes = (None, "model", "inner")
    module = f"{at}.{names.experts}"
    yield _single("router", f"{at}.{names.router}", (count, d), (None, None))
    if experts.biases:
        yield _bias("router_bias", f"{at}.{names.router}", count)
    if names.interleaved:
        yield _interleaved("gate_up", f"{module}.gate_up_proj", (count, f, d), axes_in)
        whole = Part(f"{module}.down_proj", *((count, d, f),) * 2, site="down_proj", leading=1, transposed=True)
        yield Parameter("down", (whole,), axes_out, quantizable=True)
        if experts.biases:
            yield _interleaved("gate_up_bias", f"{module}.gate_up_proj_bias", (count, f), axes_in[:-1])
            bias = Part(f"{module}.down_proj_bias", *((count, d),) * 2, site="down_proj", leading=1)
            yield Parameter("down_bias", (bias,), (None, None), "zeros")
        return
    if names.expert is None:  # one tensor for all experts
        parts = (Part(f"{module}.gate_up_proj", (count, 2 * f, d), (count, 2, f, d)),)
        yield Parameter("gate_up", parts, axes_in, quantizable=True)
        yield Parameter("down", (Part(f"{module}.down_proj", *((count, d, f),) * 2),), axes_out, quantizable=True)
        return
    gate, up, down = names.expert

    def part(expert: int, name: str, site: str, *shape: int) -> Part:
        # If there is a shared expert or a dense feed-forward, the sites are its projections.
        site = "" if other_sites else site
        return Part(f"{module}.{expert}.{name}.weight", shape, (1, *shape), site=site)

    both = [part(e, name, site, f, d) for e in range(count) for name, site in ((gate, "gate_proj"), (up, "up_proj"))]
    yield Parameter("gate_up", tuple(both), axes_in, quantizable=True, reshaped=(count, 2, f, d))
    every = tuple(part(e, down, "down_proj", d, f) for e in range(count))
    yield Parameter("down", every, axes_out, quantizable=True)


def _interleaved(name: str, tensor: str, shape: tuple[int, ...], axes: Axes) -> Parameter:
    """The gate and up projections of all experts, or their biases, whose outputs take turns in one tensor."""
    count, f, *inputs = shape
    weight = bool(inputs)
    parts = tuple(
        Part(tensor, shape, (count, 1, f, *inputs), (i, i + 1, 2), site, heads=f, leading=1, transposed=weight)
        for i, site in enumerate(MLP_SITES[:2])
    )
    return Parameter(name, parts, axes, "normal" if weight else "zeros", quantizable=weight, joined_along=1)


def _bias(name: str, module: str, size: int, site: str = "", axis: Axis | None = None) -> Parameter:
    return Parameter(name, (Part(f"{module}.bias", (size,), (size,), site=site),), (axis,), "zeros")


def _fused(
    name: str,
    fused: str,
    paths: Mapping[str, str],
    views: Mapping[str, tuple[int, ...]],
    axes: Axes,
    joined_along: int = 0,
    inputs: int | None = None,
    heads: int = 1,
    transposed: bool = False,
) -> Parameter:
    """Several projections in one weight, or their biases if `inputs` is None.

    Each comes from its own Hugging Face tensor, or from rows of the module `fused` if that is not empty. With `heads`,
    every head has its rows of all projections.
    """
    kind, last = ("bias", ()) if inputs is None else ("weight", (inputs,))
    total, start, parts = sum(math.prod(view) for view in views.values()) // heads, 0, []
    for site, view in views.items():
        size = math.prod(view)
        rows = (start, start + size // heads, total) if fused else None
        tensor, shapes = f"{fused or paths[site]}.{kind}", ((size, *last), (*view, *last))
        parts.append(Part(tensor, *shapes, rows, site, heads, transposed=transposed and inputs is not None))
        start += size // heads
    init: Literal["normal", "zeros"] = "zeros" if inputs is None else "normal"
    return Parameter(name, tuple(parts), axes, init, inputs is not None, joined_along)
