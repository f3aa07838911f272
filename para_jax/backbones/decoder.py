"""The decoder: embeddings, blocks, head; a full forward pass, prefill and single decode steps in one code path.

Weights keep the (outputs, inputs) orientation of Hugging Face checkpoints; XLA's CPU products read it about 1.5
times faster than its transpose at the row counts of decoding. q, k and v are one product, as are gate and up.
Layers are a list that programs unroll, or stacked arrays that they scan: docs/backbone.md has the measurements.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from para_jax.adapters.adapter import named_leaves
from para_jax.adapters.bank import AdapterBank, batch_rows
from para_jax.adapters.method import Prompt
from para_jax.adapters.rows import Rows, Tenant
from para_jax.adjustment import Adjustment
from para_jax.backbones import rope
from para_jax.backbones.attention import Seen
from para_jax.backbones.block import Block, norm
from para_jax.backbones.cache import Cache, DecodeState
from para_jax.backbones.choice import choose
from para_jax.backbones.kernels import Kernel, prompt_attention
from para_jax.backbones.linear import KEEP_PRODUCTS, product
from para_jax.backbones.options import Attention, Dtype, Remat, compute_dtype, default_stacked, wide
from para_jax.backbones.packed import Segments
from para_jax.backbones.weights import random_weights
from para_jax.compat import List
from para_jax.config import BackboneConfig
from para_jax.convert.checkpoint import fetched, load_weights
from para_jax.errors import ParaJaxError, unknown
from para_jax.parameters import VOCABULARY, axes, table
from para_jax.quantization import QUANTIZED, Quantize
from para_jax.sharding import check_mesh, embedded, gathered, own_mesh, spec, split_rows

if TYPE_CHECKING:
    from jax import Array
    from jax.sharding import Mesh
    from jaxtyping import Bool, Float, Int


class Backbone(nnx.Module):
    """A frozen language model of any of the families; a pytree of arrays that programs take as an argument.

    Weights: embed (v, d), blocks, norm (d,), and head (v, d) unless it is tied to embed; norm_bias (d,) and head_bias
    (v,) if the family has them.

    >>> from para_jax import Backbone, tiny_backbone_path
    >>> backbone = Backbone.from_pretrained(tiny_backbone_path())
    >>> backbone(jnp.array([[5, 6, 7]])).shape
    (1, 3, 4096)
    """

    embed: nnx.Param
    norm: nnx.Param
    norm_bias: nnx.Param
    head: nnx.Param
    head_bias: nnx.Param

    def __init__(
        self,
        config: BackboneConfig,
        key: Array,
        dtype: Dtype = "auto",
        stacked: bool | None = None,
        quantize: Quantize | None = None,
        attention: Attention = "auto",
        mesh: Mesh | None = None,
    ):
        """Random weights, N(0, 0.02). `from_pretrained` is for a checkpoint, and puts it on the devices of `mesh`."""
        compute = compute_dtype(dtype)
        if quantize is not None and quantize not in QUANTIZED:
            raise unknown("quantize", quantize, QUANTIZED)
        self.config = config
        self.quantize = quantize
        self.mesh = mesh
        self.attention = choose(attention, config, compute).kernel
        self.stacked = default_stacked() if stacked is None else stacked
        top, *layers = jax.random.split(key, 1 + config.num_hidden_layers)
        outside = random_weights(table(config), config, compute, top)
        self.embed, self.norm = outside["embed"], outside["norm"]
        if "norm_bias" in outside:
            self.norm_bias = outside["norm_bias"]
        if "head" in outside:
            self.head = outside["head"]
        if "head_bias" in outside:
            self.head_bias = outside["head_bias"]
        make = partial(random_weights, table(config, 0), config, compute, quantize=quantize)
        self.blocks: Any = jax.vmap(make)(jnp.stack(layers)) if self.stacked else List([make(key) for key in layers])

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        dtype: Dtype = "auto",
        stacked: bool | None = None,
        quantize: Quantize | None = None,
        attention: Attention = "auto",
        check_finite: bool = False,
        mesh: Mesh | None = None,
    ) -> Backbone:
        """Reads a Hugging Face checkpoint: config.json and safetensors (or PyTorch's .bin), one file or several.

        Args:
          path_or_hub_id: a folder, or a hub id that is downloaded.
          dtype: of weights and computation; "auto" is bfloat16 on TPU and GPU, but float16 on an NVIDIA GPU before
            Ampere, and float32 on CPU. With float16 all but weights, cache and what enters matmuls is float32.
          stacked: whether layers are stacked and scanned or kept apart and unrolled; by default as is fastest.
          quantize: "int8" or "int4" for the projections of the layers, quantised while they are read
            (docs/backbone.md). Embeddings, head and norms stay in `dtype`, and so does computation.
          attention: how whole prompts attend: "plain", "cudnn" (GPU), "splash" (TPU), or "auto" for the device's own,
            if it compiles (`backbones/choice.py`).
          check_finite: whether to look for weights that are infinite or no number.
          mesh: devices to split the weights over (`para_jax.sharding.make_mesh`, or any mesh of its axes); each gets
            its part as it is read.

        Raises ParaJaxError for what is no checkpoint, a family or an option not supported, or missing, extra or
        misshapen tensors (all of them are listed).
        """
        folder, shapes = cls.opened(path_or_hub_id, dtype, stacked, quantize, attention, mesh)
        return load_weights(folder, shapes, check_finite)

    @classmethod
    def opened(
        cls, path_or_hub_id: str | Path, dtype: Dtype, stacked: bool | None, quantize: Quantize | None,
        attention: Attention, mesh: Mesh | None,
    ) -> tuple[Path, Backbone]:  # fmt: skip
        """The folder of a checkpoint, and its backbone with shapes in place of arrays."""
        folder = fetched(path_or_hub_id)
        config = BackboneConfig.from_folder(folder, name=str(path_or_hub_id))
        if mesh is not None:
            mesh = own_mesh(mesh)
            check_mesh(config, mesh)
        return folder, cls.abstract(config, dtype, stacked, quantize, attention, mesh)

    @classmethod
    def abstract(
        cls,
        config: BackboneConfig,
        dtype: Dtype = "auto",
        stacked: bool | None = None,
        quantize: Quantize | None = None,
        attention: Attention = "auto",
        mesh: Mesh | None = None,
    ) -> Backbone:
        """A backbone with shapes, dtypes and shardings in place of arrays; programs can be compiled for it."""
        make = partial(cls, config, dtype=dtype, stacked=stacked, quantize=quantize, attention=attention, mesh=mesh)
        tree, logical = jax.eval_shape(make, jax.random.key(0)), axes(config)

        def sharded(name: str, x: Any) -> jax.ShapeDtypeStruct:
            own = logical[name.rpartition(".")[2]]
            where = None if mesh is None else NamedSharding(mesh, spec(own, x.shape, mesh))
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

        return jax.tree.unflatten(
            jax.tree.structure(tree), [sharded(name, x) for name, x in named_leaves(tree).items()]
        )

    @property
    def dtype(self) -> jnp.dtype:
        return self.embed.dtype

    @property
    def residual_dtype(self) -> jnp.dtype:
        """Of the residual stream and of Adjustments: float32 if computation is in float16, else the same as that."""
        return wide(self.dtype)

    def __call__(
        self,
        tokens_bt: Int[Array, "b t"],
        *,
        mask: Bool[Array, "b t"] | None = None,
        prompt_mask: Bool[Array, "b t"] | None = None,
        bank: AdapterBank | None = None,
        tenants: Sequence[Tenant] | None = None,
    ) -> Float[Array, "b t v"]:
        """Float32 logits of every token.

        Args:
          tokens_bt: token ids.
          mask: which of them are tokens and not padding, on either side; all, if not given.
          prompt_mask: which tokens adapters are prepared from; all, if not given.
          bank, tenants: the adapters, and for each row its tenant's name, None, or names with adapter weights.

        Raises ParaJaxError for an unknown tenant, or tenants that do not match the rows.
        """
        mask = jnp.ones(tokens_bt.shape, bool) if mask is None else jnp.asarray(mask, bool)
        prompt_mask = mask if prompt_mask is None else jnp.asarray(prompt_mask, bool) & mask
        return _logits(self, tokens_bt, mask, prompt_mask, batch_rows(bank, tenants, tokens_bt.shape[0], self.mesh))

    def forward(
        self,
        tokens_bt: Int[Array, "b t"],
        mask_bt: Bool[Array, "b t"],
        prompt_mask_bt: Bool[Array, "b t"],
        rows: Rows,
        cache: Cache | None = None,
        remat: Remat = "none",
        segments: Segments | None = None,
    ) -> tuple[Float[Array, "b t d"], Any, Cache | None]:
        """Prepares the rows' adapters layer by layer and runs all tokens.

        Args:
          mask_bt, prompt_mask_bt: which tokens are none of the padding, and which of those are a prompt's.
          cache: an empty one to fill with these tokens.
          remat: what the backward pass computes again: "layers" keeps what enters a layer, "products" its products
            too, "none" everything.
          segments: of packed rows, the sequence of each token; each has an Adjustment of its own. Not with a cache.

        Returns the final hidden states after the norm, the Adjustments, and the cache.
        """
        if segments is not None and cache is not None:
            raise ParaJaxError("a cache holds one sequence a row; leave out segments, or the cache")
        next_bt = jnp.pad(prompt_mask_bt[:, 1:], [(0, 0), (0, 1)])
        if segments is None:
            position_bt = jnp.maximum(jnp.cumsum(mask_bt, axis=1, dtype=jnp.int32) - 1, 0)
            count_b1 = jnp.sum(mask_bt, axis=1, keepdims=True, dtype=jnp.int32)
            length_bt = jnp.broadcast_to(count_b1, mask_bt.shape)
            prompt_masks, segment_bt = prompt_mask_bt, None
        else:
            position_bt, length_bt = segments.position_bt, segments.each(segments.length_bs)
            prompt_masks, segment_bt = segments.of_each(prompt_mask_bt), segments.segment_bt
            next_bt = next_bt & (segment_bt == jnp.pad(segment_bt[:, 1:], [(0, 0), (0, 1)]))
        angles = self._angles(position_bt, length_bt)
        # The prompt's last token is where the first new one is predicted from: it belongs to what comes.
        in_prompt = prompt_mask_bt & next_bt
        column = None if cache is None else cache.column
        seen = Seen(mask_bt, jnp.arange(mask_bt.shape[1]), None, segment_bt)

        def body(carry: Any, layer: Any, block: Block, adapters: Any) -> tuple[Any, Adjustment]:
            x, cache = carry
            adjustment = rows.prepare(adapters, layer, Prompt(x, block.attention_input(x), prompt_masks))
            adjustment = adjustment.astype(x.dtype)
            new: list[Array] = []

            def adjust(site: str, x: Array, y: Array) -> Array:
                if segments is None:
                    return adjustment.apply(site, x, y, in_prompt)
                return segments.apply(adjustment, site, x, y, in_prompt)

            def attend(q: Array, k: Array, v: Array) -> Array:
                k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
                new.extend((k, v))
                return self._attend(layer, self.attention, q, k, v, seen)

            x = split_rows(block(x, adjust, self._of_kind(layer, angles), attend), self.mesh)
            if cache is not None:
                cache = cache.write(layer, column, *new)
            return (x, cache), adjustment.for_decoding()

        carry = (self._embedded(tokens_bt), cache)
        (x, cache), adjustments = self._over_layers(body, carry, self._layered(rows.per_layer()), remat)
        if cache is not None:
            cache = cache.admit(mask_bt)
        return self._final_norm(x), adjustments, cache

    def prefill(
        self, tokens_bt: Int[Array, "b t"], mask_bt: Bool[Array, "b t"], rows: Rows, length: int
    ) -> tuple[Float[Array, "b v"], DecodeState]:
        """Runs prompts that stand flush right and makes room for `length` columns in all.

        Returns the float32 logits of the token after each prompt, and the state to decode from. More than
        `length - t` steps of `decode` would overwrite the last column.
        """
        if length < tokens_bt.shape[1]:
            raise ParaJaxError(f"a cache of {length} columns cannot hold prompts of {tokens_bt.shape[1]}")
        cache = Cache.create(self.config, tokens_bt.shape[0], length, self.dtype, self.stacked)
        hidden, adjustments, filled = self.forward(tokens_bt, mask_bt, mask_bt, rows, cache)
        assert filled is not None
        return self.logits(hidden[:, -1:])[:, 0], DecodeState(filled, adjustments)

    def decode(self, token_b: Int[Array, " b"], state: DecodeState) -> tuple[Float[Array, "b v"], DecodeState]:
        """One token for every row: float32 logits of the next, and the state after it."""
        column = state.cache.column
        position_bt = state.cache.position_b[:, None]
        angles = self._angles(position_bt, position_bt + 1)
        cache = state.cache.admit(jnp.ones((token_b.shape[0], 1), bool))
        seen = Seen(cache.valid_bs, column[None])

        def body(carry: Any, layer: Any, block: Block, adjustment: Adjustment) -> tuple[Any, None]:
            x_btd, cache = carry
            after = []

            def attend(q: Array, k: Array, v: Array) -> Array:
                new = cache.write(layer, column, k.swapaxes(1, 2), v.swapaxes(1, 2))
                after.append(new.settled(self.mesh) if self.stacked else new)
                keys, values = after[0].read(layer)
                return self._attend(layer, "plain", q, keys, values, seen)

            x_btd = block(x_btd, adjustment.apply, self._of_kind(layer, angles), attend)
            return (split_rows(x_btd, self.mesh), after[0]), None

        carry = (self._embedded(token_b[:, None]), cache)
        (x_btd, cache), _ = self._over_layers(body, carry, state.adjustments)
        return self.logits(self._final_norm(x_btd))[:, 0], DecodeState(cache, state.adjustments)

    def whole_head(self) -> Float[Array, "v d"]:
        """The head as products want it: on a mesh its features are gathered, once for all products that follow."""
        head = (self.embed if self.config.tie_word_embeddings else self.head)[...]
        return head if self.mesh is None else gathered(head, VOCABULARY, self.mesh)

    def logits(
        self, hidden_btd: Float[Array, "b t d"], head: Float[Array, "v d"] | None = None
    ) -> Float[Array, "b t v"]:
        """Float32 logits of hidden states, with `whole_head()` if that is at hand."""
        head = self.whole_head() if head is None else head
        logits, cap = product(hidden_btd, head, dtype=jnp.float32), self.config.final_logit_softcapping
        logits = (
            logits + self.head_bias[...][None, None].astype(jnp.float32) if "lm_head" in self.config.biases else logits
        )
        logits = logits if self.config.logits_scale == 1 else logits * self.config.logits_scale
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def _embedded(self, tokens_bt: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        x, scale = embedded(self.embed[...], tokens_bt, self.mesh), self.config.embedding_scale
        x = x.astype(self.residual_dtype)
        return x if scale == 1 else x * jnp.asarray(scale, x.dtype)

    def _final_norm(self, x_btd: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        bias = self.norm_bias[...] if "norm" in self.config.biases else None
        return norm(self.config, x_btd, self.norm[...], bias).astype(self.dtype)

    def _attend(self, layer: int | Int[Array, ""], kernel: Kernel, q: Array, k: Array, v: Array, seen: Seen) -> Array:
        """Attention as the layer's kind has it."""
        c = self.config
        scale = c.head_dim**-0.5 if c.attention_scale is None else c.attention_scale

        def of_window(window: int | None) -> Callable[[Array, Array, Array], Array]:
            own = seen._replace(window=window)
            return lambda q, k, v: prompt_attention(kernel, q, k, v, own, scale, c.attn_logit_softcapping, self.mesh)

        # Kernels want to know the window when they are compiled: a branch for each, if layers are scanned.
        windows = [kind.window for kind in c.attention_kinds]
        different = list(dict.fromkeys(windows))
        if len(different) == 1:
            return of_window(windows[0])(q, k, v)
        if isinstance(layer, int):
            return of_window(windows[c.kind_of_layer[layer]])(q, k, v)
        branch = jnp.array([different.index(windows[kind]) for kind in c.kind_of_layer])[layer]
        return jax.lax.switch(branch, [of_window(window) for window in different], q, k, v)

    def _angles(self, position_bt: Int[Array, "b t"], length_bt: Int[Array, "b t"]) -> list[rope.Angles]:
        """Those of each kind of attention."""
        c = self.config
        return [
            rope.angles(kind.rope, c.head_dim, c.max_position_embeddings, position_bt, length_bt)
            for kind in c.attention_kinds
        ]

    def _of_kind(self, layer: int | Int[Array, ""], kinds: Sequence[Any]) -> Any:
        """What a layer takes of what there is for each kind of attention."""
        if len(kinds) == 1:
            return kinds[0]
        if isinstance(layer, int):
            return kinds[self.config.kind_of_layer[layer]]
        kind = jnp.array(self.config.kind_of_layer)[layer]
        return jax.tree.map(lambda *x: jnp.stack(x)[kind], *kinds)

    def _layered(self, stacked: Any) -> Any:
        """Per-layer inputs in the form `_over_layers` takes: apart if the blocks are, stacked if they are."""
        if self.stacked:
            return stacked
        return tuple(jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(self.config.num_hidden_layers))

    def _over_layers(self, body: Callable[..., Any], carry: Any, inputs: Any, remat: Remat = "none") -> tuple[Any, Any]:
        """`body(carry, index, block, input) -> carry, output` over the layers; outputs apart or stacked, as these."""
        if remat not in get_args(Remat):
            raise unknown("remat", remat, get_args(Remat))
        saved = KEEP_PRODUCTS if remat == "products" else None
        again = partial(jax.checkpoint, policy=saved)

        def layer(carry: Any, index: Any, weights: Any, inputs: Any) -> tuple[Any, Any]:
            return body(carry, index, Block(self.config, weights, self.dtype, self.mesh), inputs)

        if self.stacked:
            step = (lambda c, x: layer(c, *x)) if remat == "none" else again(lambda c, x: layer(c, *x))
            return jax.lax.scan(step, carry, (jnp.arange(self.config.num_hidden_layers), self.blocks, inputs))
        layer = layer if remat == "none" else again(layer, static_argnums=(1,))
        outputs = []
        for index, weights in enumerate(self.blocks):
            carry, output = layer(carry, index, weights, inputs[index])
            outputs.append(output)
        return carry, tuple(outputs)


@jax.jit
def _logits(backbone: Backbone, tokens_bt: Array, mask_bt: Array, prompt_mask_bt: Array, rows: Rows) -> Array:
    hidden, _, _ = backbone.forward(tokens_bt, mask_bt, prompt_mask_bt, rows)
    return backbone.logits(hidden)
