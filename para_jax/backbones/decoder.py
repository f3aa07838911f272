"""The decoder: embedding, blocks and head. Forward pass, prefill and decode steps share one code path.

Weights have the (outputs, inputs) orientation of Hugging Face checkpoints, which XLA's CPU matmuls read about 1.5 times
faster than the transpose in decoding. q, k and v are one matmul, and so are gate and up. Layers are stacked arrays that
programs scan, or a list that they unroll; docs/backbone.md has measurements.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
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
from para_jax.backbones.linear import SAVE_MATMULS, matmul
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
    """A frozen language model of any family, as a pytree that is passed to programs as an argument.

    Its weights are embed (v, d), blocks, norm (d,), and head (v, d) unless it is tied to embed; some families also have
    positions (p, d), norm_bias (d,) and head_bias (v,), or no norm.

    >>> from para_jax import Backbone, tiny_backbone_path
    >>> backbone = Backbone.from_pretrained(tiny_backbone_path())
    >>> backbone(jnp.array([[5, 6, 7]])).shape
    (1, 3, 4096)
    """

    embed: nnx.Param
    positions: nnx.Param
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
        """Creates random weights, N(0, 0.02). Unlike `from_pretrained`, it does not shard them over `mesh`."""
        compute = compute_dtype(dtype)
        if quantize is not None and quantize not in QUANTIZED:
            raise unknown("quantize", quantize, QUANTIZED)
        self.config = config
        self.quantize = quantize
        self.mesh = mesh
        self.attention = choose(attention, config, compute).kernel
        self.stacked = default_stacked() if stacked is None else stacked
        top, *layers = jax.random.split(key, 1 + config.num_hidden_layers)
        for name, weight in random_weights(table(config), config, compute, top).items():
            setattr(self, name, weight)
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
        """Reads a Hugging Face checkpoint: config.json and safetensors or PyTorch .bin files.

        Args:
          path_or_hub_id: a folder, or a hub id to download.
          dtype: the dtype of weights and computation. "auto" is bfloat16 on TPU and GPU, float16 on an NVIDIA GPU
            before Ampere, and float32 on CPU. With float16, only weights, cache and matmul inputs are float16; all else
            is float32.
          stacked: whether layers are stacked and scanned, or unstacked and unrolled; by default what decodes fastest
            (`backbones/options.py`).
          quantize: "int8" or "int4" to quantize the layers' projections while reading (docs/backbone.md). Embedding,
            head, norms and computation use `dtype`.
          attention: the attention kernel (not for decode steps): "plain", "cudnn" (GPU), "splash" (TPU), or "auto" for
            the device's own if it compiles (`backbones/choice.py`).
          check_finite: whether to check for NaN or infinite weights.
          mesh: the mesh to shard the weights over, from `make_mesh` or any mesh with its axes. Weights are put on the
            devices as they are read.

        Raises ParaJaxError if this is not a checkpoint, if its family or an option is not supported, or if tensors are
        missing, unknown or of the wrong shape (all of them are listed).
        """
        folder, shapes = cls.opened(path_or_hub_id, dtype, stacked, quantize, attention, mesh)
        return load_weights(folder, shapes, check_finite)

    @classmethod
    def opened(
        cls, path_or_hub_id: str | Path, dtype: Dtype, stacked: bool | None, quantize: Quantize | None,
        attention: Attention, mesh: Mesh | None,
    ) -> tuple[Path, Backbone]:  # fmt: skip
        """The folder of a checkpoint, downloaded if necessary, and its abstract backbone."""
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
        """A backbone of `jax.ShapeDtypeStruct` with shardings, to compile programs ahead."""
        make = partial(cls, config, dtype=dtype, stacked=stacked, quantize=quantize, attention=attention, mesh=mesh)
        tree, logical = jax.eval_shape(make, jax.random.key(0)), axes(config)

        def sharded(name: str, x: Any) -> jax.ShapeDtypeStruct:
            own = logical[name.rpartition(".")[2]]
            sharding = None if mesh is None else NamedSharding(mesh, spec(own, x.shape, mesh))
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        return jax.tree.unflatten(
            jax.tree.structure(tree), [sharded(name, x) for name, x in named_leaves(tree).items()]
        )

    @property
    def dtype(self) -> jnp.dtype:
        return self.embed.dtype

    @property
    def residual_dtype(self) -> jnp.dtype:
        """The dtype of the residual stream and of Adjustments: float32 for float16, else `dtype`."""
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
          mask: False for padding, which may be on the left or right; by default all True.
          prompt_mask: the tokens that adapters are prepared from; by default all.
          bank, tenants: the adapters, and the tenant of each row: a name, None, or names with adapter weights.

        Raises ParaJaxError for an unknown tenant, if the tenants do not match the rows, or if a row has more tokens
        than there are learned positions.
        """
        mask = jnp.ones(tokens_bt.shape, bool) if mask is None else jnp.asarray(mask, bool)
        self._check_positions(mask)
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
        """Runs all tokens, and prepares the rows' adapters layer by layer.

        Args:
          mask_bt, prompt_mask_bt: which tokens are not padding, and which belong to the prompt.
          cache: an empty cache to fill with these tokens.
          remat: what is saved for the backward pass, which recomputes the rest: "layers" saves the inputs of layers,
            "products" also the outputs of matmuls, "none" everything.
          segments: the sequences of packed rows, each with its own Adjustment. Not supported with a cache.

        Returns the hidden states after the final norm, the Adjustments, and the cache.
        """
        if segments is not None and cache is not None:
            raise ParaJaxError("a cache holds one sequence per row; pass segments or a cache, not both")
        next_bt = jnp.pad(prompt_mask_bt[:, 1:], [(0, 0), (0, 1)])
        if segments is None:
            position_bt = jnp.maximum(jnp.cumsum(mask_bt, axis=1, dtype=jnp.int32) - 1, 0)
            count_b1 = jnp.sum(mask_bt, axis=1, keepdims=True, dtype=jnp.int32)
            length_bt = jnp.broadcast_to(count_b1, mask_bt.shape)
            prompt_masks, segment_bt = prompt_mask_bt, None
        else:
            position_bt, length_bt = segments.position_bt, segments.each(segments.length_bs)
            prompt_masks, segment_bt = segments.masks(prompt_mask_bt), segments.segment_bt
            next_bt = next_bt & (segment_bt == jnp.pad(segment_bt[:, 1:], [(0, 0), (0, 1)]))
        angles = self._angles(position_bt, length_bt)
        # The last prompt token predicts the first response token, so it counts as response.
        in_prompt = prompt_mask_bt & next_bt
        column = None if cache is None else cache.column
        seen = Seen(mask_bt, jnp.arange(mask_bt.shape[1]), None, segment_bt)

        def body(carry: Any, layer: Any, block: Block, adapters: Any) -> tuple[Any, Adjustment]:
            x, cache = carry
            adjustment = rows.prepare(adapters, layer, Prompt(x, block.attention_input(x), prompt_masks))
            adjustment = adjustment.astype(x.dtype)
            new_kv: list[Array] = []

            def adjust(site: str, x: Array, y: Array) -> Array:
                if segments is None:
                    return adjustment.apply(site, x, y, in_prompt)
                return segments.apply(adjustment, site, x, y, in_prompt)

            def attend(q: Array, k: Array, v: Array) -> Array:
                k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
                new_kv.extend((k, v))
                return self._attend(layer, self.attention, q, k, v, seen)

            x = split_rows(block(x, adjust, self._for_kind(layer, angles), attend), self.mesh)
            if cache is not None:
                cache = cache.write(layer, column, *new_kv)
            return (x, cache), adjustment.for_decoding()

        carry = (self._embedded(tokens_bt, position_bt), cache)
        (x, cache), adjustments = self._over_layers(body, carry, self._per_layer(rows.per_layer()), remat)
        if cache is not None:
            cache = cache.admit(mask_bt)
        return self._final_norm(x), adjustments, cache

    def prefill(
        self, tokens_bt: Int[Array, "b t"], mask_bt: Bool[Array, "b t"], rows: Rows, length: int
    ) -> tuple[Float[Array, "b v"], DecodeState]:
        """Runs left-padded prompts, with a cache of `length` columns.

        Returns the float32 logits of the token after each prompt, and the state for at most `length - t` steps of
        `decode`. Further steps would overwrite the last column.
        """
        if length < tokens_bt.shape[1]:
            raise ParaJaxError(f"a cache of {length} columns cannot hold prompts of {tokens_bt.shape[1]}")
        cache = Cache.create(self.config, tokens_bt.shape[0], length, self.dtype, self.stacked)
        hidden, adjustments, filled = self.forward(tokens_bt, mask_bt, mask_bt, rows, cache)
        assert filled is not None
        return self.logits(hidden[:, -1:])[:, 0], DecodeState(filled, adjustments)

    def decode(self, token_b: Int[Array, " b"], state: DecodeState) -> tuple[Float[Array, "b v"], DecodeState]:
        """Runs one token per row. Returns the float32 logits of the next token, and the new state."""
        column = state.cache.column
        position_bt = state.cache.position_b[:, None]
        angles = self._angles(position_bt, position_bt + 1)
        cache = state.cache.admit(jnp.ones((token_b.shape[0], 1), bool))
        seen = Seen(cache.valid_bs, column[None])

        def body(carry: Any, layer: Any, block: Block, adjustment: Adjustment) -> tuple[Any, None]:
            x_btd, cache = carry
            written = []

            def attend(q: Array, k: Array, v: Array) -> Array:
                new = cache.write(layer, column, k.swapaxes(1, 2), v.swapaxes(1, 2))
                written.append(new.with_row_major_layout(self.mesh) if self.stacked else new)
                keys, values = written[0].read(layer)
                return self._attend(layer, "plain", q, keys, values, seen)

            x_btd = block(x_btd, adjustment.apply, self._for_kind(layer, angles), attend)
            return (split_rows(x_btd, self.mesh), written[0]), None

        carry = (self._embedded(token_b[:, None], position_bt), cache)
        (x_btd, cache), _ = self._over_layers(body, carry, state.adjustments)
        return self.logits(self._final_norm(x_btd))[:, 0], DecodeState(cache, state.adjustments)

    def gathered_head(self) -> Float[Array, "v d"]:
        """The head, with its features gathered on a mesh, once for all matmuls that use it."""
        head = (self.embed if self.config.tie_word_embeddings else self.head)[...]
        return head if self.mesh is None else gathered(head, VOCABULARY, self.mesh)

    def logits(
        self, hidden_btd: Float[Array, "b t d"], head: Float[Array, "v d"] | None = None
    ) -> Float[Array, "b t v"]:
        """Float32 logits of hidden states. `head` defaults to `gathered_head()`."""
        head = self.gathered_head() if head is None else head
        logits, cap = matmul(hidden_btd, head, dtype=jnp.float32), self.config.final_logit_softcapping
        if "lm_head" in self.config.biases:
            logits = logits + self.head_bias[...][None, None].astype(jnp.float32)
        logits = logits if self.config.logits_scale == 1 else logits * self.config.logits_scale
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def _embedded(self, tokens_bt: Int[Array, "b t"], position_bt: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        """The input of the first layer; NaN for a position without a learned vector."""
        c = self.config
        x = embedded(self.embed[...], tokens_bt, self.mesh).astype(self.residual_dtype)
        x = x if c.embedding_scale == 1 else x * jnp.asarray(c.embedding_scale, x.dtype)
        if c.position_offset is not None:
            learned = embedded(self.positions[...], position_bt + c.position_offset, self.mesh)
            x = jnp.where(position_bt[..., None] < c.max_position_embeddings, x + learned.astype(x.dtype), jnp.nan)
        return norm(c, x, None) if c.embedding_norm else x

    def _check_positions(self, mask_bt: Bool[Array, "b t"]) -> None:
        """Raises ParaJaxError for a row with more tokens than there are learned positions, where the mask is known."""
        c = self.config
        if c.position_offset is None or mask_bt.shape[1] <= c.max_position_embeddings or isinstance(mask_bt, Tracer):
            return
        length_b = np.asarray(mask_bt).sum(axis=1)
        row = int(length_b.argmax())
        if length_b[row] > c.max_position_embeddings:
            raise ParaJaxError(
                f"row {row} has {length_b[row]} tokens, and the backbone has learned {c.max_position_embeddings} "
                "positions; shorten the row"
            )

    def _final_norm(self, x_btd: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        c = self.config
        weight, bias = (self.norm[...] if c.norm_weights else None, self.norm_bias[...] if "norm" in c.biases else None)
        return norm(c, x_btd, weight, bias).astype(self.dtype)

    def _attend(self, layer: int | Int[Array, ""], kernel: Kernel, q: Array, k: Array, v: Array, seen: Seen) -> Array:
        """Attention with the window of the layer's kind."""
        c = self.config
        scale = c.head_dim**-0.5 if c.attention_scale is None else c.attention_scale

        def with_window(window: int | None) -> Callable[[Array, Array, Array], Array]:
            mask = seen._replace(window=window)
            return lambda q, k, v: prompt_attention(kernel, q, k, v, mask, scale, c.attn_logit_softcapping, self.mesh)

        # Kernels need a static window, so scanned layers get a branch per window.
        windows = [kind.window for kind in c.attention_kinds]
        different = list(dict.fromkeys(windows))
        if len(different) == 1:
            return with_window(windows[0])(q, k, v)
        if isinstance(layer, int):
            return with_window(windows[c.kind_of_layer[layer]])(q, k, v)
        branch = jnp.array([different.index(windows[kind]) for kind in c.kind_of_layer])[layer]
        return jax.lax.switch(branch, [with_window(window) for window in different], q, k, v)

    def _angles(self, position_bt: Int[Array, "b t"], length_bt: Int[Array, "b t"]) -> list[rope.Angles]:
        """The RoPE angles of each kind of attention."""
        c = self.config
        return [
            rope.angles(kind.rope, c.head_dim, c.max_position_embeddings, position_bt, length_bt)
            for kind in c.attention_kinds
        ]

    def _for_kind(self, layer: int | Int[Array, ""], kinds: Sequence[Any]) -> Any:
        """Selects the entry for the layer's kind of attention."""
        if len(kinds) == 1:
            return kinds[0]
        if isinstance(layer, int):
            return kinds[self.config.kind_of_layer[layer]]
        kind = jnp.array(self.config.kind_of_layer)[layer]
        return jax.tree.map(lambda *x: jnp.stack(x)[kind], *kinds)

    def _per_layer(self, stacked: Any) -> Any:
        """Unstacks per-layer inputs for `_over_layers` if the blocks are unstacked."""
        if self.stacked:
            return stacked
        return tuple(jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(self.config.num_hidden_layers))

    def _over_layers(self, body: Callable[..., Any], carry: Any, inputs: Any, remat: Remat = "none") -> tuple[Any, Any]:
        """Loops `body(carry, index, block, input) -> carry, output` over layers; outputs are stacked if layers are."""
        if remat not in get_args(Remat):
            raise unknown("remat", remat, get_args(Remat))
        checkpointed = partial(jax.checkpoint, policy=SAVE_MATMULS if remat == "products" else None)

        def layer(carry: Any, index: Any, weights: Any, inputs: Any) -> tuple[Any, Any]:
            return body(carry, index, Block(self.config, weights, self.dtype, self.mesh), inputs)

        if self.stacked:
            step = (lambda c, x: layer(c, *x)) if remat == "none" else checkpointed(lambda c, x: layer(c, *x))
            return jax.lax.scan(step, carry, (jnp.arange(self.config.num_hidden_layers), self.blocks, inputs))
        layer = layer if remat == "none" else checkpointed(layer, static_argnums=(1,))
        outputs = []
        for index, weights in enumerate(self.blocks):
            carry, output = layer(carry, index, weights, inputs[index])
            outputs.append(output)
        return carry, tuple(outputs)


@jax.jit
def _logits(backbone: Backbone, tokens_bt: Array, mask_bt: Array, prompt_mask_bt: Array, rows: Rows) -> Array:
    hidden, _, _ = backbone.forward(tokens_bt, mask_bt, prompt_mask_bt, rows)
    return backbone.logits(hidden)
