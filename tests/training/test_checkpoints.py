"""Checkpoints are exact, and a save that fails leaves the one before it whole."""

import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from para_jax import ParaJaxError
from para_jax.adapters.bank import AdapterBank
from para_jax.adapters.para import ParaConfig
from para_jax.training.checkpoints import Checkpoints
from para_jax.training.state import TrainState
from tests.helpers import SMALL, random_adapter

FULL_DISK = """
import resource, sys
import jax, jax.numpy as jnp
from para_jax import ParaJaxError
from para_jax.training.checkpoints import Checkpoints

state = {"weights": jax.random.normal(jax.random.key(0), (1000, 1000)), "step": jnp.int32(7)}
with Checkpoints(sys.argv[1]) as checkpoints:
    checkpoints.save(7, state)
    checkpoints.wait()
    # From here on no file may grow past 100 kB: what a full disk does, on any disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        checkpoints.save(8, jax.tree.map(lambda x: x + 1, state))
        checkpoints.wait()
    except ParaJaxError as error:
        print(error)
    else:
        sys.exit("the save did not fail")
with Checkpoints(sys.argv[1]) as checkpoints:
    assert checkpoints.latest() == 7
    loaded, _ = checkpoints.restore(jax.tree.map(jnp.zeros_like, state))
    assert all((a == b).all() for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(state)))
"""


def train_state():
    config = ParaConfig(r=3, pooling="attention", activation="rational")
    bank = AdapterBank.stack({n: random_adapter(config, SMALL, i) for i, n in enumerate("ab")}, SMALL)
    state = TrainState.create(bank)
    return jax.tree.map(lambda x: x + jnp.asarray(0.1).astype(x.dtype), state)


def test_exact_and_the_two_newest_are_kept(tmp_path):
    state = train_state()
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.latest() is None
        for step in (2, 4, 6):
            checkpoints.save(step, state, {"loss": repr(step / 3)})
        checkpoints.save(6, state)
        checkpoints.wait()
        assert checkpoints.latest() == 6
    assert sorted(p.name for p in (tmp_path / "c").iterdir() if p.name.isdigit()) == ["4", "6"]
    with Checkpoints(tmp_path / "c") as checkpoints:
        loaded, beside = checkpoints.restore(jax.tree.map(jnp.zeros_like, state))
    assert float(beside["loss"]) == 2.0
    assert jax.tree.structure(loaded) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(state), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_a_full_disk(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / "c")], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "step 8 could not be written" in done.stdout and "the checkpoint of step 7 is whole" in done.stdout


def test_a_disk_without_room(tmp_path, monkeypatch):
    state = train_state()
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(2, state)
        checkpoints.wait()
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(ParaJaxError, match=r"step 3 .*0\.0 MB are free\); the checkpoint of step 2 is whole"):
            checkpoints.save(3, state)
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["2"]
