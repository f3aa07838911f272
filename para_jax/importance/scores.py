"""How much each module of each layer contributes to a LoRA adapter of all linear modules.

One interface: `importance_scores(score, backbone, adapter, examples)` gives an array (layers, sites) in which more is
more important. FanLoRA's own score could not be read; the default is the ablation score of ALoRA (Liu et al., arXiv
2403.16187), by the same group, lifted from ranks to modules.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from para_jax.adapters.adapter import Adapter
from para_jax.adapters.lora import LoraConfig, LoraLayer
from para_jax.adapters.method import Prompt
from para_jax.adapters.rows import Rows
from para_jax.adjustment import Adjustment
from para_jax.backbones.decoder import Backbone
from para_jax.checks import COUNT, SEED
from para_jax.data.batches import Batch, one_row_each
from para_jax.data.examples import Example
from para_jax.errors import ParaJaxError, unknown
from para_jax.progress import duration
from para_jax.training.loss import target_nll

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Float, Int

SHOW_EVERY = 5.0  # seconds


@dataclass(frozen=True)
class Scoring:
    """What a score is computed from; the arguments of `importance`."""

    backbone: Backbone
    adapter: Adapter
    examples: Sequence[Example]
    batch_size: int
    variants: int
    seed: int
    show: Callable[[str], None]

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(self.backbone.config.linear_sites)

    @property
    def size(self) -> tuple[int, int]:
        return self.backbone.config.num_hidden_layers, len(self.sites)

    @property
    def tokens(self) -> int:
        """The response tokens of all examples."""
        return sum(e.response_ids.size for e in self.examples)


def importance_scores(
    score: str,
    backbone: Backbone,
    adapter: Adapter,
    examples: Sequence[Example] = (),
    *,
    batch_size: int = 8,
    variants: int = 16,
    seed: int = 0,
    show: Callable[[str], None] = lambda line: None,
) -> Float[np.ndarray, "layers sites"]:
    """The importance of every module, float64, by layer and by site in the order of `backbone.config.sites`.

    Args:
      score: "ablation", "gradient", "norm" or "random"; see the functions of these names.
      adapter: LoRA on every linear module, tuned.
      examples: held-out rows; "norm" and "random" do without.
      batch_size: rows of a forward pass.
      variants: ablations that run in one pass, each with its own activations of these rows.
      seed: of "random".
      show: takes a line of progress every few seconds.

    Raises ParaJaxError for an unknown score, an adapter that is not LoRA or lacks a module, or no rows.

    >>> from para_jax import AdapterBank, LoraConfig, tiny_backbone_path
    >>> backbone = Backbone.from_pretrained(tiny_backbone_path())
    >>> bank = AdapterBank.create({"all": LoraConfig(r=1, target_modules="all-linear")}, backbone.config)
    >>> importance_scores("norm", backbone, bank["all"]).tolist() == [[0.0] * 7] * 4
    True
    """
    if score not in SCORES:
        raise unknown("score", score, SCORES)
    batch_size, variants = COUNT.check("batch_size", batch_size), COUNT.check("variants", variants)
    seed = SEED.check("seed", seed)
    check(adapter, backbone)
    if score in NEED_ROWS and not examples:
        raise ParaJaxError(f"the {score} score is computed on held-out rows, and there are none")
    return SCORES[score](Scoring(backbone, adapter, examples, batch_size, variants, seed, show))


def check(adapter: Adapter, backbone: Backbone) -> None:
    """Raises ParaJaxError unless the adapter is LoRA on every linear module of the backbone."""
    way = "tune one with para-jax finetune --method lora --target-modules all-linear"
    if not isinstance(adapter.config, LoraConfig):
        raise ParaJaxError(f"modules are scored in LoRA, and this adapter's method is {adapter.config.method}; {way}")
    adapter.check(backbone.config)
    for layer, modules in enumerate(adapter.config.modules(backbone.config)):
        lacking = [site for site in backbone.config.linear_sites if site not in modules]
        if lacking:
            raise ParaJaxError(f"the adapter has no {', '.join(lacking)} in layer {layer} to be scored; {way}")


def ablation(s: Scoring) -> Float[np.ndarray, "layers sites"]:
    """S(M) - S(M without m) + S(only m), where S is the negative mean cross-entropy of a response token.

    The first two terms say what a module's loss costs, the third what the module does alone. With m modules that is
    2 m + 1 forward passes over the held-out rows (449 for the 224 modules of LLaMA-2 7B), `variants` of them at a time
    as one vmapped pass that reads the backbone's weights once.
    """
    m = s.size[0] * s.size[1]
    alone = np.eye(m, dtype=np.float32)
    loss_v = losses(s, np.concatenate([np.ones((1, m), np.float32), 1 - alone, alone]).reshape(-1, *s.size))
    return (loss_v[1 : m + 1] - loss_v[0] - loss_v[m + 1 :]).reshape(s.size)


def gradient(s: Scoring) -> Float[np.ndarray, "layers sites"]:
    """The sum of |p * dL/dp| over the numbers p of a module's A and B: to first order, what losing each one costs.

    L is the mean cross-entropy of a response token over all rows. One forward and one backward pass over them.
    """
    total: Any = None
    for batch in _shown(_batches(s), "gradient", s.show):
        part = jax.device_get(_slope(s.backbone, s.adapter.layers, batch))
        total = part if total is None else jax.tree.map(np.add, total, part)
    moved = jax.tree.map(lambda p, g: np.abs(np.asarray(p) * g / s.tokens), s.adapter.layers, total)
    return np.stack([_by_layer(moved.down[site]) + _by_layer(moved.up[site]) for site in s.sites], axis=1)


def norm(s: Scoring) -> Float[np.ndarray, "layers sites"]:
    """The Frobenius norm of what a module adds to its weights, scale * B A. No forward pass."""
    assert isinstance(s.adapter.config, LoraConfig)
    scores = np.zeros(s.size)
    for layer, modules in enumerate(s.adapter.config.modules(s.backbone.config)):
        for i, site in enumerate(s.sites):
            down, up = (np.asarray(x[site][layer], np.float64) for x in (s.adapter.layers.down, s.adapter.layers.up))
            # The trace of (B^T B)(A A^T), which needs no matrix of the size of the weights.
            squared = max(0.0, float(np.sum((up.T @ up) * (down @ down.T))))
            scores[layer, i] = abs(modules[site].scale) * squared**0.5
    return scores


def random(s: Scoring) -> Float[np.ndarray, "layers sites"]:
    """Uniform numbers of `seed`: what a score has to do better than."""
    return np.random.default_rng(s.seed).random(s.size)


SCORES: Mapping[str, Callable[[Scoring], np.ndarray]] = {
    "ablation": ablation,
    "gradient": gradient,
    "norm": norm,
    "random": random,
}
NEED_ROWS = ("ablation", "gradient")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Gated:
    """LoRA whose modules can be switched off: each module's change is multiplied by its gate."""

    lora: LoraLayer
    gates: Mapping[str, Float[Array, ""]]

    def prepare(self, prompt: Prompt, layer: int | Int[Array, ""]) -> Adjustment:
        return self.lora.prepare(prompt, layer).gated(self.gates)


