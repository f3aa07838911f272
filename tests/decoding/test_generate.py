"""Texts against transformers' greedy ones, and rows against themselves alone."""

from __future__ import annotations

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from para_jax import ParaConfig, ParaJaxError, complete, generate, tiny_backbone_path
from para_jax.decoding import loop
from para_jax.decoding.generate import Completion
from para_jax.decoding.sampling import Sampler
from tests.decoding.conftest import PROMPTS, Reference
from tests.helpers import random_backbone, random_bank

SENTENCES = ["It was a dark night and", "She said that"]
NEW = {"max_new_tokens": 16}
GREEDY = {**NEW, "eos_token_id": ()}


@pytest.fixture(scope="module")
def plain(backbone, tokenizer):
    """What every row says without any end."""
    return complete(backbone, tokenizer, PROMPTS, **GREEDY)


def test_greedy_texts_are_those_of_transformers(backbone, reference, tokenizer, plain):
    assert [row.tokens for row in plain] == reference.generate(PROMPTS, **GREEDY)
    eos = [plain[0].tokens[5], plain[2].tokens[9]]
    theirs = reference.generate(PROMPTS, **NEW, eos_token_id=eos)
    ours = complete(backbone, tokenizer, PROMPTS, **NEW, eos_token_id=eos)
    assert [row.tokens for row in ours] == theirs
    assert [row.text for row in ours] == [tokenizer.decode(ids, skip_special_tokens=True) for ids in theirs]
    reasons = [row.finish_reason for row in ours]
    assert reasons == ["stop" if len(ids) < 16 else "length" for ids in theirs]
    assert set(reasons) == {"stop", "length"}


def test_layers_apart_say_the_same(tokenizer, plain):
    assert complete(random_backbone(3), tokenizer, PROMPTS, **GREEDY) == plain


def test_repetition_penalty_as_in_transformers(backbone, reference, tokenizer, plain):
    theirs = reference.generate(PROMPTS, **NEW, repetition_penalty=1.5)
    ours = complete(backbone, tokenizer, PROMPTS, **GREEDY, repetition_penalty=1.5)
    assert [row.tokens for row in ours] == theirs != [row.tokens for row in plain]
    mixed = complete(backbone, tokenizer, PROMPTS, **GREEDY, repetition_penalty=[1.5, 1.0, 1.5, 1.0])
    assert mixed == [ours[0], plain[1], ours[2], plain[3]]


def test_the_backbones_own_eos_ends_a_row(reference, tokenizer, plain):
    eos = plain[3].tokens[4]
    backbone = random_backbone(3, stacked=True, eos_token_ids=(eos,))
    ours = complete(backbone, tokenizer, PROMPTS, **NEW)
    assert [row.tokens for row in ours] == reference.generate(PROMPTS, **NEW, eos_token_id=[eos])
    assert ours[3].finish_reason == "stop" and eos not in ours[3].tokens


@pytest.mark.slow
def test_ends_and_tokenizers_of_each_rows_own(backbone, tokenizer, plain):
    """Rows that end in other ways, or are written by another tokenizer, say what each says alone."""
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["<|mail|>"])
    eos = [(), (plain[1].tokens[3], 0), (), (plain[3].tokens[4],)]
    own = [tokenizer, other, other, tokenizer]
    for more in ({}, {"stop": "e"}, {"num_beams": 2}):
        options = {**NEW, **more, "batch_size": 2}
        ours = complete(backbone, own, PROMPTS, **options, eos_token_id=eos)
        for i, row in enumerate(ours):
            assert [row] == complete(backbone, own[i], PROMPTS[i : i + 1], **options, eos_token_id=eos[i])
    for wrong, message in (
        ({"tokenizer": own[:2]}, "2 tokenizers for 4 rows; give one for each, or one for all"),
        ({"eos_token_id": eos[:2]}, "eos_token_id has tuples for 2 of 4 rows; give one for each, or ids for all"),
        ({"eos_token_id": 3.7}, "eos_token_id must be a whole number from 0 to 60, not 3.7"),
        ({"eos_token_id": [(3,), (True,), (), ()]}, "eos_token_id must be a whole number from 0 to 60, not True"),
    ):
        with pytest.raises(ParaJaxError, match=message):
            complete(backbone, **{"tokenizer": tokenizer, "prompts": PROMPTS, **NEW, **wrong})


