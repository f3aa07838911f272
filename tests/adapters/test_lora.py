"""LoRA's pairs, scales and first weights against NumPy, and what training leaves of padding and dropout."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from para_jax import LoraConfig, ParaJaxError
from para_jax.adapters.adapter import Adapter, abstract_layers
from para_jax.adapters.bank import AdapterBank
from para_jax.adapters.method import Prompt
from para_jax.adapters.registry import config_from_dict
from para_jax.adjustment import Adjustment
from para_jax.data.examples import Example
from para_jax.data.packing import Shape
from para_jax.training.places import TenantLayout
from para_jax.training.settings import Settings
from para_jax.training.state import Sums, TrainState, stack_settings
from tests.helpers import SMALL, random_adapter, random_backbone, take_step

D = SMALL.hidden_size
PROMPT = Prompt(jnp.zeros((2, D)), jnp.zeros((2, D)), jnp.ones(2, bool))
# Other ranks and scales in each layer, a module that one layer lacks, and one that no pattern touches.
PATTERNS = LoraConfig(
    r=3,
    lora_alpha=6,
    target_modules=("q_proj", "o_proj", "layers.1.mlp.down_proj", "up_proj"),
    rank_pattern={"layers.0.self_attn.q_proj": 1, "q_proj": 5, r"mlp\.(up|down)_proj": 2},
    alpha_pattern={r"1\..*q_proj": 4.0, "o_proj": 0.5},
)
EXPECTED = {  # rank and alpha of each layer's modules, by PEFT's rules
    "q_proj": [(1, 6.0), (5, 4.0)],
    "o_proj": [(3, 0.5), (3, 0.5)],
    "down_proj": [None, (2, 6.0)],
    "up_proj": [(2, 6.0), (2, 6.0)],
}


def prepared(adapter: Adapter, layer: int, stacked: bool) -> Adjustment:
    """One layer's pairs, its number known as it is where layers are unrolled, or not as where they are scanned."""
    weights = jax.tree.map(lambda x: x[layer], adapter.layers)
    return weights.prepare(PROMPT, jnp.int32(layer) if stacked else layer)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("rslora", [False, True])
def test_pairs_against_numpy(stacked: bool, rslora: bool) -> None:
    """y + scale (x A^T) B^T, each module of each layer at its own rank and scale."""
    adapter = random_adapter(dataclasses.replace(PATTERNS, use_rslora=rslora), SMALL, seed=3)
    tensors = {name: np.asarray(x, np.float64) for name, x in adapter.tensors().items()}
    rng = np.random.default_rng(0)
    for layer in range(2):
        pairs = jax.tree.map(lambda x: x[None], prepared(adapter, layer, stacked))
        for site, module in SMALL.sites.items():
            x = rng.normal(size=(1, 4, module.inputs)).astype(np.float32)
            y = rng.normal(size=(1, 4, module.outputs)).astype(np.float32)
            expected = y.astype(np.float64)
            if EXPECTED.get(site, [None, None])[layer] is not None:
                rank, alpha = EXPECTED[site][layer]
                a, b = tensors[f"down.{site}"][layer][:rank], tensors[f"up.{site}"][layer][:, :rank]
                expected = expected + alpha / (math.sqrt(rank) if rslora else rank) * (x @ a.T) @ b.T
                assert stacked or pairs.pairs[site].down.shape[-2] == rank
                assert np.abs(expected - y).max() > 1
            elif not stacked:
                assert site not in pairs.pairs
            ours = pairs.apply(site, jnp.asarray(x), jnp.asarray(y))
            np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


def test_sizes_count_each_module_at_its_own_rank() -> None:
    widths = {site: module.inputs + module.outputs for site, module in SMALL.sites.items()}
    expected = sum(rank * widths[s] for s, layers in EXPECTED.items() for rank, _ in filter(None, layers))
    assert PATTERNS.size(SMALL) == expected
    fresh = Adapter.create(dataclasses.replace(PATTERNS, init_lora_weights=False), SMALL, jax.random.key(0))
    assert sum(int(jnp.sum(x != 0)) for x in fresh.tensors().values()) == expected, "the rest is padding"
    assert set(fresh.tensors()) == {f"{half}.{site}" for half in ("down", "up") for site in EXPECTED}


# The first weights


def fresh(init: Any, r: int = 8, **options: Any) -> dict[str, np.ndarray]:
    config = LoraConfig(r=r, init_lora_weights=init, target_modules=("q_proj", "down_proj"), **options)
    return {name: np.asarray(x) for name, x in Adapter.create(config, SMALL, jax.random.key(1)).tensors().items()}