def losses(s: Scoring, gates_vls: Float[np.ndarray, "v layers sites"]) -> Float[np.ndarray, " v"]:
    """The mean cross-entropy of a response token, float64, for each variant of the adapter.

    A variant is an array of gates (layers, sites): 1 leaves a module as it is, 0 switches it off.
    """
    total = len(gates_vls)
    turns = -(-total // s.variants)
    # Chunks of one size, so that they share a program; the last is filled up with variants that are thrown away.
    chunk = -(-total // turns)
    filled = np.concatenate([gates_vls, np.ones((turns * chunk - total, *s.size), np.float32)])
    sum_v = np.zeros(turns * chunk)
    work = [(batch, start) for batch in _batches(s) for start in range(0, turns * chunk, chunk)]
    for batch, start in _shown(work, f"{total} variants on {len(s.examples)} rows", s.show):
        sum_v[start : start + chunk] += _gated_nll(s.backbone, s.adapter.layers, batch, filled[start : start + chunk])
    return sum_v[:total] / s.tokens


@jax.jit
def _gated_nll(
    backbone: Backbone, layers: LoraLayer, batch: Batch, gates_vls: Float[Array, "v layers sites"]
) -> Float[Array, " v"]:
    return jax.vmap(partial(_nll, backbone, layers, batch))(gates_vls)


@jax.jit
def _slope(backbone: Backbone, layers: LoraLayer, batch: Batch) -> LoraLayer:
    size = (backbone.config.num_hidden_layers, len(backbone.config.linear_sites))
    return jax.grad(_nll, argnums=1)(backbone, layers, batch, jnp.ones(size, jnp.float32))


def _nll(
    backbone: Backbone, layers: LoraLayer, batch: Batch, gates_ls: Float[Array, "layers sites"]
) -> Float[Array, ""]:
    """The cross-entropy of a batch's response tokens, summed, under one variant of one adapter."""
    gates = {site: gates_ls[:, i] for i, site in enumerate(backbone.config.linear_sites)}
    one = jax.tree.map(lambda x: x[None], Gated(layers, gates))
    rows = Rows((jnp.ones(1, jnp.float32),), (one,), (0.0,), repeats=batch.tokens.shape[0])
    return jnp.sum(jnp.where(batch.targets.place == 0, target_nll(backbone, rows, batch), 0))


def _batches(s: Scoring) -> list[Batch]:
    """All rows in batches without a leading axis, by length; the last is filled up with rows that count nothing."""
    ordered = sorted(s.examples, key=len)
    batches = []
    for start in range(0, len(ordered), s.batch_size):
        some = ordered[start : start + s.batch_size]
        # Fewer rows than a batch holds make a smaller one.
        batches.append(one_row_each(some, min(s.batch_size, len(ordered))))
    return batches


def _by_layer(x: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, " layers"]:
    return np.asarray(x, np.float64).reshape(len(x), -1).sum(axis=1)


def _shown(work: Sequence[Any], what: str, show: Callable[[str], None]) -> Iterator[Any]:
    """The items of `work`, with a line now and then of how many are done and how long the others will take."""
    began = shown = time.monotonic()
    for done, item in enumerate(work):
        now = time.monotonic()
        if done == 1:
            began = now  # the first compiles; its time says nothing about the others
        if done > 1 and now - shown > SHOW_EVERY:
            shown = now
            left = duration((now - began) / (done - 1) * (len(work) - done))
            show(f"{what}: {done}/{len(work)} passes, {left} left")
        yield item