def test_limits_of_each_rows_own(backbone, tokenizer, plain):
    limits = [3, 16, 1, 7]
    ours = complete(backbone, tokenizer, PROMPTS, max_new_tokens=limits, eos_token_id=())
    assert [row.tokens for row in ours] == [row.tokens[:n] for row, n in zip(plain, limits, strict=True)]
    assert all(row.finish_reason == "length" for row in ours)
    # An eos token that is the last one allowed still is an end.
    eos = plain[0].tokens[2]
    last = complete(backbone, tokenizer, PROMPTS, max_new_tokens=[3, 16, 1, 7], eos_token_id=eos)[0]
    assert last.finish_reason == "stop" and last.tokens == plain[0].tokens[: plain[0].tokens.index(eos)]


def test_stop_strings_end_rows_and_are_cut_off(backbone, reference, tokenizer, plain):
    stops = [plain[0].text[4:7], plain[3].text[9]]
    ours = complete(backbone, tokenizer, PROMPTS, **GREEDY, stop=stops)
    for prompt, row, whole in zip(PROMPTS, ours, plain, strict=True):
        theirs = reference.generate([prompt], **NEW, stop_strings=stops, tokenizer=tokenizer)[0]
        assert row.tokens == theirs == whole.tokens[: len(theirs)]
        stopped = any(stop in whole.text for stop in stops)
        assert row.finish_reason == ("stop" if stopped else "length")
        assert whole.text.startswith(row.text) and not any(stop in row.text for stop in stops)
        assert stopped or row == whole
    assert {row.finish_reason for row in ours} == {"stop", "length"}
    assert ours[0].text == plain[0].text[:4]
    assert complete(backbone, tokenizer, PROMPTS, **GREEDY, stop=stops[0])[0] == ours[0]


