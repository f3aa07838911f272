"""Batches: a pure function of the step, with every response token once in the targets."""

import numpy as np

from para_jax.data.batches import pad
from para_jax.data.examples import Example
from para_jax.data.order import Mixture
from para_jax.training.places import Layout


def example(prompt, response):
    return Example.of(tuple(prompt), tuple(response))


def test_a_mixture_takes_its_sources_by_weight():
    mixture = Mixture((tuple(example([1], [i + 2, 0]) for i in range(6)), (example([1], [30, 0]),)), (0.75, 0.25))
    batch, tokens = Layout.of(None, 1, rows=8).step_batch([["acme"]], {"acme": mixture}, 0, {"acme": 0})
    assert tokens == 24
    assert batch.target_token[0, 0].tolist().count(30) == 2


def test_targets_predict_each_response_token():
    tenants = [
        [example([5, 6, 7], [8, 0]), example([9], [10, 11, 0])],
        [example([1, 2], [3, 0]), example([4], [0])],
    ]
    batch = pad([tenants])
    assert batch.tokens.shape == (1, 4, 16)
    assert batch.target_count.tolist() == [[5, 3]]
    for n, tenant in enumerate(tenants):
        mask = batch.target_tenant[0, 0] == n
        wanted = [token for e in tenant for token in e.response_ids]
        assert batch.target_token[0, 0][mask].tolist() == wanted
        # What follows the place of a target is the target.
        assert batch.tokens[0].reshape(-1)[batch.target_place[0, 0][mask] + 1].tolist() == wanted
    assert batch.length[0].tolist() == [5, 4, 4, 2] and batch.prompt_length[0].tolist() == [3, 1, 2, 1]
    assert batch.size == 15 and batch.line == (16, 16, 1)
    assert set(batch.target_tenant[0, 0].tolist()) == {0, 1, 2}


def test_micro_batches_split_every_tenants_rows():
    examples = {n: [example([1 + i], [20 + i, 0]) for i in range(8)] for n in ("a", "b")}
    whole, parts = (
        Layout.of(None, 2, 4, k).step_batch([["a", "b"]], examples, 0, dict.fromkeys("ab", 2))[0] for k in (1, 2)
    )
    assert parts.tokens.shape == (2, 4, 16)
    first = np.concatenate([parts.tokens[0, :2], parts.tokens[1, :2]])
    np.testing.assert_array_equal(first, whole.tokens[0, :4])
    assert parts.target_count.tolist() == whole.target_count.tolist()
