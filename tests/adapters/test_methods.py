"""What a method says of itself."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from para_jax import FanLoraConfig
from para_jax.adapters import registry
from para_jax.adapters.method import MethodConfig, Prompt
from tests.helpers import METHODS, SMALL, random_adapter

CONFIGS = {**METHODS, "fanlora": FanLoraConfig.of([["q_proj"], ["up_proj"]], SMALL)}


def test_every_method_is_here() -> None:
    assert {config.method for config in CONFIGS.values()} == set(registry.METHODS)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_whether_it_reads_the_prompt(config: MethodConfig) -> None:
    layers = jax.tree.map(lambda x: x[0], random_adapter(config, SMALL, seed=1).layers)
    mask = jnp.ones(5, bool)
    one, other = (
        layers.prepare(Prompt(x, x, mask), 0) for x in jax.random.normal(jax.random.key(0), (2, 5, SMALL.hidden_size))
    )
    same = [np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)]
    assert same and all(same) != config.reads_prompt