def test_stop_strings_that_tokens_cut_anywhere(tiny):
    """On a whole vocabulary, where tokens are words and parts of words."""
    backbone, tokenizer = tiny
    whole = complete(backbone, tokenizer, SENTENCES, **GREEDY)
    pairs = [whole[0].text[at : at + size] for at in range(4, 14) for size in (2, 3, 6)]
    # Half a character is decoded to a mark which is none of the text's own.
    stops = [pair for pair in pairs if pair.isascii()]
    for stop in stops[:: len(stops) // 6]:
        ours = complete(backbone, tokenizer, SENTENCES, **GREEDY, stop=[stop])
        for row, free in zip(ours, whole, strict=True):
            assert row.text == free.text.partition(stop)[0]
            assert (row.finish_reason == "stop") == (stop in free.text)
            shorter = tokenizer.decode(row.tokens[:-1], skip_special_tokens=True)
            assert stop not in shorter


def test_batches_come_back_in_order(backbone, tokenizer, plain):
    three = [[*PROMPTS, PROMPTS[1], PROMPTS[2]][i] for i in (0, 1, 2, 3, 4, 5, 2)]
    wanted = [plain[i] for i in (0, 1, 2, 3, 1, 2, 2)]
    assert complete(backbone, tokenizer, three, **GREEDY, batch_size=4) == wanted
    limits = [1, 2, 3, 4, 5, 6, 7]
    ours = complete(backbone, tokenizer, three, max_new_tokens=limits, eos_token_id=(), batch_size=4)
    assert [row.tokens for row in ours] == [row.tokens[:n] for row, n in zip(wanted, limits, strict=True)]


def test_seeds_of_each_rows_own(backbone, tokenizer, plain):
    options = {**GREEDY, "temperature": 1.5}
    seeds = [11, 12, 11, 13]
    ours = complete(backbone, tokenizer, PROMPTS, **options, seed=seeds)
    order = [2, 0, 3, 1]
    moved = complete(backbone, tokenizer, [PROMPTS[i] for i in order], **options, seed=[seeds[i] for i in order])
    assert moved == [ours[i] for i in order]
    alone = complete(backbone, tokenizer, [PROMPTS[1]], **options, seed=12)
    assert alone == [ours[1]]
    twins = complete(backbone, tokenizer, [PROMPTS[0]] * 4, **options, seed=[1, 2, 1, 2**32 - 1])
    assert twins[0] == twins[2]
    assert len({row.text for row in twins}) == 3
    # One seed for all, and rows still do not draw alike where their logits are much the same.
    flat = complete(backbone, tokenizer, PROMPTS, **{**options, "temperature": 1e6}, seed=5)
    assert len({row.tokens[0] for row in flat}) > 1


def test_each_row_samples_by_its_own_settings(backbone, tokenizer, plain):
    settings = {
        "temperature": [0.0, 1.2, 1.2, 5.0],
        "top_k": [0, 1, 0, 0],
        "top_p": [0.1, 1.0, 0.9, 1e-6],
        "min_p": [0.0, 0.0, 0.02, 0.0],
        "seed": [1, 2, 3, 4],
    }
    ours = complete(backbone, tokenizer, PROMPTS, **GREEDY, **settings)
    assert [ours[0], ours[1], ours[3]] == [plain[0], plain[1], plain[3]]
    assert ours[2] != plain[2]


def test_a_mixed_batch_of_tenants_says_what_each_says_alone(backbone, tokenizer, plain):
    configs = {
        "acme": ParaConfig(r=4),
        "globex": ParaConfig(r=4),
        "initech": ParaConfig(r=3, pooling="mean", bias=True, target_modules=("k_proj", "down_proj")),
    }
    bank = random_bank(configs, backbone.config)
    prompts = [*PROMPTS, *PROMPTS]
    tenants = ["acme", None, "globex", "acme", "initech", "globex", None, "initech"]
    mixed = complete(backbone, tokenizer, prompts, bank=bank, tenants=tenants, **GREEDY)
    for prompt, tenant, row in zip(prompts, tenants, mixed, strict=True):
        assert complete(backbone, tokenizer, [prompt], bank=bank, tenants=[tenant], **GREEDY) == [row]
    assert [mixed[1], mixed[6]] == [plain[1], plain[2]]
    changed = [row.text != free.text for row, free in zip(mixed, [*plain, *plain], strict=True)]
    assert changed == [tenant is not None for tenant in tenants]
    drawn = complete(backbone, tokenizer, prompts, bank=bank, tenants=tenants, **GREEDY, temperature=1.0, seed=range(8))
    for i in (0, 4):
        one = {"bank": bank, "tenants": [tenants[i]], "seed": i}
        assert complete(backbone, tokenizer, [prompts[i]], **GREEDY, temperature=1.0, **one) == [drawn[i]]


def test_strings_and_ids_say_the_same_here_and_in_transformers(tiny):
    backbone, tokenizer = tiny
    ids = tokenizer(SENTENCES)["input_ids"]
    texts = generate(backbone, tokenizer, SENTENCES, **NEW)
    assert texts == generate(backbone, tokenizer, ids, **NEW)
    model = LlamaForCausalLM.from_pretrained(tiny_backbone_path(), dtype=torch.float32).eval()
    theirs = Reference(model).generate(ids, **NEW, eos_token_id=backbone.config.eos_token_ids)
    assert texts == tokenizer.batch_decode(theirs, skip_special_tokens=True)
    assert generate(backbone, tokenizer, []) == []
    assert complete(backbone, tokenizer, iter([np.array(ids[0])]), **NEW)[0].text


def test_the_whole_context_can_be_used(reference, backbone, tokenizer):
    """A prompt whose bucket is longer than the context, and new tokens up to its end."""
    prompt = [int(token) for token in np.random.default_rng(0).integers(2, 61, 100)]
    ours = complete(backbone, tokenizer, [prompt], max_new_tokens=28, eos_token_id=())
    assert [ours[0].tokens] == reference.generate([prompt], max_new_tokens=28)


def test_the_loop_writes_the_cache_where_it_lies():
    """The state is aliased to the program's result, and no second cache is kept."""
    for stacked in (False, True):
        backbone = random_backbone(3, stacked=stacked)
        rows = random_bank({"acme": ParaConfig(r=4)}, backbone.config).rows(["acme"] * 4)
        prompts = loop.Prompts(jnp.ones((4, 512), jnp.int32), jnp.ones((4, 512), bool))
        logits, state = jax.eval_shape(lambda b, p, r: loop.prefill(b, p, r, 1024), backbone, prompts, rows)
        ending = loop.Ending(jnp.full(4, 512, jnp.int32), jnp.full(4, -1, jnp.int32))
        program = loop.run.lower(backbone, logits, state, Sampler(), ending, prompts, 512).compile()
        cache = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((state.cache.keys, state.cache.values)))
        memory = program.memory_analysis()
        assert memory.alias_size_in_bytes >= cache
        # Stacked, a layer is copied out of the stack, which is half of this cache.
        assert memory.temp_size_in_bytes < cache * (0.75 if stacked else 0.25)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompts": "one string"}, "one string; give a list"),
        ({"prompts": [[2], ""]}, "row 1 is empty"),
        ({"prompts": [[2], []]}, "row 1 is empty"),
        ({"prompts": [[2], [61]]}, "row 1 has token 61, and the backbone's vocabulary has 61"),
        ({"prompts": [[0.5]]}, "row 0 is neither a string nor a list of token ids"),
        ({"prompts": [[2] * 100, [3]], "max_new_tokens": 30}, "up to 30 .* by 2 tokens, or .* to 28"),
        ({"prompts": [[2] * 130] * 3}, r"194 in total, .* context is 128 \(2 more rows exceed it\)"),
        ({"max_new_tokens": 0}, "max_new_tokens of row 0 is 0; it must be between 1 and"),
        ({"max_new_tokens": [4, 4]}, "max_new_tokens has 2 values for 4 rows"),
        ({"max_new_tokens": 4.5}, "max_new_tokens is 4.5; give a whole number"),
        ({"max_new_tokens": [[4], [4, 5]]}, "give a whole number for all rows"),
        ({"temperature": [0.0, 1.0, -1.0, 0.0]}, "temperature of row 2 is -1.0; it must be finite and at least 0"),
        ({"temperature": float("nan")}, "temperature of row 0 is nan"),
        ({"temperature": "hot"}, "temperature is 'hot'; give a number"),
        ({"top_k": -1}, "top_k of row 0 is -1"),
        ({"top_p": 1.5}, "top_p of row 0 is 1.5; it must be between 0 and 1"),
        ({"min_p": -0.5}, "min_p of row 0"),
        ({"repetition_penalty": 0}, "repetition_penalty of row 0 is 0; it must be finite and above 0"),
        ({"seed": -1}, "seed of row 0 is -1"),
        ({"seed": 2**32}, "between 0 and 2"),
        ({"eos_token_id": 61}, "eos_token_id must be a whole number from 0 to 60, not 61"),
        ({"stop": ""}, "stop is"),
        ({"batch_size": 0}, "batch_size must be a whole number from 1 to 2147483647, not 0"),
        ({"batch_size": 2.0}, "batch_size must be a whole number from 1 to 2147483647, not 2.0"),
        ({"num_beams": 2.0}, "num_beams must be a whole number from 1 to 2147483647, not 2.0"),
        ({"num_beams": True}, "num_beams must be a whole number from 1 to 2147483647, not True"),
        ({"length_penalty": float("nan")}, "length_penalty must be a finite number, not nan"),
        ({"length_penalty": "1"}, "length_penalty must be a finite number, not '1'"),
        ({"early_stopping": 1}, "unknown early_stopping 1"),
        ({"eos_token_id": 3.7}, "eos_token_id must be a whole number from 0 to 60, not 3.7"),
        ({"eos_token_id": [3, True]}, "eos_token_id must be a whole number from 0 to 60, not True"),
        ({"eos_token_id": "a"}, "eos_token_id must be a whole number from 0 to 60, not 'a'"),
        ({"eos_token_id": -1}, "eos_token_id must be a whole number from 0 to 60, not -1"),
        ({"temperature": 1e39}, r"temperature of row 0 is 1e\+39; it must be finite"),
        ({"temperature": True}, "temperature is True; give a number"),
        ({"max_new_tokens": True}, "max_new_tokens is True; give a whole number"),
        ({"max_new_tokens": 10**12}, r"is 1000000000000; it must be between 1 and 2\*\*31 - 1"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty of row 0 is inf; it must be finite and above 0"),
        ({"window": 0}, "window must be a whole number from 1 to 2147483647, not 0"),
        ({"skip": 5}, "skip must be a whole number from 0 to 4, not 5"),
        ({"skip": 1, "window": 2}, "skip must be a multiple of the window of 2 rows, not 1"),
        ({"stop": 5}, "stop is 5; give a string or a list of strings"),
        ({"stop": ["caf\ud800"]}, r"stop is not UTF-8: it has the lone surrogate U\+D800 as character 4"),
        ({"prompts": ["caf\udce9"]}, "the prompt of row 0 is not UTF-8: it has the byte 0xe9 as character 4"),
        ({"prompts": [None]}, "row 0 is neither a string nor a list of token ids"),
        ({"prompts": [5]}, "row 0 is neither a string nor a list of token ids"),
        ({"prompts": [[[2], [3, 4]]]}, "row 0 is neither a string nor a list of token ids"),
        ({"prompts": None}, "prompts is None; give a list"),
        ({"tenants": ["acme"] * 4}, "no bank; pass bank="),
        ({"bank": True}, "a bank was given but no tenants"),
        ({"bank": True, "tenants": "acme"}, "tenants is one string, 'acme'"),
        ({"bank": True, "tenants": ["acme"]}, "4 rows but 1 tenants"),
        ({"bank": True, "tenants": [None, None, None, "acne"], "batch_size": 1}, "did you mean 'acme'"),
    ],
)  # fmt: skip
def test_errors_say_what_is_wrong(backbone, tokenizer, wrong, message):
    if "bank" in wrong:
        wrong = {**wrong, "bank": random_bank({"acme": ParaConfig(r=4)}, backbone.config)}
    prompts = wrong.get("prompts", PROMPTS)
    options = {name: value for name, value in wrong.items() if name != "prompts"}
    with pytest.raises(ParaJaxError, match=message):
        complete(backbone, tokenizer, prompts, **options)


