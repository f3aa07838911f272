"""What a prepared adapter does to a projection's output, against NumPy in float64."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from para_jax.adjustment import Adjustment, Dropout, LowRank, total

B, T, INPUTS, OUTPUTS, RANK = 4, 3, 6, 5, 2
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(B, T, INPUTS)).astype(np.float32), RNG.normal(size=(B, T, OUTPUTS)).astype(np.float32)
PROMPT = np.arange(T)[None] < np.array([[1], [3], [0], [2]])


def draw(*shape: int, seed: int = 1) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def pair_of(n: int, rank: int = RANK, seed: int = 1) -> LowRank:
    return LowRank(draw(n, rank, INPUTS, seed=seed), draw(n, OUTPUTS, rank, seed=seed + 1))


def of_every_kind() -> Adjustment:
    """Of one site, with all that there can be for it."""
    vectors = ({"q_proj": draw(B, OUTPUTS, seed=seed)} for seed in (1, 2, 3))
    return Adjustment(next(vectors), next(vectors), {"q_proj": pair_of(B)}, next(vectors))


def change(pair: LowRank, row: int, n: int) -> np.ndarray:
    """x down^T up^T of one row, in float64."""
    down, up = (np.asarray(half, np.float64)[row // (B // n)] for half in (pair.down, pair.up))
    return X[row].astype(np.float64) @ down.T @ up.T


@pytest.mark.parametrize("n", [B, 2, 1])
def test_a_pair_serves_consecutive_rows(n: int) -> None:
    pair = pair_of(n)
    expected = np.stack([change(pair, row, n) for row in range(B)])
    np.testing.assert_allclose(pair(jnp.asarray(X)), expected, rtol=1e-5, atol=1e-5)


def test_apply_scales_and_adds() -> None:
    """Everywhere; or, of `later`, on tokens that are not the prompt's."""
    always, later, shift, pair = draw(B, OUTPUTS), draw(B, OUTPUTS, seed=2), draw(B, OUTPUTS, seed=3), pair_of(B)
    adjustment = Adjustment({"q_proj": always}, {"q_proj": later}, {"q_proj": pair}, {"q_proj": shift})
    scale = 1 + np.asarray(always)[:, None] + np.where(PROMPT[..., None], 0, np.asarray(later)[:, None])
    expected = Y * scale + np.asarray(shift)[:, None] + np.stack([change(pair, row, B) for row in range(B)])
    ours = adjustment.apply("q_proj", jnp.asarray(X), jnp.asarray(Y), jnp.asarray(PROMPT))
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)
    # After the prompt, both forms are one.
    after = adjustment.apply("q_proj", jnp.asarray(X), jnp.asarray(Y))
    np.testing.assert_allclose(
        adjustment.for_decoding().apply("q_proj", jnp.asarray(X), jnp.asarray(Y)), after, rtol=1e-5
    )
    # `later` alone, and a site that is not adjusted.
    alone = Adjustment(later={"q_proj": later}).apply("q_proj", jnp.asarray(X), jnp.asarray(Y), jnp.asarray(PROMPT))
    assert np.array_equal(np.asarray(alone)[PROMPT], Y[PROMPT])
    assert not np.any(np.isclose(np.asarray(alone)[~PROMPT], Y[~PROMPT], rtol=1e-6))
    assert np.array_equal(adjustment.apply("k_proj", jnp.asarray(X), jnp.asarray(Y)), Y)


def test_sums_are_taken_in_float32_and_returned_as_they_came() -> None:
    """A scale of 1 + 2^-10 does not exist in bfloat16; a small change of a large output must not be lost twice."""
    y = jnp.full((1, 1, 1), 100.0, jnp.bfloat16)
    small = Adjustment({"q_proj": jnp.full((1, 1), 2.0**-7, jnp.bfloat16)})
    out = small.apply("q_proj", y, y)
    assert out.dtype == jnp.bfloat16 and float(out[0, 0, 0]) == 101.0
    # 100 + 2^-2 is nearest to 100 in bfloat16, and 100 * (1 + 2^-9) + 2^-2, rounded once, to 100.5.
    both = Adjustment({"q_proj": jnp.full((1, 1), 2.0**-9, jnp.bfloat16)}, shifts={"q_proj": y[:, 0] * 0 + 0.25})
    assert float(both.apply("q_proj", y, y)[0, 0, 0]) == 100.5
    pair = LowRank(jnp.full((1, 4, 1), 0.1, jnp.bfloat16), jnp.full((1, 1, 4), 0.1, jnp.bfloat16))
    assert pair(y).dtype == jnp.float32


