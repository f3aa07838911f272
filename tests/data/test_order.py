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
    rows = order(5, "acme", range(size))
    epochs = [[rows[place] for place in range(epoch * size, (epoch + 1) * size)] for epoch in range(4)]
    assert all(Counter(epoch) == Counter(range(size)) for epoch in epochs)
    if size > 20:
        assert len(set(map(tuple, epochs))) == 4, "in an order of its own"


def test_every_order_of_few_rows_occurs() -> None:
    rows = order(0, "acme", range(4))
    seen = {tuple(rows[place] for place in range(4 * epoch, 4 * epoch + 4)) for epoch in range(500)}
    assert seen == set(permutations(range(4)))


def test_order_depends_on_seed_and_tenant_and_is_the_same_in_another_process() -> None:
    orders = [
        [order(seed, tenant, range(50))[place] for place in range(50)]
        for seed, tenant in ((0, "a"), (1, "a"), (0, "b"))
    ]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    code = "from para_jax.data.order import order; print([order(0, 'a', range(50))[place] for place in range(50)])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(orders[0])


def test_places_far_on_are_as_quick_and_in_any_order() -> None:
    rows = order(0, "acme", range(7))
    assert [rows[place] for place in (10**12 + 1, 3, 10**12)] == [rows[10**12 + 1], rows[3], rows[10**12]]
    start = 7 * 10**11
    assert sorted(rows[place] for place in range(start, start + 7)) == list(range(7))


def test_a_mixture_has_of_each_source_what_its_weight_says() -> None:
    mixed = Mixture((range(10), range(10, 13)), (0.7, 0.3))
    rows = order(0, "acme", mixed)
    taken = [rows[place] for place in range(2000)]
    for stretch in (taken[:100], taken[1000:1100]):
        assert abs(sum(row >= 10 for row in stretch) - 30) <= 1
    first, second = ([row for row in taken if (row >= 10) == late] for late in (False, True))
    assert Counter(first[:10]) == Counter(range(10)) == Counter(first[10:20]), "each source has epochs of its own"
    assert Counter(second[:3]) == Counter(range(10, 13)) == Counter(second[3:6])


def test_weights_are_relative_and_a_source_alone_has_the_order_of_no_mixture() -> None:
    sources = (range(5), range(5, 12))
    ones, tens = ([order(0, "acme", Mixture(sources, weights))[i] for i in range(60)] for weights in ((1, 3), (10, 30)))
    assert ones == tens
    alone = order(0, "acme", range(5))
    assert [row for row in ones if row < 5][:5] == [alone[place] for place in range(5)]
