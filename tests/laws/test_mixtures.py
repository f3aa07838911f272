"""Laws 1 to 3 for mixtures: every method in one batch, and rows of several adapters with adapter weights."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from para_jax import AdapterBank, Backbone, LoraConfig, complete
from para_jax.adapters.adapter import Adapter
from para_jax.adapters.method import Prompt
from para_jax.adapters.rows import Rows
from para_jax.adjustment import Adjustment
from tests.helpers import METHODS, random_adapter, random_backbone, random_bank

EVERYONE = [*METHODS, None]
PROMPTS = [[int(token) for token in np.random.default_rng(n).integers(2, 61, n)] for n in (5, 1, 7, 3, 4, 6, 8, 2)]
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "eos_token_id": ()}


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return tiny[1]


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return random_backbone(3, stacked=True)


@pytest.fixture(scope="module")
def bank(backbone: Backbone) -> AdapterBank:
    return random_bank(METHODS, backbone.config, scale=0.3)


def only(bank: AdapterBank, name: str | None) -> AdapterBank:
    return AdapterBank.stack({} if name is None else {name: bank[name]}, bank.shape)


# Every method in one batch


def test_each_row_is_what_it_is_in_a_run_of_its_method_alone(backbone: Backbone, bank: AdapterBank) -> None:
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 61, (len(EVERYONE), 6)), jnp.int32)
    prompt = jnp.arange(6)[None] < jnp.array([6, 3, 4, 5, 1, 2, 3, 6])[:, None]
    together = np.asarray(backbone(tokens, prompt_mask=prompt, bank=bank, tenants=EVERYONE))
    bare = np.asarray(backbone(tokens, prompt_mask=prompt))
    for row, name in enumerate(EVERYONE):
        tenants = [name if i == row else None for i in range(len(EVERYONE))]
        alone = np.asarray(backbone(tokens, prompt_mask=prompt, bank=only(bank, name), tenants=tenants))
        np.testing.assert_allclose(
            together[row], alone[row], rtol=0, atol=1e-5 * np.abs(alone).max(), err_msg=str(name)
        )
        assert (np.abs(alone[row] - bare[row]).max() > 0.1) == (name is not None)


def test_generated_texts_are_those_of_each_method_alone(backbone: Backbone, bank: AdapterBank, tokenizer) -> None:
    mixed = complete(backbone, tokenizer, PROMPTS, bank=bank, tenants=EVERYONE, **GREEDY)
    for prompt, name, row in zip(PROMPTS, EVERYONE, mixed, strict=True):
        if name in ("lora", "patterned", "ia3", "bias", None):
            own = complete(backbone, tokenizer, [prompt], bank=only(bank, name), tenants=[name], **GREEDY)
            assert own == [row], name
    # They are what one full forward pass says, too: prepared from the prompt, each token the likeliest.
    length = max(map(len, PROMPTS)) + 6
    texts = [[*prompt, *row.tokens] for prompt, row in zip(PROMPTS, mixed, strict=True)]
    tokens = jnp.asarray([text + [0] * (length - len(text)) for text in texts], jnp.int32)
    column, starts = np.arange(length)[None], np.array([len(prompt) for prompt in PROMPTS])[:, None]
    logits = backbone(tokens, mask=column < starts + 6, prompt_mask=column < starts, bank=bank, tenants=EVERYONE)
    likeliest = np.take_along_axis(np.asarray(jnp.argmax(logits, -1)), starts - 1 + np.arange(6)[None], axis=1)
    assert likeliest.tolist() == [row.tokens for row in mixed]
    assert len({tuple(row.tokens) for row in mixed}) == len(EVERYONE)


def test_beams_find_the_likeliest_text(backbone: Backbone, bank: AdapterBank, tokenizer) -> None:
    """As many beams as tokens look at every text of two, which full forward passes can, too."""
    tenants, prompts, v = ["lora", "para", {"patterned": 0.5, "ia3": 1.0}, None], PROMPTS[:4], 61
    options = {"max_new_tokens": 2, "eos_token_id": (), "num_beams": v}
    found = complete(backbone, tokenizer, prompts, bank=bank, tenants=tenants, **options)
    length = max(map(len, prompts)) + 1
    tokens = np.zeros((len(prompts), v, length), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, :, : len(prompt)] = prompt
        tokens[row, :, len(prompt)] = np.arange(v)
    starts = np.repeat([len(prompt) for prompt in prompts], v)[:, None]
    column = np.arange(length)[None]
    logits = backbone(
        jnp.asarray(tokens.reshape(-1, length)),
        mask=column <= starts,
        prompt_mask=column < starts,
        bank=bank,
        tenants=[tenant for tenant in tenants for _ in range(v)],
    )
    log_p = np.asarray(jax.nn.log_softmax(logits)).reshape(len(prompts), v, length, v)
    for row, prompt in enumerate(prompts):
        n = len(prompt)
        score = log_p[row, 0, n - 1][:, None] + log_p[row, :, n]
        assert found[row].tokens == list(np.unravel_index(score.argmax(), score.shape))


# Adapter weights


def prepared(bank: AdapterBank, tenants: list) -> Adjustment:
    """The Adjustment of the second layer of a batch of these tenants."""
    rows = bank.rows(tenants)
    hidden = jnp.asarray(np.random.default_rng(5).normal(size=(len(tenants), 3, 32)), jnp.float32)
    hidden = jnp.broadcast_to(hidden[:1], hidden.shape)
    prompt = Prompt(hidden, hidden, jnp.ones((len(tenants), 3), bool))
    return rows.prepare(jax.tree.map(lambda x: x[1], rows.of_stack("")), 1, prompt)


def changes(bank: AdapterBank, site: str, tenants: list) -> np.ndarray:
    """By how much each tenant changes one output of the site: (tenants, t, features)."""
    inputs, outputs = bank.shape.sites[site][:2]
    rng = np.random.default_rng(6)
    x, y = (np.repeat(rng.normal(size=(1, 3, n)).astype(np.float32), len(tenants), axis=0) for n in (inputs, outputs))
    return np.asarray(prepared(bank, tenants).apply(site, jnp.asarray(x), jnp.asarray(y))) - y


def test_weight_zero_is_no_adapter_and_one_is_the_adapter(backbone: Backbone, bank: AdapterBank) -> None:
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 61, (3, 5)), jnp.int32)
    assert bank.rows([{"lora": 0.0}, {}, {"para": 0, "ia3": 0.0}]) == Rows()
    plain, zero, one = (
        np.asarray(backbone(tokens, bank=bank, tenants=[*row, "lora", "ia3"]))
        for row in ([None], [{"lora": 0.0}], [{"lora": 1.0}])
    )
    named = np.asarray(backbone(tokens, bank=bank, tenants=["lora", {"lora": 1}, {"ia3": np.float32(1)}]))
    assert np.array_equal(plain, zero) and np.array_equal(one, named)
    assert np.abs(plain[0] - one[0]).max() > 0.1 and np.array_equal(plain[1:], one[1:])


@pytest.mark.parametrize("name", METHODS)
def test_changes_are_linear_in_the_weight(bank: AdapterBank, name: str) -> None:
    """At a layer, given its input: logits are not, since later layers see what earlier ones changed."""
    site = "k_proj" if name == "ia3" else "q_proj"
    full, half, minus, none = changes(bank, site, [name, {name: 0.5}, {name: -2.0}, None])
    assert np.abs(full).max() > 0.1 and not np.any(none)
    np.testing.assert_allclose(half, 0.5 * full, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(minus, -2 * full, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "mixture",
    [
        {"lora": 0.5, "patterned": 2.0},
        {"lora": 1.0, "ia3": 0.7},
        {"patterned": 1.0, "para": -0.5, "group": 1.0},
        {"bias": 2.0, "lora": 1.0, "para": -0.5},
    ],
    ids=str,
)
def test_several_adapters_add_what_each_changes(bank: AdapterBank, mixture: dict[str, float]) -> None:
    """y (1 + sum of s * offset) + sum of s * shift + sum of s * x down^T up^T, beside rows of one and of none."""
    for site in bank.shape.sites:
        both, none, *each = changes(bank, site, [mixture, None, *mixture])
        expected = sum(weight * change for weight, change in zip(mixture.values(), each, strict=True))
        np.testing.assert_allclose(both, expected, rtol=1e-4, atol=1e-5)
        assert not np.any(none)


def test_two_low_rank_adapters_are_one_of_both_ranks(backbone: Backbone) -> None:
    """Also where both are of one configuration."""
    config = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear")
    one, two = (random_adapter(config, backbone.config, seed, 0.3) for seed in (1, 2))
    joined_config = LoraConfig(r=4, lora_alpha=4, target_modules="all-linear")
    fresh = Adapter.create(joined_config, backbone.config, jax.random.key(0))
    # Scale 2 times weight 0.5 is the joined one's scale, which is 1.
    halves = zip(one.tensors().items(), two.tensors().values(), strict=True)
    tensors = [jnp.concatenate([a, b], axis=1 if name.startswith("down") else 2) for (name, a), b in halves]
    joined = Adapter(joined_config, jax.tree.unflatten(jax.tree.structure(fresh.layers), tensors))
    bank = AdapterBank.stack({"one": one, "two": two, "joined": joined}, backbone.config)
    row = np.random.default_rng(2).integers(0, 61, (1, 6))
    tokens = jnp.asarray(np.repeat(row, 3, axis=0), jnp.int32)
    mixed, alone, bare = backbone(tokens, bank=bank, tenants=[{"one": 0.5, "two": 0.5}, "joined", None])
    np.testing.assert_allclose(mixed, alone, rtol=0, atol=1e-5 * float(jnp.abs(alone).max()))
    assert float(jnp.abs(mixed - bare).max()) > 0.1
