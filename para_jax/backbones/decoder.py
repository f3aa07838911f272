"""The decoder: embedding, blocks and head. Forward pass, prefill and decode steps share one code path.

Weights have the (outputs, inputs) orientation of Hugging Face checkpoints, which XLA's CPU matmuls read 1.2 to 1.4
times faster than the transpose in decoding. q, k and v are one matmul, and so are gate and up. Layers are stacked
arrays that programs scan, or a list that they unroll; docs/backbone.md has measurements.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from para_jax.backbones import kinds
from para_jax.backbones.attention import Seen
from para_jax.backbones.block import Block, norm
from para_jax.backbones.cache import Cache, DecodeState
from para_jax.backbones.choice import choose
from para_jax.backbones.layers import At, over_layers, place
from para_jax.backbones.linear import matmul
from para_jax.backbones.options import Attention, Dtype, Remat, compute_dtype, default_stacked, wide
from para_jax.backbones.packed import Segments
from para_jax.backbones.weights import random_weights
from para_jax.compat import Dict, List
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
    positions (p, d), norm_bias (d,) and head_bias (v,), or no norm, or inputs for every layer: layer_embed (v, l * p),
    layer_inputs (l * p, d) and layer_inputs_norm (p,).

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
    layer_embed: nnx.Param
    layer_inputs: nnx.Param
    layer_inputs_norm: nnx.Param

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
        weights = random_weights(table(config), config, compute, top)
        self.embed, self.positions = weights["embed"], weights.get("positions")
        self.norm, self.norm_bias = weights.get("norm"), weights.get("norm_bias")
        self.head, self.head_bias = weights.get("head"), weights.get("head_bias")
        self.layer_embed, self.layer_inputs = weights.get("layer_embed"), weights.get("layer_inputs")
        self.layer_inputs_norm = weights.get("layer_inputs_norm")

        def make(layer: int, key: Array) -> Any:
            return random_weights(table(config, layer), config, compute, key, quantize=quantize)

        if self.stacked:
            keys = [jnp.stack([layers[layer] for layer in stack.layers]) for stack in config.stacks]
            made = [jax.vmap(partial(make, s.layers[0]))(own) for s, own in zip(config.stacks, keys, strict=True)]
            by_name = {stack.name: weights for stack, weights in zip(config.stacks, made, strict=True)}
            self.blocks: Any = made[0] if len(made) == 1 else Dict(by_name)
        else:
            self.blocks = List([make(layer, key) for layer, key in enumerate(layers)])

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
    ) -> tuple[Float[Array, "b t d"], tuple[Adjustment, ...], Cache | None]:
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
        angles = kinds.angles(self.config, position_bt, length_bt)
        # The last prompt token predicts the first response token, so it counts as response.
        in_prompt = prompt_mask_bt & next_bt
        column = None if cache is None else cache.column
        seen = Seen(mask_bt, jnp.arange(mask_bt.shape[1]), None, segment_bt)

        def body(carry: Any, at: At, weights: Any, inputs: Any) -> tuple[Any, Adjustment]:
            (x, cache, shared), (adapters, layer_input), block = carry, inputs, self._block(at, weights)
            normed = block.attention_input(x)
            adjustment = rows.prepare(adapters, at.number, Prompt(x, normed, prompt_masks)).astype(x.dtype)

            def adjust(site: str, x: Array, y: Array) -> Array:
                if segments is None:
                    return adjustment.apply(site, x, y, in_prompt)
                return segments.apply(adjustment, site, x, y, in_prompt)

            q, keys_values = block.queries_keys_values(normed, adjust, at.select(angles))
            if keys_values is None:
                keys_values = shared[block.shares]
            else:
                shared = {source: at.is_layer(source, keys_values, old) for source, old in shared.items()}
                cache = None if cache is None else cache.write(at, column, *keys_values)
            mixed = kinds.attend(self.config, at, self.attention, q, keys_values, seen, block.sinks, self.mesh)
            x = split_rows(block.after_attention(x, normed, mixed, adjust, layer_input), self.mesh)
            return (x, cache, shared), adjustment.for_decoding()

        x = self._embedded(tokens_bt, position_bt)
        own = self._layer_inputs(tokens_bt, x)
        inputs = tuple(zip(self._per_layer(rows), own, strict=True))
        carry = (x, cache, kinds.to_share(self.config, self.dtype, *tokens_bt.shape))
        (x, cache, _), adjustments = self._over_layers(body, carry, inputs, remat)
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
        angles = kinds.angles(self.config, position_bt, position_bt + 1)
        cache = state.cache.admit(jnp.ones((token_b.shape[0], 1), bool))
        seen = Seen(cache.valid_bs, column[None])

        def body(carry: Any, at: At, weights: Any, inputs: Any) -> tuple[Any, None]:
            (x_btd, cache), (adjustment, layer_input), block = carry, inputs, self._block(at, weights)
            normed = block.attention_input(x_btd)
            q, keys_values = block.queries_keys_values(normed, adjustment.apply, at.select(angles))
            if keys_values is None:
                source = place(self.config, self.stacked, block.shares)
            else:
                source = at
                cache = cache.write(at, column, *keys_values)
                cache = cache.with_row_major_layout(self.mesh) if self.stacked else cache
            mixed = kinds.attend(self.config, at, "plain", q, cache.read(source), seen, block.sinks, self.mesh)
            x_btd = block.after_attention(x_btd, normed, mixed, adjustment.apply, layer_input)
            return (split_rows(x_btd, self.mesh), cache), None

        x_btd = self._embedded(token_b[:, None], position_bt)
        inputs = tuple(zip(state.adjustments, self._layer_inputs(token_b[:, None], x_btd), strict=True))
        (x_btd, cache), _ = self._over_layers(body, (x_btd, cache), inputs)
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

    def _layer_inputs(self, tokens_bt: Int[Array, "b t"], x_btd: Float[Array, "b t d"]) -> Sequence[Any]:
        """Each layer's own input, by stack or by unstacked layer; None in families without."""
        c = self.config
        if c.per_layer_inputs is None:
            return [None] * (len(c.stacks) if self.stacked else c.num_hidden_layers)
        by_token = embedded(self.layer_embed[...], tokens_bt, self.mesh)
        every_lbtp = kinds.layer_inputs(c, by_token, x_btd, self.layer_inputs[...], self.layer_inputs_norm[...])
        return [every_lbtp[jnp.array(stack.layers)] for stack in c.stacks] if self.stacked else [*every_lbtp]

    def _block(self, at: At, weights: Any) -> Block:
        first = self.config.stacks[at.slot].layers[0] if self.stacked else at.slot
        return Block(self.config, self.config.kind(first), weights, self.dtype, self.mesh)

    def _per_layer(self, rows: Rows) -> tuple[Any, ...]:
        """The adapters of the rows, by stack or by unstacked layer."""
        stacks = self.config.stacks
        stacked = tuple(rows.of_stack(stack.name) for stack in stacks)
        if self.stacked:
            return stacked
        layers = {
            layer: jax.tree.map(lambda x, i=i: x[i], own)
            for stack, own in zip(stacks, stacked, strict=True)
            for i, layer in enumerate(stack.layers)
        }
        return tuple(layers[layer] for layer in range(self.config.num_hidden_layers))

    def _over_layers(
        self, body: Callable[..., Any], carry: Any, inputs: Sequence[Any], remat: Remat = "none"
    ) -> tuple[Any, tuple[Any, ...]]:
        """`over_layers` with this backbone's blocks."""
        weights: Sequence[Any] = self.blocks
        if self.stacked:
            stacks = self.config.stacks
            weights = [self.blocks] if len(stacks) == 1 else [self.blocks[stack.name] for stack in stacks]
        return over_layers(self.config, self.stacked, body, carry, weights, inputs, remat)


@jax.jit
def _logits(backbone: Backbone, tokens_bt: Array, mask_bt: Array, prompt_mask_bt: Array, rows: Rows) -> Array:
    hidden, _, _ = backbone.forward(tokens_bt, mask_bt, prompt_mask_bt, rows)
    return backbone.logits(hidden)
