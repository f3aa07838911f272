"""Slices by name, and the table of chips against the compiler."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from para_jax import ParaJaxError
from para_jax.planning import topology
from para_jax.planning.chips import CHIPS, GIB, parse_topology
from para_jax.planning.topology import environment

TPUS = {"v4": "v4:2x2x1", "v5e": "v5e:1x1", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}

TOO_LARGE = """
import json, re, sys
import jax, jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from para_jax.planning.chips import parse_topology
from para_jax.planning.topology import devices

found = {}
for name in sys.argv[1:]:
    topology = parse_topology(name)
    there = devices(topology)
    x = jax.ShapeDtypeStruct((2**18, 2**18), jnp.float32, sharding=SingleDeviceSharding(there[0]))
    try:
        jax.jit(jnp.sin).lower(x).compile()
    except jax.errors.JaxRuntimeError as error:
        found[name] = [len(there), float(re.search(r"exceeds available HBM \\(([\\d.]+)G\\)", str(error))[1])]
print(json.dumps(found))
"""


def test_memory_and_devices_are_those_of_the_compiler() -> None:
    """Of every TPU in the table, with one device for each chip."""
    assert set(TPUS) == {name for name, chip in CHIPS.items() if chip.kind == "tpu"}
    done = subprocess.run(
        [sys.executable, "-c", TOO_LARGE, *TPUS.values()], capture_output=True, text=True,
        env={**os.environ, **environment(parse_topology("v5e:1x1"))},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    for chip, name in TPUS.items():
        assert said[name] == [parse_topology(name).size, round(CHIPS[chip].hbm / GIB, 2)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5:4x4", r"unknown chip 'v5'; did you mean 'v5"),
        ("v5e", "'v5e' is not a slice of v5e chips, which have 2 axes; write it as v5e:2x2"),
        ("v5p:4x4", "'v5p:4x4' is not a slice of v5p chips, which have 3 axes; write it as v5p:2x2x2"),
        ("v6e:0x4", "'v6e:0x4' is not a slice"),
        ("gpu:h100x2x2", "'gpu:h100x2x2' is not a slice of h100 chips, which have 1 axes; write it as gpu:h100x8"),
        ("gpu:b300x8", "unknown chip 'b300'"),
    ],
)
def test_names_that_are_none(name: str, message: str) -> None:
    with pytest.raises(ParaJaxError, match=message):
        parse_topology(name)


def test_without_libtpu(monkeypatch) -> None:
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ParaJaxError, match=r'libtpu, which is not installed; .* pip install "para-jax\[tpu\]"'):
        topology.devices(parse_topology("v5e:1x1"))
