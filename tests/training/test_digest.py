"""A digest tells weights apart bit for bit, and means the same wherever they lie."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from para_jax import Backbone, LoraConfig, ParaJaxError, merge_adapter
from para_jax.adapters.adapter import named_leaves
from para_jax.convert.checkpoint import save_backbone
from para_jax.sharding import make_mesh
from para_jax.training.claim import Claim
from para_jax.training.digest import weights_digest
from para_jax.training.folder import RUN
from tests.helpers import family_backbone, random_adapter, random_backbone


@pytest.mark.parametrize("family", ["llama", pytest.param("mixtral", marks=pytest.mark.slow)])
@pytest.mark.parametrize("quantize", [None, pytest.param("int8", marks=pytest.mark.whole), "int4"])
def test_one_digest_wherever_the_weights_are(family: str, quantize: str | None, tmp_path: Path) -> None:
    save_backbone(family_backbone(family), tmp_path / "a")
    found = {
        weights_digest(Backbone.from_pretrained(tmp_path / "a", stacked=stacked, quantize=quantize, mesh=mesh))
        for stacked in (False, True)
        for mesh in (None, make_mesh("data=8"), make_mesh("data=2,fsdp=2,tensor=2"))
    }
    assert len(found) == 1
    if quantize is None:  # made in memory
        assert found == {weights_digest(family_backbone(family)), weights_digest(family_backbone(family, stacked=True))}


def test_any_weight_counts() -> None:
    backbone = random_backbone(tie_word_embeddings=False)
    leaves = dict(named_leaves(backbone))
    found = {weights_digest(backbone)}
    for name, x in leaves.items():
        for change in (changed(x), jnp.flip(x, 0)):
            if np.array_equal(change, x):  # norms of ones
                continue
            others = {**leaves, name: change}
            found.add(weights_digest(jax.tree.unflatten(jax.tree.structure(backbone), list(others.values()))))
    even = sum(np.array_equal(jnp.flip(x, 0), x) for x in leaves.values())
    assert len(found) == 1 + 2 * len(leaves) - even


def changed(x: jax.Array) -> jax.Array:
    """The last bit of the last number, another."""
    bits = np.array(x).view(np.uint32)
    bits.flat[-1] ^= 1
    return jnp.asarray(bits.view(np.float32))


def test_layers_that_change_places() -> None:
    backbone = random_backbone(stacked=True)
    leaves = [jnp.flip(x, 0) if "blocks" in name else x for name, x in named_leaves(backbone).items()]
    other = jax.tree.unflatten(jax.tree.structure(backbone), leaves)
    assert weights_digest(other) != weights_digest(backbone)


def test_a_merged_adapter_is_another_model() -> None:
    """Its norm and embedding are the backbone's own."""
    backbone = random_backbone()
    merged = merge_adapter(backbone, random_adapter(LoraConfig(r=1, target_modules=("v_proj",)), backbone.config, 0))
    assert np.array_equal(merged.embed[...], backbone.embed[...])
    assert weights_digest(merged) != weights_digest(backbone)


def test_a_run_of_an_earlier_version(tmp_path: Path) -> None:
    """It noted a hash of the norm and of eight rows of the embedding."""
    out = tmp_path / "out"
    out.mkdir()
    (out / RUN).write_text(json.dumps({"weights_sha256": "0" * 64}))
    with pytest.raises(ParaJaxError) as error, Claim(out, resume=True, overwrite=False) as claim:
        claim.begin({"weights": "1" * 64})
    assert str(error.value) == (
        f"{out} holds a run of an earlier version of para_jax, which recorded only a few of the backbone's weights, "
        "so it cannot be checked that the weights are the same. Finish it with that version, or pass --overwrite"
    )
