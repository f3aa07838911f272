"""Experts on a mesh say what they say on one device, with weights of few bits too, and so do their gradients."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from para_jax.backbones.experts import through_experts
from para_jax.backbones.linear import dequantized
from para_jax.families.architecture import Experts
from para_jax.parameters import axes
from para_jax.quantization import QUANTIZED, quantized
from para_jax.sharding import make_mesh, spec
from tests.helpers import SMALL

EXPERTS, D, F = Experts(count=4, per_token=2, width=192, normalized=True), 64, 192
LOGICAL = axes(dataclasses.replace(SMALL, experts=EXPERTS))


def weights(bits: str | None) -> dict[str, tuple[np.ndarray, np.ndarray | None]]:
    rng = np.random.default_rng(0)
    drawn = {"gate_up": rng.standard_normal((4, 2, F, D)) / 8, "down": rng.standard_normal((4, D, F)) / 14}
    whole = {name: x.astype(np.float32) for name, x in drawn.items()}
    return {name: (x, None) if bits is None else quantized(x, QUANTIZED[bits]) for name, x in whole.items()}


def told(rows: int, given: dict, mesh=None):
    """What a batch comes to, and the slopes of its inputs."""
    rng = np.random.default_rng(1)
    x, scale = (jnp.asarray(rng.standard_normal((rows, 5, n)), jnp.float32) for n in (D, F))
    chance = jax.nn.softmax(jnp.asarray(rng.standard_normal((rows, 5, 4)), jnp.float32))

    @jax.jit
    def run(x, chance, scale, given):
        def loss(*inputs):
            out = through_experts(*inputs, None, given["gate_up"], given["down"], EXPERTS, jax.nn.silu, mesh)
            return jnp.sum(jnp.sin(out)), out

        return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(x, chance, scale)

    (_, out), slopes = run(x, chance, scale, given)
    return out, *slopes


@pytest.mark.parametrize(
    ("mesh", "rows", "bits"),
    [("fsdp=4,tensor=2", 8, None), ("fsdp=4,tensor=2", 8, "int4"), ("data=2,tensor=4", 3, "int8")],
)
def test_on_a_mesh(mesh: str, rows: int, bits: str | None) -> None:
    """Also where the rows do not divide, nor the groups of the weights' inputs."""
    devices, given = make_mesh(mesh), weights(bits)
    placed = {
        name: tuple(
            None if x is None else jax.device_put(x, NamedSharding(devices, spec(LOGICAL[at], x.shape, devices)))
            for at, x in zip((name, f"{name}_scale"), both, strict=True)
        )
        for name, both in given.items()
    }
    for x, _ in placed.values():
        assert x.addressable_shards[0].data.size == x.size // (devices.shape["fsdp"] * devices.shape["tensor"])
    for ours, theirs in zip(told(rows, placed, devices), told(rows, given), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_each_token_has_its_own_experts() -> None:
    """Against a loop over tokens."""
    given = weights("int4")
    gate_up, down = (np.asarray(dequantized(*map(jnp.asarray, given[n]), jnp.float32)) for n in ("gate_up", "down"))
    rng = np.random.default_rng(1)
    x, scale = (rng.standard_normal((2, 5, n)).astype(np.float32) for n in (D, F))
    chance = np.asarray(jax.nn.softmax(jnp.asarray(rng.standard_normal((2, 5, 4)), jnp.float32)))
    expected = np.zeros_like(x)
    for at in np.ndindex(2, 5):
        best = np.argsort(-chance[at])[:2]
        for e in best:
            gate, up = gate_up[e] @ x[at]
            inner = gate / (1 + np.exp(-gate)) * up * scale[at]
            expected[at] += chance[at][e] / chance[at][best].sum() * (down[e] @ inner)
    ours, *_ = told(2, given)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)
