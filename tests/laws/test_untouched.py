"""Law 5: the backbone is never copied per tenant, donated or changed, and decoding never sees a tenant."""

from __future__ import annotations

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from para_jax import AdapterBank, Backbone, ParaConfig, generate
from para_jax.adapters.bank import Rows
from para_jax.backbones.decoder import DecodeState
from tests.helpers import random_backbone, random_bank

# No size of the backbone is among these.
RANK, TENANTS, BATCH, PROMPT, LENGTH = 13, 17, 3, 5, 9


TOKENS = np.arange(BATCH * PROMPT, dtype=np.int32).reshape(BATCH, PROMPT)
MASK = np.ones((BATCH, PROMPT), bool)
prefill = partial(Backbone.prefill, length=LENGTH)


def state_shapes(backbone: Backbone, bank: AdapterBank, tenants: list[str | None]) -> DecodeState:
    """The DecodeState that decoding these tenants would start from, with shapes and dtypes only."""
    return jax.eval_shape(prefill, backbone, TOKENS, MASK, rows=bank.rows(tenants))[1]


def big_bank(backbone: Backbone) -> AdapterBank:
    return random_bank({f"t{i}": ParaConfig(r=RANK) for i in range(TENANTS)}, backbone.config)


def buffers(backbone: Backbone) -> list[int]:
    return [x.unsafe_buffer_pointer() for x in jax.tree.leaves(backbone)]


@pytest.mark.parametrize("stacked", [False, True])
def test_the_same_arrays_after_forward_prefill_and_decode(stacked: bool) -> None:
    backbone = random_backbone(stacked=stacked)
    where, what = buffers(backbone), [np.array(x) for x in jax.tree.leaves(backbone)]
    bank = big_bank(backbone)
    tenants = ["t3", None, "t16"]
    backbone(jnp.zeros((BATCH, PROMPT), jnp.int32), bank=bank, tenants=tenants)
    logits, state = jax.jit(prefill)(backbone, TOKENS, MASK, rows=bank.rows(tenants))
    for _ in range(2):
        logits, state = jax.jit(Backbone.decode)(backbone, jnp.argmax(logits, axis=-1), state)
    assert not any(x.is_deleted() for x in jax.tree.leaves(backbone))
    assert buffers(backbone) == where
    assert all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(backbone), what, strict=True))


def test_the_same_arrays_after_generate(tiny) -> None:
    backbone, tokenizer = tiny
    where, what = buffers(backbone), [np.array(x) for x in jax.tree.leaves(backbone)]
    bank = random_bank({"acme": ParaConfig(r=2)}, backbone.config)
    generate(backbone, tokenizer, ["It was", "A"], bank=bank, tenants=["acme", None], max_new_tokens=3)
    assert not any(x.is_deleted() for x in jax.tree.leaves(backbone))
    assert buffers(backbone) == where
    assert all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(backbone), what, strict=True))


@pytest.mark.parametrize("stacked", [False, True])
def test_decode_holds_no_tenants_weights(stacked: bool) -> None:
    """Its arguments are a token for each row and the DecodeState, where no array has a tenant's or a rank's axis."""
    assert list(inspect.signature(Backbone.decode).parameters) == ["self", "token_b", "state"]
    backbone = random_backbone(stacked=stacked)
    state = state_shapes(backbone, big_bank(backbone), ["t0", "t16", None])
    assert isinstance(state, DecodeState)
    for x in jax.tree.leaves(state):
        assert RANK not in x.shape
        assert TENANTS not in x.shape

    config = backbone.config
    widths = [config.sites[site].outputs for site in ("q_proj", "v_proj", "up_proj")]
    held = sum(x.size for x in jax.tree.leaves(state.adjustments))
    assert held == config.num_hidden_layers * BATCH * sum(widths)


@pytest.mark.parametrize("stacked", [False, True])
def test_decode_does_not_depend_on_ranks_or_tenants(stacked: bool) -> None:
    """The decode program of a batch of one tenant at rank 2 is that of a batch of many at rank 13."""
    backbone = random_backbone(stacked=stacked)
    one = random_bank({"only": ParaConfig(r=2, pooling="attention", activation="rational")}, backbone.config)
    few = state_shapes(backbone, one, ["only"] * BATCH)
    many = state_shapes(backbone, big_bank(backbone), ["t1", "t2", "t3"])
    assert jax.tree.structure(few) == jax.tree.structure(many)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(few)] == [(x.shape, x.dtype) for x in jax.tree.leaves(many)]


def test_no_adapter_costs_nothing() -> None:
    backbone = random_backbone()
    rows = big_bank(backbone).rows([None] * BATCH)
    assert jax.tree.leaves(rows) == [] and rows == Rows()
    state = state_shapes(backbone, big_bank(backbone), [None] * BATCH)
    assert jax.tree.leaves(state.adjustments) == []
