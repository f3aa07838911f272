"""Every score against a plain reading of its definition."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from para_jax import AdapterBank, Backbone, LoraConfig, ParaConfig, ParaJaxError, progress
from para_jax.adapters.adapter import Adapter
from para_jax.data.examples import Example
from para_jax.importance import scores
from para_jax.importance.scores import importance_scores
from tests.helpers import random_adapter, random_backbone

# Ranks and scales differ from module to module.
EVERYWHERE = LoraConfig(r=2, lora_alpha=3, target_modules="all-linear", rank_pattern={"v_proj": 3})


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return random_backbone(stacked=True)


@pytest.fixture(scope="module")
def adapter(backbone: Backbone) -> Adapter:
    return random_adapter(EVERYWHERE, backbone.config, 1, scale=0.3)


@pytest.fixture(scope="module")
def rows() -> list[Example]:
    """Five, so that batches of two end in one that is filled up. They share one program."""
    rng = np.random.default_rng(0)

    def ids(size: int) -> tuple[int, ...]:
        return tuple(rng.integers(1, 61, size).tolist())

    return [Example.of(ids(p), ids(r)) for p, r in ((11, 2), (10, 4), (13, 1), (9, 4), (11, 3))]


def arrays(rows: list[Example]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Tokens (b, t) padded on the right, and which of them are tokens and which the prompt's."""
    t = max(map(len, rows))
    tokens = np.array([(*e.prompt_ids, *e.response_ids, *[0] * (t - len(e))) for e in rows], np.int32)
    column = np.arange(t)[None]
    mask = column < np.array([[len(e)] for e in rows])
    return jnp.asarray(tokens), jnp.asarray(mask), jnp.asarray(column < np.array([[len(e.prompt_ids)] for e in rows]))


def mean_loss(logits: jax.Array, rows: list[Example]) -> jax.Array:
    """Of a response token, one row after the other."""
    log_p = jax.nn.log_softmax(logits, axis=-1)
    own = [
        log_p[i, len(e.prompt_ids) - 1 + j, token] for i, e in enumerate(rows) for j, token in enumerate(e.response_ids)
    ]
    return -jnp.mean(jnp.stack(own))


def loss(backbone: Backbone, adapter: Adapter, rows: list[Example]) -> jax.Array:
    """The public way: a bank of this adapter alone, and the logits of every token."""
    tokens, mask, prompt_mask = arrays(rows)
    bank = AdapterBank(backbone.config, AdapterBank.stack({"one": adapter}, backbone.config).groups)
    logits = backbone(tokens, mask=mask, prompt_mask=prompt_mask, bank=bank, tenants=["one"] * len(rows))
    return mean_loss(logits, rows)


def only(adapter: Adapter, on: np.ndarray, sites: list[str]) -> Adapter:
    """An adapter of its own whose modules are zero where `on` (layers, sites) is False."""
    layers = jax.tree.map(jnp.copy, adapter.layers)
    for i, site in enumerate(sites):
        for half in (layers.down, layers.up):
            half[site] = jnp.where(jnp.asarray(on[:, i])[:, None, None], half[site][...], 0)
    return dataclasses.replace(adapter, layers=layers)


@pytest.fixture(scope="module")
def by_loop(backbone: Backbone, adapter: Adapter, rows: list[Example]) -> np.ndarray:
    """The ablation score, one adapter after the other."""
    sites = list(backbone.config.sites)
    size = (backbone.config.num_hidden_layers, len(sites))

    def s(on: np.ndarray) -> float:
        return -float(loss(backbone, only(adapter, on, sites), rows))

    whole, found = s(np.ones(size, bool)), np.zeros(size)
    for place in np.ndindex(size):
        m = np.zeros(size, bool)
        m[place] = True
        found[place] = whole - s(~m) + s(m)
    return found


@pytest.mark.parametrize("stacked", [False, True])
def test_ablation_is_that_of_separate_adapters(
    adapter: Adapter, rows: list[Example], by_loop: np.ndarray, stacked: bool
) -> None:
    # 29 variants in chunks of 8 and rows in batches of 2: neither comes out even.
    found = importance_scores("ablation", random_backbone(stacked=stacked), adapter, rows, batch_size=2, variants=8)
    assert np.ptp(by_loop) > 0.5
    np.testing.assert_allclose(found, by_loop, rtol=0, atol=1e-5)