@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal"])
def test_fresh_pairs_are_the_identity(init: Any) -> None:
    """Also where ranks differ from layer to layer."""
    tensors = fresh(init, rank_pattern={"layers.0.self_attn.q_proj": 4})
    for site in ("q_proj", "down_proj"):
        for down, up in zip(tensors[f"down.{site}"], tensors[f"up.{site}"], strict=True):
            assert np.abs(down).max() > 0.01
            product = up.astype(np.float64) @ down.astype(np.float64)
            assert np.abs(product).max() < 1e-7
            assert (init == "orthogonal") == bool(np.any(up))
    assert not np.any(tensors["down.q_proj"][0, 4:]) and np.any(tensors["down.q_proj"][1, 4:])


def test_first_weights_are_drawn_as_in_peft() -> None:
    """Range and spread against those of peft's own layers."""
    import torch
    from peft import LoraConfig as PeftConfig
    from peft.tuners.lora.layer import Linear

    torch.manual_seed(0)
    for init, rank in ((True, 64), (False, 64), ("gaussian", 16), ("orthogonal", 16)):
        config = LoraConfig(r=rank, init_lora_weights=init, target_modules=("down_proj",))
        tensors = Adapter.create(config, SMALL, jax.random.key(1)).tensors()
        base = torch.nn.Linear(SMALL.intermediate_size, SMALL.hidden_size, bias=False)
        theirs = Linear(base, "default", PeftConfig(r=rank, init_lora_weights=init), r=rank, init_lora_weights=init)
        halves = (("down", theirs.lora_A), ("up", theirs.lora_B))
        for half, module in halves:
            a = np.asarray(tensors[f"{half}.down_proj"])[0]
            b = module["default"].weight.detach().numpy()
            assert a.shape == b.shape
            np.testing.assert_allclose(np.std(a), np.std(b), rtol=0.15)
            np.testing.assert_allclose(np.abs(a).max(), np.abs(b).max(), rtol=0.3)


def test_random_pairs_change_something() -> None:
    tensors = fresh(False)
    assert all(np.abs(tensors[f"up.{s}"] @ tensors[f"down.{s}"]).max() > 0.01 for s in ("q_proj", "down_proj"))


# Training


def rows_of(name: str, count: int = 4) -> list[Example]:
    rng = np.random.default_rng(len(name))

    def ids(n: int) -> tuple[int, ...]:
        return tuple(int(i) for i in rng.integers(1, SMALL.vocab_size, n))

    return [Example.of(ids(5), (*ids(4), 0)) for _ in range(count)]


def tune(configs: dict[str, LoraConfig], steps: int = 3, seed: int = 0):
    backbone = random_backbone(stacked=True)
    bank = AdapterBank.stack({n: random_adapter(c, SMALL, len(n), 0.1) for n, c in configs.items()}, SMALL)
    settings = Settings(steps=steps, lr=1e-2, weight_decay=0.1)
    state, rules = TrainState.create(bank), stack_settings(bank, dict.fromkeys(configs, settings))
    history, step_tenants, sums = [], [list(configs)], Sums.create(bank, 1, len(configs))
    layout, shapes = TenantLayout.of(None, len(configs), rows=2), [Shape(2, 20, 2, 20)]
    for step in range(steps):
        rows = layout.step_rows(step_tenants, {n: rows_of(n) for n in configs}, 3, dict.fromkeys(configs, step))
        state, sums, report = take_step(backbone, state, sums, rules, layout, shapes, step_tenants, rows, seed)
        history.append(report["loss"])
    return bank, state.bank, history


DROPPED = dataclasses.replace(PATTERNS, lora_dropout=0.5)
BOTH = {"globex": LoraConfig(r=2), "acme": DROPPED}


@pytest.fixture(scope="module")
def tuned():
    """Two tenants, one of which drops half of its inputs."""
    return tune(BOTH)


def test_padding_stays_zero_in_training(tuned) -> None:
    """Its gradients are zero, and so are Adam's steps and the weights' decay."""
    before, after, _ = tuned
    old, new = before["acme"].tensors(), after["acme"].tensors()
    for name, x in new.items():
        padding = np.asarray(old[name]) == 0
        assert not np.any(np.asarray(x)[padding]), name
        assert np.mean(np.asarray(x)[~padding] != np.asarray(old[name])[~padding]) > 0.9, name
    assert np.any(np.asarray(old["down.q_proj"]) == 0) and np.any(np.asarray(old["up.down_proj"]) == 0)


def test_dropout_is_at_work_in_training_and_reproducible(tuned) -> None:
    _, after, history = tuned
    _, again, same = tune(BOTH)
    assert same == history
    assert all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(after), jax.tree.leaves(again), strict=True))
    _, _, other = tune(BOTH, seed=1)
    _, _, without = tune({**BOTH, "acme": PATTERNS})
    for x, y, z in zip(history, other, without, strict=True):
        assert len({x["acme"], y["acme"], z["acme"]}) == 3, "another seed drops others, and none is something else"
        # The neighbour drops nothing. Its program is another one without dropout, so that only rounding may differ.
        assert x["globex"] == y["globex"] == pytest.approx(z["globex"], rel=1e-4)


