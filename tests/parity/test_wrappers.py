"""Models that have a text decoder among other parts: the same logits as transformers' class of the whole, on text."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from para_jax import Backbone, ParaJaxError
from para_jax.convert.checkpoint import save_backbone
from para_jax.families.table import FAMILIES
from para_jax.families.wrappers import WRAPPERS
from tests.parity import models
from tests.wrappers import mrope, saved, wrapped

OF_THE_WHOLE = ("tie_word_embeddings", "vocab_size", "vocab_size_per_layer_input")
NAMES = [*WRAPPERS]
TOKENS = np.random.default_rng(0).integers(3, 56, (2, 9))


def logits(model: Any) -> np.ndarray:
    with torch.inference_mode():
        return model(torch.from_numpy(TOKENS)).logits.numpy()


def is_close(ours: Any, theirs: np.ndarray, tolerance: float = models.TOLERANCE) -> bool:
    return float(np.abs(np.asarray(ours) - theirs).max()) < tolerance * float(np.abs(theirs).max())


def check(name: str, model: Any, folder: Path, stacked: bool, same_length: bool = False) -> None:
    """Forward, prefill and decode; back into the whole, bit for bit; and the text part alone."""
    backbone = Backbone.from_pretrained(folder, dtype="float32", stacked=stacked)
    worst: models.Worst = {}
    models.check_forward(worst, model, backbone, np.random.default_rng(0), same_length)
    models.check_decode(worst, model, backbone, np.random.default_rng(0), same_length)
    again, alone = folder.with_name("again"), folder.with_name("alone")
    save_backbone(backbone, again, like=folder)
    before, after = models.tensors_in(folder), models.tensors_in(again)
    assert before.keys() == after.keys() and all(torch.equal(x, after[key]) for key, x in before.items())
    assert json.loads((again / "config.json").read_text()) == json.loads((folder / "config.json").read_text())
    save_backbone(backbone, alone, text_only=True)
    text = AutoModelForCausalLM.from_pretrained(alone, attn_implementation="eager").eval()
    assert type(text).__name__ == FAMILIES[backbone.config.family].architecture
    whole = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager").eval()
    assert is_close(logits(text), logits(whole), 1e-6)


@pytest.mark.parametrize(("spelling", "tied"), [("hub", False), ("memory", True)])
@pytest.mark.parametrize("name", NAMES)
def test_as_it_is_saved(name: str, spelling: str, tied: bool, tmp_path: Path) -> None:
    """In both spellings of transformers 5, in one file and in many."""
    model = wrapped(name, tied)
    folder = saved(model, tmp_path / "a", spelling, max_shard_size="20KB" if tied else "5GB")
    assert (folder / "model.safetensors.index.json").exists() == tied
    check(name, model, folder, stacked=tied)


def test_the_other_decoder_of_mistral3(tmp_path: Path) -> None:
    """Ministral 3's, whose queries are scaled by position: rows are longer than the original length."""
    rope = {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 4, "beta_fast": 8.0,
        "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.3,
    }  # fmt: skip
    model = wrapped("mistral3", model_type="ministral3", rope_parameters=rope)
    check("mistral3", model, saved(model, tmp_path / "a"), stacked=True)


