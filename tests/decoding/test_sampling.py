"""Every processor against transformers' own, and draws against exact probabilities."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from para_jax.decoding.sampling import Draws, Filters, Sampler, likeliest, min_p, seen_tokens, top_k_top_p

ROWS, V = 16, 300
LOGITS = (4 * np.random.default_rng(0).standard_normal((ROWS, V))).astype(np.float32)


def assert_equal(ours, theirs):
    """The same tokens ruled out, and the others equal but for one rounding.

    Torch divides; XLA multiplies by the reciprocal of a value that a whole row is divided by, on CPU at
    least.
    """
    np.testing.assert_array_equal(np.isneginf(ours), np.isneginf(theirs))
    np.testing.assert_array_max_ulp(np.where(np.isneginf(ours), 0, ours), np.where(np.isneginf(theirs), 0, theirs), 1)


def theirs(*processors, logits=LOGITS, ids=None):
    ids = torch.zeros((len(logits), 0), dtype=torch.int64) if ids is None else torch.tensor(ids)
    return LogitsProcessorList(processors)(ids, torch.tensor(logits)).numpy()


@pytest.mark.parametrize("k", [1, 7, V - 1, V, 5000])
def test_top_k(k):
    ours = jax.vmap(top_k_top_p, (0, None, None))(LOGITS, jnp.int32(k), jnp.float32(1))
    np.testing.assert_array_equal(ours, theirs(TopKLogitsWarper(k)))


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_top_p(p):
    ours = jax.vmap(top_k_top_p, (0, None, None))(LOGITS, jnp.int32(0), jnp.float32(p))
    np.testing.assert_array_equal(ours, theirs(TopPLogitsWarper(p)))


@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 1.0])
def test_min_p(p):
    ours = jax.vmap(min_p, (0, None))(LOGITS, jnp.float32(p))
    np.testing.assert_array_equal(ours, theirs(MinPLogitsWarper(p)))


def test_filters_that_are_off_for_a_row_leave_it_as_it_is():
    # A flat tail whose sum is lost in float32 must survive too.
    logits = np.where(np.arange(V) == 0, 40.0, LOGITS).astype(np.float32)
    ours = jax.vmap(lambda x: min_p(top_k_top_p(x, jnp.int32(0), jnp.float32(1)), jnp.float32(0)))(logits)
    np.testing.assert_array_equal(ours, logits)


def test_repetition_penalty_counts_prompt_and_text_but_not_padding():
    rng = np.random.default_rng(1)
    ids, lengths = rng.integers(0, 40, (ROWS, 24)), rng.integers(1, 25, ROWS)
    mask = np.arange(24) >= 24 - lengths[:, None]
    penalty = np.linspace(0.5, 2, ROWS).astype(np.float32)
    seen_bv = seen_tokens(jnp.asarray(ids, jnp.int32), jnp.asarray(mask), V)
    ours = Sampler(jnp.asarray(penalty)).penalised(jnp.asarray(LOGITS), seen_bv)
    for row in range(ROWS):
        processor = RepetitionPenaltyLogitsProcessor(float(penalty[row]))
        one = theirs(processor, logits=LOGITS[row : row + 1], ids=ids[row : row + 1, 24 - lengths[row] :])
        assert_equal(ours[row], one[0])


def test_all_of_them_in_order_with_values_of_each_rows_own():
    rng = np.random.default_rng(2)
    temperature = rng.uniform(0.3, 2, ROWS).astype(np.float32)
    k, p = rng.integers(2, 100, ROWS).astype(np.int32), rng.uniform(0.3, 0.99, ROWS).astype(np.float32)
    smallest = rng.uniform(0.01, 0.3, ROWS).astype(np.float32)
    filters = Filters(jnp.asarray(k), jnp.asarray(p), jnp.asarray(smallest))
    draws = Draws(jnp.asarray(temperature), jnp.zeros(ROWS, jnp.uint32), filters)
    ours = draws.processed(jnp.asarray(LOGITS))
    for row in range(ROWS):
        one = theirs(
            TemperatureLogitsWarper(float(temperature[row])),
            TopKLogitsWarper(int(k[row])),
            TopPLogitsWarper(float(p[row])),
            MinPLogitsWarper(float(smallest[row])),
            logits=LOGITS[row : row + 1],
        )
        assert_equal(ours[row], one[0])


def test_the_likeliest_token_is_the_first_of_the_highest():
    logits = jnp.asarray(np.random.default_rng(3).integers(0, 5, (ROWS, V)), jnp.float32)
    np.testing.assert_array_equal(likeliest(logits), jnp.argmax(logits, axis=1))
    assert int(likeliest(jnp.full((1, 7), jnp.nan))[0]) == 6


PROBABILITY = np.array([0.35, 0.25, 0.16, 0.1, 0.06, 0.04, 0.03, 0.01])
DRAWN = 20_000


def assert_drawn_from(tokens, probability):
    """Pearson's statistic stays below the value that one experiment in 100,000 exceeds."""
    counts = np.bincount(np.asarray(tokens), minlength=len(probability))
    assert counts[probability == 0].sum() == 0
    expected = DRAWN * probability[probability > 0]
    statistic = np.sum((counts[probability > 0] - expected) ** 2 / expected)
    freedom = len(expected) - 1
    # Wilson and Hilferty's approximation of the chi-square quantile; 4.265 is the normal one.
    assert statistic < freedom * (1 - 2 / (9 * freedom) + 4.265 * np.sqrt(2 / (9 * freedom))) ** 3


