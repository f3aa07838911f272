"""Law 5: the backbone is never copied per tenant, donated or changed, and decoding never sees a tenant."""

from __future__ import annotations

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from para_jax import AdapterBank, Backbone, ParaConfig, generate
from para_jax.adapters.rows import Rows
from para_jax.backbones.decoder import DecodeState
from tests.helpers import METHODS, random_backbone, random_bank

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
    bank = random_bank(METHODS, backbone.config)
    tenants = [{"lora": 0.5, "ia3": 1.0, "bias": 0.5}, "patterned", "response"]
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
    bank = random_bank({"acme": ParaConfig(r=2), "globex": METHODS["patterned"]}, backbone.config)
    generate(backbone, tokenizer, ["It was", "A"], bank=bank, tenants=["acme", "globex"], max_new_tokens=3)
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


@pytest.mark.parametrize("stacked", [False, True])
def test_configurations_that_no_row_uses_cost_nothing(stacked: bool) -> None:
    """A batch's rows, its state and its programs are those of a bank without them, whatever else the bank holds."""
    backbone = random_backbone(stacked=stacked)
    every = random_bank(METHODS, backbone.config)
    for name in ("para", "ia3"):
        tenants = [name, None, {name: 0.5}]
        alone = AdapterBank.stack({name: every[name]}, backbone.config)
        state, expected = (state_shapes(backbone, bank, tenants) for bank in (every, alone))
        assert jax.tree.structure(state) == jax.tree.structure(expected)
        assert [(x.shape, x.dtype) for x in jax.tree.leaves(state)] == [
            (x.shape, x.dtype) for x in jax.tree.leaves(expected)
        ]
        lowered = [jax.jit(prefill).lower(backbone, TOKENS, MASK, rows=b.rows(tenants)) for b in (every, alone)]
        assert lowered[0].as_text() == lowered[1].as_text()
        assert not any(adjustment.pairs for adjustment in state.adjustments), "no low-rank row, no pairs"


@pytest.mark.parametrize("stacked", [False, True])
def test_what_low_rank_rows_hold(stacked: bool) -> None:
    """One pair a row at each targeted site, at the highest rank in use, and no tenant's axis."""
    backbone = random_backbone(stacked=stacked)
    many = {f"t{i}": METHODS["lora"] for i in range(TENANTS)} | {"wide": METHODS["patterned"]}
    state = state_shapes(backbone, random_bank(many, backbone.config), ["t0", "wide", "t16"])
    assert not any(TENANTS in x.shape for x in jax.tree.leaves(state.adjustments))
    for i in range(backbone.config.num_hidden_layers):
        adjustment = state.adjustments[0 if stacked else i]
        assert set(adjustment.pairs) == set(backbone.config.sites) and not adjustment.offsets
        for site, pair in adjustment.pairs.items():
            # The first layer's q_proj has rank 1 in one configuration and 2 in the other; o_proj 4 and 2.
            inputs, outputs = backbone.config.sites[site][:2]
            wide = {"q_proj": 4 if stacked or i else 2, "o_proj": 4, "down_proj": 4 if stacked or i else 2}
            rank = wide.get(site, 2)
            assert pair.down.shape[-3:] == (BATCH, rank, inputs) and pair.up.shape[-3:] == (BATCH, outputs, rank)
