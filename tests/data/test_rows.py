"""What people's rows hold: system texts, weights, parts, tools, tenants, ends inside texts; and rows that are cut."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from para_jax import ParaJaxError
from para_jax.convert.tokenizer import with_chat_template
from para_jax.data.buffers import Examples
from para_jax.data.examples import encode_rows, read_examples
from para_jax.data.rows import group_by_tenant
from para_jax.data.sources import read_jsonl
from tests.data.bad_rows import ANSWER, USER
from tests.data.test_bad_rows import WHOLE

EOS = (0,)


@pytest.fixture
def tokenizer(tiny: Any) -> Any:
    return tiny[1]


def encode(tokenizer: Any, *rows: Any, **options: Any) -> Examples:
    return encode_rows([(f"rows.jsonl:{i}", row) for i, row in enumerate(rows, 1)], tokenizer, EOS, **options)


def said(tokenizer: Any, *rows: Any, **options: Any) -> list[tuple[str, str]]:
    """Prompts and responses as texts."""
    found = encode(tokenizer, *rows, **options)
    return [(tokenizer.decode(e.prompt_ids), tokenizer.decode(e.response_ids)) for e in found]


def test_a_system_text_is_a_system_message(tokenizer: Any) -> None:
    row = {"system": "Answer like a pirate.", "prompt": "Who sat?", "response": "The cat."}
    system = {"role": "system", "content": "Answer like a pirate."}
    [pair] = said(tokenizer, row)
    assert pair == ("System: Answer like a pirate.\nUser: Who sat?\nAssistant:", " The cat.<|endoftext|>")
    assert said(tokenizer, {"messages": [USER, ANSWER], "system": system["content"]}) == [pair]
    assert said(tokenizer, {"messages": [system, USER, ANSWER], "system": None}) == [pair]
    asked = [{k: row[k] for k in ("system", "prompt")}, {"messages": [USER], "system": system["content"]}, row]
    assert said(tokenizer, *asked, need_response=False) == [(pair[0], "")] * 3
    with pytest.raises(ParaJaxError, match='no chat template to write "system" with; put it into the prompt'):
        encode(with_chat_template(tokenizer, ""), row)


def test_a_template_that_drops_a_message(tokenizer: Any) -> None:
    first_only = "{% for m in messages if m.role != 'system' %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    row = {"system": "Be brief.", "prompt": "Who sat?", "response": "The cat."}
    with pytest.raises(ParaJaxError, match=r"message 1 \(system\): the chat template does not write 'content'"):
        encode(with_chat_template(tokenizer, first_only), row)
    # What it writes in another way is written.
    loud = with_chat_template(tokenizer, tokenizer.chat_template.replace("message['content']", "message.content|upper"))
    assert said(loud, row)[0][1] == " THE CAT.<|endoftext|>"


@pytest.mark.parametrize("one_pass", [False, True])
def test_turns_of_the_weight_0_are_not_learnt(tokenizer: Any, one_pass: bool) -> None:
    five, six = ({"role": "assistant", "content": text} for text in ("five", "six"))
    rows = [{"messages": [USER, {**five, "weight": 0}, USER, {**six, "weight": 1}]}]
    [(prompt, response)] = said(tokenizer, *rows, one_pass=one_pass)
    assert "Assistant: five" in prompt and response == " six<|endoftext|>"
    assert len(encode(tokenizer, {"messages": [{**five, "weight": 0}, USER, six]})) == 1


def test_parts_of_a_text_are_joined(tokenizer: Any) -> None:
    parts = [{"type": "text", "text": "Who "}, {"type": "text", "text": "sat?", "image_url": None}]
    rows = [{"messages": [{"role": "user", "content": some}, ANSWER]} for some in (parts, "Who sat?")]
    first, second = said(tokenizer, *rows)
    assert first == second


def test_tools_go_through_a_template_that_has_them(tokenizer: Any) -> None:
    whole, look = with_chat_template(tokenizer, WHOLE), {"type": "function", "function": {"name": "look"}}
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"where": "mat"}'}}
    messages = [
        {**USER, "name": "Ann"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "a cat"},
        {**ANSWER, "reasoning_content": "I looked. ", "refusal": None},
    ]
    first, second = said(whole, {"messages": messages, "tools": [look]})
    assert first[1] == '<look {"where": "mat"}><|endoftext|>', "the call is learnt, and no end at once"
    assert first[0].startswith('Tools: [{"type": "function"') and "user (Ann): Who sat?" in first[0]
    assert second[0].endswith("tool: a cat\nassistant: ") and second[1] == "I looked. The cat.<|endoftext|>"


@pytest.mark.parametrize("one_pass", [False, True])
def test_an_end_inside_a_text_is_kept_where_it_is_allowed(tokenizer: Any, one_pass: bool) -> None:
    inside, chat = "With <|endoftext|> and nothing after it.", [USER, {**ANSWER, "content": "A <|endoftext|> cat."}]
    rows = [{"prompt": "x", "response": inside}, {"messages": [*chat, USER, ANSWER]}]
    plain, *turns = said(tokenizer, *rows, allow_special_tokens=True, one_pass=one_pass)
    assert plain == ("x", f" {inside}<|endoftext|>")
    assert "".join(response for _, response in turns) == " A <|endoftext|> cat.<|endoftext|> The cat.<|endoftext|>"
    # An end that a response has already is not put there again, and one in a prompt is the user's business.
    [(prompt, response)] = said(tokenizer, {"prompt": inside, "response": "x<|endoftext|>"})
    assert (prompt, response) == (inside, " x<|endoftext|>")


def test_texts_of_a_chat_are_what_a_prediction_can_be(tokenizer: Any) -> None:
    (e,) = encode(tokenizer, {"messages": [USER, ANSWER], "choices": ["The cat.", "A dog."]}, keep_texts=True)
    assert (e.response, e.choices) == ("The cat.", ("The cat.", "A dog.")), "no end of text, no line break"


REFUSALS = {
    "{{ raise_exception('System role not supported') }}": "System role not supported",
    "{% if messages[0].role == 'user' %}{{ 1 / 0 }}{% endif %}": "division by zero",
    "{{ messages[5].content.x }}": "list object has no element 5",
    "{% for m in messages %}{{ m.content }}": "Unexpected end of template. Jinja was looking for the following tags: "
    "'endfor' or 'else'. The innermost block that needs to be closed is 'for'. (line 1 of the template)",
}


@pytest.mark.parametrize(("template", "words"), REFUSALS.items())
def test_what_a_template_says_is_said(tokenizer: Any, template: str, words: str) -> None:
    with pytest.raises(ParaJaxError) as error:
        encode(with_chat_template(tokenizer, template), {"messages": [USER, ANSWER]})
    assert str(error.value) == f"rows.jsonl:1: the chat template refuses this: {words}"


def test_named_templates_without_a_default(tokenizer: Any) -> None:
    named = with_chat_template(tokenizer, {"tool_use": WHOLE, "rag": WHOLE})
    with pytest.raises(ParaJaxError, match=r"rows.jsonl:1: the chat template refuses this: .*no default specified"):
        encode(named, {"messages": [USER, ANSWER]})


def test_a_template_that_opens_a_thought(tokenizer: Any) -> None:
    opening = tokenizer.chat_template.replace("}Assistant:{", "}Assistant: <think>\n{")
    thinking = with_chat_template(tokenizer, opening)
    with pytest.raises(ParaJaxError) as error:
        encode(thinking, {"messages": [USER, ANSWER]})
    assert str(error.value) == (
        "rows.jsonl:1: message 2: the chat template starts every answer with 'Assistant: <think>\\n' and writes this "
        "one as 'Assistant: The cat.<|endoftext|>\\n'; write the turn so that it starts that way (reasoning goes into "
        '"reasoning_content", if the template reads it), or give another template (--chat-template)'
    )
    [(prompt, response)] = said(thinking, {"messages": [USER, {**ANSWER, "content": "<think>\nHm.</think>The cat."}]})
    assert prompt.endswith("<think>\n") and response == "Hm.</think>The cat.<|endoftext|>"


def test_files_as_people_have_them(tmp_path: Path) -> None:
    line = json.dumps({"prompt": "café", "response": "x"}, ensure_ascii=False)
    rows = {
        "bom.jsonl": line.encode("utf-8-sig"),
        "rows.jsonl.gz": gzip.compress(line.encode()),
        "windows.jsonl": f"{line}\r\n\r\n".encode(),
    }
    for name, content in rows.items():
        (tmp_path / name).write_bytes(content)
        [(place, row)] = read_jsonl(tmp_path / name)
        assert place == f"{tmp_path / name}:1" and row == {"prompt": "café", "response": "x"}
    (tmp_path / "half.jsonl.gz").write_bytes(rows["rows.jsonl.gz"][:-9])
    with pytest.raises(ParaJaxError, match=r"half.jsonl.gz is damaged: Compressed file ended"):
        read_jsonl(tmp_path / "half.jsonl.gz")
    for encoding in ("utf-16", "utf-16-le", "utf-32"):
        (tmp_path / "wide.jsonl").write_bytes(line.encode(encoding))
        with pytest.raises(ParaJaxError, match=r"wide.jsonl is UTF-16 or UTF-32, not UTF-8; save it as UTF-8"):
            read_jsonl(tmp_path / "wide.jsonl")


def test_a_json_array_is_no_file_of_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"prompt": "x", "response": "y"}], indent=1))
    with pytest.raises(ParaJaxError, match=r"rows.json is a JSON array; write each of its objects on its own line"):
        read_jsonl(path)


def test_rows_of_other_tenants(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "rows.jsonl"
    names = ("acme", None, "globex")
    rows = [{"prompt": "Who sat?", "response": "The cat.", "tenant": name} for name in names]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for tenant, wrong in (
        ("acme", "rows.jsonl:3: the row names tenant 'globex'"),
        (None, "rows.jsonl:3"),
        ("globex", "rows.jsonl:1"),
    ):
        with pytest.raises(ParaJaxError, match=f"{wrong}.*--tenant-from reads a source with several tenants"):
            read_examples(path, tokenizer, EOS, tenant=tenant)
    with pytest.raises(ParaJaxError, match=r"rows.jsonl:2: no tenant's name under \"tenant\""):
        group_by_tenant(read_jsonl(path))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    assert len(read_examples(path, tokenizer, EOS, tenant="acme")) == len(read_examples(path, tokenizer, EOS)) == 2


def test_rows_cut_to_a_length(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"prompt": "word " * n + "end:", "response": "yes " * m} for n, m in ((1, 1), (40, 2), (9, 17))]
    with caplog.at_level(logging.WARNING):
        whole, cut = encode(tokenizer, *rows), encode(tokenizer, *rows, max_length=20, truncate=True)
    assert [len(e) for e in cut] == [len(whole[0]), 20] and cut.places[1] == "rows.jsonl:2"
    assert cut[1].response_ids.tolist() == whole[1].response_ids.tolist(), "a response keeps its end"
    by = len(whole[1]) - 20
    assert caplog.messages == [
        f"1 of 2 rows are longer than 20 tokens; their prompts are cut at the beginning, by {by} tokens in the mean "
        f"and by {by} at most",
        "1 rows are left out: their responses leave less than a quarter of 20 tokens for the prompt (the first: "
        "rows.jsonl:3)",
    ]
    with pytest.raises(ParaJaxError, match=r"1 rows are left out: .* and no row is left; pass a larger max_length"):
        encode(tokenizer, rows[2], max_length=20, truncate=True)


def test_a_cut_prompt_keeps_its_beginning_of_text(tiny: Any) -> None:
    from para_jax.data.buffers import Example
    from para_jax.data.lengths import truncate

    e = Example.of([1, *range(10, 40)], [7, 8, 0])
    for bos, first in ((1, 1), (2, 25)):
        short = truncate(e, 18, bos)
        assert short is not None and len(short) == 18
        assert short.prompt_ids.tolist() == [first, *range(26, 40)]
        assert short.response_ids.tolist() == [7, 8, 0]


def test_a_text_of_too_many_letters_is_no_work(tokenizer: Any) -> None:
    with pytest.raises(ParaJaxError, match=r"rows.jsonl:1: 3,000,009 characters are more than 64 tokens; remove them"):
        encode(tokenizer, {"prompt": "word " * 600_000, "response": "The cat."[:8] + "."}, max_length=64)


def test_reading_says_how_far_it_is(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 600, 6))
    monkeypatch.setattr("para_jax.progress.time", SimpleNamespace(monotonic=lambda: next(clock)))
    shown: list[str] = []
    encode(tokenizer, *[{"prompt": "x", "response": "y"}] * 3, total=3, show=shown.append)
    assert shown == [
        "0/3 rows read",
        "1/3 rows read  0.167 a second  12s left",
        "2/3 rows read  0.167 a second  6s left",
        "3/3 rows read  0.167 a second",
    ]
