"""Importance scores: how much each module of each layer contributes to a LoRA adapter on all linear modules.

`importance_scores(score, backbone, adapter, examples)` returns an array (layers, sites); higher is more important.
FanLoRA's own score was not available; the default is the ablation score of ALoRA (Liu et al., arXiv 2403.16187), by the
same group, applied to modules instead of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from para_jax.adapters.adapter import Adapter, in_stack
from para_jax.adapters.lora import LoraConfig, LoraLayer
from para_jax.adapters.method import Prompt
from para_jax.adapters.rows import Rows
from para_jax.adjustment import Adjustment
from para_jax.annotations import Array, Float, Int
from para_jax.backbones.decoder import Backbone
from para_jax.checks import COUNT, SEED
from para_jax.data.batches import Batch, one_row_each
from para_jax.data.examples import Example
from para_jax.errors import ParaJaxError, check_known
from para_jax.families.architecture import Stack
from para_jax.importance.select import present
from para_jax.progress import Pace, say
from para_jax.training.loss import target_nll


@dataclass(frozen=True)
class Scoring:
    """The arguments of `importance_scores`."""

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
    show: Callable[[str], None] = say,
) -> Float[np.ndarray, "layers sites"]:
    """The importance of every module, float64, by layer and by site in the order of `backbone.config.sites`; NaN where
    a layer does not have the site.

    Args:
      score: "ablation", "gradient", "norm" or "random"; see the functions of these names.
      adapter: a tuned LoRA adapter on every linear module.
      examples: held-out rows; not needed for "norm" and "random".
      batch_size: the number of rows of a forward pass.
      variants: the number of ablations in one forward pass; each needs its own activations.
      seed: the seed of "random".
      show: is called with a line of progress every few seconds. By default there is a bar on a terminal and in a
        notebook, and elsewhere lines are printed.

    Raises ParaJaxError for an unknown score, an adapter that is not LoRA or lacks a module, or no rows.

    >>> from para_jax import AdapterBank, LoraConfig, tiny_backbone_path
    >>> backbone = Backbone.from_pretrained(tiny_backbone_path())
    >>> bank = AdapterBank.create({"all": LoraConfig(r=1, target_modules="all-linear")}, backbone.config)
    >>> importance_scores("norm", backbone, bank["all"]).tolist() == [[0.0] * 7] * 4
    True
    """
    check_known("score", [score], SCORES)
    batch_size, variants = COUNT.check("batch_size", batch_size), COUNT.check("variants", variants)
    seed = SEED.check("seed", seed)
    check(adapter, backbone)
    if score in NEED_ROWS and not examples:
        raise ParaJaxError(f"the {score} score is computed on held-out rows, and there are none")
    scores = SCORES[score](Scoring(backbone, adapter, examples, batch_size, variants, seed, show))
    return np.where(present(backbone.config), scores, np.nan)


def check(adapter: Adapter, backbone: Backbone) -> None:
    """Raises ParaJaxError unless the adapter is LoRA on every linear module of the backbone."""
    way = "tune one with para-jax finetune --method lora --target-modules all-linear"
    if not isinstance(adapter.config, LoraConfig):
        raise ParaJaxError(f"scores need a LoRA adapter, and this adapter's method is {adapter.config.method}; {way}")
    adapter.check(backbone.config)
    for layer, modules in enumerate(adapter.config.modules(backbone.config)):
        sites = backbone.config.sites_of(layer)
        missing = [name for name, site in sites.items() if site.linear and name not in modules]
        if missing:
            raise ParaJaxError(f"the adapter has no {', '.join(missing)} in layer {layer}; {way}")


def ablation(s: Scoring) -> Float[np.ndarray, "layers sites"]:
    """S(M) - S(M without m) + S(only m), where S is the negative mean cross-entropy of a response token.

    The first two terms measure what removing a module costs, the third what the module does alone. m modules need
    2 m + 1 forward passes over the held-out rows (449 for the 224 modules of LLaMA-2 7B). `variants` passes at a time
    run as one vmapped pass, which reads the backbone's weights once.
    """
    m = s.size[0] * s.size[1]
    alone = np.eye(m, dtype=np.float32)
    loss_v = losses(s, np.concatenate([np.ones((1, m), np.float32), 1 - alone, alone]).reshape(-1, *s.size))
    return (loss_v[1 : m + 1] - loss_v[0] - loss_v[m + 1 :]).reshape(s.size)


def gradient(s: Scoring) -> Float[np.ndarray, "layers sites"]:
    """The sum of |p * dL/dp| over the entries p of a module's A and B: to first order, what removing each entry costs.

    L is the mean cross-entropy of a response token. It takes one forward and one backward pass over all rows.
    """
    total: Any = None
    for batch in _shown(_batches(s), "gradient", s.show):
        part = jax.device_get(_gradient(s.backbone, s.adapter.layers, batch))
        total = part if total is None else jax.tree.map(np.add, total, part)
    terms = jax.tree.map(lambda p, g: np.abs(np.asarray(p) * g / s.tokens), s.adapter.layers, total)
    scores = np.zeros(s.size)
    for stack in s.backbone.config.stacks:
        own = in_stack(terms, stack.name)
        for i, site in enumerate(s.sites):
            if site in own.down:
                scores[list(stack.layers), i] = _by_layer(own.down[site]) + _by_layer(own.up[site])
    return scores


def norm(s: Scoring) -> Float[np.ndarray, "layers sites"]:
    """The Frobenius norm of a module's weight update, scale * B A. It needs no forward pass."""
    assert isinstance(s.adapter.config, LoraConfig)
    scores = np.zeros(s.size)
    modules = s.adapter.config.modules(s.backbone.config)
    for stack in s.backbone.config.stacks:
        own = in_stack(s.adapter.layers, stack.name)
        for index, layer in enumerate(stack.layers):
            for site, module in modules[layer].items():
                down, up = (np.asarray(x[site][index], np.float64) for x in (own.down, own.up))
                # The trace of (B^T B)(A A^T), computed without a matrix of the size of the weights.
                squared = max(0.0, float(np.sum((up.T @ up) * (down @ down.T))))
                scores[layer, s.sites.index(site)] = abs(module.scale) * squared**0.5
    return scores


