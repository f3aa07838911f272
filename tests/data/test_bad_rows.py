"""Every row is used or refused: the table of `bad_rows`, and any JSON there may be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from para_jax import ParaJaxError
from para_jax.convert.tokenizer import with_chat_template
from para_jax.data.examples import encode_rows, read_examples
from tests.data.bad_rows import ANSWER, BAD_ROWS, USER
from tests.data.test_chats import TEMPLATES as ENDS

EOS = (0,)
PARTS = [{"type": "text", "text": "Who "}, {"type": "text", "text": "sat?"}]


@pytest.mark.parametrize(("row", "says"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_row_is_refused_by_its_line(tiny: Any, tmp_path: Path, row: Any, says: str) -> None:
    line = row if isinstance(row, bytes) else json.dumps(row).encode()
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "fine", "response": "fine"}\n' + line + b"\n")
    with pytest.raises(ParaJaxError) as error:
        read_examples(path, tiny[1], EOS, keep_texts=True)
    assert str(error.value) == f"{path}:2{says}"


# Writes all that a message can hold, and the end of a turn.
WHOLE = (
    "{% if tools %}Tools: {{ tools | tojson }}{{ '\\n' }}{% endif %}{% for m in messages %}{{ m.role }}{% if m.name %} "
    "({{ m.name }}){% endif %}: {% if m.role == 'assistant' %}{{ m.reasoning_content or '' }}{{ m.content or '' }}"
    "{% for call in m.tool_calls %}<{{ call.function.name }} {{ call.function.arguments | tojson }}>{% endfor %}"
    "<|endoftext|>{% else %}{{ m.content }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TEMPLATES = {name: ENDS[name] for name in ("its own", "end of text", "marked")} | {"whole": WHOLE}

text = st.one_of(st.text(max_size=8), st.sampled_from(["Who sat?", "The cat.", "", " ", "<|endoftext|>", "a\ud83d"]))
part = st.one_of(st.fixed_dictionaries({"type": st.just("text"), "text": text}), st.just({"type": "image"}), text)
content = st.one_of(text, st.none(), st.lists(part, max_size=3), st.integers())
calls = st.lists(
    st.fixed_dictionaries(
        {"function": st.fixed_dictionaries({"name": text, "arguments": st.sampled_from(["{}", {"a": 1}, "{", 3])})}
    ),
    max_size=2,
)
message = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "assistant", "system", "tool", "human"])},
    optional={
        "content": content,
        "weight": st.sampled_from([0, 1, 0.5, None]),
        "name": text,
        "reasoning_content": text,
        "tool_calls": calls,
        "tool_call_id": st.just("call 1"),
        "extra": st.none() | text,
    },
)
tools = st.lists(st.just({"type": "function", "function": {"name": "look"}}), max_size=1)
# Rows that are mostly in order: else hardly a chat would be.
word = st.text(min_size=1, max_size=8) | st.sampled_from(["Who sat?", "The cat.", " a", "\n"])
parts = st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": word}), min_size=1, max_size=3)
asked = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "user", "system", "tool"]), "content": word | parts}, optional={"name": word}
)
said = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": word},
    optional={"weight": st.sampled_from([0, 1, None]), "reasoning_content": word, "extra": st.none()},
)
pair = st.one_of(st.tuples(asked, said), st.tuples(asked, asked, said), st.tuples(asked, said, said))
chat = st.lists(pair, min_size=1, max_size=3).map(lambda some: [m for own in some for m in own])
ordered = st.one_of(
    st.fixed_dictionaries({"messages": chat}, optional={"system": word}),
    st.fixed_dictionaries({"prompt": word, "response": word}, optional={"system": word, "references": st.lists(word)}),
    st.fixed_dictionaries({"prompt": word, "completion": word}, optional={"tenant": word}),
)
row = ordered | st.one_of(
    st.fixed_dictionaries({"messages": st.lists(message, max_size=4)}, optional={"tools": tools, "system": text}),
    st.fixed_dictionaries(
        {"prompt": text | st.integers()},
        optional={"response": text | st.none(), "completion": text, "system": text, "references": st.lists(text)},
    ),
    st.dictionaries(text, st.recursive(st.none() | st.integers() | text, st.lists, max_leaves=3), max_size=3),
)


def expected(row: dict[str, Any], tokenizer: Any) -> list[list[int]]:
    """The tokens of each learnt turn of an accepted row, by transformers' own template and tokenizer."""
    if "messages" not in row and row.get("system") is None:
        answer = row["completion"] if row.get("completion") is not None else row["response"]
        joined = answer[:1].isspace() or row["prompt"][-1:].isspace() or row.get("completion") is not None
        whole = row["prompt"] + ("" if joined else " ") + answer
        return [_joined(tokenizer, row["prompt"], whole, tokenizer(whole)["input_ids"])]
    if "messages" in row:
        messages = [{k: v for k, v in m.items() if k != "weight"} for m in row["messages"]]
        weights = [m.get("weight") for m in row["messages"]]
    else:
        answer = row["completion"] if row.get("completion") is not None else row["response"]
        messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": answer}]
        weights = [None, None]
    if row.get("system") is not None:
        messages, weights = [{"role": "system", "content": row["system"]}, *messages], [None, *weights]
    for m in messages:
        if isinstance(m.get("content"), list):
            m["content"] = "".join(p["text"] for p in m["content"])
        for call in m.get("tool_calls") or ():
            if isinstance(call["function"]["arguments"], str):
                call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    found = []
    for i, m in enumerate(messages):
        if m["role"] == "assistant" and weights[i] != 0:
            how = {"tools": row.get("tools") or None, "tokenize": False}
            prompt = tokenizer.apply_chat_template(messages[:i], add_generation_prompt=True, **how)
            whole = tokenizer.apply_chat_template(messages[: i + 1], **how)
            whole = whole.removesuffix("\n")
            found.append(_joined(tokenizer, prompt, whole, tokenizer(whole, add_special_tokens=False)["input_ids"]))
    return found


def _joined(tokenizer: Any, prompt: str, whole: str, ids: list[int]) -> list[int]:
    begins = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if ids[: len(begins)] != begins:
        ids = begins + tokenizer(whole[len(prompt) :], add_special_tokens=False)["input_ids"]
    return ids if ids[-1] in EOS else [*ids, EOS[0]]


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(row={"system": "Answer like a pirate.", "prompt": "Who sat?", "response": "The cat."})
@example(row={"messages": [USER, {**ANSWER, "weight": 0}, USER, ANSWER]})
@example(row={"messages": [{"role": "user", "content": PARTS}, ANSWER]})
@given(row=row)
def test_a_row_trains_what_transformers_writes_or_is_refused(tiny: Any, template: str | None, row: Any) -> None:
    tokenizer = with_chat_template(tiny[1], template)
    try:
        examples = encode_rows([("rows.jsonl:7", row)], tokenizer, EOS)
    except ParaJaxError as error:
        assert str(error).startswith("rows.jsonl:7: ")
        return
    assert [[*e.prompt_ids, *e.response_ids] for e in examples] == expected(row, tokenizer)
