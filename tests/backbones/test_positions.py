"""Learned positions: of packed and padded rows, up to the last one, and past it."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from para_jax import Backbone, BackboneConfig, ParaJaxError, complete
from para_jax.adapters.rows import Rows
from para_jax.backbones.packed import Segments
from tests.helpers import drawn, family_fields

LAST = 12
TOKENS = np.random.default_rng(0).integers(0, 62, (2, LAST), dtype=np.int32)


@pytest.fixture(scope="module", params=["gpt2", "opt"])
def backbone(request: pytest.FixtureRequest) -> Backbone:
    fields = family_fields(request.param)
    key = "n_positions" if request.param == "gpt2" else "max_position_embeddings"
    config = BackboneConfig.from_hf({**fields, key: LAST})
    return drawn(config, seed=3, stacked=request.param == "opt", spread=0.2)


def close(x: jax.Array, y: jax.Array) -> bool:
    return bool(jnp.abs(x - y).max() < 1e-5 * jnp.abs(y).max())


def test_each_sequence_of_a_packed_row_begins_anew(backbone: Backbone) -> None:
    segments = Segments.of(jnp.array([[5, 4]]), LAST)
    hidden, _, _ = backbone.forward(
        jnp.asarray(TOKENS[:1]), segments.mask_bt, segments.mask_bt, Rows(), segments=segments
    )
    for start, end in ((0, 5), (5, 9)):
        alone = backbone(jnp.asarray(TOKENS[:1, start:end]))
        assert close(backbone.logits(hidden[:, start:end]), alone)


def test_padding_takes_no_position(backbone: Backbone) -> None:
    tokens = jnp.asarray(np.pad(TOKENS[:1], ((0, 0), (3, 2))))
    mask = jnp.asarray(np.pad(np.ones((1, LAST), bool), ((0, 0), (3, 2))))
    assert close(backbone(tokens, mask=mask)[:, 3 : 3 + LAST], backbone(jnp.asarray(TOKENS[:1])))


def test_up_to_the_last_position(backbone: Backbone, tiny: Any) -> None:
    """A row that ends before its neighbours goes on past the table, and nothing of it is read."""
    prompts, new = [TOKENS[0, :10].tolist(), TOKENS[1, :3].tolist()], [2, 9]
    both = complete(backbone, tiny[1], prompts, max_new_tokens=new, eos_token_id=())
    for prompt, most, row in zip(prompts, new, both, strict=True):
        assert len(row.tokens) == most and row.finish_reason == "length"
        logits = backbone(jnp.asarray([[*prompt, *row.tokens]]))[0, len(prompt) - 1 : -1]
        assert jnp.argmax(logits, axis=-1).tolist() == row.tokens


def test_past_the_last_position(backbone: Backbone, tiny: Any) -> None:
    tokens = jnp.asarray(np.pad(TOKENS, ((0, 0), (0, 1))))
    mask = np.ones(tokens.shape, bool)
    mask[0, 0] = False
    with pytest.raises(ParaJaxError, match="row 1 has 13 tokens, and the backbone has learned 12 positions"):
        backbone(tokens, mask=jnp.asarray(mask))
    with pytest.raises(ParaJaxError, match="the backbone's context is 12"):
        complete(backbone, tiny[1], [TOKENS[0, :10].tolist()], max_new_tokens=3)
    # Where lengths are not known before a program runs, nothing is clamped to the last position.
    logits, _ = jax.jit(partial(Backbone.prefill, rows=Rows(), length=13))(backbone, tokens, jnp.asarray(mask))
    assert jnp.isfinite(logits[0]).all() and jnp.isnan(logits[1]).all()
