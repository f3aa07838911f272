"""Stop strings, found exactly and on the device. `Ending` in decoding/loop.py has all rules that end a row.

An automaton over the bytes of the stop strings (Aho and Corasick, 1975) is composed with the bytes of every token into
a table (state, token) -> next state. Each row has a state, and one lookup per step finds a complete stop string,
however it is split into tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import numpy as np

from para_jax.annotations import Int16
from para_jax.checks import check_text
from para_jax.errors import ParaJaxError

START, MATCHED = 0, 1
# The number of states is a power of two, so that other stop strings share the program.
LEAST_STATES, MOST_STATES = 16, 1024


@dataclass(frozen=True)
class StopStrings:
    """Stop strings of one tokenizer.

    Attributes:
      stops: the strings, in UTF-8.
      pieces: the bytes of each token.
      hidden: the special tokens, which are not in the text of a completion.
      table_sv: int16 on the device, the state after a token. MATCHED is final.
    """

    stops: tuple[bytes, ...]
    pieces: list[bytes]
    hidden: frozenset[int]
    table_sv: jax.Array

    def cut(self, text: str, ids: Sequence[int]) -> str:
        """The text of these tokens up to the start of the stop string that is completed first.

        If several end at the same byte, the longest counts. The text is cut from its end, because a decoder may change
        its beginning (many drop the first space).
        """
        raw = b"".join(self.pieces[i] for i in ids)
        found = [(at + len(stop), at) for stop in self.stops if (at := raw.find(stop)) >= 0]
        if not found:
            return text
        _, start = min(found)
        tail, end = b"", len(raw)
        for i in reversed(ids):
            begin = end - len(self.pieces[i])
            if end <= start:
                break
            if i not in self.hidden:
                tail = raw[max(begin, start) : end] + tail
            end = begin
        return text[: max(0, len(text) - len(tail.decode("utf-8", "replace")))]


def stop_strings(tokenizer: Any, stops: Sequence[str], vocab_size: int) -> StopStrings | None:
    """Builds the stop strings, with a cache; None if there are none.

    Args:
      tokenizer: a fast transformers tokenizer with a byte-level or sentencepiece-like vocabulary.
      stops: a string or several.
      vocab_size: the backbone's vocabulary size, which may be larger than the tokenizer's.

    Raises ParaJaxError for a stop string that is empty or not UTF-8, and for another kind of tokenizer.

    >>> from para_jax import tiny_backbone_path
    >>> from transformers import AutoTokenizer
    >>> tokenizer = AutoTokenizer.from_pretrained(tiny_backbone_path())
    >>> found = stop_strings(tokenizer, ["the"], 4096)
    >>> state = START
    >>> for token in tokenizer("o")["input_ids"] + tokenizer("there")["input_ids"]:
    ...     state = found.table_sv[state, token]
    >>> int(state) == MATCHED
    True
    """
    if not isinstance(stops, Sequence):
        raise ParaJaxError(f"stop is {stops!r}; give a string or a list of strings")
    stops = (stops,) if isinstance(stops, str) else tuple(stops)
    if not stops:
        return None
    if not all(isinstance(stop, str) and stop for stop in stops):
        raise ParaJaxError(f"stop is {list(stops)!r}; each entry must be a string of at least one character")
    for stop in stops:
        check_text("stop", stop)
    # The length is a part of the cache key, because tokens may be added to a tokenizer later.
    return _build(tokenizer, len(tokenizer), tuple(dict.fromkeys(stops)), vocab_size)


@lru_cache(maxsize=8)
def _build(tokenizer: Any, _tokens: int, stops: tuple[str, ...], vocab_size: int) -> StopStrings:
    pieces, hidden = token_bytes(tokenizer, len(tokenizer))
    pieces = (pieces + [b""] * (vocab_size - len(pieces)))[:vocab_size]
    encoded = tuple(stop.encode() for stop in stops)
    return StopStrings(encoded, pieces, hidden, jax.device_put(compose(automaton(encoded), pieces)))


def automaton(stops: Sequence[bytes]) -> Int16[np.ndarray, "s 256"]:
    """The next state for every state and byte, int16.

    Except for MATCHED, a state is a prefix of a stop string: the longest one that is a suffix of the text so far.

    >>> step = automaton([b"aab"])
    >>> state = START
    >>> for byte in b"aaab":
    ...     state = step[state, byte]
    >>> int(state) == MATCHED
    True
    """
    prefixes = sorted({stop[:end] for stop in stops for end in range(len(stop))}, key=len)
    state = {prefix: i + 1 if i else START for i, prefix in enumerate(prefixes)}
    size = LEAST_STATES
    while size < len(prefixes) + 1:
        size *= 2
    if size > MOST_STATES:
        raise ParaJaxError(
            f"the stop strings have {len(prefixes)} bytes in total, and up to {MOST_STATES - 1} are supported; "
            "give fewer of them"
        )
    step = np.zeros((size, 256), np.int16)
    step[MATCHED] = MATCHED
    for prefix in prefixes:
        for byte in {byte for stop in stops for byte in stop}:
            text = prefix + bytes([byte])
            if text.endswith(tuple(stops)):
                step[state[prefix], byte] = MATCHED
            else:
                endings = (text[begin:] for begin in range(len(text) + 1))
                step[state[prefix], byte] = next(state[ending] for ending in endings if ending in state)
    return step


def compose(step: Int16[np.ndarray, "s 256"], pieces: Sequence[bytes]) -> Int16[np.ndarray, "s v"]:
    """The next state for every state and token.

    Pass i processes byte i of all tokens at once. Tokens are sorted by length, so that a pass covers only the tokens
    that have such a byte.
    """
    length_v = np.array([len(piece) for piece in pieces])
    order_v = np.argsort(-length_v, kind="stable")
    text = np.frombuffer(b"".join(pieces), np.uint8)
    begin_v = (np.cumsum(length_v) - length_v)[order_v]
    longer_n = np.searchsorted(-length_v[order_v], -np.arange(length_v.max(initial=0)))
    state = np.repeat(np.arange(len(step), dtype=np.int16)[:, None], len(pieces), axis=1)
    for place, n in enumerate(longer_n):
        state[:, :n] = step[state[:, :n], text[begin_v[:n] + place]]
    table = np.empty_like(state)
    table[:, order_v] = state
    return table


def token_bytes(tokenizer: Any, size: int) -> tuple[list[bytes], frozenset[int]]:
    """The bytes that each token adds to a text, and the special tokens.

    They follow from the tokenizer's decoder: a byte-level one writes bytes as printable characters; a
    sentencepiece-like one marks spaces, and writes bytes without a piece as <0x0A>.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ParaJaxError("stop strings need a fast tokenizer of transformers; without one, give eos_token_id instead")
    spec = json.loads(backend.to_str())
    decoder = spec["decoder"] or {"type": "none"}
    parts = {part["type"]: part for part in decoder.get("decoders", [decoder])}
    if "ByteLevel" in parts:
        byte_of = {char: byte for byte, char in _printable_bytes().items()}

        def to_bytes(piece: str) -> bytes:
            # Added tokens are plain text, and may have characters that do not stand for a byte.
            is_bytes = all(char in byte_of for char in piece)
            return bytes(byte_of[char] for char in piece) if is_bytes else piece.encode()

    elif "Replace" in parts or "Metaspace" in parts:
        mark = parts["Replace"]["pattern"]["String"] if "Replace" in parts else parts["Metaspace"]["replacement"]
        space = parts["Replace"]["content"] if "Replace" in parts else " "
        spelled = re.compile("<0x([0-9A-F]{2})>") if "ByteFallback" in parts else re.compile("(?!)")

        def to_bytes(piece: str) -> bytes:
            byte = spelled.fullmatch(piece)
            return bytes.fromhex(byte[1]) if byte else piece.replace(mark, space).encode()

    else:
        raise ParaJaxError(
            "stop strings are supported for byte-level and sentencepiece-like tokenizers, and the decoder of "
            f"this one is of type {decoder['type']}; give eos_token_id instead"
        )
    pieces = [b""] * size
    for piece, i in backend.get_vocab(with_added_tokens=True).items():
        if i >= len(pieces):
            pieces += [b""] * (i + 1 - len(pieces))
        pieces[i] = to_bytes(piece)
    return pieces, frozenset(token["id"] for token in spec["added_tokens"] if token["special"])


def _printable_bytes() -> dict[int, str]:
    """The character that stands for each byte in a byte-level vocabulary (Radford et al., GPT-2, 2019).

    Printable Latin-1 characters stand for themselves; the other bytes, in order, are the characters from 256 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
