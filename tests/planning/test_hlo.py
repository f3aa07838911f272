"""Collectives as read from a program, against programs whose collectives are known."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from para_jax.planning.chips import parse_topology
from para_jax.planning.hlo import Collective, collectives, loop_bytes_written, total
from para_jax.planning.topology import environment

TURNS = 5
# What a device of 4 x 2 sends. It has 1024 x 1024 numbers of 4 bytes; x counts 4 devices, y counts 2.
OWN = 1024 * 1024 * 4
EXPECTED = {
    "all-reduce": {"count": TURNS, "bytes": TURNS * 2 * OWN * 3 // 4},  # over x
    "all-gather": {"count": TURNS, "bytes": TURNS * OWN},  # over y: 2 x OWN are made, half of it comes from elsewhere
    "reduce-scatter": {"count": 1, "bytes": OWN * 3 // 4},  # over x
    "all-to-all": {"count": 1, "bytes": OWN * 3 // 4},  # over x
    "collective-permute": {"count": 1, "bytes": OWN},
}


def known(mesh: Mesh) -> str:
    """The text of a program with one collective of each kind, two of them in a loop."""

    @jax.jit
    @partial(jax.shard_map, mesh=mesh, in_specs=P("x", "y"), out_specs=P("x", "y"), check_vma=False)
    def program(x):
        def turn(x, _):
            x = jax.lax.psum(jnp.sin(x), "x")
            both = jnp.sin(jax.lax.all_gather(x, "y", axis=1, tiled=True))
            return jnp.cos(both[:, :1024] + both[:, 1024:]), None

        x, _ = jax.lax.scan(turn, x, length=TURNS)
        part = jax.lax.psum_scatter(jnp.sin(x), "x", tiled=True)
        x = jnp.sin(x + jnp.tile(part, (4, 1)))
        x = jnp.sin(jax.lax.all_to_all(x, "x", 0, 0, tiled=True))
        return jnp.sin(jax.lax.ppermute(x, "y", [(0, 1), (1, 0)]))

    shape = jax.ShapeDtypeStruct((4 * 1024, 2 * 1024), jnp.float32, sharding=NamedSharding(mesh, P("x", "y")))
    return program.lower(shape).compile().as_text()


def mesh_of(devices) -> Mesh:
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2, devices=devices)


def test_a_known_program_on_cpus() -> None:
    found = collectives(known(mesh_of(jax.devices())), 8)
    assert total(found) == EXPECTED
    sizes = {one.kind: one.devices for one in found}
    assert sizes == {k: {"all-gather": 2, "collective-permute": 8}.get(k, 4) for k in EXPECTED}


@pytest.mark.parametrize("text", sorted((Path(__file__).parent / "hlo").iterdir()), ids=lambda path: path.stem)
def test_a_known_program_of_other_versions(text: Path) -> None:
    """What jax 0.10 and 0.12 compiled `known` to, without metadata: HLO's text changes from version to version."""
    assert total(collectives(text.read_text(), 8)) == EXPECTED
    large = TURNS * 5 * OWN if "cpu" in text.stem else 0  # a TPU keeps them on the chip
    assert loop_bytes_written(text.read_text()) == large


