import re
from collections import Counter

import pytest

from para_jax.data.examples import encode_rows
from para_jax.data.quickstart import FEELINGS, PEOPLE, PLACES, quickstart_rows

TRAIN, HELD_OUT = quickstart_rows()


def split(prompt):
    """Feeling word, person, verb and place, read from the text alone."""
    how, person, verb, place = re.search(r"[Tt]he (\w+) (\w+) (will \w+|\w+) to the (\w+)", prompt).groups()
    return how, person, verb, place


def test_tenants_read_the_same_prompts_and_none_comes_twice():
    prompts = {name: [row["prompt"] for part in (TRAIN, HELD_OUT) for row in part[name]] for name in TRAIN}
    assert list(TRAIN) == list(HELD_OUT) == ["mood", "place", "question"]
    assert prompts["mood"] == prompts["place"] == prompts["question"]
    assert len(set(prompts["mood"])) == len(prompts["mood"]) == 1600


def test_held_out_pairs_of_feeling_and_person_are_never_trained_on():
    trained = {split(row["prompt"])[:2] for row in TRAIN["mood"]}
    held_out = {split(row["prompt"])[:2] for row in HELD_OUT["mood"]}
    assert not trained & held_out
    assert len(held_out) >= 40
    # Each word of them is, so that there is something to generalise from.
    assert {how for how, _ in trained} == {how for words in FEELINGS.values() for how in words}
    assert {person for _, person in trained} == set(PEOPLE)
    assert {split(row["prompt"])[3] for row in TRAIN["mood"]} == set(PLACES)


@pytest.mark.parametrize("part", [TRAIN, HELD_OUT])
def test_responses_are_right(part):
    past = {"walked", "went", "came", "ran", "returned", "hurried"}
    for mood, place, question in zip(*part.values(), strict=True):
        how, person, verb, where = split(mood["prompt"])
        assert how in FEELINGS[mood["response"]]
        assert place["response"] == f"the {where}"
        if verb.startswith("will "):
            assert question["response"] == f"Where will the {person} be?"
        else:
            assert question["response"] == f"Where {'was' if verb in past else 'is'} the {person}?"


def test_one_answer_for_all_rows_scores_little():
    for name, rows in HELD_OUT.items():
        assert Counter(row["response"] for row in rows).most_common(1)[0][1] < 0.4 * len(rows), name


def test_the_rows_depend_on_the_seed_alone():
    assert quickstart_rows() == (TRAIN, HELD_OUT)
    other, _ = quickstart_rows(seed=1)
    assert len({row["prompt"] for row in other["mood"]} & {row["prompt"] for row in TRAIN["mood"]}) < 100
    fewer, few = quickstart_rows(train=30, held_out=7)
    assert [len(rows) for rows in (*fewer.values(), *few.values())] == [30] * 3 + [7] * 3


def test_rows_are_short(tiny):
    _, tokenizer = tiny
    for part in (TRAIN, HELD_OUT):
        rows = [(name, row) for name in part for row in part[name]]
        assert max(map(len, encode_rows(rows, tokenizer, (tokenizer.eos_token_id,)))) <= 24
