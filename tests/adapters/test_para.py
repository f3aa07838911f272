"""The vector generator against NumPy and torch, its size, dtypes and gradients."""

from __future__ import annotations

import itertools
import math
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.activations import ACT2FN

from para_jax import BackboneConfig, ParaConfig
from para_jax.adapters.adapter import abstract_layers, named_leaves
from para_jax.adapters.method import Prompt
from para_jax.adapters.para import RATIONAL_DENOMINATOR, RATIONAL_NUMERATOR, Activation, ParaLayer, Pooling, rational
from tests.helpers import SMALL, random_backbone, random_bank

T, D = 7, SMALL.hidden_size
MASKS = {
    "all": [1, 1, 1, 1, 1, 1, 1],
    "flush left": [1, 1, 1, 0, 0, 0, 0],
    "flush right": [0, 0, 0, 0, 1, 1, 1],
    "one": [0, 0, 1, 0, 0, 0, 0],
    "with a hole": [0, 1, 0, 1, 1, 0, 0],
    "none": [0, 0, 0, 0, 0, 0, 0],
}


def layer_of(config: ParaConfig, seed: int = 0, scale: float = 0.5) -> ParaLayer:
    """One layer with every weight drawn from N(0, scale); by NumPy, which has nothing to compile."""
    leaves, tree = jax.tree.flatten(jax.eval_shape(lambda: config.layer(SMALL, nnx.Rngs(0))))
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(tree, [jnp.asarray(scale * rng.normal(size=x.shape), jnp.float32) for x in leaves])


def read(hidden: np.ndarray, mask: object) -> Prompt:
    """A prompt whose two forms are the same, as no test here tells them apart."""
    return Prompt(jnp.asarray(hidden), jnp.asarray(hidden), jnp.asarray(mask, bool))


def hidden_with_rubbish(mask: list[int], seed: int = 0) -> np.ndarray:
    """Hidden states with not-a-number wherever the mask is off."""
    hidden = np.random.default_rng(seed).normal(size=(T, D)).astype(np.float32)
    return np.where(np.array(mask, bool)[:, None], hidden, np.nan)


# Sizes


@pytest.mark.parametrize(
    ("sizes", "bias", "expected"),
    [
        # LLaMA-2 7B: the paper's 8.9M, and what a bias would add to it.
        ((32000, 4096, 11008, 32, 32, 32, 128), False, 8_945_664),
        ((32000, 4096, 11008, 32, 32, 32, 128), True, 8_945_664 + 32 * (4096 + 4096 + 11008)),
        # Llama 3 8B, where v is narrower: 32 * 12 * (d + q + v + f).
        ((128256, 4096, 14336, 32, 32, 8, 128), False, 32 * 12 * (4096 + 4096 + 1024 + 14336)),
    ],
)
def test_number_of_parameters(sizes: tuple[int, ...], bias: bool, expected: int) -> None:
    layers = abstract_layers(ParaConfig(r=12, bias=bias), BackboneConfig(*sizes))
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(layers)) == expected
    assert {x.dtype for x in jax.tree.leaves(layers)} == {jnp.dtype("float32")}


def test_options_add_only_their_own_parameters() -> None:
    def names(**options) -> set[str]:
        return set(named_leaves(abstract_layers(ParaConfig(**options), SMALL)))

    assert names() == {"down", "up"}
    assert names(bias=True) == {"down", "up", "bias"}
    assert names(pooling="attention") == {"down", "up", "query"}
    assert names(activation="rational") == {"down", "up", "numerator", "denominator"}


# Pooling


def pooled(pooling: str, hidden: np.ndarray, mask: np.ndarray, query: np.ndarray) -> np.ndarray:
    prompt = hidden[mask].astype(np.float64)
    if len(prompt) == 0:
        return np.zeros(D)
    if pooling == "last":
        return prompt[-1]
    if pooling == "mean":
        return prompt.mean(axis=0)
    if pooling == "max":
        return prompt.max(axis=0)
    weight = np.exp(prompt @ query - (prompt @ query).max())
    return (weight / weight.sum()) @ prompt


