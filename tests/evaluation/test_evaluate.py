import copy
import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
from sacrebleu.metrics import BLEU

from para_jax import ParaConfig, ParaJaxError
from para_jax.data.examples import encode_rows
from para_jax.decoding.generate import complete
from para_jax.evaluation.choices import choice_log_likelihoods
from para_jax.evaluation.evaluate import evaluate
from tests.helpers import random_backbone, random_bank

PROMPTS = ["It was the best of times,", "Call me", "The old captain walked slowly to the church and", "She said", "No"]
NEW = 6
BATCH = 4  # Of all calls, so that they share their programs.
SMALL = {"max_new_tokens": NEW, "batch_size": BATCH}


@pytest.fixture(scope="module")
def world(tiny):
    """A random backbone with the shipped tokenizer, two random tenants, and each prompt answered by each, alone."""
    tokenizer = tiny[1]
    backbone = random_backbone(5, stacked=True, vocab_size=4096)
    bank = random_bank({"acme": ParaConfig(r=3), "globex": ParaConfig(r=3)}, backbone.config)
    answers = {}
    for tenant in ("acme", "globex", None):
        alone = [[p] * BATCH for p in PROMPTS]
        options = {"bank": bank, "tenants": [tenant] * BATCH, "max_new_tokens": NEW}
        answers[tenant] = [complete(backbone, tokenizer, p, **options)[0].text.strip() for p in alone]
    return backbone, tokenizer, bank, answers


def encode(world, rows):
    backbone, tokenizer, _, _ = world
    placed = [(f"rows:{i}", row) for i, row in enumerate(rows)]
    return encode_rows(placed, tokenizer, backbone.config.eos_token_ids, keep_texts=True)


def test_every_row_is_answered_by_its_own_tenant_and_scored_against_its_own_response(world):
    backbone, tokenizer, bank, answers = world
    assert all(a != b for a, b in zip(answers["acme"], answers["globex"], strict=True))
    right = {"acme": [0, 1, 3], "globex": [2, 4]}
    examples = {
        tenant: encode(
            world,
            [
                {"prompt": p, "response": answers[tenant][i] if i in right[tenant] else "the answer of nobody"}
                for i, p in enumerate(PROMPTS)
            ],
        )
        for tenant in right
    }
    seen = []
    scores = evaluate(backbone, tokenizer, examples, bank, **SMALL, progress=lambda *x: seen.append(x))
    for tenant, rows in right.items():
        assert [p["prediction"] for p in scores[tenant]["predictions"]] == answers[tenant]
        assert [p["prompt"] for p in scores[tenant]["predictions"]] == PROMPTS
        assert scores[tenant]["rows"] == 5
        assert scores[tenant]["exact_match"] == len(rows) / 5
        assert len(rows) / 5 <= scores[tenant]["token_f1"] < 1
        assert scores[tenant]["majority"] == max(1, 5 - len(rows)) / 5
        assert "bleu" not in scores[tenant]
        assert "choice_accuracy" not in scores[tenant]
    assert seen == [(4, 10), (8, 10), (10, 10)]
    assert json.loads(json.dumps(scores)) == scores


def test_without_a_bank_the_bare_backbone_answers(world):
    backbone, tokenizer, _, answers = world
    examples = {
        "acme": encode(world, [{"prompt": p, "response": a} for p, a in zip(PROMPTS, answers[None], strict=True)])
    }
    scores = evaluate(backbone, tokenizer, examples, None, **SMALL)
    assert scores["acme"]["exact_match"] == scores["acme"]["token_f1"] == 1.0


def test_references_take_the_place_of_the_response_and_make_bleu(world):
    backbone, tokenizer, bank, answers = world
    # The longest first: BLEU of less than four words is nothing.
    best = sorted(zip(answers["acme"], PROMPTS, strict=True), key=lambda one: -len(one[0].split()))[:4]
    given = [answer for answer, _ in best[:2]]
    references = [["nobody", given[0]], [given[1] + " and more words than that"], [], []]
    rows = [
        {"prompt": p, "response": "something else", "references": r} for (_, p), r in zip(best, references, strict=True)
    ]
    scores = evaluate(backbone, tokenizer, {"acme": encode(world, rows)}, bank, **SMALL)["acme"]
    assert scores["exact_match"] == pytest.approx(1 / 4)
    streams = [[references[0][0], references[1][0]], [references[0][1], None]]
    assert scores["bleu"] == pytest.approx(BLEU().corpus_score(given, streams).score)
    assert scores["bleu"] > 0


