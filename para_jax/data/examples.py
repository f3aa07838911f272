"""Tokenizes rows into examples.

A "response" is separated from its prompt by a space, unless the prompt ends in white space. A "completion" is appended
to its prompt verbatim. Messages go through the tokenizer's chat template. Every assistant turn is an example whose
prompt is everything before it, because an adapter is prepared once per prompt. For methods that do not read the prompt,
all turns of a chat can be one example. If the template marks generated text, the response ends where the mark ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from para_jax.data.buffers import Example, Examples
from para_jax.data.chats import in_one_pass
from para_jax.data.lengths import Truncation, check_characters, check_sizes
from para_jax.data.rows import Turn, check_tenant, turns
from para_jax.data.sources import Rows, read_rows
from para_jax.data.table import raise_problems
from para_jax.data.templates import Template
from para_jax.data.tokens import tokenize, with_end
from para_jax.errors import ParaJaxError
from para_jax.progress import Pace

# The number of characters in one call of the tokenizer. A call per row is many times slower, and one call for all rows
# would hold all tokens as Python ints.
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
      eos_token_ids: the ids that end a text; the first one is appended to every response without one.
      max_length: the maximum number of tokens of a prompt and its response together.
      tenant: the tenant of these rows. Rows that name another tenant, or several tenants, are an error.
      template, data_dir: as for `read_rows`.
      options: as for `encode_rows`.

    Raises ParaJaxError, with file and line or row, for a malformed line, an unknown or unused key, an empty prompt or
    response, or rows longer than `max_length`; and as `read_rows`.
    """
    rows = check_tenant(read_rows(source, template, data_dir), tenant)
    return encode_rows(_popping(rows), tokenizer, eos_token_ids, max_length, total=len(rows), **options)


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
    """Like `read_examples`, for rows in memory, given as (place, row).

    Args:
      truncate: shorten rows longer than `max_length` instead of raising: the prompt loses tokens at its start. A row is
        dropped if its response leaves less than a quarter of `max_length` for the prompt. A `logging` warning has the
        numbers of truncated and dropped rows.
      need_response: whether a row without a response is an error.
      keep_texts: whether examples keep their texts and choices, which `evaluate` needs.
      one_pass: make one example of all assistant turns of a chat, if it is equivalent (`chats.in_one_pass`). For
        methods whose config has `reads_prompt` False.
      allow_special_tokens: whether a response may contain an end-of-text token.
      total: the number of rows, for progress lines.
      show: is called with a line of progress every few seconds.

    >>> from para_jax import tiny_backbone_path
    >>> from para_jax.convert.tokenizer import load_tokenizer
    >>> tokenizer = load_tokenizer(tiny_backbone_path())
    >>> rows = encode_rows([("row 1", {"prompt": "Who sat?", "response": "The cat."})], tokenizer, eos_token_ids=(0,))
    >>> tokenizer.decode(rows[0].response_ids), rows[0].place
    (' The cat.<|endoftext|>', 'row 1')
    """
    if one_pass and keep_texts:
        raise ParaJaxError(
            "keep_texts needs an example for each turn, and one_pass makes one of all turns; leave out one of the two"
        )
    eos = tuple(eos_token_ids)
    truncation = Truncation(max_length, tokenizer.bos_token_id) if truncate and max_length is not None else None
    limit = None if truncate else max_length

    def encoded() -> Iterator[Example]:
        for chunk in _chunks(rows, tokenizer, need_response, keep_texts, limit, total, show):
            examples = iter(_examples(chunk, tokenizer, eos, keep_texts, allow_special_tokens))
            for row_turns in chunk:
                separate = list(islice(examples, len(row_turns)))
                joined = in_one_pass(separate) if one_pass and len(separate) > 1 else None
                if truncation is None:
                    yield from separate if joined is None else [joined]
                else:
                    fitting = separate if joined is None or len(joined) > truncation.limit else [joined]
                    yield from (short for e in fitting if (short := truncation.apply(e)) is not None)

    examples = Examples.of(encoded())
    if truncation is not None:
        truncation.log(len(examples))
    if max_length is not None:
        check_sizes(examples, max_length)
    return examples


