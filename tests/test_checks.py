"""Numbers of a range and texts that UTF-8 can write, wherever they come from."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest

from para_jax import ParaJaxError
from para_jax.checks import Number, Whole, check_text
from para_jax.data.examples import Example
from para_jax.evaluation.evaluate import evaluate
from para_jax.training.settings import Settings
from tests.helpers import random_backbone

POSITIVE = Number(0, above=True)


@pytest.mark.parametrize(
    "value", [True, False, 2.0, 0, 9, -1, "3", None, math.nan, math.inf, [3], np.float32(3), 10**30]
)
def test_what_is_no_whole_number_of_the_range(value: object) -> None:
    with pytest.raises(ParaJaxError) as error:
        Whole(1, 8).check("rows", value)
    assert str(error.value) == f"rows must be a whole number from 1 to 8, not {value!r}"


@pytest.mark.parametrize("value", [True, 0, 0.0, -1, "1", None, math.nan, math.inf, -math.inf, 1e39, 1e-50, 1j, [1.0]])
def test_what_is_no_number_above_zero(value: object) -> None:
    with pytest.raises(ParaJaxError) as error:
        POSITIVE.check("lr", value)
    assert str(error.value) == f"lr must be a finite number above 0, not {value!r}"


def test_numbers_of_every_kind_are_pythons_own() -> None:
    for value in (3, np.int64(3), np.uint8(3)):
        assert Whole(1).check("rows", value) == 3 and type(Whole(1).check("rows", value)) is int
    for value in (3, 3.0, np.float32(3), np.int32(3)):
        assert POSITIVE.check("lr", value) == 3 and type(POSITIVE.check("lr", value)) is float
    assert [Number(0, 1).parse(text) for text in ("0", "1", "1e-45")] == [0.0, 1.0, 1e-45]
    settings = Settings(steps=np.int64(5), lr=np.float32(0.5))
    assert json.loads(json.dumps(dataclasses.asdict(settings)))["steps"] == 5


def test_text() -> None:
    check_text("--stop", "any text: é 𝄞 \0")
    for text, words in (
        ("a\ud800", "the lone surrogate U+D800 as character 2"),
        ("\udc80", "the byte 0x80 as character 1"),
    ):
        with pytest.raises(ParaJaxError) as error:
            check_text("--stop", text)
        assert str(error.value) == f"--stop is not UTF-8: it has {words}"


@pytest.mark.parametrize("epochs", [math.inf, math.nan, 0, -1.0, "3", 1e30])
def test_epochs(epochs: Any) -> None:
    with pytest.raises(
        ParaJaxError, match=r"epochs must be a|the number of steps of 1e\+30 epochs must be a whole number"
    ):
        Settings(epochs=epochs).of_rows(examples=100, rows=16)


@pytest.mark.parametrize("limit", [0, 2.5, True, "4", None])
def test_the_limit_of_an_evaluation(limit: object) -> None:
    row = dataclasses.replace(Example.of([5, 6], [7, 0]), prompt="say", response="yes")
    with pytest.raises(ParaJaxError, match="max_new_tokens must be a whole number from 1 to 2147483647, not"):
        evaluate(random_backbone(), None, {"a": [row]}, None, max_new_tokens=limit)  # type: ignore[arg-type]