def test_weighted() -> None:
    """Changes are linear in the weight. Weight zero changes nothing, even if the adapter has NaN."""
    made = of_every_kind()
    weights = np.array([1.0, 0.5, 0.0, -2.0], np.float32)

    def changes(adjustment: Adjustment) -> np.ndarray:
        return np.asarray(adjustment.apply("q_proj", jnp.asarray(X), jnp.asarray(Y))) - Y

    weighted = changes(made.weighted(jnp.asarray(weights)))
    np.testing.assert_allclose(weighted, weights[:, None, None] * changes(made), rtol=1e-4, atol=1e-5)
    broken = jax.tree.map(lambda x: x.at[2].set(jnp.nan), made)
    assert np.isnan(changes(broken)).any()
    assert np.array_equal(changes(broken.weighted(jnp.asarray(weights))), weighted)
    assert not any(np.any(x[2]) for x in jax.tree.leaves(broken.weighted(jnp.asarray(weights))))


def test_weights_of_pairs_that_rows_share() -> None:
    pair = pair_of(2)
    weighted = Adjustment(pairs={"q_proj": pair}).weighted(jnp.array([2.0, 2.0, 3.0, 3.0])).pairs["q_proj"]
    np.testing.assert_allclose(weighted.up, pair.up * jnp.array([2.0, 3.0])[:, None, None])
    assert np.array_equal(weighted.down, pair.down)


@pytest.mark.parametrize("disjoint", [True, False])
def test_total_is_the_sum_of_the_changes(disjoint: bool) -> None:
    """Pairs are padded and added if rows are disjoint, and concatenated otherwise."""
    parts = []
    for i, rank in enumerate((2, 3, 1)):
        weight = jnp.array([1.0, 0.0, 0.0, 0.0]) if i == 0 else jnp.array([0.0, i == 1, i == 2, 0.0], jnp.float32)
        weight = weight if disjoint else jnp.array([1.0, 0.5, 2.0, 0.0])
        sites = {"q_proj": pair_of(B, rank, seed=5 * i)} | ({} if i else {"up_proj": pair_of(B, rank, seed=9)})
        offsets, later, shift = (draw(B, OUTPUTS, seed=seed + i) for seed in (20, 0, 30))
        made = Adjustment({"q_proj": offsets}, {"v_proj": later}, sites, {"q_proj": shift} if i else {"up_proj": shift})
        parts.append(made.weighted(weight))
    whole = total(parts, disjoint=disjoint)
    assert whole.pairs["q_proj"].up.shape[-1] == (3 if disjoint else 6)
    for site in ("q_proj", "v_proj", "up_proj", "o_proj"):
        x, y = jnp.asarray(X), jnp.asarray(Y)
        expected = sum(np.asarray(part.apply(site, x, y)) - Y for part in parts)
        np.testing.assert_allclose(np.asarray(whole.apply(site, x, y)) - Y, expected, rtol=1e-4, atol=1e-5)


def test_half_precision_is_what_waits() -> None:
    made = of_every_kind()
    waiting = made.astype(jnp.dtype("bfloat16"))
    assert {x.dtype for x in jax.tree.leaves(waiting)} == {jnp.dtype("bfloat16")}
    assert jax.tree.structure(waiting) == jax.tree.structure(made)


def test_inputs_in_float16_are_multiplied_in_the_pairs_dtype() -> None:
    """Inputs times `down`, and the change, may be beyond 65504, where float16 ends."""
    made = Adjustment(pairs={"q_proj": pair_of(B)})
    x, y = jnp.asarray(3e4 * X / np.abs(X).max()), jnp.asarray(Y)
    found, exact = made.apply("q_proj", x.astype(jnp.float16), y), made.apply("q_proj", x, y)
    assert np.abs(exact).max() > 65504
    np.testing.assert_allclose(found, exact, rtol=5e-3, atol=5e-3 * np.abs(exact).max())


def test_the_identity_is_free() -> None:
    """No arrays, no operations."""
    assert jax.tree.leaves(Adjustment()) == []
    jaxpr = jax.make_jaxpr(lambda x, y: Adjustment().apply("q_proj", x, y))(X, Y)
    assert [str(e.primitive) for e in jaxpr.eqns if e.primitive.name != "convert_element_type"] == []


