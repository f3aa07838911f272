"""Rows in a few arrays: the same examples, however they are sliced, pickled or told to other processes."""

from __future__ import annotations

import pickle
from dataclasses import fields

import numpy as np
import pytest

from para_jax import ParaJaxError
from para_jax.data import examples as encoding
from para_jax.data.buffers import Example, Examples
from para_jax.data.examples import check_ids, encode_rows
from para_jax.training.folder import fingerprint

ROWS = [
    Example.of([5, 6, 7], [8, 9, 0], place="a.jsonl:1"),
    Example.of([5], [], place="a.jsonl:20"),
    Example.of([3, 4], [1], "three", "one", references=("1",), choices=("1", "2"), choice_ids=((1,), (2,)), place="b"),
    Example.of(range(1, 9), (2, 0), place="hf:x:train row 0"),
]


def same(a: Example, b: Example) -> bool:
    return all(np.array_equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(Example))


def test_an_ordinary_row() -> None:
    e = ROWS[0]
    assert e.ids.dtype == e.targets.dtype == np.int32
    assert e.ids.tolist() == [5, 6, 7, 8, 9] and e.targets.tolist() == [-1, -1, 8, 9, 0]
    assert e.prompt_ids.tolist() == [5, 6, 7] and e.response_ids.tolist() == [8, 9, 0] and len(e) == 6
    assert [len(e) for e in ROWS[1:3]] == [1, 3]
    with pytest.raises(ParaJaxError, match="the prompt has no tokens"):
        Example.of([], [1])


@pytest.mark.parametrize(
    "part", [slice(None), slice(1, 3), slice(None, None, -1), slice(0, None, 2), slice(2, 2)], ids=str
)
def test_slices_and_pickles_have_the_same_rows(part: slice) -> None:
    wanted, found = ROWS[part], Examples.of(ROWS)[part]
    for some in (found, pickle.loads(pickle.dumps(found)), Examples.of(list(found))):
        assert len(some) == len(wanted) and all(map(same, some, wanted))
        assert some.lengths.tolist() == [e.ids.size for e in wanted]
        assert some.target_counts.tolist() == [e.response_ids.size for e in wanted]
    assert fingerprint(found) == fingerprint(wanted)
    assert part == slice(None) or fingerprint(found) != fingerprint(ROWS)


def test_rows_are_views_and_a_pickle_is_no_larger_than_its_rows() -> None:
    rows = Examples.of(Example.of(range(1, 1001), [0]) for _ in range(50))
    assert rows.texts is None and rows[7].ids.base is not None and np.shares_memory(rows[7].ids, rows.ids)
    assert len(pickle.dumps(rows)) < 8 * rows.ids.size + 2000
    assert len(pickle.dumps(rows[:1])) < 10_000
    with pytest.raises(IndexError):
        rows[50]


def test_what_is_hashed() -> None:
    one = fingerprint(ROWS)
    for other in (
        [Example.of([5, 6, 7], [8, 9, 1]), *ROWS[1:]],
        [Example.of([5, 6, 7, 8], [9, 0]), *ROWS[1:]],
        ROWS[::-1],
        [*ROWS, ROWS[1]],
    ):
        assert fingerprint(other) != one


def test_chunks_are_no_part_of_the_result(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "captain"}] * 2
    rows = [(f"x:{i}", {"prompt": "word " * i + "end:", "response": "yes"}) for i in range(20)]
    rows.insert(7, ("x:chat", {"messages": chat}))
    at_once = encode_rows(rows, tiny[1], (0,), keep_texts=True)
    monkeypatch.setattr(encoding, "CHUNK", 30)
    assert all(map(same, at_once, encode_rows(rows, tiny[1], (0,), keep_texts=True)))
    with pytest.raises(ParaJaxError, match=r"x:bad: no text(.|\n)*y:bad: no text"):
        encode_rows([("x:bad", {}), *rows, ("y:bad", {})], tiny[1], (0,))


def test_texts_are_kept_where_they_are_asked_for(tiny) -> None:
    rows = [("x:1", {"prompt": "Kind:", "response": "a", "choices": ["a", "b"], "references": ["a"]})]
    bare, full = (encode_rows(rows, tiny[1], (0,), keep_texts=keep) for keep in (False, True))
    assert bare.texts is None and bare[0].place == "x:1" and not bare[0].choice_ids
    assert full[0].prompt == "Kind:" and full[0].choices == ("a", "b") and full[0].references == ("a",)
    assert fingerprint(bare) == fingerprint(full)


def test_a_token_of_a_choice_beyond_the_vocabulary() -> None:
    check_ids(Examples.of(ROWS), 10)
    wide = Example.of([1], [2], "p", "r", choices=("x",), choice_ids=((99,),), place="c:3")
    with pytest.raises(ParaJaxError, match="c:3: token 99 is beyond the backbone's vocabulary of 10"):
        check_ids(Examples.of([*ROWS, wide]), 10)