def check_ids(examples: Iterable[Example], vocab_size: int) -> None:
    """Raises ParaJaxError for the first row with a token outside the backbone's vocabulary."""
    if isinstance(examples, Examples) and examples.texts is None:
        highest = max(examples.ids.max(initial=-1), examples.targets.max(initial=-1))
        examples = () if highest < vocab_size else examples
    for e in examples:
        highest = max(e.ids.max(initial=-1), e.targets.max(initial=-1))
        highest = max((int(highest), *(x for ids in e.choice_ids for x in ids)))
        if highest >= vocab_size:
            raise ParaJaxError(
                f"{e.place or 'a row'}: token {highest} is beyond the backbone's vocabulary of {vocab_size}; remove it "
                "from the row, or load the tokenizer of this model"
            )


def _popping(rows: Rows) -> Iterator[Any]:
    """The rows of a list, which is emptied on the way to free memory for tokens."""
    rows.reverse()
    while rows:
        yield rows.pop()


def _chunks(
    rows: Iterable[tuple[str, Mapping[str, Any]]],
    tokenizer: Any,
    need_response: bool,
    choices: bool,
    limit: int | None,
    total: int | None,
    show: Callable[[str], None] | None,
) -> Iterator[list[list[Turn]]]:
    """The turns of each row, in chunks of rows. Raises one ParaJaxError for all bad rows."""
    chunk: list[list[Turn]] = []
    problems: list[str] = []
    characters = 0
    pace = Pace("rows read", show)
    for done, (place, row) in enumerate(rows):
        try:
            found = [t if choices else t._replace(choices=()) for t in turns(place, row, tokenizer, need_response)]
            # The turns of a chat share their beginning, and only the longest is tokenized in full.
            longest = max((len(turn.prompt) + len(turn.answer) for turn in found), default=0)
            if limit is not None:  # a text with too many characters need not be tokenized
                check_characters(longest, tokenizer, limit)
        except ParaJaxError as error:
            problems.append(f"{place}: {error}")
            found, longest = [], 0
        if show is not None:
            pace(done, total)
            if longest > 2 * CHUNK:
                show(f"{place}: tokenizing {longest:,} characters")
        if problems:
            continue
        chunk.append(found)
        characters += longest
        if characters > CHUNK:
            yield chunk
            chunk, characters = [], 0
    if show is not None and total:
        pace(total, total)
    raise_problems(problems)
    yield chunk


def _examples(
    chunk: Sequence[Sequence[Turn]], tokenizer: Any, eos: tuple[int, ...], keep_texts: bool, allow: bool
) -> list[Example]:
    """Each turn of these rows as an example. Raises one ParaJaxError for all bad turns."""
    examples, problems = [], []
    for turn, prompt_ids, (response_ids, *choice_ids) in tokenize(chunk, tokenizer):
        try:
            response = with_end(turn, response_ids, tokenizer, eos, allow) if response_ids else []
            texts = _texts(turn, response, choice_ids, tokenizer) if keep_texts else {}
            examples.append(Example.of(prompt_ids, response, place=turn.place, **texts))
        except ParaJaxError as error:
            problems.append(f"{turn.place}: {error}")
    raise_problems(problems)
    return examples


def _texts(turn: Turn, response_ids: list[int], choice_ids: list[list[int]], tokenizer: Any) -> dict[str, Any]:
    # Predictions do not contain the special tokens that a template adds.
    response = tokenizer.decode(response_ids, skip_special_tokens=True) if turn.chat else turn.answer
    return {
        "prompt": turn.prompt,
        "response": response.strip(),
        "references": turn.references,
        "choices": tuple(choice.strip() for choice in turn.choices),
        "choice_ids": tuple(map(tuple, choice_ids)),
    }
