"""Law 2: adapters are prepared once per prompt, so prefill and single steps equal one full forward pass."""

from __future__ import annotations

from functools import partial
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from para_jax import Backbone, ParaConfig
from para_jax.adapters.para import Activation, Pooling
from tests.helpers import METHODS, random_backbone, random_bank

# Two tenants share a configuration; one repeats in the batch, and two rows have none.
CONFIGS = {
    pooling: ParaConfig(r=3 + i, pooling=pooling, activation=activation, bias=i % 2 == 0, normalize=i < 3)
    for i, (pooling, activation) in enumerate(zip(get_args(Pooling), get_args(Activation), strict=True))
} | {"other": ParaConfig(r=3, pooling="last", activation="gelu", bias=True)}
BATCHES: dict[str, list] = {
    "para": ["last", None, "mean", "max", "attention", "last", None, "other"],
    "mixed": ["lora", None, "response", "patterned", "ia3", "group", "bias", {"lora": -0.5}],
    # Rows of several adapters: their pairs stand side by side and their scales are added.
    "composed": [
        *["lora", None, {"lora": 0.5, "patterned": 1.5}, "response", {"ia3": 0.7, "response": 0.5}],
        *[{"patterned": 1.0, "group": 1.0, "last": -1.0}, "lora", {"bias": 0.5, "ia3": 1.0}],
    ],
}
LENGTHS = np.array([6, 1, 4, 6, 3, 2, 5, 1])[:, None]
B, PROMPT, STEPS = len(LENGTHS), 6, 4


def setup(stacked: bool, batch: str):
    backbone = random_backbone(seed=1, stacked=stacked)
    bank = random_bank(CONFIGS | METHODS, backbone.config, seed=2, scale=0.3)
    rng = np.random.default_rng(3)
    prompts, generated = (rng.integers(0, backbone.config.vocab_size, (B, n), dtype=np.int32) for n in (PROMPT, STEPS))
    return backbone, bank.rows(BATCHES[batch]), prompts, generated


@jax.jit
def full(backbone, tokens, mask, prompt_mask, rows):
    hidden, adjustments, _ = backbone.forward(tokens, mask, prompt_mask, rows)
    return backbone.logits(hidden), adjustments


@pytest.mark.parametrize(
    ("stacked", "batch"),
    [(True, "para"), (False, "mixed"), (True, "composed")],
)
def test_prefill_and_decode_equal_one_forward_pass(stacked: bool, batch: str) -> None:
    backbone, rows, prompts, generated = setup(stacked, batch)
    mask = np.arange(PROMPT)[None] >= PROMPT - LENGTHS  # flush right
    logits, state = jax.jit(partial(Backbone.prefill, length=PROMPT + STEPS))(
        backbone, jnp.asarray(prompts), jnp.asarray(mask), rows=rows
    )
    decode = jax.jit(Backbone.decode)
    stepwise = [logits]
    for i in range(STEPS):
        logits, state = decode(backbone, jnp.asarray(generated[:, i]), state)
        stepwise.append(logits)

    # The same rows whole, flush left: padding on the other side.
    total = PROMPT + STEPS
    tokens = np.zeros((B, total), np.int32)
    for row, length in enumerate(LENGTHS[:, 0]):
        whole = np.concatenate([prompts[row, PROMPT - length :], generated[row]])
        tokens[row, : len(whole)] = whole
    column = np.arange(total)[None]
    logits, adjustments = full(backbone, tokens, column < LENGTHS + STEPS, column < LENGTHS, rows)

    read = LENGTHS - 1 + np.arange(STEPS + 1)[None]
    expected = np.take_along_axis(np.asarray(logits), read[..., None], axis=1)
    scale = np.abs(expected).max()
    assert np.abs(np.stack(stepwise, axis=1) - expected).max() < 1e-5 * scale
    assert np.std(expected) > 1
    for ours, theirs in zip(jax.tree.leaves(state.adjustments), jax.tree.leaves(adjustments), strict=True):
        assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max()
        assert np.abs(theirs).max() > 0.1, "an adapter near the identity would prove nothing"


@pytest.mark.parametrize(
    ("stacked", "batch"),
    [(True, "para"), (False, "mixed")],
)
def test_later_tokens_do_not_change_what_was_prepared(stacked: bool, batch: str) -> None:
    backbone, rows, prompts, generated = setup(stacked, batch)
    column = np.arange(PROMPT + STEPS)[None]
    everything = np.ones((B, PROMPT + STEPS), bool)
    prompt_mask = np.broadcast_to(column < PROMPT, everything.shape)
    tokens = np.concatenate([prompts, generated], axis=1)
    others = np.concatenate([prompts, (generated + 7) % backbone.config.vocab_size], axis=1)
    (logits, before), (other_logits, after) = (
        full(backbone, x, everything, prompt_mask, rows) for x in (tokens, others)
    )
    assert not np.array_equal(logits, other_logits)
    assert all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))
    # The check is no tautology: the prompt does change it.
    prompts = (prompts + 1) % backbone.config.vocab_size
    _, changed = full(backbone, np.concatenate([prompts, generated], axis=1), everything, prompt_mask, rows)
    assert not all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(changed), strict=True))


@pytest.mark.parametrize("stacked", [False, True])
def test_response_scaling_leaves_the_prompts_keys_and_values_alone(stacked: bool) -> None:
    """All but the last token's, which is where the first new token is predicted from: that one is changed."""
    backbone, _, prompts, _ = setup(stacked, "mixed")
    config = METHODS["response"]
    bank = random_bank({"a": config}, backbone.config, seed=2, scale=0.3)
    mask = np.arange(PROMPT)[None] >= PROMPT - LENGTHS
    prefill = jax.jit(partial(Backbone.prefill, length=PROMPT))
    (ours, adjusted), (theirs, bare) = (
        prefill(backbone, jnp.asarray(prompts), jnp.asarray(mask), rows=bank.rows(tenants))
        for tenants in (["a"] * B, [None] * B)
    )
    for x, y in zip(jax.tree.leaves((adjusted.cache.keys, adjusted.cache.values)),
                    jax.tree.leaves((bare.cache.keys, bare.cache.values)), strict=True):  # fmt: skip
        held = mask[:, None, :, None] & (np.arange(PROMPT) < PROMPT - 1)[:, None]
        assert np.abs(np.where(held, x - y, 0)).max() < 1e-5 * np.abs(y).max()
    assert (np.abs(ours - theirs).max(axis=1) > 0.01).all()
