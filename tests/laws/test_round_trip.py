"""Law 8 for adapter folders; tests/parity has the one for checkpoints."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import get_args

import jax
import numpy as np
import pytest

from para_jax import AdapterBank, ParaConfig, ParaJaxError, load_adapter, save_adapter
from para_jax.adapters.files import CONFIG
from para_jax.adapters.para import Activation, Pooling
from tests.helpers import SMALL, random_adapter

OPTIONS = [
    {},
    {"pooling": "mean", "activation": "relu", "bias": True},
    {"pooling": "max", "activation": "silu", "normalize": False, "target_modules": ("down_proj", "k_proj")},
    {
        "pooling": "attention",
        "activation": "rational",
        "r": 1,
        "init_std": 0.125,
        "read": "normed",
        "scale": "response",
    },
    {"pooling": "last", "activation": "gelu", "r": 7, "bias": True, "target_modules": tuple(SMALL.sites)},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_adapter_folder(options: dict, tmp_path: Path) -> None:
    config = ParaConfig(**options)
    adapter = random_adapter(config, SMALL, seed=1)
    # Every kind of float32, not only the ordinary ones.
    odd = np.array([np.nan, np.inf, -np.inf, -0.0, 1e-45, np.finfo(np.float32).max], np.float32)
    down = adapter.layers.down
    down[...] = down[...].at[0, : len(odd), 0].set(odd)

    save_adapter(adapter, tmp_path / "a", SMALL)
    with pytest.raises(ParaJaxError, match=r"down has 3 NaN or infinite values"):
        load_adapter(tmp_path / "a", SMALL)
    again = load_adapter(tmp_path / "a", SMALL, check_finite=False)
    assert again.config == config
    assert jax.tree.structure(again) == jax.tree.structure(adapter)
    for x, y in zip(jax.tree.leaves(again), jax.tree.leaves(adapter), strict=True):
        assert x.dtype == y.dtype == np.float32
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()

    # A second generation has the same files, byte for byte.
    save_adapter(again, tmp_path / "b", SMALL)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_every_option_is_covered() -> None:
    assert {name for options in OPTIONS for name in options} == {f.name for f in dataclasses.fields(ParaConfig)}
    assert {options.get("pooling") for options in OPTIONS[1:]} == set(get_args(Pooling))
    assert {options.get("activation") for options in OPTIONS[1:]} == set(get_args(Activation))


def test_folder_says_what_it_is(tmp_path: Path) -> None:
    from para_jax import __version__

    shape = dataclasses.replace(SMALL, name="some/backbone")
    save_adapter(random_adapter(ParaConfig(r=3), shape, 0), tmp_path / "a", shape)
    assert json.loads((tmp_path / "a" / CONFIG).read_text()) == {
        "peft_type": "PARA",
        "r": 3,
        "target_modules": ["q_proj", "v_proj", "up_proj"],
        "pooling": "last",
        "activation": "gelu",
        "normalize": True,
        "bias": False,
        "read": "hidden",
        "scale": "all",
        "init_std": 0.02,
        "base_model_name_or_path": "some/backbone",
        "base_model": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            # Those that it adapts, and no others: a site that gets a name later takes nothing from it.
            "sites": {"q_proj": [32, 32], "v_proj": [32, 16], "up_proj": [32, 48]},
        },
        "para_jax_version": __version__,
    }


def test_through_the_bank(tmp_path: Path) -> None:
    configs = {"a": ParaConfig(r=2), "b": ParaConfig(r=2), "c": ParaConfig(r=3, bias=True)}
    adapters = {name: random_adapter(config, SMALL, i) for i, (name, config) in enumerate(configs.items())}
    bank = AdapterBank.stack(adapters, SMALL, capacity=5)
    for name in bank.names:
        save_adapter(bank[name], tmp_path / name, SMALL)
    loaded = AdapterBank.load({name: tmp_path / name for name in configs}, SMALL)
    assert loaded.names == bank.names
    for name, adapter in adapters.items():
        for x, y in zip(jax.tree.leaves(loaded[name]), jax.tree.leaves(adapter), strict=True):
            assert np.array_equal(x, y)