def test_the_likeliest_choice_is_the_one_that_counts(world):
    backbone, tokenizer, bank, _ = world
    choices = ["happy", "sad", "sad and lost"]
    rows = [{"prompt": p, "response": choices[i % 3], "choices": choices} for i, p in enumerate(PROMPTS)]
    examples = encode(world, [*rows, {"prompt": "Call me", "response": "sad"}])
    end = backbone.config.eos_token_ids[0]
    likelihoods = choice_log_likelihoods(
        backbone,
        [e.prompt_ids for e in examples[:5]],
        [[[*ids, end] for ids in e.choice_ids] for e in examples[:5]],
        bank=bank,
        tenants=["globex"] * 5,
        batch_size=BATCH,
    )
    best = [max(range(3), key=row.__getitem__) for row in likelihoods]
    scores = evaluate(backbone, tokenizer, {"globex": examples}, bank, **SMALL)["globex"]
    assert scores["choice_accuracy"] == sum(b == i % 3 for i, b in enumerate(best)) / 5
    assert [p["choice"] for p in scores["predictions"][:5]] == [choices[b] for b in best]
    assert [p["log_likelihoods"] for p in scores["predictions"][:5]] == [
        pytest.approx(row, rel=1e-5) for row in likelihoods
    ]
    assert "choice" not in scores["predictions"][5]


def test_nan_chooses_nothing(world, caplog):
    """Whatever the order of the choices; and what is written is JSON."""
    backbone, tokenizer, bank, _ = world
    nan = bank.replace("acme", jax.tree.map(lambda x: x * jnp.nan, bank["acme"]))
    for choices in (["happy", "sad"], ["sad", "happy"]):
        examples = encode(world, [{"prompt": "Call me", "response": "sad", "choices": choices}] * 2)
        both = evaluate(backbone, tokenizer, {"acme": examples, "globex": examples}, nan, **SMALL)
        scores = both["acme"]
        assert scores["choice_accuracy"] == 0.0
        assert [(p["choice"], p["log_likelihoods"]) for p in scores["predictions"]] == [(None, [None, None])] * 2
        assert "NaN" not in json.dumps(both) and None not in both["globex"]["predictions"][0]["log_likelihoods"]
        (record,) = [
            record.getMessage() for record in caplog.records if "log-likelihoods are NaN" in record.getMessage()
        ]
        assert record.startswith(
            "acme: log-likelihoods are NaN in 2 of 2 rows with choices, so no choice is the likeliest"
        )
        caplog.clear()


def test_tenants_with_tokenizers_and_end_tokens_of_their_own(world):
    """A row ends and is written as by its own tokenizer, whatever the others have."""
    backbone, tokenizer, bank, answers = world
    own = copy.deepcopy(tokenizer)
    first = tokenizer(answers["acme"][0], add_special_tokens=False)["input_ids"]
    own.eos_token = own.convert_ids_to_tokens(first[1])
    rows = [{"prompt": p, "response": "x"} for p in PROMPTS]
    examples = {name: encode(world, rows) for name in ("acme", "globex")}
    scores = evaluate(backbone, tokenizer, examples, bank, tokenizers={"acme": own}, **SMALL)
    assert [p["prediction"] for p in scores["globex"]["predictions"]] == answers["globex"]
    first_row = scores["acme"]["predictions"][0]
    assert first_row["finish_reason"] == "stop" and answers["acme"][0].startswith(first_row["prediction"])
    assert len(first_row["prediction"]) < len(answers["acme"][0])


def test_what_cannot_be_evaluated_is_named_before_anything_runs(world):
    backbone, tokenizer, bank, _ = world
    [row] = encode(world, [{"prompt": "Call me", "response": "sad", "choices": ["happy", "sad"]}])

    def attempt(examples, new=NEW):
        evaluate(backbone, tokenizer, examples, bank, max_new_tokens=new)

    with pytest.raises(ParaJaxError, match="did you mean 'acme'"):
        attempt({"acne": [row]})
    with pytest.raises(ParaJaxError, match="tenant 'globex' has no rows"):
        attempt({"acme": [row], "globex": []})
    with pytest.raises(ParaJaxError, match=r"rows:0: the response 'mad' is not one of its choices \['happy', 'sad'\]"):
        attempt({"acme": [dataclasses.replace(row, response="mad")]})
    with pytest.raises(ParaJaxError, match="rows:0: there is no response"):
        attempt({"acme": [dataclasses.replace(row, response="")]})
    with pytest.raises(ParaJaxError, match="rows:0: the example has no texts; read the rows with keep_texts=True"):
        attempt({"acme": [dataclasses.replace(row, prompt="", response="")]})
    with pytest.raises(
        ParaJaxError, match=r"rows:0: the prompt has 3 tokens, and the context without the new tokens holds 1"
    ):
        attempt({"acme": [row]}, new=backbone.config.max_position_embeddings - 1)