def test_a_known_program_on_tpus() -> None:
    """The same for v5e:2x4, whose compiler writes loops, groups and reduce-scatters in other ways."""
    code = (
        "from tests.planning.test_hlo import *\nfrom para_jax.planning.topology import devices\n"
        "text = known(mesh_of(devices(parse_topology('v5e:2x4'))))\nassert 'known_trip_count' not in text\n"
        "print(total(collectives(text, 8)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True,
        env={**os.environ, **environment(parse_topology("v5e:2x4"))},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert ast.literal_eval(done.stdout.splitlines()[-1]) == EXPECTED


@pytest.mark.parametrize(
    ("groups", "devices"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", 4),
        ("[4,2]<=[2,4]T(1,0)", 2),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_1'}", 2),
        ("mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_0','axis_1'}", 8),
        ("mesh['axis_0'=8] {'axis_0':(2)4}", 4),
        ("{}", 8),
    ],
)
def test_groups(groups: str, devices: int) -> None:
    operation = f"all-reduce(%x), channel_id=1, replica_groups={groups}, to_apply=%add"
    text = f"""
ENTRY %main (x: bf16[16,8]) -> bf16[16,8] {{
  %x = bf16[16,8]{{1,0}} parameter(0)
  ROOT %all-reduce.1 = bf16[16,8]{{1,0:T(8,128)(2,1)S(1)}} {operation}
}}
"""
    sent = 2 * 256 * (devices - 1) // devices
    assert collectives(text, 8) == [Collective("all-reduce", 1, sent, devices, "all-reduce.1")]


def test_a_loop_that_does_two_turns_in_one() -> None:
    """As products that gather their weights piece by piece have it."""
    text = """
%ends (p: (u32[], f32[64])) -> pred[] {
  %most = u32[]{:T(128)} constant(6)
  %p = (u32[]{:T(128)}, f32[64]{0}) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %less = pred[] compare(%i, %most), direction=LT
}

%turn (q: (u32[], f32[64])) -> (u32[], f32[64]) {
  %q = (u32[]{:T(128)}, f32[64]{0}) parameter(0)
  %at = u32[]{:T(128)} get-tuple-element(%q), index=0
  %x = f32[64]{0} get-tuple-element(%q), index=1
  %two = u32[]{:T(128)} constant(2)
  %next = u32[]{:T(128)} add(%at, %two)
  %once = f32[64]{0} collective-permute(%x), channel_id=1, source_target_pairs={{0,1},{1,0}}
  %twice = f32[64]{0} collective-permute(%once), channel_id=2, source_target_pairs={{0,1},{1,0}}
  ROOT %result = (u32[]{:T(128)}, f32[64]{0}) tuple(%next, %twice)
}

ENTRY %main (z: (u32[], f32[64])) -> (u32[], f32[64]) {
  %z = (u32[]{:T(128)}, f32[64]{0}) parameter(0)
  ROOT %loop = (u32[]{:T(128)}, f32[64]{0}) while(%z), condition=%ends, body=%turn
}
"""
    assert total(collectives(text, 2)) == {"collective-permute": {"count": 6, "bytes": 6 * 256}}


def test_pieces_of_one_collective_count_once() -> None:
    """A TPU's program starts, goes on with and ends a collective in fusions of their own, on one channel; and its
    reduce-scatter is a fusion of an all-reduce with a slice."""
    text = """
%start (p: s4[2,512]) -> (s4[2,512], s4[4,512]) {
  %p = s4[2,512]{1,0} parameter(0)
  %all-gather.1 = s4[4,512]{1,0} all-gather(%p), channel_id=7, replica_groups=[4,2]<=[8], dimensions={0}
  ROOT %c = (s4[2,512]{1,0}, s4[4,512]{1,0}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%done (q: s4[2,512]) -> s4[4,512] {
  %q = s4[2,512]{1,0} parameter(0)
  %all-gather.2 = s4[4,512]{1,0} all-gather(%q), channel_id=7, replica_groups=[4,2]<=[8], dimensions={0}
}

%all-reduce-scatter.3 (r: f32[8,128]) -> f32[2,128] {
  %r = f32[8,128]{1,0} parameter(0)
  %all-reduce.3 = f32[8,128]{1,0} all-reduce(%r), channel_id=8, replica_groups=[2,4]<=[8], to_apply=%add
}

ENTRY %main (x: s4[2,512], y: f32[8,128]) -> s4[4,512] {
  %x = s4[2,512]{1,0} parameter(0)
  %y = f32[8,128]{1,0} parameter(1)
  %begun = (s4[2,512]{1,0}, s4[4,512]{1,0}) fusion(%x), kind=kCustom, calls=%start
  %scattered = f32[2,128]{1,0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.3
  ROOT %ended = s4[4,512]{1,0} fusion(%x), kind=kCustom, calls=%done
}
"""
    gather, scatter = (4 * 512 // 2) // 2, 8 * 128 * 4 * 3 // 4
    assert [(c.kind, c.count, c.sent) for c in collectives(text, 8)] == [
        ("all-gather", 1, gather),
        ("reduce-scatter", 1, scatter),
    ]


def test_of_branches_the_dearest_counts() -> None:
    text = """
%small (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %all-reduce.1 = f32[8]{0} all-reduce(%p), channel_id=1, replica_groups={{0,1}}, to_apply=%add
}

%large (q: f32[8]) -> f32[8] {
  %q = f32[8]{0} parameter(0)
  ROOT %cp = (f32[64]{0}, f32[64]{0}, u32[], u32[]) collective-permute-start(%q), source_target_pairs={{0,1}}
}

ENTRY %main (i: s32[], x: f32[8]) -> f32[8] {
  %i = s32[] parameter(0)
  %x = f32[8]{0} parameter(1)
  ROOT %c = f32[8]{0} conditional(%i, %x, %x), branch_computations={%small, %large}
}
"""
    (only,) = collectives(text, 2)
    assert (only.kind, only.sent) == ("collective-permute", 64 * 4)


def test_large_buffers_of_loops() -> None:
    """Not what is on the chip, small, outside of loops, inside a fusion, or updated in place."""
    large, small = "bf16[1024,2048]", "bf16[8,2048]"
    trips = 'backend_config={"known_trip_count":{"n":"3"}}'
    text = f"""
%inside (a: {large}) -> {large} {{
  ROOT %half = {large}{{1,0}} negate(%a)
}}

%updating (a: {large}) -> {large} {{
  ROOT %new = {large}{{1,0}} dynamic-update-slice(%a, %b, %i)
}}

%turn (q: (u32[], {large})) -> (u32[], {large}) {{
  %q = (u32[], {large}{{1,0}}) parameter(0)
  %x = {large}{{1,0}} get-tuple-element(%q), index=1
  %written = {large}{{1,0:T(8,128)(2,1)}} fusion(%x), kind=kLoop, calls=%inside
  %kept = {large}{{1,0:T(8,128)(2,1)S(1)}} fusion(%x), kind=kLoop, calls=%inside
  %updated = {large}{{1,0}} fusion(%x), kind=kLoop, calls=%updating
  %begun = ({large}{{1,0:S(1)}}, {large}{{1,0}}, u32[]) copy-start(%x)
  %ended = {large}{{1,0:S(1)}} copy-done(%begun)
  %both = ({large}{{1,0}}, {small}{{1,0}}) fusion(%x), kind=kLoop, calls=%inside
  ROOT %result = (u32[], {large}{{1,0}}) tuple(%i, %written)
}}

ENTRY %main (z: (u32[], {large})) -> (u32[], {large}) {{
  %before = {large}{{1,0}} fusion(%x), kind=kLoop, calls=%inside
  ROOT %loop = (u32[], {large}{{1,0}}) while(%z), condition=%ends, body=%turn, {trips}
}}
"""
    assert loop_bytes_written(text) == 3 * 2 * 2 * 1024 * 2048
