"""What rows are in tokens.

A response is an answer: a space is put between it and a prompt that does not end in white space. A completion goes on
from its prompt to the letter. Messages go through the tokenizer's chat template; every assistant turn is an example of
its own, with all before it as the prompt, because an adapter is prepared once for each prompt. For methods that do not
read the prompt, all turns of a chat can be one example. Where the template marks what is generated, the response ends
there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from para_jax.data.buffers import Example, Examples
from para_jax.data.chats import in_one_pass
from para_jax.data.lengths import Cuts, Letters, check_sizes
from para_jax.data.rows import Turn, of_tenant, turns
from para_jax.data.sources import Rows, read_rows
from para_jax.data.table import raise_problems
from para_jax.data.templates import Template
from para_jax.data.tokens import encoded, ended
from para_jax.errors import ParaJaxError
from para_jax.progress import Pace

# Letters that are made tokens in one call: one call for each row takes many times as long, and of all rows at once
# the tokens would be Python's ints at one time.
CHUNK = 2**20


def read_examples(
    source: str | Path,
    tokenizer: Any,
    eos_token_ids: Sequence[int],
    max_length: int | None = None,
    *,
    tenant: str | None = None,
    template: Template | str | None = None,
    data_dir: str | Path | None = None,
    **options: Any,
) -> Examples:
    """The examples of a JSONL file or another source of `read_rows`.

    Args:
      tokenizer: a transformers tokenizer.
      eos_token_ids: the ids that end a text; the first one is put after every response without one.
      max_length: the most tokens a prompt and its response may have together.
      tenant: whose rows these are. Rows that name another tenant are refused, and so are rows of several tenants.
      template, data_dir: as for `read_rows`.
      options: as for `encode_rows`.

    Raises ParaJaxError, with file and line or row, for a malformed line, a key that is unknown or goes unused, an empty
    prompt or response, or rows longer than `max_length` (how many, and the longest); and what `read_rows` raises.
    """
    rows = of_tenant(read_rows(source, template, data_dir), tenant)
    return encode_rows(_let_go(rows), tokenizer, eos_token_ids, max_length, total=len(rows), **options)


def encode_rows(
    rows: Iterable[tuple[str, Mapping[str, Any]]],
    tokenizer: Any,
    eos_token_ids: Sequence[int],
    max_length: int | None = None,
    *,
    truncate: bool = False,
    need_response: bool = True,
    keep_texts: bool = False,
    one_pass: bool = False,
    allow_special_tokens: bool = False,
    total: int | None = None,
    show: Callable[[str], None] | None = None,
) -> Examples:
    """`read_examples` of rows that are in memory, each with its place.

    Args:
      truncate: cut what is longer than `max_length` instead of refusing it: the prompt at its beginning. A row whose
        response leaves less than a quarter of `max_length` for the prompt is left out. A warning of `logging` says how
        many rows were cut, and left out.
      need_response: whether a row without a response is an error.
      keep_texts: whether examples have their texts and choices beside their tokens, as `evaluate` needs them.
      one_pass: make one example of all assistant turns of a chat, where it predicts the same tokens from the same
        tokens before them (`chats.in_one_pass`). For methods whose config has `reads_prompt` False.
      allow_special_tokens: whether a response may have an end-of-text token in its text.
      total: how many rows there are, for `show`, which takes a line of progress every few seconds.

    >>> from para_jax import tiny_backbone_path
    >>> from para_jax.convert.tokenizer import load_tokenizer
    >>> tokenizer = load_tokenizer(tiny_backbone_path())
    >>> rows = encode_rows([("row 1", {"prompt": "Who sat?", "response": "The cat."})], tokenizer, eos_token_ids=(0,))
    >>> tokenizer.decode(rows[0].response_ids), rows[0].place
    (' The cat.<|endoftext|>', 'row 1')
    """
    if one_pass and keep_texts:
        raise ParaJaxError("texts are of one turn and one_pass makes one example of all; leave out one of the two")
    eos = tuple(eos_token_ids)
    cuts = Cuts(max_length, tokenizer.bos_token_id) if truncate and max_length is not None else None
    # A text of more letters is too long in any case, and need not be made tokens to know it.
    most = None if max_length is None or truncate else Letters(tokenizer, max_length)

    def made() -> Iterator[Example]:
        for chunk in _chunks(rows, tokenizer, need_response, keep_texts, most, total, show):
            found = iter(_examples(chunk, tokenizer, eos, keep_texts, allow_special_tokens))
            for own in chunk:
                apart = list(islice(found, len(own)))
                whole = in_one_pass(apart) if one_pass and len(apart) > 1 else None
                if cuts is None:
                    yield from apart if whole is None else [whole]
                else:
                    some = apart if whole is None or len(whole) > cuts.limit else [whole]
                    yield from (short for e in some if (short := cuts.cut(e)) is not None)

    examples = Examples.of(made())
    if cuts is not None:
        cuts.say(len(examples))
    if max_length is not None:
        check_sizes(examples, max_length)
    return examples


def check_ids(examples: Iterable[Example], vocab_size: int) -> None:
    """Raises ParaJaxError for the first row with a token that the backbone has no embedding of."""
    if isinstance(examples, Examples) and examples.texts is None and examples.highest_token < vocab_size:
        return
    for e in examples:
        own = max(e.ids.max(initial=-1), e.targets.max(initial=-1))
        highest = max((int(own), *(x for ids in e.choice_ids for x in ids)))
        if highest >= vocab_size:
            raise ParaJaxError(
                f"{e.place or 'a row'}: token {highest} is beyond the backbone's vocabulary of {vocab_size}; take what "
                "it stands for out of the row, or the tokenizer is another model's"
            )


def _let_go(rows: Rows) -> Iterator[Any]:
    """The rows of a list, each of which leaves it, so that texts make room for tokens."""
    rows.reverse()
    while rows:
        yield rows.pop()


def _chunks(
    rows: Iterable[tuple[str, Mapping[str, Any]]],
    tokenizer: Any,
    need_response: bool,
    choices: bool,
    most: Letters | None,
    total: int | None,
    show: Callable[[str], None] | None,
) -> Iterator[list[list[Turn]]]:
    """The turns of each row, some rows at a time. Raises ParaJaxError for all bad rows together."""
    chunk: list[list[Turn]] = []
    problems: list[str] = []
    letters = 0
    pace = Pace("rows are read", show)
    for done, (place, row) in enumerate(rows):
        try:
            own = [t if choices else t._replace(choices=()) for t in turns(place, row, tokenizer, need_response)]
            if most is not None:
                most.check(own)
        except ParaJaxError as error:
            problems.append(f"{place}: {error}")
            own = []
        # Turns of one chat begin alike, and only the longest is made tokens as a whole.
        more = max((len(turn.prompt) + len(turn.answer) for turn in own), default=0)
        if show is not None:
            pace(done, total)
            if more > 2 * CHUNK:
                show(f"{place}: {more:,} letters are made tokens")
        if problems:
            continue
        chunk.append(own)
        letters += more
        if letters > CHUNK:
            yield chunk
            chunk, letters = [], 0
    raise_problems(problems)
    yield chunk


def _examples(
    chunk: Sequence[Sequence[Turn]], tokenizer: Any, eos: tuple[int, ...], keep_texts: bool, allow: bool
) -> list[Example]:
    """Every turn of these rows as an example. Raises ParaJaxError for all bad ones together."""
    made, problems = [], []
    for turn, prompt_ids, (response_ids, *choice_ids) in encoded(chunk, tokenizer):
        try:
            whole = ended(turn, response_ids, tokenizer, eos, allow) if response_ids else []
            texts = _texts(turn, whole, choice_ids, tokenizer) if keep_texts else {}
            made.append(Example.of(prompt_ids, whole, place=turn.place, **texts))
        except ParaJaxError as error:
            problems.append(f"{turn.place}: {error}")
    raise_problems(problems)
    return made


def _texts(turn: Turn, response_ids: list[int], choice_ids: list[list[int]], tokenizer: Any) -> dict[str, Any]:
    """What an example has beside its tokens."""
    # What a template writes around an answer is in no prediction.
    response = tokenizer.decode(response_ids, skip_special_tokens=True) if turn.chat else turn.answer
    return {
        "prompt": turn.prompt,
        "response": response.strip(),
        "references": turn.references,
        "choices": tuple(choice.strip() for choice in turn.choices),
        "choice_ids": tuple(map(tuple, choice_ids)),
    }