@pytest.mark.parametrize("name", NAMES)
def test_random_configs(name: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The options of the decoder's family, in text_config."""
    family = next(iter(WRAPPERS[name].texts.values()))

    @seed(0)
    @settings(
        max_examples=request.config.getoption("parity_examples"),
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(case=models.cases(family))
    def run(case: models.Case) -> None:
        text = {key: value for key, value in case.fields.items() if key not in OF_THE_WHOLE}
        if name == "gemma3":
            text["final_logit_softcapping"] = None
        if name == "qwen2_5_vl":  # its heads make hidden_size, and no option says their size
            text["hidden_size"] = text["num_attention_heads"] * text.pop("head_dim")
        if name == "qwen3_vl":  # it has no windows
            for key in ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types"):
                text.pop(key, None)
        if name.startswith("qwen"):
            head_dim = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
            text["rope_parameters"] |= {"mrope_section": mrope(head_dim)["rope_parameters"]["mrope_section"]}
        model = wrapped(name, case.fields["tie_word_embeddings"], case.seed, **text)
        folder = tmp_path_factory.mktemp(name) / "a"
        saved(model, folder, "memory" if case.old_spelling else "hub", max_shard_size="1KB" if case.sharded else "5GB")
        check(name, model, folder, case.stacked, case.by_length)
        jax.clear_caches()

    run()


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_three_equal_positions_rotate_as_one(name: str) -> None:
    """Which feature is rotated by which of them does not matter then, bit for bit; it does for those of an image."""
    positions = torch.randint(0, 10_000, (1, *TOKENS.shape), generator=torch.Generator().manual_seed(0))
    equal, apart = positions.expand(3, -1, -1), torch.cat([positions, positions + 1, positions + 2])
    of_text, of_images = [], []
    interleaved = name == "qwen3_vl"
    for sections in ([6, 3, 3], [4, 4, 4], [8, 2, 2]) if interleaved else ([2, 1, 1], [1, 2, 1], [1, 1, 2]):
        rope = mrope(8, mrope_section=sections, **({"mrope_interleaved": True} if interleaved else {}))
        model = wrapped(name, **rope, **({"head_dim": 24} if interleaved else {}))
        with torch.inference_mode():
            for found, at in ((of_text, equal), (of_images, apart)):
                found.append(model(torch.from_numpy(TOKENS), position_ids=at).logits)
    assert all(torch.equal(x, of_text[0]) for x in of_text)
    assert not any(torch.equal(x, of_images[0]) for x in of_images[1:])


@pytest.mark.parametrize("name", NAMES)
def test_the_head_is_tied_where_transformers_ties_it(name: str, tmp_path: Path) -> None:
    """By what the top level says, or else text_config. It is an error where the file says something else."""
    models_of = {tied: wrapped(name, tied) for tied in (False, True)}
    says: tuple[bool | None, ...] = (None, False, True)
    for has_head, top, text in itertools.product((False, True), says, says):
        folder = saved(models_of[not has_head], tmp_path / f"{has_head}-{top}-{text}")
        fields = json.loads((folder / "config.json").read_text())
        for at, tied in ((fields, top), (fields["text_config"], text)):
            at.pop("tie_word_embeddings", None)
            at |= {} if tied is None else {"tie_word_embeddings": tied}
        (folder / "config.json").write_text(json.dumps(fields))
        said = next((tied for tied in (top, text) if tied is not None), name.startswith("gemma"))
        if said is has_head:
            told = "lm_head.weight differs from the embedding" if has_head else "lm_head.weight [61, 32] is missing"
            with pytest.raises(ParaJaxError, match=re.escape(told)):
                Backbone.from_pretrained(folder)
            continue
        reference, loaded = AutoModelForImageTextToText.from_pretrained(
            folder, attn_implementation="eager", output_loading_info=True
        )
        # For want of a head transformers draws one at random, if text_config alone says that it is tied.
        if "lm_head.weight" not in loaded["missing_keys"]:
            ours = Backbone.from_pretrained(folder, dtype="float32", stacked=True)(jnp.asarray(TOKENS))
            assert is_close(ours, logits(reference.eval())), (has_head, top, text)


@pytest.mark.parametrize("name", NAMES)
def test_what_a_base_model_saves(name: str, tmp_path: Path) -> None:
    """It has no head, so that the embedding has to be it."""
    model = wrapped(name, tied=True)
    for spelling in ("hub", "memory"):
        folder = saved(model.model, tmp_path / spelling, spelling)
        ours = Backbone.from_pretrained(folder, dtype="float32", stacked=True)(jnp.asarray(TOKENS))
        assert is_close(ours, logits(model))