def test_what_is_empty_costs_nothing() -> None:
    """Scaling is one sum and one product whether or not there are Adjustments that add; adding is one sum."""
    by_form = {"offsets": ["add", "mul"], "shifts": ["add"]}
    for form, expected in by_form.items():
        made = Adjustment(**{form: {"q_proj": draw(B, OUTPUTS)}})
        jaxpr = jax.make_jaxpr(lambda x, y, made=made: made.apply("q_proj", x, y))(X, Y)
        assert [str(e.primitive) for e in jaxpr.eqns if e.primitive.name in ("add", "mul")] == expected


# Its parts


def test_the_part_of_one_site() -> None:
    made = total([of_every_kind(), Adjustment(shifts={"k_proj": draw(B, OUTPUTS)})], disjoint=True)
    x, y = jnp.asarray(X), jnp.asarray(Y)
    for site in ("q_proj", "k_proj"):
        assert np.array_equal(made.at(site).apply(site, x, y), made.apply(site, x, y))
    assert len(jax.tree.leaves(made.at("q_proj"))) == 5 and len(jax.tree.leaves(made.at("k_proj"))) == 1


def test_gates_are_of_the_change() -> None:
    made, x, y = of_every_kind(), jnp.asarray(X), jnp.asarray(Y)
    ours = made.gated({"q_proj": jnp.float32(0.25)}).apply("q_proj", x, y)
    np.testing.assert_allclose(ours - Y, 0.25 * (made.apply("q_proj", x, y) - Y), rtol=1e-4, atol=1e-5)


def test_rows_that_are_repeated() -> None:
    """As beams are: with a pair that serves them all."""
    made = dataclasses.replace(of_every_kind(), pairs={"q_proj": pair_of(1)})
    repeated = made.per_row(lambda x: jnp.repeat(x, 2, axis=0))
    twice, (x, y) = np.repeat(np.arange(B), 2), (jnp.asarray(X), jnp.asarray(Y))
    ours = repeated.apply("q_proj", x[twice], y[twice])
    np.testing.assert_allclose(ours, made.apply("q_proj", x, y)[twice], rtol=1e-5, atol=1e-5)


# Dropout


def keys(tokens: int, *seeds: int) -> jax.Array:
    """(rows, tokens) a key for each token; of a row they depend on its seed alone."""
    return jnp.stack([jax.random.split(jax.random.key(seed), tokens) for seed in seeds])


def test_dropout_drops_its_share_and_keeps_the_mean() -> None:
    x = jnp.ones((2, 50, 200), jnp.float32)
    dropped = np.asarray(Dropout(keys(50, 1, 2), jnp.array([0.25, 0.5]))("q_proj", x))
    for row, rate in zip(dropped, (0.25, 0.5), strict=True):
        assert np.all(np.isclose(row, 0) | np.isclose(row, 1 / (1 - rate)))
        assert np.mean(row == 0) == pytest.approx(rate, abs=0.02)
        assert np.mean(row) == pytest.approx(1, abs=0.03)


def test_dropout_depends_on_the_tokens_own_key_and_the_site() -> None:
    x = jnp.ones((2, 4, 20), jnp.float32)
    half = jnp.array([0.5, 0.5])

    def masks(site: str, *seeds: int) -> np.ndarray:
        return np.asarray(Dropout(keys(4, *seeds), half)(site, x))

    first = masks("q_proj", 1, 2)
    assert np.array_equal(first, masks("q_proj", 1, 2))
    assert np.array_equal(first[1], masks("q_proj", 7, 2)[1]), "whatever its neighbour's key"
    drawn = [first[0], first[1], masks("q_proj", 7, 2)[0], masks("v_proj", 1, 2)[0]]
    assert not any(np.array_equal(a, b) for a, b in itertools.combinations(drawn, 2))


def test_a_rate_of_zero_is_no_dropout() -> None:
    x = jnp.asarray(X[:2])
    assert np.array_equal(Dropout(keys(T, 1, 2), jnp.zeros(2))("q_proj", x), x)


def test_dropout_is_of_the_pairs_inputs_only() -> None:
    x, y, pair = jnp.asarray(X), jnp.asarray(Y), pair_of(B)
    dropout = Dropout(keys(T, *range(B)), jnp.full(B, 0.5))
    offsets = {"q_proj": draw(B, OUTPUTS)}
    ours = Adjustment(offsets, pairs={"q_proj": pair}, dropout=dropout).apply("q_proj", x, y)
    expected = Adjustment(offsets).apply("q_proj", x, y) + pair(dropout("q_proj", x))
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)