def test_what_a_tenant_drops_does_not_depend_on_its_neighbours(tuned) -> None:
    """Beside another tenant its rows are the second half of the batch, and alone all of it."""
    _, _, history = tuned
    _, _, alone = tune({"acme": DROPPED}, steps=1)
    assert alone[0]["acme"] == pytest.approx(history[0]["acme"], rel=1e-5)


def test_evaluation_drops_nothing() -> None:
    """Bit for bit: without keys the rate is no part of the program."""
    backbone = random_backbone(stacked=True)
    adapter = random_adapter(DROPPED, SMALL, 0)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, SMALL.vocab_size, (2, 6)), jnp.int32)
    plain = Adapter(PATTERNS, plain_layers(adapter))
    ours, expected = (
        backbone(tokens, bank=AdapterBank.stack({"a": a}, SMALL), tenants=["a", None]) for a in (adapter, plain)
    )
    assert np.array_equal(ours, expected)


def plain_layers(adapter: Adapter) -> Any:
    """The same weights under the config without dropout."""
    tree = jax.tree.structure(abstract_layers(PATTERNS, SMALL))
    return jax.tree.unflatten(tree, jax.tree.leaves(adapter.layers))


# Mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r and the ranks of rank_pattern must be whole numbers from 1, not 0"),
        ({"r": True}, "not True"),
        ({"rank_pattern": {"q_proj": 1.5}}, "rank_pattern must be whole numbers from 1, not 1.5"),
        ({"rank_pattern": "q_proj"}, 'rank_pattern must be values by pattern, such as {"q_proj": 4}'),
        ({"rank_pattern": {"(": 3}}, r"rank_pattern has '\(', which is not a regular expression"),
        ({"rank_pattern": {"k_proj": 3}}, "rank_pattern has 'k_proj', which matches no targeted module"),
        ({"alpha_pattern": {"proj": 3}}, "alpha_pattern has 'proj', which matches no targeted module"),
        ({"alpha_pattern": {"q_proj": "big"}}, "values of alpha_pattern must be numbers, not 'big'"),
        ({"lora_alpha": float("nan")}, "lora_alpha and .* must be numbers, not nan"),
        ({"lora_dropout": 1.0}, "lora_dropout must be at least 0 and below 1, not 1.0"),
        ({"lora_dropout": "half"}, "lora_dropout must be at least 0"),
        ({"use_rslora": 1}, "use_rslora must be true or false, not 1"),
        ({"init_lora_weights": "gausian"}, "unknown init_lora_weights 'gausian'; did you mean 'gaussian'"),
        ({"init_lora_weights": 1}, "unknown init_lora_weights 1"),
        ({"init_lora_weights": "pissa"}, "unknown init_lora_weights 'pissa'"),
        ({"init_lora_weights": "orthogonal", "r": 3}, "needs even ranks, not 3"),
        ({"init_lora_weights": "orthogonal", "rank_pattern": {"q_proj": 5}}, "needs even ranks, not 5"),
        ({"target_modules": ("q_porj",)}, "target_modules 'q_porj'; did you mean 'q_proj'"),
        ({"target_modules": "q_proj"}, r"Write a list for names: \['q_proj'\]"),
        ({"target_modules": 5}, "target_modules must be names of modules, not 5"),
        ({"target_modules": ("q_proj", "q_proj")}, "target_modules names q_proj more than once"),
        (
            {"exclude_modules": ("lm_head",)},
            "exclude_modules has lm_head; embeddings and the output layer cannot be adapted. Take",
        ),
        ({"exclude_modules": None}, "exclude_modules must be names of modules, not None"),
        ({"layers_to_transform": 2}, "has layer 2; the backbone has layers 0 to 1"),
        ({"layers_to_transform": ("last",)}, r"layers_to_transform must be numbers of layers, not \('last',\)"),
        ({"layers_to_transform": 0, "target_modules": "all-linear"}, "layers_to_transform needs target_modules as a"),
    ],
)
def test_mistakes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ParaJaxError, match=message):
        LoraConfig(**options).size(SMALL)


def test_a_config_of_json() -> None:
    """Lists and objects become what can be hashed and compared."""
    fields = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": [["v_proj", 4]], "target_modules": ["q_proj", "v_proj"]}
    config = config_from_dict("lora", {**fields, "layers_to_transform": [1]})
    assert config == LoraConfig(rank_pattern=(("q_proj", 2),), alpha_pattern={"v_proj": 4}, layers_to_transform=(1,))
    assert len({config, config_from_dict("lora", dataclasses.asdict(config))}) == 1
    with pytest.raises(ParaJaxError, match="option of method 'lora' 'lora_alhpa'; did you mean 'lora_alpha'"):
        config_from_dict("lora", {"lora_alhpa": 3})