@pytest.mark.parametrize("pooling", get_args(Pooling))
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_pooling(pooling: Pooling, mask: list[int]) -> None:
    layer = layer_of(ParaConfig(r=2, pooling=pooling))
    hidden, mask_t = hidden_with_rubbish(mask), np.array(mask, bool)
    query = np.asarray(layer.query[...]) if pooling == "attention" else np.zeros(D)
    ours = layer._pool(jnp.asarray(hidden), jnp.asarray(mask_t))
    np.testing.assert_allclose(ours, pooled(pooling, hidden, mask_t, query), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pooling", get_args(Pooling))
def test_where_a_prompt_stands_does_not_matter(pooling: Pooling) -> None:
    layer = layer_of(ParaConfig(r=2, pooling=pooling))
    prompt = np.random.default_rng(0).normal(size=(3, D)).astype(np.float32)
    offsets = []
    for start in range(T - 2):
        hidden = np.full((T, D), np.inf, np.float32)
        hidden[start : start + 3] = prompt
        column = np.arange(T)
        adjustment = layer.prepare(read(hidden, (start <= column) & (column < start + 3)))
        offsets.append(np.concatenate(jax.tree.leaves(adjustment)))
    for x in offsets[1:]:
        np.testing.assert_allclose(x, offsets[0], rtol=1e-5, atol=1e-6)


# The generator


def numpy_rational(x: np.ndarray, numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    above = sum(a * x**j for j, a in enumerate(numerator))
    return above / (1 + np.abs(sum(b * x**i for i, b in enumerate(denominator, start=1))))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("activation", get_args(Activation))
def test_generator(activation: Activation, normalize: bool) -> None:
    """l = g(h W_down) W_up + b_up, cut into the sites' vectors in the order of target_modules."""
    targets = ("up_proj", "q_proj", "k_proj")
    config = ParaConfig(r=3, activation=activation, normalize=normalize, bias=True, target_modules=targets)
    layer = layer_of(config, scale=0.2)
    weights = {name: np.asarray(x, np.float64) for name, x in vars(layer).items() if hasattr(x, "shape")}
    hidden = hidden_with_rubbish(MASKS["flush left"])

    h = hidden[2].astype(np.float64)
    if normalize:
        h = h / np.sqrt(np.mean(h**2) + 1e-6)
    x = h @ weights["down"]
    if activation == "rational":
        x = numpy_rational(x, weights["numerator"], weights["denominator"])
    else:
        x = ACT2FN[activation](torch.tensor(x)).numpy()
    l_q_k = x @ weights["up"] + weights["bias"]
    f, q = SMALL.intermediate_size, SMALL.num_attention_heads * SMALL.head_dim
    expected = dict(zip(targets, np.split(l_q_k, [f, f + q]), strict=True))

    adjustment = layer.prepare(read(hidden, MASKS["flush left"]))
    assert adjustment.offsets.keys() == expected.keys()
    for site, offset in adjustment.offsets.items():
        assert offset.shape == (SMALL.sites[site].outputs,)
        np.testing.assert_allclose(offset, expected[site], rtol=1e-5, atol=1e-6)


def test_rational_is_born_close_to_gelu() -> None:
    x = np.linspace(-5, 5, 2001, dtype=np.float32)
    ours = rational(jnp.asarray(x), jnp.array(RATIONAL_NUMERATOR), jnp.array(RATIONAL_DENOMINATOR))
    assert np.abs(ours - torch.nn.functional.gelu(torch.tensor(x)).numpy()).max() < 0.0034


@settings(derandomize=True, deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**16))
def test_rational(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, a, b = (rng.normal(size=n).astype(np.float32) for n in (50, 7, 5))
    ours = rational(jnp.asarray(x), jnp.asarray(a), jnp.asarray(b))
    expected = numpy_rational(*(v.astype(np.float64) for v in (x, a, b)))
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


# Gradients


@pytest.mark.parametrize(("pooling", "activation"), [*zip(get_args(Pooling), get_args(Activation), strict=True)])
@pytest.mark.parametrize("normalize", [False, True])
def test_gradients_are_finite(pooling: Pooling, activation: Activation, normalize: bool) -> None:
    """For every mask, an empty one too, whatever stands in the padding, and for hidden states that are all zero."""
    config = ParaConfig(r=3, pooling=pooling, activation=activation, normalize=normalize, bias=True)

    @jax.jit
    @jax.grad
    def slope(arguments, mask):
        layer, hidden = arguments
        return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(layer.prepare(read(hidden, mask))))

    layer = layer_of(config)
    fresh = jax.tree.map(jnp.zeros_like, layer)
    for (name, mask), generator in itertools.product(MASKS.items(), (layer, fresh)):
        for hidden in (hidden_with_rubbish(mask), np.zeros((T, D), np.float32)):
            slopes = slope((generator, jnp.asarray(hidden)), jnp.asarray(mask, bool))
            assert all(np.isfinite(x).all() for x in jax.tree.leaves(slopes)), name
    slopes = slope((layer, jnp.asarray(hidden_with_rubbish(MASKS["all"]))), jnp.asarray(MASKS["all"], bool))
    # A relu may be shut for one of its few units; no parameter as a whole is without a gradient.
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(slopes))