def draws(seeds, temperature=1.0, filters=None):
    many = len(seeds)
    if filters is not None:
        filters = Filters(*(jnp.full(many, x) for x in filters))
    return Draws(jnp.full(many, jnp.float32(temperature)), jnp.asarray(seeds, jnp.uint32), filters)


def test_draws_of_many_seeds_have_the_probabilities_of_the_softmax():
    logits = jnp.tile(jnp.log(jnp.asarray(PROBABILITY, jnp.float32)), (DRAWN, 1))
    step = jnp.int32(3)
    assert_drawn_from(Sampler(None, draws(range(DRAWN))).choose(logits, None, step), PROBABILITY)
    sharp = PROBABILITY**2 / np.sum(PROBABILITY**2)
    assert_drawn_from(Sampler(None, draws(range(DRAWN), 0.5)).choose(logits, None, step), sharp)
    kept = np.where(np.arange(8) < 3, PROBABILITY, 0)
    three = draws(range(DRAWN), filters=(jnp.int32(3), jnp.float32(1), jnp.float32(0)))
    assert_drawn_from(Sampler(None, three).choose(logits, None, step), kept / kept.sum())


def test_draws_of_one_seed_at_many_steps_have_them_too():
    logits = jnp.log(jnp.asarray(PROBABILITY, jnp.float32))[None]
    tokens = jax.vmap(lambda step: draws([7]).draw(logits, step)[0])(jnp.arange(DRAWN))
    assert_drawn_from(tokens, PROBABILITY)
    pairs = np.bincount(np.asarray(tokens[:-1] * 8 + tokens[1:]), minlength=64) / (DRAWN - 1)
    # Steps are independent: a pair's share is the product, to four standard deviations.
    product = np.outer(PROBABILITY, PROBABILITY).ravel()
    assert np.all(np.abs(pairs - product) < 4.5 * np.sqrt(product * (1 - product) / DRAWN))


def test_a_rows_draw_is_its_own():
    logits = jnp.asarray(LOGITS)
    seeds = np.arange(ROWS)
    whole = draws(seeds).draw(logits, jnp.int32(2))
    shuffled = np.random.default_rng(4).permutation(ROWS)
    moved = draws(seeds[shuffled]).draw(logits[shuffled], jnp.int32(2))
    np.testing.assert_array_equal(moved, whole[shuffled])
    for row in (0, 5):
        assert draws([row]).draw(logits[row : row + 1], jnp.int32(2))[0] == whole[row]
    assert np.any(np.asarray(draws(seeds).draw(logits, jnp.int32(3))) != np.asarray(whole))


def test_a_row_of_temperature_zero_takes_the_likeliest_token_beside_rows_that_draw():
    logits = jnp.asarray(LOGITS)
    mixed = draws(range(ROWS))._replace(temperature_b=jnp.asarray([0.0, 1.5] * (ROWS // 2), jnp.float32))
    tokens = np.asarray(Sampler(None, mixed).choose(logits, None, jnp.int32(0)))
    best = LOGITS.argmax(axis=1)
    np.testing.assert_array_equal(tokens[::2], best[::2])
    assert np.any(tokens[1::2] != best[1::2])
