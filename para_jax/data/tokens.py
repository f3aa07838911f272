"""Tokenizes turns: prompts, answers, and the end-of-text token of responses."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any

from para_jax.data.rows import Turn
from para_jax.errors import ParaJaxError

ALLOW = "remove it, or pass allow_special_tokens (--allow-special-tokens) if it is meant"


def tokenize(chunk: Sequence[Sequence[Turn]], tokenizer: Any) -> Iterator[tuple[Turn, list[int], list[list[int]]]]:
    """Yields for each turn of these rows the ids of its prompt, and those of its answer and of each choice.

    A prompt has the same tokens as when it is tokenized alone, as it is when served.
    """
    plain = [_texts(turn) for turns in chunk for turn in turns if not turn.chat]
    flat = iter(_ids(tokenizer, [text for texts in plain for text in texts], special=True))
    plain_ids = iter([[next(flat) for _ in texts] for texts in plain])
    chats = [[text for turn in turns for text in _texts(turn)] for turns in chunk if turns and turns[0].chat]
    chat_ids = iter([ids for group in prefix_ids(tokenizer, chats) for ids in group])
    for turns in chunk:
        for turn in turns:
            answers = (turn.answer, *turn.choices)
            prompt, *joined = [next(chat_ids) for _ in range(1 + len(answers))] if turn.chat else next(plain_ids)
            yield turn, prompt, [_suffix(tokenizer, prompt, *pair) for pair in zip(joined, answers, strict=True)]


def _texts(turn: Turn) -> list[str]:
    """The prompt of a turn, and the prompt followed by the answer and by each choice."""
    return [turn.prompt, *(turn.prompt + answer for answer in (turn.answer, *turn.choices))]


def _suffix(tokenizer: Any, prompt: list[int], joined: list[int], answer: str) -> list[int]:
    if joined[: len(prompt)] == prompt:
        return joined[len(prompt) :]
    # A token spans the border between prompt and answer.
    return _ids(tokenizer, [answer])[0]


def _ids(tokenizer: Any, texts: list[str], special: bool = False) -> list[list[int]]:
    if not texts:
        return []
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]
    return ids


def prefix_ids(tokenizer: Any, groups: Sequence[Sequence[str]]) -> list[list[list[int]]]:
    """The tokens of each text, computed quickly if the texts of a group share a prefix, like the turns of one chat.

    A tokenizer splits a text at special tokens first. So a prefix of the group's longest text has the tokens of the
    longest text up to its last special token, and only the rest is tokenized.

    >>> from para_jax import tiny_backbone_path
    >>> from para_jax.convert.tokenizer import load_tokenizer
    >>> tokenizer = load_tokenizer(tiny_backbone_path())
    >>> [[a, b]] = prefix_ids(tokenizer, [["One.<|endoftext|>Tw", "One.<|endoftext|>Two."]])
    >>> a == tokenizer("One.<|endoftext|>Tw")["input_ids"]
    True
    """
    cutters = _cutters(tokenizer)
    if not cutters:
        flat = iter(_ids(tokenizer, [text for group in groups for text in group]))
        return [[next(flat) for _ in group] for group in groups]
    longest = [max(group, key=len) for group in groups]
    if not longest:
        return []
    encoding = tokenizer(longest, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    heads: list[list[list[int]]] = []
    tails: list[str] = []
    for group, long, ids, spans in zip(groups, longest, encoding["input_ids"], encoding["offset_mapping"], strict=True):
        cuts = [(stop, start, k) for k, (token, (start, stop)) in enumerate(zip(ids, spans, strict=True))
                if token in cutters]  # fmt: skip
        group_heads = []
        for text in group:
            at = bisect_right(cuts, len(text), key=lambda cut: cut[0]) - 1
            _, start, k = cuts[at] if at >= 0 and long.startswith(text) else (0, 0, 0)
            group_heads.append(ids[:k])
            tails.append(text[start:])
        heads.append(group_heads)
    tail_ids = iter(_ids(tokenizer, tails))
    return [[head + next(tail_ids) for head in group_heads] for group_heads in heads]


def _cutters(tokenizer: Any) -> frozenset[int]:
    """The special tokens that split a text whatever surrounds them; none for a slow tokenizer."""
    if not getattr(tokenizer, "is_fast", False):
        return frozenset()
    return frozenset(
        i
        for i, token in tokenizer.added_tokens_decoder.items()
        if token.special and not (token.normalized or token.single_word or token.lstrip or token.rstrip)
    )


def with_end(turn: Turn, ids: list[int], tokenizer: Any, eos: Sequence[int], allow: bool) -> list[int]:
    """The tokens of a response up to its end-of-text token, which is appended if there is none.

    A chat template writes the end-of-text token itself, and what it writes after that is not learnt. Raises
    ParaJaxError for an end-of-text token in the text of the row, unless `allow`; then the full text is kept.
    """
    positions = [i for i, token in enumerate(ids) if token in eos]
    if turn.chat:
        ends = [tokenizer.decode([token]) for token in eos]
        inside = next((end for end in ends if end and any(end in text for text in turn.row_texts)), None)
        kept = ids[: positions[-1 if inside else 0] + 1] if positions else [*ids, *eos[:1]]
    else:
        inside = next((tokenizer.decode([ids[i]]) for i in positions if i < len(ids) - 1), None)
        kept = ids if positions and positions[-1] == len(ids) - 1 else [*ids, *eos[:1]]
    if inside and not allow:
        raise ParaJaxError(f"the response contains the end-of-text token {inside!r}; {ALLOW}")
    return kept
