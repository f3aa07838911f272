"""Validates values: numbers in a range, and text that is valid UTF-8."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from para_jax.errors import ParaJaxError

INT32, UINT32 = 2**31 - 1, 2**32 - 1


@dataclass(frozen=True)
class Whole:
    """Integers from `least` to `most`, inclusive. By default they fit int32, like counts on a device.

    >>> Whole(1).check("rows", 16), Whole(1).parse("16")
    (16, 16)
    >>> Whole(1, 8).check("rows", True)
    Traceback (most recent call last):
    ...
    para_jax.errors.ParaJaxError: rows must be a whole number from 1 to 8, not True
    """

    least: int
    most: int = INT32

    def __str__(self) -> str:
        return f"a whole number from {self.least} to {self.most}"

    def check(self, name: str, value: Any) -> int:
        """The value as an int. Raises ParaJaxError if it is out of range or not an integer, including bools and 2.0."""
        if isinstance(value, bool) or not isinstance(value, Integral) or not self.least <= int(value) <= self.most:
            raise ParaJaxError(f"{name} must be {self}, not {value!r}")
        return int(value)

    def parse(self, text: str) -> int:
        """Parses a number. Raises ValueError, with the range, for an invalid text."""
        try:
            return self.check("", int(text))
        except ValueError:
            raise ValueError(f"must be {self}, not {text!r}") from None


@dataclass(frozen=True)
class Number:
    """Numbers that are finite in float32, from `least` to `most`; `above` excludes `least`.

    >>> Number(0, above=True).check("lr", 1e-3), Number(0, 1).parse("0.5")
    (0.001, 0.5)
    >>> Number(0, above=True).check("lr", float("nan"))
    Traceback (most recent call last):
    ...
    para_jax.errors.ParaJaxError: lr must be a finite number above 0, not nan
    """

    least: float = -math.inf
    most: float = math.inf
    above: bool = False

    def __str__(self) -> str:
        if math.isinf(self.least):
            return "a finite number"
        if math.isinf(self.most):
            return f"a finite number {'above' if self.above else 'from'} {self.least:g}"
        return f"a number {'above' if self.above else 'from'} {self.least:g} {'up ' * self.above}to {self.most:g}"

    def check(self, name: str, value: Any) -> float:
        """The value as a float. Raises ParaJaxError if it is out of range or not a number, including bools."""
        if isinstance(value, bool) or not isinstance(value, Real) or not self._has(float(value)):
            raise ParaJaxError(f"{name} must be {self}, not {value!r}")
        return float(value)

    def _has(self, value: float) -> bool:
        try:
            (rounded,) = struct.unpack("f", struct.pack("f", value))
        except OverflowError:
            return False
        inside = value <= self.most and (rounded > self.least if self.above else value >= self.least)
        return inside and math.isfinite(rounded)

    def parse(self, text: str) -> float:
        """Parses a number. Raises ValueError, with the range, for an invalid text."""
        try:
            return self.check("", float(text))
        except ValueError:
            raise ValueError(f"must be {self}, not {text!r}") from None


COUNT = Whole(1)
KEEP = Whole(2)  # checkpoints: a machine that dies may lose the newest
SEED = Whole(0, UINT32)
POSITIVE = Number(0, above=True)


def check_text(name: str, text: str) -> None:
    r"""Raises ParaJaxError for a text with lone surrogates, which UTF-8 cannot encode.

    Command-line arguments have one for each byte that is not UTF-8, and JSON can escape one.

    >>> check_text("--prompt", "caf\udce9")
    Traceback (most recent call last):
    ...
    para_jax.errors.ParaJaxError: --prompt is not UTF-8: it has the byte 0xe9 as character 4
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        what = f"the byte {code - 0xDC00:#x}" if 0xDC80 <= code <= 0xDCFF else f"the lone surrogate U+{code:X}"
        raise ParaJaxError(f"{name} is not UTF-8: it has {what} as character {error.start + 1}") from None