@pytest.mark.parametrize("num_beams", [1, 2])
def test_logits_that_are_no_numbers(backbone, tokenizer, num_beams, caplog):
    """The first prompt of the tenant is named, once for all batches; its texts end, and the others go on."""
    bank = random_bank({"good": ParaConfig(r=3), "huge": ParaConfig(r=3)}, backbone.config)
    huge = jax.tree.map(lambda x: x.at[1].mul(1e30), bank.groups[0].stack)
    bank = dataclasses.replace(bank, groups=(dataclasses.replace(bank.groups[0], stack=huge),))
    tenants, options = ["good", None, "huge", "huge"], {**GREEDY, "num_beams": num_beams}
    rows = complete(backbone, tokenizer, PROMPTS, bank=bank, tenants=tenants, batch_size=1, window=1, **options)
    assert caplog.messages == [
        "the logits of prompt 3 (of huge) are NaN or infinite, and its text ends there; run the "
        "prompt without an adapter; if its logits are finite, the adapter's weights are too large"
    ]
    assert rows[2:] == [Completion("", [], "error")] * 2
    only_good = random_bank({"good": ParaConfig(r=3)}, backbone.config)
    assert rows[:2] == complete(backbone, tokenizer, PROMPTS[:2], bank=only_good, tenants=tenants[:2], **options)
    assert len(caplog.messages) == 1


@pytest.mark.parametrize(("dtype", "way_out"), [("float32", "convert --check"), ("float16", "choose dtype float32")])
def test_logits_that_stop_being_numbers(tokenizer, dtype, way_out, caplog):
    backbone = jax.tree.map(lambda x: x.astype(dtype), random_backbone(3, tie_word_embeddings=False))
    (first,) = complete(backbone, tokenizer, PROMPTS[:1], max_new_tokens=1, eos_token_id=())[0].tokens
    assert first not in PROMPTS[0]
    damaged = jax.tree.map(lambda x: x, backbone)
    damaged.embed[...] = backbone.embed[...].at[first].set(jnp.inf)
    assert complete(damaged, tokenizer, PROMPTS[:1], max_new_tokens=1, eos_token_id=())[0].finish_reason == "length"
    assert not caplog.messages
    (row,) = complete(damaged, tokenizer, PROMPTS[:1], max_new_tokens=5, eos_token_id=())
    assert (row.tokens, row.finish_reason) == ([first], "error")
    assert "prompt 1 (without an adapter) are NaN or infinite" in caplog.text and way_out in caplog.text
