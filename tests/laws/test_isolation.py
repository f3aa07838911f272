"""Law 3: a row's output does not depend on who else is in its batch, bit for bit at one batch shape."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from para_jax import AdapterBank, Backbone, ParaConfig
from tests.helpers import METHODS, random_backbone, random_bank

SMALL, LARGE = ParaConfig(r=2, pooling="mean", activation="rational"), ParaConfig(r=5, bias=True)
# Two configurations each, the first that of tenants a and b, the second that of c and d.
BANKS = {
    "para": (SMALL, LARGE),
    "lora": (METHODS["patterned"], METHODS["lora"]),
    "others": (METHODS["ia3"], METHODS["response"]),
    "biases": (METHODS["bias"], METHODS["para"]),
    "mixed": (METHODS["lora"], METHODS["group"]),
}
B, PROMPT, STEPS = 5, 6, 3


@jax.jit
def run(backbone, tokens, mask, rows):
    """Logits of a full pass, of prefill and of a few steps: (b, PROMPT + 1 + STEPS, v)."""
    hidden, _, _ = backbone.forward(tokens[:, :PROMPT], mask, mask, rows)
    last, state = Backbone.prefill(backbone, tokens[:, :PROMPT], mask, rows, PROMPT + STEPS)
    logits = [backbone.logits(hidden), last[:, None]]
    for i in range(STEPS):
        last, state = backbone.decode(tokens[:, PROMPT + i], state)
        logits.append(last[:, None])
    return jnp.concatenate(logits, axis=1)


@jax.jit
@jax.grad
def slopes(layers, rows, backbone, tokens, mask):
    hidden, _, _ = backbone.forward(tokens[:, :PROMPT], mask, mask, replace(rows, layers=layers))
    return jnp.sum(jnp.sin(hidden))


MODELS = [
    (False, "para", "float32"),
    (True, "lora", "float32"),
    (True, "others", "float32"),
    (True, "biases", "float32"),
    (True, "mixed", "float16"),
]


@pytest.fixture(scope="module", params=MODELS, ids=lambda p: f"{p[1]}-{'stacked' if p[0] else 'unrolled'}-{p[2]}")
def model(request: pytest.FixtureRequest):
    stacked, kind, dtype = request.param
    backbone = jax.tree.map(lambda x: x.astype(dtype), random_backbone(seed=4, stacked=stacked))
    first, second = BANKS[kind]
    configs = {"a": first, "b": first, "c": second, "d": second}
    return backbone, random_bank(configs, backbone.config, seed=5, scale=0.3)


def batch(backbone: Backbone, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, backbone.config.vocab_size, (B, PROMPT + STEPS), dtype=np.int32)
    return tokens, np.arange(PROMPT)[None] >= PROMPT - rng.integers(1, PROMPT + 1, (B, 1))


@pytest.mark.parametrize("tenant", ["a", "c", None])
@pytest.mark.parametrize("row", [0, 3])
def test_neighbours_do_not_change_a_row(model, tenant: str | None, row: int) -> None:
    backbone, bank = model
    tokens, mask = batch(backbone, 0)
    outputs = []
    # Every batch has both configurations, which makes it one program.
    neighbours = (["b", "c", None, "d"], ["d", "b", "d", "d"], ["c", None, None, "a"], ["a", "b", "c", None])
    for seed, others in enumerate(neighbours, start=1):
        other_tokens, other_mask = batch(backbone, seed)
        other_tokens[row], other_mask[row] = tokens[row], mask[row]
        tenants = [*others[:row], tenant, *others[row:]]
        outputs.append(np.asarray(run(backbone, other_tokens, other_mask, bank.rows(tenants))))
    assert all(np.array_equal(x[row], outputs[0][row]) for x in outputs[1:])
    assert not any(np.array_equal(x[4], outputs[0][4]) for x in outputs[1:])


def test_the_tenant_does_change_it(model) -> None:
    backbone, bank = model
    tokens, mask = batch(backbone, 0)
    outputs = [np.asarray(run(backbone, tokens, mask, bank.rows([t, "a", "b", "c", "d"]))) for t in (*"abcd", None)]
    for i, x in enumerate(outputs):
        for y in outputs[:i]:
            assert np.abs(x[0] - y[0]).max() > 0.1
            assert np.array_equal(x[1:], y[1:])


def poisoned(bank: AdapterBank, name: str) -> AdapterBank:
    adapter = bank[name]
    return bank.replace(
        name, replace(adapter, layers=jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), adapter.layers))
    )


@pytest.mark.parametrize("name", ["a", "d"])
def test_a_broken_adapter_breaks_its_own_rows_only(model, name: str) -> None:
    backbone, bank = model
    tokens, mask = batch(backbone, 0)
    tenants = ["a", None, "b", "c", "d"]
    healthy, broken = (np.asarray(run(backbone, tokens, mask, x.rows(tenants))) for x in (bank, poisoned(bank, name)))
    for row, tenant in enumerate(tenants):
        if tenant == name:
            assert np.isnan(broken[row]).any()
        else:
            assert np.array_equal(broken[row], healthy[row])


@pytest.mark.parametrize("name", ["a", "d"])
def test_a_broken_adapter_breaks_its_own_gradients_only(model, name: str) -> None:
    """Also where it holds the first slot of a configuration that the other rows do not have."""
    backbone, bank = model
    tokens, mask = batch(backbone, 0)
    tenants = ["a", None, "b", "c", "d"]

    batches = (x.rows(tenants) for x in (bank, poisoned(bank, name)))
    healthy, broken = (slopes(rows.layers, rows, backbone, tokens, mask) for rows in batches)
    for x, y in zip(jax.tree.leaves(healthy), jax.tree.leaves(broken), strict=True):
        for row, tenant in enumerate(tenants):
            if tenant != name:
                assert np.array_equal(x[row], y[row])
                assert np.isfinite(x[row]).all()
    assert max(np.abs(x).max() for x in jax.tree.leaves(healthy)) > 0.1
