"""Micro-batches: packed rows in which every response token is once a target, and shapes planned for them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from para_jax.config import BackboneConfig
from para_jax.data.batches import make_batch
from para_jax.data.examples import Example, Examples
from para_jax.data.order import Mixture
from para_jax.data.packing import Row, Shape, Sizes, micro_batches, pack
from para_jax.training.places import TenantLayout
from para_jax.training.settings import Settings
from para_jax.training.shapes import Device, plan


def example(prompt, response):
    return Example.of(prompt, response)


def test_a_mixture_takes_its_sources_by_weight():
    mixture = Mixture((tuple(example([1], [i + 2, 0]) for i in range(6)), (example([1], [30, 0]),)), (0.75, 0.25))
    rows = TenantLayout.of(None, 1, rows=8).step_rows([["acme"]], {"acme": mixture}, 0, {"acme": 0})["acme"]
    assert [e.response_ids[0] for e in rows].count(30) == 2


TENANTS = [
    [example([5, 6, 7], [8, 0]), example([9], [10, 11, 0])],
    [example([1, 2], [3, 0]), example([4], [0])],
]


def test_targets_predict_each_response_token():
    rows = [[Row(0, [1, 0]), Row(1, [0]), Row(1, [1])]]
    batch = make_batch(Shape(4, 8, 2, 10), rows, TENANTS, np.array([[5, 3]], np.int32))
    assert batch.tokens[0].tolist() == [9, 10, 11, 5, 6, 7, 8, 0]
    assert batch.length.tolist() == [[3, 4], [3, 0], [1, 0], [0, 0]]
    assert batch.prompt_length.tolist() == [[1, 3], [2, 0], [1, 0], [0, 0]]
    assert batch.item.tolist() == [[1, 0], [0, 0], [1, 0], [0, 0]]
    assert batch.place.tolist() == [[0, 1, 1, 2]] and batch.repeats == 1
    assert batch.targets.token[0].tolist() == [10, 11, 0, 8, 0, 3, 0, 0, 0, 0]
    assert batch.targets.place[0].tolist() == [0] * 5 + [1] * 3 + [2] * 2
    flat = batch.tokens.reshape(-1)
    # Each is predicted at the place before its own, and nothing is computed for the last token of a response.
    assert flat[batch.targets.slot[0, :8]].tolist() == [9, 10, 11, 7, 8, 2, 3, 4]


@st.composite
def steps(draw):
    tenants = draw(st.integers(1, 4))
    lengths = st.lists(st.integers(1, 60), min_size=0, max_size=9)
    return [
        Sizes(tokens, [draw(st.integers(0, min(n, 20))) for n in tokens])
        for tokens in (draw(lengths) for _ in range(tenants))
    ]


SHAPES = [
    (Shape(2, 60, 4, 24),),
    (Shape(1, 20, 2, 20), Shape(2, 64, 5, 30)),
    (Shape(1, 64, 3, 20), Shape(3, 64, 3, 20)),
]


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("groups", [1, 3])
@given(step=steps())
def test_every_sequence_is_dealt_once_and_fits(shapes, groups, step):
    seen = []
    for at, dealt in micro_batches(step, shapes, groups):
        assert len(dealt) == groups and any(dealt)
        for rows in dealt:
            assert len(rows) <= shapes[at].rows
            assert sum(row.targets for row in rows) <= shapes[at].targets
            assert [row.place for row in rows] == sorted(row.place for row in rows), "a tenant's stand side by side"
            for row in rows:
                own = step[row.place]
                assert sum(own.tokens[i] for i in row.items) == row.tokens <= shapes[at].length
                assert len(row.items) <= shapes[at].segments
                seen += [(row.place, i) for i in row.items]
    assert sorted(seen) == [(place, i) for place, own in enumerate(step) for i in range(len(own.tokens))]


def test_a_tenants_rows_do_not_depend_on_the_others():
    rng = np.random.default_rng(0)
    sizes = [Sizes(rng.integers(1, 60, 9).tolist(), [1] * 9) for _ in range(3)]
    shapes = SHAPES[1]
    alone = [[row.items for row in rows] for rows in pack(*sizes[2], shapes)]
    together = [
        row.items for _, dealt in micro_batches(sizes, shapes, 1) for rows in dealt for row in rows if row.place == 2
    ]
    assert sorted(together) == sorted(items for rows in alone for items in rows)


LLAMA = BackboneConfig(32000, 4096, 11008, 32, 32, 32, 128)


@pytest.mark.parametrize(("backend", "most"), [("cpu", 2), ("tpu", 1)])
def test_a_plan_is_few_shapes_with_room_for_every_row(backend, most):
    rng = np.random.default_rng(0)
    lengths = np.clip(np.exp(rng.normal(4.2, 1.0, (40, 16))), 5, 1000).astype(int)
    steps = [[Sizes(own.tolist(), (own // 3).tolist())] for own in lengths]
    planned = plan(steps, 1, False, 1000, 333, Device.of(LLAMA, backend=backend))
    assert len(planned.shapes) <= most
    assert max(shape.length for shape in planned.shapes) >= 1000
    assert min(shape.targets for shape in planned.shapes if shape.length >= 1000) >= 333
    assert 0 < planned.padding < (0.2 if backend == "cpu" else 0.4)
    small = plan(steps, 1, False, 1000, 333, Device.of(LLAMA, 600, backend))
    assert all(shape.rows == 1 for shape in small.shapes if shape.length > 600)


def test_examples_of_a_run_are_planned_from_their_lengths_only():
    rows = Examples.of([example([1] * n, [2, 0]) for n in (3, 5, 8)])
    assert rows.lengths.tolist() == [4, 6, 9] and Settings().steps > 0
