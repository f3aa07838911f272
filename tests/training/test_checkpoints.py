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
from para_jax.sharding import make_mesh
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
    assert checkpoints.newest() == 7
    loaded = checkpoints.restore(jax.tree.map(jnp.zeros_like, state), 7)
    assert all((a == b).all() for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(state)))
"""


def train_state():
    config = ParaConfig(r=3, pooling="attention", activation="rational")
    bank = AdapterBank.stack({n: random_adapter(config, SMALL, i) for i, n in enumerate("ab")}, SMALL)
    state = TrainState.create(bank)
    return jax.tree.map(lambda x: x + jnp.asarray(0.1).astype(x.dtype), state)


def same(loaded, state):
    assert jax.tree.structure(loaded) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(state), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_exact_and_the_two_newest_are_kept(tmp_path):
    state = train_state()
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.newest() is None and not (tmp_path / "c").exists()
        for step in (2, 4, 6):
            checkpoints.save(step, state, {"loss": repr(step / 3)}, {"metrics.jsonl": b"%d" % step, "best/a/x": b"y"})
        checkpoints.save(6, state)
        checkpoints.wait()
        assert checkpoints.newest_complete == 6
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["4", "6"]
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.newest() == 6
        same(checkpoints.restore(jax.tree.map(jnp.zeros_like, state), 6), state)
        assert float(checkpoints.metadata(6)["loss"]) == 2.0
        assert checkpoints.files(4, "metrics.jsonl")["metrics.jsonl"].read_bytes() == b"4"
        assert list(checkpoints.files(6, "best")) == ["best/a/x"]


@pytest.mark.parametrize("name", ["process-0.json", "process-0.safetensors", "best/a/x"])
@pytest.mark.parametrize("how", ["gone", "cut off", "older"])
def test_one_that_is_not_whole_does_not_count(tmp_path, name, how):
    """As a machine that is lost leaves it on Google Drive: each file there or not, by itself."""
    said = []
    with Checkpoints(tmp_path) as checkpoints:
        for step in (2, 4):
            checkpoints.save(step, train_state(), None, {"best/a/x": b"of step %d" % step})
    file = tmp_path / "4" / name
    if how == "gone":
        file.unlink()
    elif how == "cut off":
        file.write_bytes(file.read_bytes()[:-3])
    elif name == "process-0.safetensors":  # both states are the same
        file.write_bytes(file.read_bytes()[:-1] + b"x")
    else:
        file.write_bytes((tmp_path / "2" / name).read_bytes())
    with Checkpoints(tmp_path, show=said.append) as checkpoints:
        assert checkpoints.newest() == 2 and len(said) == 1
        assert said[0].startswith("the checkpoint of step 4 is incomplete (") and "best/a/x" in checkpoints.files(
            2, "best"
        )
        # It is no reason to remove the one that is.
        checkpoints.save(6, train_state())
        checkpoints.wait()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "4", "6"]
        checkpoints.save(8, train_state())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["6", "8"]


@pytest.mark.parametrize("meshes", [("fsdp=8", "fsdp=4,tensor=2"), ("data=2,fsdp=2,tensor=2", None), (None, "fsdp=8")])
def test_on_other_devices(tmp_path, meshes):
    """Each device's part is written once, and read by whoever needs some of it."""
    configs = {name: ParaConfig(r=4) for name in "abcdefgh"}
    bank = AdapterBank.stack({n: random_adapter(c, SMALL, i) for i, (n, c) in enumerate(configs.items())}, SMALL)
    there, here = (
        TrainState.create(bank, None if text is None else make_mesh(text), shards)
        for text, shards in zip(meshes, (8, 1), strict=True)
    )
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, there)
        checkpoints.wait()
        size = (tmp_path / "2" / "process-0.safetensors").stat().st_size
        assert size < 1.2 * sum(x.nbytes for x in jax.tree.leaves(there)), "nothing twice"
        loaded = checkpoints.restore(jax.tree.map(jnp.zeros_like, here), 2)
        same(loaded, there)
        assert [x.sharding for x in jax.tree.leaves(loaded)] == [x.sharding for x in jax.tree.leaves(here)]


def test_a_full_disk(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / "c")], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "step 8 could not be written" in done.stdout and "the checkpoint of step 7 is complete" in done.stdout


def test_a_disk_without_room(tmp_path, monkeypatch):
    state = train_state()
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(2, state)
        checkpoints.wait()
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(
            ParaJaxError, match=r"step 3 .*0\.0 MB are free\); it takes .* make room.*; the checkpoint of step 2 is"
        ):
            checkpoints.save(3, state)
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["2"]
