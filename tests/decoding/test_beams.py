"""Beam search against transformers' own, on a random model."""

from __future__ import annotations

import pytest

from para_jax import ParaConfig, ParaJaxError, complete
from tests.decoding.conftest import PROMPTS
from tests.helpers import random_bank

FIXED = {"max_new_tokens": 16, "num_beams": 3}


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [1.0, 2.5, 0.0, -0.5])
def test_texts_are_those_of_transformers(backbone, reference, tokenizer, early_stopping, length_penalty):
    eos = [56, 29]
    options = {**FIXED, "early_stopping": early_stopping, "length_penalty": length_penalty, "eos_token_id": eos}
    theirs = reference.generate(PROMPTS, **options)
    ours = complete(backbone, tokenizer, PROMPTS, **options)
    assert [completion.tokens for completion in ours] == theirs
    assert [completion.text for completion in ours] == [tokenizer.decode(ids) for ids in theirs]
    assert [completion.finish_reason == "stop" for completion in ours] == [len(ids) < 16 for ids in theirs]


def test_eos_ends_some_rows_and_not_others(backbone, tokenizer):
    """What the comparison above has to have met to be worth anything."""
    ours = complete(backbone, tokenizer, PROMPTS, **FIXED, eos_token_id=[56, 29])
    assert {completion.finish_reason for completion in ours} == {"stop", "length"}


def test_without_eos_and_with_a_repetition_penalty(backbone, reference, tokenizer):
    for penalty in (1.0, 1.4, 0.7):
        options = {**FIXED, "repetition_penalty": penalty, "eos_token_id": ()}
        ours = complete(backbone, tokenizer, PROMPTS, **options)
        assert [completion.tokens for completion in ours] == reference.generate(PROMPTS, **options)


def test_stop_strings(backbone, reference, tokenizer):
    # Short texts win, so that a text which comes to its stop string is not overtaken.
    options = {**FIXED, "eos_token_id": (), "length_penalty": -1.0, "early_stopping": True}
    plain = complete(backbone, tokenizer, PROMPTS, **options)
    stop = plain[2].text[3:5]
    ours = complete(backbone, tokenizer, PROMPTS, **options, stop=[stop])
    for prompt, completion in zip(PROMPTS, ours, strict=True):
        theirs = reference.generate([prompt], **options, stop_strings=[stop], tokenizer=tokenizer)[0]
        # Tokens that transformers generated after the best text was complete are padding.
        assert theirs[: len(completion.tokens)] == completion.tokens
        assert stop not in completion.text
        text = tokenizer.decode(completion.tokens)
        assert completion.text == text.partition(stop)[0]
        assert (completion.finish_reason == "stop") == (stop in text)
    assert {completion.finish_reason for completion in ours} == {"stop", "length"}


def test_limits_of_each_rows_own(backbone, reference, tokenizer):
    limits = [2, 16, 7, 11]
    options = {**FIXED, "eos_token_id": [56, 29], "early_stopping": "never", "length_penalty": 1.5}
    ours = complete(backbone, tokenizer, PROMPTS, **{**options, "max_new_tokens": limits})
    for prompt, limit, completion in zip(PROMPTS, limits, ours, strict=True):
        assert reference.generate([prompt], **{**options, "max_new_tokens": limit}) == [completion.tokens]


def test_tenants_of_a_mixed_batch_search_as_they_would_alone(backbone, tokenizer):
    bank = random_bank({"acme": ParaConfig(r=4), "globex": ParaConfig(r=4)}, backbone.config)
    tenants = ["acme", None, "globex", "acme"]
    options = {**FIXED, "bank": bank, "eos_token_id": [56, 29]}
    mixed = complete(backbone, tokenizer, PROMPTS, tenants=tenants, **options)
    for tenant in ("acme", "globex"):
        alone = complete(backbone, tokenizer, PROMPTS, tenants=[tenant] * 4, **options)
        for row in range(4):
            if tenants[row] == tenant:
                assert alone[row] == mixed[row]
    bare = complete(backbone, tokenizer, PROMPTS, **FIXED, eos_token_id=[56, 29])
    assert bare[1] == mixed[1]
    assert all(bare[row] != mixed[row] for row in (0, 2, 3))


def test_beams_do_not_draw(backbone, tokenizer):
    with pytest.raises(ParaJaxError, match="temperature"):
        complete(backbone, tokenizer, PROMPTS, num_beams=2, temperature=0.5)
    with pytest.raises(ParaJaxError, match="num_beams must be a whole number from 1 to 2147483647, not 0"):
        complete(backbone, tokenizer, PROMPTS, num_beams=0)
    with pytest.raises(ParaJaxError, match=r"'often'.*never"):
        complete(backbone, tokenizer, PROMPTS, num_beams=2, early_stopping="often")