def random(s: Scoring) -> Float[np.ndarray, "layers sites"]:
    """Uniform random numbers, the baseline for other scores."""
    return np.random.default_rng(s.seed).random(s.size)


SCORES: Mapping[str, Callable[[Scoring], np.ndarray]] = {f.__name__: f for f in (ablation, gradient, norm, random)}
NEED_ROWS = ("ablation", "gradient")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Gated:
    """LoRA with a gate for each module, which scales the module's update; 0 switches it off."""

    lora: LoraLayer
    gates: Mapping[str, Float[Array, ""]]

    def prepare(self, prompt: Prompt, layer: int | Int[Array, ""]) -> Adjustment:
        return self.lora.prepare(prompt, layer).gated(self.gates)


def losses(s: Scoring, gates_vls: Float[np.ndarray, "v layers sites"]) -> Float[np.ndarray, " v"]:
    """The mean cross-entropy of a response token, float64, for each variant of the adapter.

    A variant is an array of gates (layers, sites): 1 keeps a module, 0 switches it off.
    """
    total = len(gates_vls)
    chunks = -(-total // s.variants)
    # Chunks have one size, so that they share a program; the last is padded with unused variants.
    size = -(-total // chunks)
    padded = np.concatenate([gates_vls, np.ones((chunks * size - total, *s.size), np.float32)])
    sum_v = np.zeros(chunks * size)
    work = [(batch, start) for batch in _batches(s) for start in range(0, chunks * size, size)]
    for batch, start in _shown(work, f"{total} variants on {len(s.examples)} rows", s.show):
        sum_v[start : start + size] += _gated_nll(s.backbone, s.adapter.layers, batch, padded[start : start + size])
    return sum_v[:total] / s.tokens


@jax.jit
def _gated_nll(
    backbone: Backbone, layers: LoraLayer, batch: Batch, gates_vls: Float[Array, "v layers sites"]
) -> Float[Array, " v"]:
    return jax.vmap(partial(_nll, backbone, layers, batch))(gates_vls)


@jax.jit
def _gradient(backbone: Backbone, layers: LoraLayer, batch: Batch) -> LoraLayer:
    size = (backbone.config.num_hidden_layers, len(backbone.config.linear_sites))
    return jax.grad(_nll, argnums=1)(backbone, layers, batch, jnp.ones(size, jnp.float32))


def _nll(
    backbone: Backbone, layers: LoraLayer, batch: Batch, gates_ls: Float[Array, "layers sites"]
) -> Float[Array, ""]:
    """The summed cross-entropy of a batch's response tokens with one variant of an adapter."""
    sites, stacks = list(backbone.config.linear_sites), backbone.config.stacks

    def gated(stack: Stack) -> Gated:
        own = in_stack(layers, stack.name)
        return Gated(own, {site: gates_ls[jnp.array(stack.layers), sites.index(site)] for site in own.down})

    every = {stack.name: gated(stack) for stack in stacks}
    one = jax.tree.map(lambda x: x[None], every if len(stacks) > 1 else every[""])
    rows = Rows((jnp.ones(1, jnp.float32),), (one,), (0.0,), repeats=batch.tokens.shape[0])
    return jnp.sum(jnp.where(batch.targets.place == 0, target_nll(backbone, rows, batch), 0))


def _batches(s: Scoring) -> list[Batch]:
    """All rows in batches of one size, sorted by length; the last batch is padded with empty rows."""
    ordered = sorted(s.examples, key=len)
    size = min(s.batch_size, len(ordered))  # a single batch is not padded
    return [one_row_each(ordered[start : start + size], size) for start in range(0, len(ordered), size)]


def _by_layer(x: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, " layers"]:
    return np.asarray(x, np.float64).reshape(len(x), -1).sum(axis=1)


def _shown(work: Sequence[Any], what: str, show: Callable[[str], None]) -> Iterator[Any]:
    """Iterates over `work` and shows a line of progress every few seconds."""
    pace = Pace(f"passes of {what}", show)
    for done, item in enumerate(work):
        if done:  # the first pass compiles
            pace(done, len(work))
        yield item
    pace(len(work), len(work))