# Dtypes and vmap


def test_float32_with_a_bf16_backbone() -> None:
    backbone = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_backbone())
    bank = random_bank({"a": ParaConfig(r=2), "b": ParaConfig(r=2)}, backbone.config)
    rows = bank.rows(["a", None])
    assert {x.dtype for x in jax.tree.leaves(rows.layers)} == {jnp.dtype("float32")}

    layer = layer_of(ParaConfig(r=2))
    hidden = jax.ShapeDtypeStruct((T, D), jnp.bfloat16)
    prepared = jax.eval_shape(lambda h: layer.prepare(read(h, jnp.ones(T, bool))), hidden)
    assert {x.dtype for x in jax.tree.leaves(prepared)} == {jnp.dtype("float32")}

    # They wait for the tokens in bfloat16, and the gradients of the weights are float32 again.
    tokens, mask = jnp.zeros((2, 3), jnp.int32), jnp.ones((2, 3), bool)
    _, adjustments, _ = jax.eval_shape(backbone.forward, tokens, mask, mask, rows)
    assert {x.dtype for x in jax.tree.leaves(adjustments)} == {jnp.dtype("bfloat16")}

    def loss(rows):
        hidden, _, _ = backbone.forward(tokens, mask, mask, rows)
        assert hidden.dtype == jnp.bfloat16
        return jnp.sum(backbone.logits(hidden))

    slopes = jax.eval_shape(jax.grad(loss, allow_int=True), rows)
    assert {x.dtype for x in jax.tree.leaves(slopes.layers)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("pooling", get_args(Pooling))
def test_vmap_over_tenants_equals_a_loop(pooling: Pooling) -> None:
    config = ParaConfig(r=3, pooling=pooling, activation="rational", bias=True)
    layers = [layer_of(config, seed) for seed in range(4)]
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(4, T, D)), jnp.float32)
    mask = jnp.asarray(list(MASKS.values())[:4], bool)
    stack = jax.tree.map(lambda *x: jnp.stack(x), *layers)
    together = jax.vmap(lambda layer, h, m: layer.prepare(read(h, m)))(stack, hidden, mask)
    for i, layer in enumerate(layers):
        alone = layer.prepare(read(hidden[i], mask[i]))
        for site, offset in alone.offsets.items():
            np.testing.assert_allclose(together.offsets[site][i], offset, rtol=1e-5, atol=1e-6)
