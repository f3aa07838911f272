"""Decoding on a mesh: the texts of one device, and on each device the adapters of its own rows."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from para_jax import Backbone, ParaConfig, complete, tiny_backbone_path
from para_jax.evaluation.choices import choice_log_likelihoods
from para_jax.sharding import make_mesh
from tests.helpers import METHODS, random_bank

PROMPTS = ["It was a dark night", "My dear sister,", "The captain", "Call me", "When the war"]
TENANTS = ["acme", None, "globex", "acme", {"acme": 0.5, "globex": 0.5}]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=2,fsdp=2,tensor=2", pytest.param("data=4,tensor=2", marks=pytest.mark.whole)])
def test_the_same_texts(tiny, mesh: str) -> None:
    one, tokenizer = tiny
    many = Backbone.from_pretrained(tiny_backbone_path(), mesh=make_mesh(mesh))
    bank = random_bank({"acme": ParaConfig(r=3), "globex": METHODS["lora"]}, one.config, scale=0.02)
    options = {
        "bank": bank,
        "tenants": TENANTS,
        "max_new_tokens": 12,
        "temperature": [0.0, 0.8, 0.0, 0.8, 0.0],
        "seed": 3,
    }
    theirs, ours = (complete(backbone, tokenizer, PROMPTS, **options) for backbone in (one, many))
    assert [x.tokens for x in ours] == [x.tokens for x in theirs]
    assert len({tuple(x.tokens) for x in ours}) == 5
    some = [[[5, 6, 7], [8, 9]], [[10], [11, 12]]]
    scores = [
        choice_log_likelihoods(backbone, [[3, 4], [5, 6, 7]], some, bank=bank, tenants=["acme", None])
        for backbone in (one, many)
    ]
    np.testing.assert_allclose(scores[1], scores[0], rtol=1e-4)


def test_each_device_has_its_own_rows(tiny) -> None:
    one, _ = tiny
    bank = random_bank({"acme": ParaConfig(r=3), "globex": ParaConfig(r=3)}, one.config)
    mesh = make_mesh("data=4,tensor=2")
    tenants = ["acme", "globex"] * 4
    ours, theirs = bank.rows(tenants, mesh=mesh), bank.rows(tenants)
    for x, y in zip(jax.tree.leaves(ours.layers), jax.tree.leaves(theirs.layers), strict=True):
        assert x.addressable_shards[0].data.shape[0] == 2
        np.testing.assert_array_equal(x, y)
    for x in jax.tree.leaves(bank.rows(tenants[:3], mesh=mesh).layers):
        assert x.addressable_shards[0].data.shape == x.shape, "three rows do not divide"
