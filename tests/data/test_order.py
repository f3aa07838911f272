"""The order of rows: every epoch whole, mixtures by weight, and nothing but arguments in it."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from itertools import permutations

import pytest

from para_jax.data.order import Mixture, order


@pytest.mark.parametrize("size", [1, 2, 3, 21, 1000])
def test_every_epoch_has_every_row_once(size: int) -> None:
    rows = order(5, "acme", range(size), range(4 * size))
    epochs = [rows[epoch * size : (epoch + 1) * size] for epoch in range(4)]
    assert all(Counter(epoch) == Counter(range(size)) for epoch in epochs)
    if size > 20:
        assert len(set(map(tuple, epochs))) == 4, "in an order of its own"


def test_every_order_of_few_rows_occurs() -> None:
    seen = {tuple(order(0, "acme", range(4), range(4 * epoch, 4 * epoch + 4))) for epoch in range(500)}
    assert seen == set(permutations(range(4)))


def test_order_depends_on_seed_and_tenant_and_is_the_same_in_another_process() -> None:
    orders = [order(seed, tenant, range(50), range(50)) for seed, tenant in ((0, "a"), (1, "a"), (0, "b"))]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    code = "from para_jax.data.order import order; print(order(0, 'a', range(50), range(50)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(orders[0])


MIXED = Mixture((range(10), range(10, 13)), (0.7, 0.3))


@pytest.mark.parametrize("examples", [range(7), MIXED], ids=["one source", "mixture"])
def test_any_places_can_be_had_without_those_before_them(examples: object) -> None:
    far = 7 * 10**9
    at_once = order(0, "acme", examples, range(far, far + 21))
    assert [order(0, "acme", examples, [place])[0] for place in reversed(range(far, far + 21))] == at_once[::-1]


def test_a_mixture_has_of_each_source_what_its_weight_says() -> None:
    rows = order(0, "acme", MIXED, range(2000))
    for stretch in (rows[:100], rows[1000:1100], rows[333:433]):
        assert abs(sum(row >= 10 for row in stretch) - 30) <= 1
    first, second = ([row for row in rows if (row >= 10) == late] for late in (False, True))
    assert Counter(first[:10]) == Counter(range(10)) == Counter(first[10:20]), "each source has epochs of its own"
    assert Counter(second[:3]) == Counter(range(10, 13)) == Counter(second[3:6])


def test_weights_are_relative_and_no_source_is_ordered_as_another() -> None:
    sources = (range(5), range(5, 10))
    ones, tens = (order(0, "acme", Mixture(sources, weights), range(60)) for weights in ((1, 3), (10, 30)))
    assert ones == tens
    first, second = ([row for row in ones if (row >= 5) == late] for late in (False, True))
    assert first == order(0, "acme", range(5), range(len(first))), "the first as if it were alone"
    assert [row - 5 for row in second[: len(first)]] != first


def test_the_order_of_a_run_that_was_begun_before_is_kept() -> None:
    """Written down, since a run that resumes with a newer version has to go on as it began."""
    assert order(0, "acme", range(6), range(12)) == [0, 3, 5, 4, 2, 1, 2, 1, 3, 5, 0, 4]
    pair = Mixture((range(3), range(3, 5)), (2.0, 1.0))
    assert order(0, "acme", pair, range(12)) == [2, 0, 3, 1, 1, 4, 2, 0, 4, 1, 2, 3]
