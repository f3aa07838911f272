"""Stop strings, against a search through the decoded text."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from para_jax import ParaJaxError
from para_jax.decoding.stops import (
    LEAST_STATES,
    MATCHED,
    START,
    automaton,
    compose,
    stop_strings,
    token_bytes,
)


def first_match(found, ids) -> int | None:
    """After how many tokens the table says that a stop string is complete."""
    table, state = np.asarray(found.table_sv), START
    for count, token in enumerate(ids, 1):
        state = table[state, token]
        if state == MATCHED:
            return count
    return None


letters = st.text("ab", min_size=1, max_size=6)


@settings(max_examples=200, deadline=None)
@given(st.lists(letters, min_size=1, max_size=4), st.lists(st.text("abc", max_size=4), max_size=8))
def test_the_automaton_matches_as_soon_as_the_text_holds_a_stop_string(stops, pieces):
    encoded = [piece.encode() for piece in pieces]
    table = compose(automaton([stop.encode() for stop in stops]), encoded)
    state = START
    for count in range(len(pieces)):
        state = table[state, count]
        text = "".join(pieces[: count + 1])
        assert (state == MATCHED) == any(stop in text for stop in stops)


def first_to_end(text: str, stops) -> int | None:
    """Where the stop string begins that is complete first, the longest of several."""
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    return min(ends)[1] if ends else None


@pytest.mark.parametrize("stops", [["the"], [" a", "e "], ["\n", "ing"], ["ee", "eel"], ["é"]])
def test_texts_of_the_tiny_tokenizer(tokenizer, stops):
    """On random tokens stop strings span them, begin and end within them, and follow half characters."""
    found = stop_strings(tokenizer, stops, 4096)
    rng = np.random.default_rng(0)
    e = tokenizer("é")["input_ids"]
    matched = 0
    for _ in range(60):
        ids = rng.integers(2, 4096, 40).tolist()
        at = int(rng.integers(40))
        ids[at:at] = e
        texts = [tokenizer.decode(ids[:count]) for count in range(1, len(ids) + 1)]
        wanted = next((n for n, text in enumerate(texts, 1) if any(stop in text for stop in stops)), None)
        assert first_match(found, ids) == wanted
        if wanted is not None:
            matched += 1
            text = tokenizer.decode(ids[:wanted])
            assert found.cut(text, ids[:wanted]) == text[: first_to_end(text, stops)]
    assert matched > 10


def test_a_stop_string_that_overlaps_itself(tokenizer):
    found = stop_strings(tokenizer, ["aab"], 4096)
    a, b, aa = (tokenizer(text)["input_ids"] for text in ("a", "b", "aa"))
    for ids in (a + a + a + b, aa + a + b, a + aa + b):
        assert first_match(found, ids) == len(ids)
        assert found.cut("aaab", ids) == "a"


def test_a_special_token_is_found_by_its_text_and_is_no_part_of_the_text(tokenizer):
    hi = tokenizer("hi")["input_ids"]
    found = stop_strings(tokenizer, ["<|endoftext|>"], 4096)
    assert first_match(found, [*hi, 0]) == len(hi) + 1
    assert found.cut("hi", [*hi, 0]) == "hi"
    # One that spans a special token and what follows: only the latter is in the text, and it is cut off.
    found = stop_strings(tokenizer, ["|>!"], 4096)
    ids = [*hi, 1, *tokenizer("!")["input_ids"]]
    assert first_match(found, ids) == len(ids)
    assert found.cut(tokenizer.decode(ids, skip_special_tokens=True), ids) == "hi"


def test_other_stop_strings_have_a_table_of_the_same_shape(tokenizer):
    shapes = {stop_strings(tokenizer, stops, 4096).table_sv.shape for stops in (["a"], ["\n\nUser:", "###"])}
    assert shapes == {(LEAST_STATES, 4096)}
    assert stop_strings(tokenizer, ["x" * 20], 4100).table_sv.shape == (2 * LEAST_STATES, 4100)
    assert stop_strings(tokenizer, ["a"], 4096) is stop_strings(tokenizer, ["a"], 4096)


def sentencepiece_like() -> PreTrainedTokenizerFast:
    vocab = ["▁", "h", "i", "▁hi", "hi", "<0x0A>", "<0xC3>", "<0xA9>", "é", "▁the", "re", ":", "▁▁"]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(vocab)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken("</s>")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_a_sentencepiece_like_vocabulary():
    tokenizer = sentencepiece_like()
    pieces, special = token_bytes(tokenizer, len(tokenizer))
    assert pieces[3] == b" hi" and pieces[5] == b"\n" and pieces[12] == b"  " and special == {13}
    stops = ["i there", "\n", "é:"]
    found = stop_strings(tokenizer, stops, 16)
    for ids, text in (
        ([3, 9, 10, 11], "h"),  # The decoder drops the first space.
        ([9, 10, 3, 9, 10], "there h"),
        ([4, 4, 5], "hihi"),
        ([3, 6, 7, 11], "hi"),  # é, once spelled in bytes and once a piece.
        ([3, 8, 11], "hi"),
    ):
        count = first_match(found, ids)
        assert count is not None
        assert found.cut(tokenizer.decode(ids[:count], skip_special_tokens=True), ids[:count]) == text
    assert first_match(found, [3, 4, 9, 11, 8, 13, 15]) is None
    starts = stop_strings(tokenizer, [" hi"], 16)
    assert first_match(starts, [3]) == 1 and starts.cut("hi", [3]) == ""


def test_other_tokenizers_are_refused():
    other = Tokenizer(models.WordPiece({"[UNK]": 0, "##a": 1}, unk_token="[UNK]"))
    other.decoder = decoders.WordPiece()
    with pytest.raises(ParaJaxError, match="WordPiece"):
        stop_strings(PreTrainedTokenizerFast(tokenizer_object=other), ["a"], 2)
    with pytest.raises(ParaJaxError, match="fast tokenizer"):
        stop_strings("no tokenizer", ["a"], 2)


def test_stop_strings_that_are_none(tokenizer):
    assert stop_strings(tokenizer, (), 4096) is None
    for wrong in ([""], ["a", ""], [3]):
        with pytest.raises(ParaJaxError, match="at least one character"):
            stop_strings(tokenizer, wrong, 4096)
    with pytest.raises(ParaJaxError, match="2000 bytes"):
        stop_strings(tokenizer, ["a" * 2000], 4096)
