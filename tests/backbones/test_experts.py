"""Experts on a mesh say what they say on one device, with weights of few bits too, and so do their gradients."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from para_jax import BackboneConfig
from para_jax.backbones.experts import Projections, clamped_swiglu, gated, through_experts
from para_jax.backbones.linear import dequantized
from para_jax.families.architecture import Experts
from para_jax.parameters import axes
from para_jax.quantization import QUANTIZED, quantized
from para_jax.sharding import make_mesh, spec
from tests.helpers import family_fields

EXPERTS, D, F = Experts(count=4, per_token=2, width=192, normalized=True), 64, 192
LOGICAL = axes(BackboneConfig.from_hf(family_fields("gpt_oss")))


def weights(bits: str | None) -> dict[str, tuple[np.ndarray, np.ndarray | None]]:
    rng = np.random.default_rng(0)
    drawn = {"gate_up": rng.standard_normal((4, 2, F, D)) / 8, "down": rng.standard_normal((4, D, F)) / 14}
    whole = {name: x.astype(np.float32) for name, x in drawn.items()}
    return {name: (x, None) if bits is None else quantized(x, QUANTIZED[bits]) for name, x in whole.items()}


def biases() -> dict[str, tuple[np.ndarray, None]]:
    rng = np.random.default_rng(2)
    shapes = {"gate_up_bias": (4, 2, F), "down_bias": (4, D)}
    return {name: (rng.standard_normal(shape).astype(np.float32), None) for name, shape in shapes.items()}


def told(rows: int, given: dict, mesh=None):
    """What a batch comes to, and the slopes of its inputs."""
    rng = np.random.default_rng(1)
    x, scale = (jnp.asarray(rng.standard_normal((rows, 5, n)), jnp.float32) for n in (D, F))
    chance = jax.nn.softmax(jnp.asarray(rng.standard_normal((rows, 5, 4)), jnp.float32))

    inner = partial(clamped_swiglu, 1.7, 0.8) if "down_bias" in given else partial(gated, jax.nn.silu)

    @jax.jit
    def run(x, chance, scale, given):
        def loss(*inputs):
            added = {name: x for name, (x, _) in given.items() if "bias" in name}
            weights = Projections(given["gate_up"], given["down"], **added)
            out = through_experts(*inputs, None, weights, EXPERTS, inner, mesh)
            return jnp.sum(jnp.sin(out)), out

        return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(x, chance, scale)

    (_, out), slopes = run(x, chance, scale, given)
    return out, *slopes


@pytest.mark.parametrize(
    ("mesh", "rows", "bits", "more"),
    [("fsdp=4,tensor=2", 8, None, {}), ("fsdp=4,tensor=2", 8, "int4", {}), ("data=2,tensor=4", 3, "int8", biases())],
)
def test_on_a_mesh(mesh: str, rows: int, bits: str | None, more: dict) -> None:
    """Also where the rows do not divide, nor the groups of the weights' inputs; biases are added once."""
    devices, given = make_mesh(mesh), {**weights(bits), **more}
    placed = {
        name: tuple(
            None if x is None else jax.device_put(x, NamedSharding(devices, spec(LOGICAL[at], x.shape, devices)))
            for at, x in zip((name, f"{name}_scale"), both, strict=True)
        )
        for name, both in given.items()
    }
    for x, _ in (placed[name] for name in ("gate_up", "down")):
        assert x.addressable_shards[0].data.size == x.size // (devices.shape["fsdp"] * devices.shape["tensor"])
    for ours, theirs in zip(told(rows, placed, devices), told(rows, given), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("more", [{}, biases()])
def test_each_token_has_its_own_experts(more: dict) -> None:
    """Against a loop over tokens. With biases the gate is GPT-OSS's, which clamps what is scaled."""
    given = {**weights("int4"), **more}
    gate_up, down = (np.asarray(dequantized(*map(jnp.asarray, given[n]), jnp.float32)) for n in ("gate_up", "down"))
    rng = np.random.default_rng(1)
    x, scale = (rng.standard_normal((2, 5, n)).astype(np.float32) for n in (D, F))
    chance = np.asarray(jax.nn.softmax(jnp.asarray(rng.standard_normal((2, 5, 4)), jnp.float32)))
    expected = np.zeros_like(x)
    (gate_bias, up_bias), down_bias = np.zeros((2, 4, F)), np.zeros((4, D))
    if more:
        (gate_bias, up_bias), down_bias = more["gate_up_bias"][0].swapaxes(0, 1), more["down_bias"][0]
    for at in np.ndindex(2, 5):
        best = np.argsort(-chance[at])[:2]
        for e in best:
            gate, up = gate_up[e] @ x[at]
            inner = gate / (1 + np.exp(-gate)) * up * scale[at]
            if more:
                gate, up = np.minimum(gate + gate_bias[e], 0.8), np.clip((up + up_bias[e]) * scale[at], -0.8, 0.8)
                inner = gate / (1 + np.exp(-1.7 * gate)) * (up + 1)
            expected[at] += chance[at][e] / chance[at][best].sum() * (down[e] @ inner + down_bias[e])
    ours, *_ = told(2, given)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)
