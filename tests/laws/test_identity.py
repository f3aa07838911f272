"""Law 1: a fresh adapter changes nothing, and neither do the others to a row without one."""

from __future__ import annotations

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from para_jax import AdapterBank, ParaConfig
from para_jax.adapters.para import Activation, Pooling
from tests.helpers import METHODS, random_backbone

# Every pooling and every activation twice, with each pair of bias and normalize.
CONFIGS = {
    f"{pooling}-{i}": ParaConfig(
        r=3, pooling=pooling, activation=get_args(Activation)[(p + i) % 4], bias=p % 2 == i, normalize=p < 2
    )
    for p, pooling in enumerate(get_args(Pooling))
    for i in range(2)
} | METHODS


@pytest.mark.parametrize(("stacked", "dtype"), [(True, "float32"), (False, "bfloat16")])
def test_fresh_adapters_are_the_identity(stacked: bool, dtype: str) -> None:
    backbone = jax.tree.map(lambda x: x.astype(dtype), random_backbone(seed=3, stacked=stacked))
    bank = AdapterBank.create(CONFIGS, backbone.config, seed=5)
    b, t = 2 * len(CONFIGS), 7
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, backbone.config.vocab_size, (b, t), dtype=np.int32))
    column, length = np.arange(t)[None], rng.integers(1, t + 1, (b, 1))
    mask = np.where(np.arange(b)[:, None] % 2 == 0, column < length, column >= t - length)

    # Both are one program, with every adapter once: each row once with its adapter and once without.
    even = [name if i % 2 == 0 else None for i, name in enumerate(CONFIGS)]
    odd = [name if i % 2 == 1 else None for i, name in enumerate(CONFIGS)]
    first, second, bare = (
        np.asarray(backbone(tokens, mask=mask, bank=rows and bank, tenants=rows))
        for rows in (even + odd, odd + even, None)
    )
    assert np.array_equal(first, second)
    assert np.abs(first - bare).max() <= 16 * float(jnp.finfo(dtype).eps) * np.abs(bare).max()
    assert np.std(bare) > 0.5, "logits near zero would prove nothing"
