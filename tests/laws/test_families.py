"""Laws 1 to 6 on families that together have every kind of part, and with --whole on all; tests/parity has law 8."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from para_jax import AdapterBank, Backbone, BackboneConfig
from para_jax.adapters.rows import Rows
from para_jax.convert.checkpoint import save_backbone
from para_jax.errors import ParaJaxError
from para_jax.families.table import FAMILIES
from para_jax.sharding import AXES, check_mesh, make_mesh, own_mesh, row_sharding
from tests.compilations import compilations
from tests.helpers import (
    FAMILY_METHODS,
    SMALL,
    SOME_FAMILIES,
    families,
    family_backbone,
    family_fields,
    random_adapter,
    random_backbone,
    random_bank,
)

B, PROMPT, STEPS = 8, 7, 3
TENANTS = ["para", None, "lora", "response", "group", "bias", None, {"para": 0.5, "group": 0.5}]
LENGTHS = np.array([7, 1, 4, 6, 3, 7, 5, 2])[:, None]


class Model(NamedTuple):
    """A backbone of a family, its adapters, and the two programs that the laws run."""

    backbone: Backbone
    bank: AdapterBank
    tokens: np.ndarray
    mask: np.ndarray


prefill, decode = jax.jit(Backbone.prefill, static_argnums=4), jax.jit(Backbone.decode)


def stepwise(backbone: Backbone, tokens: np.ndarray, mask: np.ndarray, rows: Rows) -> np.ndarray:
    """Logits of prefill and of single steps: (b, 1 + STEPS, v)."""
    where = partial(jax.device_put, device=None if backbone.mesh is None else row_sharding(backbone.mesh, B))
    last, state = prefill(backbone, where(tokens[:, :PROMPT]), where(mask), rows, PROMPT + STEPS)
    logits = [last]
    for i in range(STEPS):
        last, state = decode(backbone, where(tokens[:, PROMPT + i]), state)
        logits.append(last)
    return np.stack([np.asarray(x) for x in logits], axis=1)


@jax.jit
def whole(backbone: Backbone, tokens: jax.Array, mask: jax.Array, prompt_mask: jax.Array, rows: Rows) -> jax.Array:
    hidden, _, _ = backbone.forward(tokens, mask, prompt_mask, rows)
    return backbone.logits(hidden)


def batch(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 62, (B, PROMPT + STEPS), dtype=np.int32)


@pytest.fixture(scope="module", params=families())
def model(request: pytest.FixtureRequest) -> Model:
    stacked = list(FAMILIES).index(request.param) % 2 == 1
    backbone = family_backbone(request.param, seed=1, stacked=stacked)
    bank = random_bank(FAMILY_METHODS, backbone.config, seed=2, scale=0.3)
    return Model(backbone, bank, batch(3), np.arange(PROMPT)[None] >= PROMPT - LENGTHS)


# What is no kind of part, or is looked at apart.
SIZES = {
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "rms_norm_eps", "max_position_embeddings", "bos_token_id", "eos_token_ids", "tie_word_embeddings",
    "name", "family", "hf", "hidden_act", "kind_of_layer", "layer_kinds", "biases", "experts",
}  # fmt: skip


def parts(family: str) -> set[tuple]:
    """What the decoder of this family is made of, without sizes and numbers."""
    config, names = BackboneConfig.from_hf(family_fields(family)), FAMILIES[family].names
    found = {("bias", name) for name in config.biases}
    found |= {("transposed", names.transposed), ("by head", names.by_head), ("experts", config.experts is None)}
    for field in dataclasses.fields(config):
        if field.name not in SIZES:
            value = getattr(config, field.name)
            found.add((field.name, value if isinstance(value, bool | str) else value == field.default))
    for kind in config.layer_kinds:
        found |= {("window", kind.window is None), ("rope", kind.rope is None), ("values", kind.values)}
        found |= {(name, getattr(kind, name) is None) for name in ("head_dim", "num_key_value_heads")}
        found.add(("inner", kind.intermediate_size is None))
        if kind.rope:
            found |= {("scaled queries", kind.rope.query_scaling is None), ("backwards", kind.rope.backwards)}
    if config.experts:
        found |= {("shared expert", config.experts.shared > 0), ("biases of experts", config.experts.biases)}
        found.add(("clamped", config.experts.clamped is not None))
    return found


def test_some_families_have_every_part() -> None:
    """Those of the tests that do not run on all. A family with a part that no other has belongs to them."""
    every, some = (set().union(*map(parts, names)) for names in (FAMILIES, SOME_FAMILIES))
    assert every == some, "add the family that has it to SOME_FAMILIES of tests/helpers.py"


def test_fresh_adapters_are_the_identity(model: Model) -> None:
    fresh = AdapterBank.create(FAMILY_METHODS, model.backbone.config)
    *three, fourth, fifth = fresh.names
    tenants = [*three, {fourth: 1.0, fifth: 1.0}]
    first, second = (fresh.rows(rows) for rows in ([*tenants, None, None, None, None], [None] * 4 + tenants))
    tokens = np.concatenate([model.tokens[:4]] * 2)
    mask = np.concatenate([model.mask[:4]] * 2)
    one, other = (stepwise(model.backbone, tokens, mask, rows) for rows in (first, second))
    assert np.array_equal(one, other)
    assert np.array_equal(one[:4], one[4:])
    bare = stepwise(model.backbone, tokens, mask, Rows())
    assert np.abs(one - bare).max() < 1e-5 * np.abs(bare).max()


def test_prepared_once(model: Model) -> None:
    """Prefill and single steps, flush right, equal one pass over the whole rows, flush left."""
    rows = model.bank.rows(TENANTS)
    ours = stepwise(model.backbone, model.tokens, model.mask, rows)
    tokens = np.zeros_like(model.tokens)
    for row, length in enumerate(LENGTHS[:, 0]):
        tokens[row, : length + STEPS] = model.tokens[row, PROMPT - length :]
    column = np.arange(PROMPT + STEPS)[None]
    logits = np.asarray(whole(model.backbone, tokens, column < LENGTHS + STEPS, column < LENGTHS, rows))
    expected = np.take_along_axis(logits, (LENGTHS - 1 + np.arange(STEPS + 1)[None])[..., None], axis=1)
    assert np.abs(ours - expected).max() < 1e-5 * np.abs(expected).max()
    bare = stepwise(model.backbone, model.tokens, model.mask, Rows())
    different = np.abs(ours - bare).max(axis=(1, 2)) > 0.01
    assert different.tolist() == [tenant is not None for tenant in TENANTS]


def test_neighbours_do_not_change_a_row(model: Model) -> None:
    outputs = []
    for seed, others in enumerate((TENANTS, [TENANTS[0], *TENANTS[:0:-1]])):
        tokens, mask = batch(seed + 10), np.roll(model.mask, seed, axis=0)
        tokens[0], mask[0] = model.tokens[0], model.mask[0]
        outputs.append(stepwise(model.backbone, tokens, mask, model.bank.rows(others)))
    assert np.array_equal(outputs[0][0], outputs[1][0])
    assert not np.array_equal(outputs[0][1], outputs[1][1])


def test_untouched_and_compiled_once(model: Model) -> None:
    where = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(model.backbone)]
    stepwise(model.backbone, model.tokens, model.mask, model.bank.rows(TENANTS))
    others = model.bank.replace("lora", random_adapter(FAMILY_METHODS["lora"], model.backbone.config, seed=9))
    with compilations() as compiled:
        stepwise(model.backbone, batch(7), model.mask[::-1].copy(), others.rows(TENANTS[1:] + TENANTS[:1]))
    assert compiled == []
    assert [x.unsafe_buffer_pointer() for x in jax.tree.leaves(model.backbone)] == where


MESHES = ["tensor=2,fsdp=4", "data=4,tensor=2", "fsdp=8", "data=8", "data=2,fsdp=2,tensor=2"]


def check_sharded(backbone: Backbone, mesh_text: str, folder: str, tenants: list) -> None:
    """A checkpoint read straight to its parts computes what it computes on one device."""
    bank = random_bank(FAMILY_METHODS, backbone.config, seed=2, scale=0.3)
    tokens, mask = batch(3), np.arange(PROMPT)[None] >= PROMPT - LENGTHS
    save_backbone(backbone, folder)
    mesh = make_mesh(mesh_text)
    sharded = Backbone.from_pretrained(folder, dtype="float32", stacked=backbone.stacked, mesh=mesh)
    split = [x for x in jax.tree.leaves(sharded) if x.addressable_shards[0].data.size < x.size]
    if mesh.shape["fsdp"] * mesh.shape["tensor"] > 1:
        assert sum(x.size for x in split) > 0.9 * sum(x.size for x in jax.tree.leaves(sharded))
    there = partial(jax.device_put, device=row_sharding(mesh, B))
    ours = stepwise(sharded, tokens, mask, jax.tree.map(there, bank.rows(tenants)))
    theirs = stepwise(backbone, tokens, mask, bank.rows(tenants))
    assert np.abs(ours - theirs).max() < 2e-5 * np.abs(theirs).max()


def test_sharded_is_unsharded(model: Model, tmp_path) -> None:
    number = list(FAMILIES).index(model.backbone.config.family)
    check_sharded(model.backbone, MESHES[number % len(MESHES)], str(tmp_path / "a"), TENANTS)


@pytest.mark.parametrize("stacked", [False, True])
def test_few_bits_on_a_mesh(stacked: bool, tmp_path) -> None:
    save_backbone(random_backbone(seed=4, vocab_size=62, hidden_size=128), tmp_path / "a")
    mesh = make_mesh("fsdp=4,tensor=2")
    one, many = (
        Backbone.from_pretrained(tmp_path / "a", dtype="float32", stacked=stacked, quantize="int4", mesh=m)
        for m in (None, mesh)
    )
    qkv_scale = (many.blocks if stacked else many.blocks[0])["qkv_scale"][...]
    assert qkv_scale.addressable_shards[0].data.size == qkv_scale.size // 2
    ours, theirs = (np.asarray(b(jnp.asarray(batch(3)))) for b in (many, one))
    assert np.abs(ours - theirs).max() < 2e-5 * np.abs(theirs).max()


@pytest.mark.parametrize(("mesh", "stacked"), [(mesh, bool(i % 2)) for i, mesh in enumerate(MESHES)])
def test_every_mesh(mesh: str, stacked: bool, tmp_path) -> None:
    check_sharded(random_backbone(seed=4, stacked=stacked, vocab_size=62), mesh, str(tmp_path / "a"), TENANTS)


def test_a_mesh_of_explicit_axes(tmp_path) -> None:
    """As jax.make_mesh makes it; the mesh that it becomes may be in force while programs run."""
    backbone = random_backbone(seed=4, vocab_size=62)
    save_backbone(backbone, tmp_path / "a")
    mesh = jax.make_mesh((2, 4), ("tensor", "fsdp"))
    assert own_mesh(mesh).shape == {"data": 1, "fsdp": 4, "tensor": 2}
    ours = Backbone.from_pretrained(tmp_path / "a", dtype="float32", mesh=mesh)
    theirs = np.asarray(backbone(jnp.asarray(batch(3))))
    assert np.abs(np.asarray(ours(jnp.asarray(batch(3)))) - theirs).max() < 2e-5 * np.abs(theirs).max()
    assert ours.mesh is not None
    with jax.set_mesh(ours.mesh):
        assert np.abs(np.asarray(ours(jnp.asarray(batch(3)))) - theirs).max() < 2e-5 * np.abs(theirs).max()


def test_meshes_that_do_not_fit() -> None:
    assert make_mesh("tensor=2,fsdp=4").axis_names == AXES
    for text, words in (
        ("tensor=3", "a mesh of tensor=3 has 3 devices; there are 8"),
        ("tensro=2", "did you mean 'tensor'?"),
        ("tensor=0", "with a size"),
    ):
        with pytest.raises(ParaJaxError, match=words.replace("?", r"\?")):
            make_mesh(text)
    with pytest.raises(ParaJaxError, match="unknown mesh axis 'tensors'; did you mean 'tensor'"):
        own_mesh(jax.make_mesh((8,), ("tensors",)))
    with pytest.raises(
        ParaJaxError, match="tensor=8 does not divide the backbone's 2 key/value heads; choose tensor=2"
    ):
        check_mesh(SMALL, make_mesh("tensor=8"))
