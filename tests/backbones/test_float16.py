"""Computation in float16: as exact as its bits are, and with float32's range where a real model needs it."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from para_jax import Backbone
from para_jax.adapters.method import Prompt
from para_jax.adapters.rows import Rows
from para_jax.adjustment import Adjustment
from para_jax.backbones.options import compute_dtype
from para_jax.errors import ParaJaxError
from tests.helpers import FAMILY_METHODS, family_backbone, random_backbone, random_bank

TOKENS = np.random.default_rng(0).integers(0, 61, (6, 9), dtype=np.int32)
TENANTS = ["para", "lora", "response", "group", "bias", None]


def logits(backbone: Backbone, dtype: str) -> np.ndarray:
    """Of rows with every method."""
    bank = random_bank(FAMILY_METHODS, backbone.config, seed=2, scale=0.1)
    cast = jax.tree.map(lambda x: x.astype(dtype), backbone)
    return np.asarray(cast(jnp.asarray(TOKENS), bank=bank, tenants=TENANTS))


@dataclass(frozen=True)
class Watching(Rows):
    """No adapters; notes the largest number of each layer's input."""

    seen: list[float] = field(default_factory=list)

    def prepare(self, layers: Any, layer: Any, prompt: Prompt) -> Adjustment:
        self.seen.append(float(jnp.abs(prompt.hidden_td).max()))
        return Adjustment()


def error(found: np.ndarray, exact: np.ndarray) -> float:
    return float(np.sqrt(np.mean((found - exact) ** 2) / np.mean(exact**2)))


@pytest.mark.parametrize(
    "family", ["llama", *(pytest.param(f, marks=pytest.mark.slow) for f in ("qwen2", "gemma3_text"))]
)
def test_eight_times_as_exact_as_bfloat16(family: str) -> None:
    backbone = family_backbone(family, seed=1, stacked=True)
    exact, half, brain = (logits(backbone, dtype) for dtype in ("float32", "float16", "bfloat16"))
    assert half.dtype == np.float32
    assert error(half, exact) < 3e-3
    assert error(half, exact) < error(brain, exact) / 5


def test_the_residual_stream_may_exceed_float16s_range() -> None:
    """As Gemma 3's does."""
    backbone = jax.tree.map(lambda x: x, random_backbone(seed=1))
    backbone.blocks[0]["down"][...] = backbone.blocks[0]["down"][...].at[7].mul(5e4)
    seen: list[float] = []
    backbone.forward(TOKENS, *[np.ones(TOKENS.shape, bool)] * 2, Watching(seen=seen))
    assert seen[0] < 100 < 65504 < seen[1]
    exact, half = (logits(backbone, dtype) for dtype in ("float32", "float16"))
    assert error(half, exact) < 5e-3


def test_what_waits_between_tokens() -> None:
    """The cache is float16. Adjustments are few numbers, and those of real models may be large: float32."""
    backbone = jax.tree.map(lambda x: x.astype("float16"), random_backbone())
    bank = random_bank(FAMILY_METHODS, backbone.config)
    prefill = jax.eval_shape(lambda: backbone.prefill(TOKENS, np.ones(TOKENS.shape, bool), bank.rows(TENANTS), 12))
    _, state = prefill
    assert {x.dtype for x in (*state.cache.keys, *state.cache.values)} == {jnp.dtype("float16")}
    assert {x.dtype for x in jax.tree.leaves(state.adjustments)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("backend", "capability", "dtype"),
    [
        ("cpu", None, "float32"),
        ("gpu", "7.5", "float16"),  # a T4
        ("gpu", "8.0", "bfloat16"),
        ("gpu", "12.0", "bfloat16"),
        ("gpu", "gfx90a", "bfloat16"),  # AMD
        ("tpu", None, "bfloat16"),
    ],
)
def test_the_dtype_is_the_devices(
    monkeypatch: pytest.MonkeyPatch, backend: str, capability: str | None, dtype: str
) -> None:
    device = SimpleNamespace(**({} if capability is None else {"compute_capability": capability}))
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert compute_dtype("auto") == jnp.dtype(dtype)
    assert compute_dtype("float16") == jnp.dtype("float16")
    with pytest.raises(ParaJaxError, match="unknown dtype 'float1'; did you mean 'float16'"):
        compute_dtype("float1")  # type: ignore[arg-type]