def test_gradient_is_that_of_each_weight(backbone: Backbone, adapter: Adapter, rows: list[Example]) -> None:
    tokens, mask, prompt_mask = arrays(rows)
    in_bank = AdapterBank.stack({"one": adapter}, backbone.config)

    def of_adapter(layers) -> jax.Array:
        group = dataclasses.replace(in_bank.groups[0], stack=jax.tree.map(lambda x: x[None], layers))
        gathered = AdapterBank(backbone.config, (group,)).rows(["one"] * len(rows))
        hidden, _, _ = backbone.forward(tokens, mask, prompt_mask, gathered)
        return mean_loss(backbone.logits(hidden), rows)

    slope = jax.jit(jax.grad(of_adapter))(adapter.layers)
    found = importance_scores("gradient", backbone, adapter, rows, batch_size=2)
    for i, site in enumerate(backbone.config.sites):
        for layer in range(backbone.config.num_hidden_layers):
            expected = sum(
                np.abs(np.asarray(p[site][layer]) * np.asarray(g[site][layer])).sum()
                for p, g in ((adapter.layers.down, slope.down), (adapter.layers.up, slope.up))
            )
            assert found[layer, i] == pytest.approx(expected, rel=1e-4)


def test_norm_is_that_of_the_product(backbone: Backbone, adapter: Adapter) -> None:
    found = importance_scores("norm", backbone, adapter)
    for i, site in enumerate(backbone.config.sites):
        scale = 3 / (3 if site == "v_proj" else 2)
        for layer in range(backbone.config.num_hidden_layers):
            product = np.asarray(adapter.layers.up[site][layer]) @ np.asarray(adapter.layers.down[site][layer])
            assert found[layer, i] == pytest.approx(scale * np.linalg.norm(product), rel=1e-5)


def test_random_is_of_the_seed(backbone: Backbone, adapter: Adapter) -> None:
    one, same, other = (importance_scores("random", backbone, adapter, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(one, same) and not np.isclose(one, other).any()
    assert one.shape == (2, 7) and len(set(one.ravel())) == 14


@pytest.mark.parametrize("score", ["ablation", "gradient", "norm"])
@pytest.mark.parametrize("place", [(0, "down_proj"), (1, "v_proj")])
def test_the_only_module_that_does_anything_is_the_most_important(
    backbone: Backbone, rows: list[Example], score: str, place: tuple[int, str]
) -> None:
    fresh = Adapter.create(EVERYWHERE, backbone.config, jax.random.key(3))
    layer, site = place
    # One module takes one step down the loss; the others change nothing.
    slope = _slope(backbone, fresh, rows).up[site]
    taken = -0.1 * slope / jnp.linalg.norm(slope[layer])
    fresh.layers.up[site] = fresh.layers.up[site][...].at[layer].add(taken[layer])
    found = importance_scores(score, backbone, fresh, rows, batch_size=2, variants=8)
    at = (layer, list(backbone.config.sites).index(site))
    others = np.delete(found.ravel(), np.ravel_multi_index(at, found.shape))
    assert found[at] > others.max() + 1e-3
    assert np.ptp(others) < 1e-5


def _slope(backbone: Backbone, adapter: Adapter, rows: list[Example]):
    s = scores.Scoring(backbone, adapter, rows, 2, 1, 0, print)
    parts = [scores._gradient(backbone, adapter.layers, batch) for batch in scores._batches(s)]
    return jax.tree.map(lambda *x: sum(x), *parts)


def test_progress_says_how_long(
    backbone: Backbone, adapter: Adapter, rows: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.0)
    lines: list[str] = []
    importance_scores("ablation", backbone, adapter, rows, batch_size=2, variants=8, show=lines.append)
    assert lines[0] == "1/12 passes of 29 variants on 5 rows"  # which compiles, and is not timed
    assert lines[1].startswith("2/12 passes of 29 variants on 5 rows  ") and lines[1].endswith(" left")
    assert lines[-1].startswith("12/12 passes of 29 variants on 5 rows  ") and lines[-1].endswith(" a second")


def test_what_cannot_be_scored(backbone: Backbone, adapter: Adapter, rows: list[Example]) -> None:
    score = partial(importance_scores, backbone=backbone, adapter=adapter, examples=rows)
    with pytest.raises(ParaJaxError, match=r"unknown score 'ablations'; did you mean 'ablation'\?"):
        score("ablations")
    with pytest.raises(ParaJaxError, match="the gradient score is computed on held-out rows, and there are none"):
        score("gradient", examples=[])
    with pytest.raises(ParaJaxError, match="variants must be a whole number from 1 to 2147483647, not 0"):
        score("ablation", variants=0)
    some = LoraConfig(target_modules=["q_proj", "v_proj"])
    with pytest.raises(ParaJaxError, match=r"no k_proj, o_proj, .* in layer 0; .*--target-modules all-linear"):
        score("norm", adapter=random_adapter(some, backbone.config, 0))
    with pytest.raises(ParaJaxError, match="this adapter's method is para"):
        score("norm", adapter=random_adapter(ParaConfig(r=2), backbone.config, 0))
    with pytest.raises(ParaJaxError, match="does not fit the backbone"):
        score("norm", adapter=random_adapter(EVERYWHERE, random_backbone(intermediate_size=64).config, 0))
