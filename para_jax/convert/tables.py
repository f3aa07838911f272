"""Which Hugging Face tensors make which of ours: one invertible table a family serves loading and saving."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from para_jax.backbones.config import BackboneConfig


@dataclass(frozen=True)
class Part:
    """A Hugging Face tensor, its shape, and the shape in which it is joined with its neighbours."""

    name: str
    shape: tuple[int, ...]
    view: tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """One of our tensors: its parts joined along `axis`."""

    name: str
    parts: tuple[Part, ...]
    axis: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Of our tensor."""
        first = self.parts[0].view
        joined = sum(part.view[self.axis] for part in self.parts)
        return (*first[: self.axis], joined, *first[self.axis + 1 :])

    def join(self, tensors: list[np.ndarray], out: np.ndarray | None = None) -> np.ndarray:
        """Ours from theirs, written into `out`, and cast to its dtype, if it is given."""
        views = [x.reshape(part.view) for x, part in zip(tensors, self.parts, strict=True)]
        return np.concatenate(views, self.axis, out=out, casting="unsafe")

    def split(self, ours: np.ndarray) -> dict[str, np.ndarray]:
        """Theirs from ours; inverse of `join`."""
        ends = np.cumsum([part.view[self.axis] for part in self.parts])[:-1]
        pieces = np.split(ours, ends, self.axis)
        return {part.name: x.reshape(part.shape) for part, x in zip(self.parts, pieces, strict=True)}


def llama(config: BackboneConfig, layer: int | None = None) -> list[Entry]:
    """The entries of one layer, or with None those outside the layers."""
    d, f, hd, k = config.hidden_size, config.intermediate_size, config.head_dim, config.num_key_value_heads
    g = config.num_attention_heads // k

    def whole(ours: str, theirs: str, *shape: int) -> Entry:
        return Entry(ours, (Part(f"{theirs}.weight", shape, shape),))

    if layer is None:
        entries = [
            whole("embed", "model.embed_tokens", config.vocab_size, d),
            whole("norm", "model.norm", d),
        ]
        if not config.tie_word_embeddings:
            entries.append(whole("head", "lm_head", config.vocab_size, d))
        return entries
    at = f"model.layers.{layer}"
    qkv = [
        Part(f"{at}.self_attn.{name}_proj.weight", (k * n * hd, d), (k, n, hd, d))
        for name, n in (("q", g), ("k", 1), ("v", 1))
    ]
    gate_up = [Part(f"{at}.mlp.{name}_proj.weight", (f, d), (1, f, d)) for name in ("gate", "up")]
    return [
        whole("attention_norm", f"{at}.input_layernorm", d),
        Entry("qkv", tuple(qkv), axis=1),
        whole("out", f"{at}.self_attn.o_proj", d, k * g * hd),
        whole("mlp_norm", f"{at}.post_attention_layernorm", d),
        Entry("gate_up", tuple(gate_up)),
        whole("down", f"{at}.mlp.down_proj", d, f),
    ]
