"""The bank: who is in it, where, and what a batch gets of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from para_jax import AdapterBank, Backbone, ParaConfig, ParaJaxError, save_adapter
from para_jax.adapters.adapter import Adapter
from para_jax.adapters.method import BackboneShape, Prompt
from para_jax.adapters.rows import Rows
from para_jax.adjustment import Adjustment
from tests.compilations import compilations
from tests.helpers import SMALL, random_adapter, random_backbone, random_bank

ONE, TWO = ParaConfig(r=2), ParaConfig(r=3, pooling="mean", activation="silu")


def equal(a: Adapter, b: Adapter) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return a.config == b.config and all(np.array_equal(x, y) for x, y in pairs)


@pytest.fixture(scope="module")
def adapters() -> dict[str, Adapter]:
    configs = {"a": ONE, "b": TWO, "c": ONE, "d": TWO, "e": ONE}
    return {name: random_adapter(config, SMALL, i) for i, (name, config) in enumerate(configs.items())}


def holds(bank: AdapterBank, adapters: dict[str, Adapter]) -> bool:
    return set(bank.names) == set(adapters) and all(equal(bank[name], x) for name, x in adapters.items())


# Creating


def test_a_fresh_adapter_depends_on_its_name_and_the_seed_only() -> None:
    alone = AdapterBank.create({"acme": ONE}, SMALL, seed=7)
    among = AdapterBank.create({"z": ONE, "acme": ONE, "b": TWO}, SMALL, seed=7, capacity=5)
    other_order = AdapterBank.create({"b": TWO, "acme": ONE, "z": ONE}, SMALL, seed=7)
    assert equal(alone["acme"], among["acme"]) and equal(alone["acme"], other_order["acme"])
    assert equal(among["b"], other_order["b"])
    assert not equal(among["acme"], among["z"])
    assert not equal(alone["acme"], AdapterBank.create({"acme": ONE}, SMALL, seed=8)["acme"])


def test_a_fresh_adapter_has_a_down_projection_and_no_up_projection() -> None:
    fresh = AdapterBank.create({"a": ParaConfig(r=12, init_std=0.3)}, SMALL)["a"].tensors()
    assert np.std(fresh["down"]) == pytest.approx(0.3, rel=0.1)
    assert not np.any(fresh["up"])
    assert not np.array_equal(fresh["down"][0], fresh["down"][1]), "each layer has its own"


def test_stack_and_size(adapters: dict[str, Adapter]) -> None:
    bank = AdapterBank.stack(adapters, SMALL)
    assert holds(bank, adapters)
    assert [group.config for group in bank.groups] == [ONE, TWO]
    sites = sum(SMALL.sites[site].outputs for site in ONE.target_modules)
    assert (
        ONE.size(SMALL)
        == sum(x.size for x in jax.tree.leaves(adapters["a"]))
        == SMALL.num_hidden_layers * ONE.r * (SMALL.hidden_size + sites)
    )
    assert AdapterBank.stack({}, SMALL).names == ()


# Adding, replacing, removing


def test_add_grows_and_keeps_the_others(adapters: dict[str, Adapter]) -> None:
    bank = AdapterBank(SMALL)
    for i, (name, adapter) in enumerate(adapters.items()):
        before = bank
        bank = bank.add(name, adapter)
        assert holds(bank, dict(list(adapters.items())[: i + 1]))
        assert name not in before and name in bank, "a bank is immutable"
    # Slots double: three tenants of ONE take four.
    assert [len(group.names) for group in bank.groups] == [4, 2]


def test_capacity_is_there_from_the_start(adapters: dict[str, Adapter]) -> None:
    bank = AdapterBank.stack({"a": adapters["a"]}, SMALL, capacity=3)
    shapes = [x.shape for x in jax.tree.leaves(bank)]
    bank = bank.add("c", adapters["c"]).add("e", adapters["e"])
    assert [x.shape for x in jax.tree.leaves(bank)] == shapes
    assert bank.groups[0].names == ("a", "c", "e")


def test_remove_clears_the_slot_and_the_next_tenant_takes_it(adapters: dict[str, Adapter]) -> None:
    bank = AdapterBank.stack(adapters, SMALL).remove("c")
    assert holds(bank, {name: x for name, x in adapters.items() if name != "c"})
    assert bank.groups[0].names == ("a", None, "e")
    assert not any(np.any(x[1]) for x in jax.tree.leaves(bank.groups[0].stack))
    bank = bank.add("next", adapters["c"])
    assert bank.groups[0].names == ("a", "next", "e")
    assert equal(bank["next"], adapters["c"])


def test_a_configuration_goes_with_its_last_tenant(adapters: dict[str, Adapter]) -> None:
    bank = AdapterBank.stack(adapters, SMALL).remove("b").remove("d")
    assert [group.config for group in bank.groups] == [ONE]
    assert holds(bank, {name: x for name, x in adapters.items() if x.config == ONE})
    assert jax.tree.leaves(bank.remove("a").remove("c").remove("e")) == []


def test_replace(adapters: dict[str, Adapter]) -> None:
    bank = AdapterBank.stack(adapters, SMALL)
    new = random_adapter(ONE, SMALL, 99)
    assert holds(bank.replace("c", new), {**adapters, "c": new})
    assert holds(bank, adapters), "the bank before is what it was"
    # A new version may have other hyper-parameters.
    other = random_adapter(TWO, SMALL, 98)
    assert holds(bank.replace("c", other), {**adapters, "c": other})
    only = AdapterBank.stack({"a": adapters["a"]}, SMALL)
    assert holds(only.replace("a", other), {"a": other})


def test_a_name_twice(adapters: dict[str, Adapter]) -> None:
    bank = AdapterBank.stack(adapters, SMALL)
    for again in (adapters["a"], adapters["b"]):
        with pytest.raises(ParaJaxError, match=r"'a' is in the bank already; use replace\(\)"):
            bank.add("a", again)


def test_adapters_that_do_not_fit(adapters: dict[str, Adapter]) -> None:
    """Not even where NumPy would broadcast one, or cast it."""
    bank = AdapterBank.stack(adapters, SMALL)
    shallow = random_adapter(ONE, dataclasses.replace(SMALL, num_hidden_layers=1), 0)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), adapters["a"])
    for bad, message in (
        (shallow, r"down is float32\[1, 32, 2\], not float32\[2, 32, 2\]; up is float32\[1, 2, 96\]"),
        (half, r"down is bfloat16\[2, 32, 2\], not float32\[2, 32, 2\]"),
    ):
        with pytest.raises(ParaJaxError, match=message):
            bank.add("new", bad)
        with pytest.raises(ParaJaxError, match=message):
            bank.replace("a", bad)
        with pytest.raises(ParaJaxError, match=message):
            AdapterBank.stack({"new": bad}, SMALL)


# Rows


def test_rows_hold_each_rows_own_adapter_and_nothing_else(adapters: dict[str, Adapter]) -> None:
    bank = AdapterBank.stack(adapters, SMALL, capacity=6)
    tenants = ["d", None, "a", "e", "a"]
    rows = bank.rows(tenants)
    assert [s.tolist() for s in rows.weights] == [[0, 0, 1, 1, 1], [1, 0, 0, 0, 0]]
    for group, layers in zip(bank.groups, rows.layers, strict=True):
        for row, name in enumerate(tenants):
            own = name is not None and adapters[name].config == group.config
            for gathered, x in zip(jax.tree.leaves(layers), jax.tree.leaves(group.stack), strict=True):
                expected = x[group.names.index(name)] if own else jnp.zeros_like(x[0])
                assert np.array_equal(gathered[row], expected)
    assert bank.rows([None, None]) == Rows() == AdapterBank(SMALL).rows([None])


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return random_backbone(stacked=True)


def test_several_configurations_in_one_batch(backbone: Backbone) -> None:
    """Each row is what it is in a batch of its own."""
    configs = {
        "last": ParaConfig(r=2),
        "mean": ParaConfig(r=3, pooling="mean", activation="silu", target_modules=("k_proj", "down_proj")),
        "attention": ParaConfig(r=1, pooling="attention", bias=True, target_modules=("o_proj", "gate_proj", "q_proj")),
    }
    bank = random_bank(configs, backbone.config, scale=0.3)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 61, (4, 5)), jnp.int32)
    together = backbone(tokens, bank=bank, tenants=["last", "mean", None, "attention"])
    bare = backbone(tokens)
    for row, name in enumerate(("last", "mean", None, "attention")):
        own = {} if name is None else {name: bank[name]}
        alone = backbone(tokens, bank=AdapterBank.stack(own, backbone.config), tenants=[name] * 4)
        np.testing.assert_allclose(together[row], alone[row], atol=1e-5 * np.abs(alone).max(), rtol=0)
        if name is not None:
            assert np.abs(alone[row] - bare[row]).max() > 0.1


@dataclasses.dataclass(frozen=True)
class Doubling:
    """A method of another kind: no matter the prompt, and even with weights of zero, q_proj is at least doubled."""

    method: ClassVar[str] = "doubling"
    dropout: ClassVar[float] = 0.0
    target_modules: tuple[str, ...] = ("q_proj",)

    class Layer(nnx.Module):
        def __init__(self, width: int):
            self.more = nnx.Param(jnp.zeros((width,), jnp.float32))

        def prepare(self, prompt: Prompt, layer: jax.Array | int) -> Adjustment:
            return Adjustment({"q_proj": 1 + self.more[...]})

    def layer(self, shape: BackboneShape, rngs: nnx.Rngs, layer: jax.Array) -> Layer:
        return self.Layer(shape.sites["q_proj"].outputs)

    def size(self, shape: BackboneShape) -> int:
        return shape.num_hidden_layers * shape.sites["q_proj"].outputs


def test_any_method_fits_in(backbone: Backbone) -> None:
    """Rows that are not its own stay as they are, whatever a method makes of weights that are all zero."""
    bank = random_bank({"para": ParaConfig(r=2), "double": Doubling()}, backbone.config, scale=0.3)
    rows = bank.rows(["double", None, "para"])
    hidden = jnp.ones((3, 4, SMALL.hidden_size))
    prompt = Prompt(hidden, hidden, jnp.ones((3, 4), bool))
    first_layer = jax.tree.map(lambda x: x[0], rows.of_stack(""))
    offsets = rows.prepare(first_layer, 0, prompt).offsets
    assert np.array_equal(offsets["q_proj"][0], 1 + bank["double"].tensors()["more"][0])
    assert not np.any(offsets["up_proj"][0])
    assert not any(np.any(x[1]) for x in offsets.values())
    alone = bank.remove("double").rows([None, None, "para"]).prepare(first_layer[:1], 0, prompt).offsets
    assert all(np.array_equal(alone[site][2], x[2]) for site, x in offsets.items())


def test_repeats_are_consecutive_rows_of_one_tenant(backbone: Backbone) -> None:
    bank = random_bank({"a": ONE, "b": TWO}, backbone.config, scale=0.3)
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 61, (6, 5)), jnp.int32)
    mask = jnp.ones(tokens.shape, bool)
    one_by_one = bank.rows(["b", "b", None, None, "a", "a"])
    repeated = bank.rows(["b", None, "a"], repeats=2)
    assert {x.shape[0] for x in jax.tree.leaves(repeated)} == {3}
    forward = jax.jit(Backbone.forward)
    expected, ours = (np.asarray(forward(backbone, tokens, mask, mask, rows)[0]) for rows in (one_by_one, repeated))
    np.testing.assert_allclose(ours, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)
    bare = forward(backbone, tokens, mask, mask, Rows())[0]
    changed = np.abs(ours - bare).max(axis=(1, 2)) > 0.01
    assert changed.tolist() == [True, True, False, False, True, True]


# Folders, and what is compiled


def test_load(adapters: dict[str, Adapter], tmp_path: Path) -> None:
    for name, adapter in adapters.items():
        save_adapter(adapter, tmp_path / name, SMALL)
    folders = {name: tmp_path / name for name in adapters}
    assert holds(AdapterBank.load(folders, SMALL, capacity=4), adapters)
    with pytest.raises(
        ParaJaxError, match=r"there is no folder .*nobody; give an adapter's folder, which has adapter_config.json"
    ):
        AdapterBank.load({**folders, "nobody": tmp_path / "nobody"}, SMALL)


def test_a_new_tenant_compiles_nothing(adapters: dict[str, Adapter], backbone: Backbone) -> None:
    """Within the capacity, once each kind of change and one batch have been seen."""
    tokens = jnp.zeros((3, 4), jnp.int32)
    bank = AdapterBank.stack({"a": adapters["a"], "b": adapters["b"]}, SMALL, capacity=4)
    with compilations() as compiled:
        bank = bank.add("c", adapters["c"]).remove("a").replace("b", adapters["d"])
        backbone(tokens, bank=bank, tenants=["b", None, "c"])
        assert compiled, "the listener works"
        compiled.clear()
        bank = bank.add("e", adapters["e"]).add("d", adapters["d"]).remove("c").replace("d", adapters["b"])
        backbone(tokens, bank=bank, tenants=["e", "d", None])
        assert not compiled
