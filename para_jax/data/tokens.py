"""Texts to tokens: prompts, what follows them, and how responses end."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any

from para_jax.data.rows import Turn
from para_jax.errors import ParaJaxError

ALLOW = "take it out, or pass allow_special_tokens (--allow-special-tokens) if it is meant"


def encoded(chunk: Sequence[Sequence[Turn]], tokenizer: Any) -> Iterator[tuple[Turn, list[int], list[list[int]]]]:
    """Every turn of these rows: its prompt, and what follows it, the answer and each choice.

    A prompt's tokens are those that it has alone, as it will have when served.
    """
    plain = [turn for own in chunk for turn in own if not turn.chat]
    texts = [[turn.prompt, *(turn.prompt + x for x in (turn.answer, *turn.choices))] for turn in plain]
    flat = iter(_ids(tokenizer, [text for some in texts for text in some], special=True))
    of_plain = iter([[next(flat) for _ in some] for some in texts])
    chats = [own for own in chunk if own and own[0].chat]
    groups = [[t for turn in own for t in (turn.prompt, *(turn.prompt + x for x in (turn.answer, *turn.choices)))]
              for own in chats]  # fmt: skip
    of_chats = iter([ids for group in prefix_ids(tokenizer, groups) for ids in group])
    for own in chunk:
        for turn in own:
            answers = (turn.answer, *turn.choices)
            prompt, *wholes = [next(of_chats) for _ in range(1 + len(answers))] if turn.chat else next(of_plain)
            yield turn, prompt, [_rest(tokenizer, prompt, *pair) for pair in zip(wholes, answers, strict=True)]


def _rest(tokenizer: Any, prompt: list[int], whole: list[int], answer: str) -> list[int]:
    if whole[: len(prompt)] == prompt:
        return whole[len(prompt) :]
    # The border is inside a token of the whole.
    return _ids(tokenizer, [answer])[0]


def _ids(tokenizer: Any, texts: list[str], special: bool = False) -> list[list[int]]:
    if not texts:
        return []
    found: list[list[int]] = tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]
    return found


def prefix_ids(tokenizer: Any, groups: Sequence[Sequence[str]]) -> list[list[list[int]]]:
    """The tokens of each text, where the texts of a group begin alike: prompts and answers of one chat.

    A tokenizer cuts a text at its special tokens first. So the tokens of a text that ends somewhere in the group's
    longest one are those of the longest up to a special token, and those of the rest from there.

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
    whole = tokenizer(longest, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    heads: list[list[list[int]]] = []
    tails: list[str] = []
    for group, long, ids, spans in zip(groups, longest, whole["input_ids"], whole["offset_mapping"], strict=True):
        cuts = [(stop, start, k) for k, (token, (start, stop)) in enumerate(zip(ids, spans, strict=True))
                if token in cutters]  # fmt: skip
        own = []
        for text in group:
            at = bisect_right(cuts, len(text), key=lambda cut: cut[0]) - 1
            _, start, k = cuts[at] if at >= 0 and long.startswith(text) else (0, 0, 0)
            own.append(ids[:k])
            tails.append(text[start:])
        heads.append(own)
    rest = iter(_ids(tokenizer, tails))
    return [[head + next(rest) for head in own] for own in heads]


def _cutters(tokenizer: Any) -> frozenset[int]:
    """The special tokens at which a text is cut wherever they stand, whatever is around them; none of a slow one."""
    if not getattr(tokenizer, "is_fast", False):
        return frozenset()
    return frozenset(
        i
        for i, token in tokenizer.added_tokens_decoder.items()
        if token.special and not (token.normalized or token.single_word or token.lstrip or token.rstrip)
    )


def ended(turn: Turn, ids: list[int], tokenizer: Any, eos: Sequence[int], allow: bool) -> list[int]:
    """A response's tokens with its end: an end-of-text token is put behind it if it has none.

    Of a chat, the template writes the end, and what it writes after that is not learnt. Raises ParaJaxError for an
    end-of-text token in the row's own text, unless `allow`; then all of the text is kept.
    """
    places = [i for i, token in enumerate(ids) if token in eos]
    if turn.chat:
        ends = [tokenizer.decode([token]) for token in eos]
        inside = next((end for end in ends if end and any(end in text for text in turn.said)), None)
        kept = ids[: places[-1 if inside else 0] + 1] if places else [*ids, *eos[:1]]
    else:
        inside = next((tokenizer.decode([ids[i]]) for i in places if i < len(ids) - 1), None)
        kept = ids if places and places[-1] == len(ids) - 1 else [*ids, *eos[:1]]
    if inside and not allow:
        raise ParaJaxError(f"the response has the end-of-text token {inside!r} in it; {ALLOW}")
    return kept
