"""Law 6 for training: on a mesh a step changes what it changes on one device, and moves no more than it has to."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from para_jax import AdapterBank, Backbone, LoraConfig
from para_jax.adapters.method import MethodConfig
from para_jax.convert.checkpoint import save_backbone
from para_jax.data.examples import Example
from para_jax.data.packing import Shape
from para_jax.errors import ParaJaxError
from para_jax.sharding import auto_mesh, make_mesh
from para_jax.training.places import Schedule, TenantLayout
from para_jax.training.programs import Parts
from para_jax.training.settings import Settings
from para_jax.training.state import Sums, TrainState, stack_settings
from para_jax.training.step import update
from tests.compilations import compilations
from tests.helpers import FAMILY_METHODS, METHODS, SMALL, family_backbone, random_adapter, random_backbone, take_step

pytestmark = pytest.mark.usefixtures("few_programs")

ROWS, STEPS = 8, 2
MESHES = ["data=8", "fsdp=8", "fsdp=4,tensor=2", "data=2,fsdp=2,tensor=2"]
DROPPED = LoraConfig(r=2, target_modules=("q_proj", "down_proj"), lora_dropout=0.5)


SHAPES = (Shape(rows=2, length=24, segments=4, targets=48),)


def rows_of(tenant: int, step: int, count: int, vocabulary: int) -> list[Example]:
    rng = np.random.default_rng((tenant, step))

    def ids(low: int, high: int) -> tuple[int, ...]:
        return tuple(int(i) for i in rng.integers(1, vocabulary, rng.integers(low, high)))

    return [Example.of(ids(2, 12), (*ids(1, 6), 0)) for _ in range(count)]


def bank_of(configs: dict, shape) -> AdapterBank:
    return AdapterBank.stack({n: random_adapter(c, shape, i, 0.1) for i, (n, c) in enumerate(configs.items())}, shape)


def tune(backbone: Backbone, configs: dict, shapes=SHAPES, spread: bool | None = None):
    """Two steps; the losses and gradient norms, the adapters afterwards, and what the programs were given."""
    bank = bank_of(configs, backbone.config)
    layout = TenantLayout.of(backbone.mesh, len(configs), ROWS, spread)
    bank = layout.shard_bank(bank)
    settings = dict.fromkeys(configs, Settings(steps=9, lr=1e-2))
    schedule, rules = Schedule(bank, settings, layout), stack_settings(bank, settings)
    state = TrainState.create(bank, layout.mesh, layout.shards)
    sums = Sums.create(bank, layout.groups, schedule.places, layout.mesh)
    said = []
    for step in range(STEPS):
        step_tenants = schedule.step_tenants(dict.fromkeys(configs, step), ())
        assert step_tenants is not None
        of = {n: rows_of(i, step, ROWS, backbone.config.vocab_size) for i, n in enumerate(configs)}
        state, sums, values = take_step(backbone, state, sums, rules, layout, shapes, step_tenants, of, seed=5)
        said.append(values)
    slots = layout.slots(bank, step_tenants)
    parts = Parts(backbone, layout, state, rules, sums, slots, schedule.places, shapes, False, "none", 5)
    return said, state.bank, parts


def on_mesh(backbone: Backbone, mesh: Mesh, folder) -> Backbone:
    save_backbone(backbone, folder)
    return Backbone.from_pretrained(folder, dtype="float32", stacked=backbone.stacked, mesh=mesh)


def same(ours, theirs, configs) -> None:
    for a, b in zip(ours[0], theirs[0], strict=True):
        for key in ("loss", "grad_norm", "lr"):
            for name in configs:
                np.testing.assert_allclose(a[key][name], b[key][name], rtol=1e-4, err_msg=f"{key} {name}")
    for name in configs:
        for key, x in theirs[1][name].tensors().items():
            # Adam divides by gradients that may be near zero, which widens what rounding leaves.
            np.testing.assert_allclose(ours[1][name].tensors()[key], x, rtol=1e-2, atol=2e-4, err_msg=f"{name} {key}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """With --every-mesh every method, on every mesh, of three families, which takes ten minutes to compile; without it
    each family, mesh and method once or twice, two methods at a time."""
    if {"mesh", "methods"} <= set(metafunc.fixturenames):
        cases = [
            ("llama", "data=8", ("patterned", "para")),
            ("qwen3", "fsdp=8", ("lora", "ia3")),
            ("mixtral", "fsdp=4,tensor=2", ("group", "response")),
            ("llama", "data=2,fsdp=2,tensor=2", ("bias", "lora")),
        ]
        if metafunc.config.getoption("every_mesh"):
            whole = [*itertools.product(["llama", "qwen3"], MESHES, METHODS)]
            whole += itertools.product(["mixtral"], MESHES, FAMILY_METHODS)
            cases = [(family, mesh, (method, method)) for family, mesh, method in whole]
        metafunc.parametrize(("family", "mesh", "methods"), cases)


@pytest.mark.slow
def test_every_method_on_every_mesh(mesh: str, family: str, methods: tuple[str, str], tmp_path) -> None:
    backbone = family_backbone(family, seed=1, stacked=family == "llama")
    configs = {"acme": METHODS[methods[0]], "globex": METHODS[methods[1]]}
    theirs = tune(backbone, configs)
    there = on_mesh(backbone, make_mesh(mesh), tmp_path / "a")
    ours = tune(there, configs, spread=False)
    assert ours[2].layout.shards == 1
    same(ours, theirs, configs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "count"), [("fsdp=4,tensor=2", 5), pytest.param("data=8", 8, marks=pytest.mark.whole)]
)
def test_tenants_that_are_spread(mesh: str, count: int, tmp_path) -> None:
    """Each device has tenants of its own and no others, also where their number does not divide."""
    backbone = random_backbone(stacked=True, vocab_size=64)
    # One of them drops some of its inputs, which depends on its name, step and row, and not on where it is.
    configs = {f"t{i}": DROPPED if i == 4 and count == 5 else METHODS["para"] for i in range(count)}
    theirs = tune(backbone, configs)
    there = on_mesh(backbone, make_mesh(mesh), tmp_path / "a")
    ours = tune(there, configs, spread=True)
    same(ours, theirs, configs)
    layout, state = ours[2].layout, ours[2].state
    assert layout.shards == layout.groups > 1
    for x in jax.tree.leaves((state.bank, state.moments)):
        assert x.addressable_shards[0].data.shape[0] == x.shape[0] // layout.shards
    names = [name for group in state.bank.groups for name in group.names]
    assert len(names) % layout.shards == 0 and names.count(None) == len(names) - count


def test_tenants_are_dealt_out_evenly() -> None:
    """Also where every one has a method of its own, and so a group of one."""
    configs = {f"t{i}": c for i, c in enumerate([*METHODS.values(), DROPPED, METHODS["para"], METHODS["para"]])}
    mesh = make_mesh("fsdp=4,tensor=2")
    layout = TenantLayout.of(mesh, len(configs), rows=3, spread=True)
    bank = layout.shard_bank(bank_of(configs, SMALL))
    schedule = Schedule(bank, dict.fromkeys(configs, Settings()), layout)
    assert sorted(map(len, schedule.shards)) == [2, 2, 3, 3] and schedule.places == 3
    assert sorted(name for shard in schedule.shards for name in shard) == sorted(configs)
    whole = bank_of(configs, SMALL)
    for name in configs:
        for key, x in whole[name].tensors().items():
            np.testing.assert_array_equal(bank[name].tensors()[key], x)


def test_a_state_goes_to_another_mesh() -> None:
    """Three tenants and two groups from four shards to two and to one device: each keeps what it has."""
    configs = {"a": METHODS["para"], "b": METHODS["lora"], "c": METHODS["para"]}
    states = []
    for text, shards in (("fsdp=4,tensor=2", 4), ("data=2,tensor=4", 2), (None, 1)):
        mesh = None if text is None else make_mesh(text)
        layout = TenantLayout(mesh, 4, shards, shards)
        states.append((layout, TrainState.create(layout.shard_bank(bank_of(configs, SMALL)), mesh, shards)))
    (_, first), *others = states
    taken = tuple(
        np.array([0 if n is None else 1 + ord(n) for n in group.names], np.int32) for group in first.bank.groups
    )
    first = dataclasses.replace(first, taken=jax.tree.map(jnp.asarray, taken), step=jnp.int32(7))
    slots = [list(group.names) for group in first.bank.groups]
    for layout, state in others:
        there = state.rearrange(first, slots, layout.mesh, layout.shards)
        assert jax.tree.structure(there) == jax.tree.structure(state) and int(there.step) == 7
        for group, has in zip(there.bank.groups, there.taken, strict=True):
            assert [int(x) for x in has] == [0 if n is None else 1 + ord(n) for n in group.names]
        for name in configs:
            for key, x in state.bank[name].tensors().items():
                np.testing.assert_array_equal(there.bank[name].tensors()[key], x)
        if layout.mesh is not None:
            assert [x.sharding for x in jax.tree.leaves(there)] == [x.sharding for x in jax.tree.leaves(state)]


@pytest.mark.slow
def test_micro_batches_on_a_mesh(tmp_path) -> None:
    backbone = random_backbone(stacked=True, vocab_size=64)
    configs = {"acme": DROPPED, "globex": DROPPED}
    theirs = tune(backbone, configs)
    there = on_mesh(backbone, make_mesh("fsdp=2,data=2,tensor=2"), tmp_path / "a")
    two = (Shape(1, 18, 2, 24), Shape(1, 32, 3, 32))
    same(tune(there, configs, shapes=two), theirs, configs)
    same(tune(backbone, configs, shapes=two), theirs, configs)


COLLECTIVE = re.compile(r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)\(")


def collectives(text: str, inside: str) -> Counter:
    """The kind of each collective whose op_name has `inside`, and how many floats it makes."""
    found = [m for line in text.splitlines() if inside in line and (m := COLLECTIVE.search(line))]
    return Counter(
        (kind, sum(math.prod(int(n) for n in shape.split(",")) for shape in re.findall(r"f32\[([\d,]+)\]", made)))
        for made, kind in (m.groups() for m in found)
    )


@pytest.mark.parametrize(
    ("family", "method"),
    [
        pytest.param("llama", METHODS["ia3"], marks=pytest.mark.whole),
        ("llama", METHODS["bias"]),
        ("mixtral", METHODS["group"]),
    ],
)
def test_what_a_layer_moves(family: str, method: MethodConfig, tmp_path) -> None:
    """Per layer and pass: its four weights are gathered over fsdp, and two sums go over tensor. Nothing else."""
    there = on_mesh(family_backbone(family, stacked=True), make_mesh("fsdp=4,tensor=2"), tmp_path / "a")
    parts = tune(there, {f"t{i}": method for i in range(8)}, spread=True)[2]
    text = parts.calls()["micro-batch 0"]().lower().compile().as_text()
    blocks, layers = there.blocks, there.config.num_hidden_layers
    # Each weight of one layer, and of it what a device has over tensor.
    weights = [
        ("all-gather", w.size // layers // 2) for w in (blocks[name] for name in ("qkv", "out", "gate_up", "down"))
    ]
    # A device's hidden states, and the gradients of its tokens' router probabilities.
    tokens = SHAPES[0].tokens
    hidden, chances = tokens * 32, tokens * 4 * (family == "mixtral")
    forward, backward = collectives(text, "/jvp()/while/body/"), collectives(text, "/transpose(jvp())/while/body/")
    assert forward == Counter([*weights, ("all-reduce", hidden), ("all-reduce", hidden)])
    assert backward == Counter([*weights, ("all-reduce", hidden), ("all-reduce", hidden + chances)])
    # Of what is gathered elsewhere, a device's part of the head is as large as a weight. A token's embedding comes in
    # parts, one from each device that has some of its features.
    rest, least = collectives(text, "") - forward - backward, min(size for _, size in weights)
    assert {
        of: n for of, n in rest.items() if of[0].startswith("all-") and of[0] != "all-reduce" and of[1] >= least
    } == {
        ("all-to-all", hidden): 1,
        ("all-gather", there.gathered_head().size // 2): 1,
    }


def test_the_programs_of_a_mesh_stay(tmp_path) -> None:
    """Law 4, and donation: the state comes back where it was, so that the next step is the same program."""
    there = on_mesh(random_backbone(stacked=True), make_mesh("fsdp=4,tensor=2"), tmp_path / "a")
    parts = tune(there, {"a": METHODS["para"], "b": METHODS["lora"]})[2]
    old = jax.tree.leaves((parts.state, parts.sums))
    with compilations() as compiled:
        step_tenants, shards, mesh = [["a", "b"]], parts.layout.shards, parts.layout.mesh
        of = {n: rows_of(i, 7, ROWS, there.config.vocab_size) for i, n in enumerate("ab")}
        given = parts.state, parts.sums, parts.rules, parts.layout, SHAPES
        state, sums, _ = take_step(there, *given, step_tenants, of, seed=5)
    assert not compiled and update._cache_size() and shards == 1 and mesh is not None
    assert all(x.is_deleted() for x in old)
    assert [x.sharding for x in old] == [x.sharding for x in jax.tree.leaves((state, sums))]
    assert not any(x.is_deleted() for x in jax.tree.leaves(there))


def test_the_bytes_of_a_device(tmp_path) -> None:
    """The backbone's part, which has no gradient and no moments, and 16 bytes for each of the tenants' parameters."""
    backbone = random_backbone(stacked=True, vocab_size=64, hidden_size=128, intermediate_size=256)
    there = on_mesh(backbone, make_mesh("fsdp=4,tensor=2"), tmp_path / "a")
    configs = {f"t{i}": METHODS["para"] for i in range(8)}
    parts = tune(there, configs, spread=True)[2]
    calls = parts.calls()
    pass_, end = (calls[name]().lower().compile().memory_analysis() for name in ("micro-batch 0", "update"))

    def on_first(tree) -> int:
        return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))

    frozen, trained, summed = on_first(there), on_first((parts.state.bank, parts.state.moments)), on_first(parts.sums)
    whole = sum(x.nbytes for x in jax.tree.leaves(backbone))
    assert frozen < whole / 8 * 1.05, "but for its norms, split over all eight devices"
    parameters = METHODS["para"].size(backbone.config)
    per_device = 8 // parts.layout.shards
    assert trained == per_device * (12 * parameters + 4), "weights and two moments, and a count"
    assert summed == per_device * (4 * parameters + 4), "gradients and losses"
    small = on_first((parts.state.step, parts.state.taken, parts.state.failed_at, parts.empty(SHAPES[0])))
    given = frozen + on_first(parts.state.bank) + summed + small
    assert pass_.argument_size_in_bytes <= given + 4000, "and the settings and slots"
    assert end.argument_size_in_bytes <= trained + summed + small + 4000
    assert pass_.alias_size_in_bytes >= summed and end.alias_size_in_bytes >= trained + summed, "they are donated"
    assert end.output_size_in_bytes < trained + summed + small + 4000, "nothing of the backbone comes out"


def test_rows_need_not_divide() -> None:
    """Packed rows are dealt over the devices, whatever their number."""
    assert TenantLayout.of(make_mesh("fsdp=8"), tenants=3, rows=6).shards == 1
    assert TenantLayout.of(make_mesh("fsdp=8"), tenants=16, rows=6).shards == 8
    with pytest.raises(ParaJaxError, match="rows must be a whole number from 1 to 2147483647, not 0"):
        TenantLayout.of(None, tenants=3, rows=0)


def test_the_mesh_that_is_chosen() -> None:
    assert auto_mesh(SMALL, 8) == {"data": 1, "fsdp": 8}
    assert auto_mesh(SMALL, 6) == {"data": 3, "fsdp": 2}
    assert auto_mesh(SMALL, 8, tuning=False) == {"data": 4, "tensor": 2}, "two key/value heads"
