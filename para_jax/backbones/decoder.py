"""The decoder: embeddings, blocks, head; a full forward pass, prefill and single decode steps in one code path.

Weights keep the (outputs, inputs) orientation of Hugging Face checkpoints; XLA's CPU products read it about 1.5
times faster than its transpose at the row counts of decoding. q, k and v are one product, as are gate and up.
Layers are a list that programs unroll, or stacked arrays that they scan: docs/backbone.md has the measurements.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from para_jax.adapters.bank import AdapterBank, Rows, Tenant, strengths_of
from para_jax.adapters.method import Prompt
from para_jax.adjustment import Adjustment
from para_jax.backbones import rope
from para_jax.backbones.attention import attention, causal
from para_jax.backbones.cache import Cache, DecodeState
from para_jax.backbones.config import BackboneConfig
from para_jax.backbones.linear import product, rms_norm
from para_jax.backbones.ragged import Line, Ragged
from para_jax.errors import ParaJaxError

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Bool, Float, Int

Dtype = Literal["auto", "float32", "bfloat16"]


class Block(nnx.Module):
    """One Transformer layer. Weights, with k key/value heads of g query heads each, hd features a head:

    attention_norm (d,), qkv (k, g + 2, hd, d), out (d, k * g * hd), mlp_norm (d,), gate_up (2, f, d), down (d, f).
    """

    def __init__(self, config: BackboneConfig, dtype: jnp.dtype, key: Array):
        d, f, hd, k = config.hidden_size, config.intermediate_size, config.head_dim, config.num_key_value_heads
        g = config.num_attention_heads // k
        keys = jax.random.split(key, 4)

        def normal(key: Array, *shape: int) -> nnx.Param:
            return nnx.Param((0.02 * jax.random.normal(key, shape, jnp.float32)).astype(dtype))

        self.config = config
        self.attention_norm = nnx.Param(jnp.ones((d,), dtype))
        self.qkv = normal(keys[0], k, g + 2, hd, d)
        self.out = normal(keys[1], d, k * g * hd)
        self.mlp_norm = nnx.Param(jnp.ones((d,), dtype))
        self.gate_up = normal(keys[2], 2, f, d)
        self.down = normal(keys[3], d, f)

    def __call__(
        self,
        x_btd: Float[Array, "b t d"],
        adjust: Callable[[str, Array, Array], Array],
        angles: tuple[Float[Array, "b t hd"], Float[Array, "b t hd"]],
        attend: Callable[[Array, Array, Array], Array],
    ) -> Float[Array, "b t d"]:
        """One layer.

        `adjust` takes a site's name, its input and its output and returns the output adjusted. `attend` takes
        q (b, t, k, g, hd) and k, v (b, t, k, hd) of these tokens and returns (b, t, k * g * hd).
        """
        c = self.config
        b, t, _ = x_btd.shape
        k, hd = c.num_key_value_heads, c.head_dim
        g = c.num_attention_heads // k

        normed = rms_norm(x_btd, self.attention_norm[...], c.rms_norm_eps)
        # Splitting and not indexing: the gradient of a split is one concatenation.
        q, k_, v = jnp.split(product(normed, self.qkv[...]), [g, g + 1], axis=-2)
        q = adjust("q_proj", normed, q.reshape(b, t, -1)).reshape(b, t, k * g, hd)
        k_ = adjust("k_proj", normed, k_.reshape(b, t, -1)).reshape(b, t, k, hd)
        v = adjust("v_proj", normed, v.reshape(b, t, -1)).reshape(b, t, k, hd)
        q = rope.rotate(q, *angles).reshape(b, t, k, g, hd)
        mixed = attend(q, rope.rotate(k_, *angles), v)
        x_btd = x_btd + adjust("o_proj", mixed, product(mixed, self.out[...]))

        normed = rms_norm(x_btd, self.mlp_norm[...], c.rms_norm_eps)
        gate, up = jnp.split(product(normed, self.gate_up[...]).reshape(b, t, -1), 2, axis=-1)
        gate, up = adjust("gate_proj", normed, gate), adjust("up_proj", normed, up)
        inner = jax.nn.silu(gate) * up
        return x_btd + adjust("down_proj", inner, product(inner, self.down[...]))


class Backbone(nnx.Module):
    """A frozen Llama-architecture language model; a pytree of arrays that programs take as an argument.

    Weights: embed (v, d), blocks, norm (d,), and head (v, d) unless it is tied to embed.

    >>> from para_jax import Backbone, tiny_backbone_path
    >>> backbone = Backbone.from_pretrained(tiny_backbone_path())
    >>> backbone(jnp.array([[5, 6, 7]])).shape
    (1, 3, 4096)
    """

    def __init__(self, config: BackboneConfig, key: Array, dtype: Dtype = "auto", stacked: bool | None = None):
        """Random weights, N(0, 0.02). `from_pretrained` is for a checkpoint."""
        compute = compute_dtype(dtype)
        self.config = config
        self.stacked = default_stacked() if stacked is None else stacked
        top, *layers = jax.random.split(key, 1 + config.num_hidden_layers)
        embed, head = jax.random.split(top)
        shape = (config.vocab_size, config.hidden_size)
        self.embed = nnx.Param((0.02 * jax.random.normal(embed, shape, jnp.float32)).astype(compute))
        if self.stacked:
            self.blocks: Any = jax.vmap(lambda k: Block(config, compute, k))(jnp.stack(layers))
        else:
            self.blocks = nnx.List([Block(config, compute, k) for k in layers])
        self.norm = nnx.Param(jnp.ones((config.hidden_size,), compute))
        if not config.tie_word_embeddings:
            self.head = nnx.Param((0.02 * jax.random.normal(head, shape, jnp.float32)).astype(compute))

    @classmethod
    def from_pretrained(
        cls, path_or_hub_id: str | Path, dtype: Dtype = "auto", stacked: bool | None = None
    ) -> Backbone:
        """Reads a Hugging Face checkpoint: config.json and safetensors, one file or an index of several.

        Args:
          path_or_hub_id: a folder, or a hub id that is downloaded.
          dtype: of weights and computation; "auto" is bfloat16 on TPU and GPU, float32 on CPU.
          stacked: whether layers are stacked and scanned or kept apart and unrolled; by default as is fastest.

        Raises ParaJaxError for what is no checkpoint, an architecture not supported, or missing, extra or
        misshapen tensors (all of them are listed).
        """
        # Reading files is the business of convert/, which builds on this module.
        from para_jax.convert.checkpoint import load_backbone

        return load_backbone(path_or_hub_id, dtype, stacked)

    @property
    def dtype(self) -> jnp.dtype:
        return self.embed.dtype

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
          bank, tenants: the adapters, and for each row its tenant's name, None, or names with strengths.

        Raises ParaJaxError for an unknown tenant, or tenants that do not match the rows.
        """
        mask = jnp.ones(tokens_bt.shape, bool) if mask is None else jnp.asarray(mask, bool)
        prompt_mask = mask if prompt_mask is None else jnp.asarray(prompt_mask, bool) & mask
        return _logits(self, tokens_bt, mask, prompt_mask, batch_rows(bank, tenants, tokens_bt.shape[0]))

    def forward(
        self,
        tokens_bt: Int[Array, "b t"],
        mask_bt: Bool[Array, "b t"],
        prompt_mask_bt: Bool[Array, "b t"],
        rows: Rows,
        cache: Cache | None = None,
        remat: bool = False,
        flat: Line | None = None,
    ) -> tuple[Float[Array, "b t d"], Any, Cache | None]:
        """Prepares the rows' adapters layer by layer and runs all tokens.

        Args:
          mask_bt, prompt_mask_bt: which tokens are none of the padding, and which of those are the prompt's.
          cache: an empty one to fill with these tokens.
          remat: recompute each layer in the backward pass instead of keeping what it made.
          flat: run all but attention on a line of the tokens in place of the padded batch, whose rows are padded on
            the right. Hidden states of padding are zero then. Not with a cache.

        Returns the final hidden states after the norm, the Adjustments, and the cache.
        """
        if flat is not None and cache is not None:
            raise ParaJaxError("a cache is filled from the padded batch; leave out flat, or the cache")
        position_bt = jnp.maximum(jnp.cumsum(mask_bt, axis=1, dtype=jnp.int32) - 1, 0)
        column = None if cache is None else cache.column
        line = None if flat is None else Ragged.of(mask_bt, flat.tokens)
        halves = () if line is None or flat is None else line.halves(flat.short)

        def flatten(x: Array) -> Array:
            return x if line is None else line.flat(x)

        def padded(x: Array) -> Array:
            return x if line is None else line.padded(x)

        angles = rope.angles(self.config, flatten(position_bt))
        in_prompt = flatten(prompt_mask_bt)

        def body(carry: Any, layer: Any, block: Block, adapters: Any) -> tuple[Any, Adjustment]:
            x, cache = carry
            normed = rms_norm(x, block.attention_norm[...], self.config.rms_norm_eps)
            prompt = Prompt(padded(x), padded(normed), prompt_mask_bt)
            adjustment = rows.prepare(adapters, layer, prompt).astype(x.dtype)
            new: list[Array] = []

            def adjust(site: str, x: Array, y: Array) -> Array:
                if line is None:
                    return adjustment.apply(site, x, y, in_prompt)
                return line.apply(adjustment, site, x, y, in_prompt)

            def attend(q: Array, k: Array, v: Array) -> Array:
                if line is None:
                    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
                    new.extend((k, v))
                    return attention(q, k, v, causal(mask_bt))
                mixed = []
                for half in halves:
                    keys, values = half.padded(k).swapaxes(1, 2), half.padded(v).swapaxes(1, 2)
                    mixed.append(half.flat(attention(half.padded(q), keys, values, causal(half.mask_bt))))
                return mixed[0] if len(mixed) == 1 else mixed[0] + mixed[1]

            x = block(x, adjust, angles, attend)
            if cache is not None:
                cache = cache.write(layer, column, *new)
            return (x, cache), adjustment.settled()

        carry = (flatten(self.embed[...][tokens_bt]), cache)
        (x, cache), adjustments = self._over_layers(body, carry, self._layered(rows.per_layer()), remat)
        if cache is not None:
            cache = cache.admit(mask_bt)
        return padded(rms_norm(x, self.norm[...], self.config.rms_norm_eps)), adjustments, cache

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

    def decode(self, token_b: Int[Array, "b"], state: DecodeState) -> tuple[Float[Array, "b v"], DecodeState]:
        """One token for every row: float32 logits of the next, and the state after it."""
        column = state.cache.column
        angles = rope.angles(self.config, state.cache.position_b[:, None])
        cache = state.cache.admit(jnp.ones((token_b.shape[0], 1), bool))
        visible_bts = cache.valid_bs[:, None, :]

        def body(carry: Any, layer: Any, block: Block, adjustment: Adjustment) -> tuple[Any, None]:
            x_btd, cache = carry
            after = []

            def attend(q: Array, k: Array, v: Array) -> Array:
                after.append(cache.write(layer, column, k.swapaxes(1, 2), v.swapaxes(1, 2)))
                keys, values = after[0].read(layer)
                return attention(q, keys, values, visible_bts)

            x_btd = block(x_btd, adjustment.apply, angles, attend)
            return (x_btd, after[0]), None

        carry = (self.embed[...][token_b[:, None]], cache)
        (x_btd, cache), _ = self._over_layers(body, carry, state.adjustments)
        hidden = rms_norm(x_btd, self.norm[...], self.config.rms_norm_eps)
        return self.logits(hidden)[:, 0], DecodeState(cache, state.adjustments)

    def logits(self, hidden_btd: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
        """The head, float32 out."""
        head = self.embed if self.config.tie_word_embeddings else self.head
        return product(hidden_btd, head[...], jnp.float32)

    def _layered(self, stacked: Any) -> Any:
        """Per-layer inputs in the form `_over_layers` takes: apart if the blocks are, stacked if they are."""
        if self.stacked:
            return stacked
        return tuple(jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(self.config.num_hidden_layers))

    def _over_layers(self, body: Callable[..., Any], carry: Any, inputs: Any, remat: bool = False) -> tuple[Any, Any]:
        """`body(carry, index, block, input) -> carry, output` over the layers; outputs apart or stacked, as these."""
        if self.stacked:
            step = jax.checkpoint(lambda c, x: body(c, *x)) if remat else lambda c, x: body(c, *x)
            return jax.lax.scan(step, carry, (jnp.arange(self.config.num_hidden_layers), self.blocks, inputs))
        body = jax.checkpoint(body, static_argnums=(1,)) if remat else body
        outputs = []
        for index, block in enumerate(self.blocks):
            carry, output = body(carry, index, block, inputs[index])
            outputs.append(output)
        return carry, tuple(outputs)


@jax.jit
def _logits(backbone: Backbone, tokens_bt: Array, mask_bt: Array, prompt_mask_bt: Array, rows: Rows) -> Array:
    hidden, _, _ = backbone.forward(tokens_bt, mask_bt, prompt_mask_bt, rows)
    return backbone.logits(hidden)


def batch_rows(bank: AdapterBank | None, tenants: Sequence[Tenant] | None, batch: int) -> Rows:
    """The adapters of a batch. Raises ParaJaxError unless there is a tenant or None for every row."""
    if tenants is None:
        if bank is not None:
            raise ParaJaxError("a bank was given but no tenants; pass tenants=[...], a name or None for every row")
        return Rows()
    if isinstance(tenants, str | Mapping) or len(tenants) != batch:
        raise ParaJaxError(f"{batch} rows but tenants={tenants!r}; give a list of a name or None for every row")
    if not any(strengths_of(tenant) for tenant in tenants):
        return Rows()
    if bank is None:
        raise ParaJaxError("tenants were given but no bank; pass bank=AdapterBank.load({name: folder, ...}, config)")
    return bank.rows(tenants)


def compute_dtype(dtype: Dtype) -> jnp.dtype:
    """The dtype of weights and computation; "auto" is bfloat16 on TPU and GPU, float32 on CPU."""
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if dtype not in ("float32", "bfloat16"):
        raise ParaJaxError(f"dtype {dtype!r} is not supported; choose auto, float32 or bfloat16")
    return jnp.dtype(dtype)


def default_stacked() -> bool:
    """Layers apart on CPU, where a scan copies every layer's weights out of the stack; stacked elsewhere."""
    return jax.default_backend() != "cpu"
