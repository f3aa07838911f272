"""Rows that are refused, each with what is said of it: one table, for every way in.

To add one, write a name, the row (or the bytes of its line), and the message behind "FILE:LINE".
"""

from __future__ import annotations

from typing import Any

USER, ANSWER = {"role": "user", "content": "Who sat?"}, {"role": "assistant", "content": "The cat."}
KEYS = "Known: choices, completion, messages, prompt, references, response, system, tenant, tools"
ROLES = "Known: assistant, developer, system, tool, user"
OTHERS = "A --template makes prompts from rows with other keys"
LEFT_OUT = "remove it, or give a template that does (--chat-template)"
MARK = 'is not read; write "weight": 0 for a turn that is not learnt'


def chat(*messages: Any, **more: Any) -> dict[str, Any]:
    return {"messages": list(messages), **more}


def answer(**keys: Any) -> dict[str, Any]:
    """A chat whose answer has these keys as well."""
    return chat(USER, {**ANSWER, **keys})


def call(**function: Any) -> dict[str, Any]:
    return chat(USER, {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]})


BAD_ROWS: dict[str, tuple[Any, str]] = {
    # What is not a row.
    "no JSON": (b"{", " is not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
    "a list": (b"[1]", " is a list, not an object with a prompt"),
    "Latin-1": (
        '{"prompt": "café", "response": "x"}'.encode("latin-1"),
        " is not UTF-8: 'utf-8' codec can't decode byte 0xe9 in position 15: invalid continuation byte; save the file "
        "as UTF-8",
    ),
    "a key twice": (
        b'{"prompt": "a", "prompt": "b", "response": "c"}',
        ": the key 'prompt' occurs twice",
    ),
    "a key twice, inside": (
        b'{"messages": [{"role": "user", "role": "assistant", "content": "a"}]}',
        ": the key 'role' occurs twice",
    ),
    "a number without end": (
        b'{"prompt": ' + b"9" * 5000 + b"}",
        " has a number with too many digits, or too deeply nested brackets",
    ),
    # Keys.
    "another key": ({"prompt": "x", "response": "y", "id": 3}, f": unknown key 'id'. {KEYS}. {OTHERS}"),
    "a key with a slip": (
        {"prompt": "x", "respones": "y"},
        f": unknown key 'respones'; did you mean 'response'? {KEYS}. {OTHERS}",
    ),
    "Alpaca's keys": (
        {"instruction": "x", "output": "y"},
        f": unknown key 'instruction'. {KEYS}. {OTHERS}",
    ),
    "no prompt": ({"response": "x"}, ': no text under "prompt" (and no "messages")'),
    "a prompt that is a number": ({"prompt": 3, "response": "x"}, ': no text under "prompt" (and no "messages")'),
    "an empty prompt": ({"prompt": " ", "response": "x"}, ": the prompt is empty; an adapter is prepared from it"),
    "no response": ({"prompt": "x"}, ': give one of "response" and "completion"'),
    "a null response": ({"prompt": "x", "response": None}, ': give one of "response" and "completion"'),
    "two responses": (
        {"prompt": "x", "response": "y", "completion": "z"},
        ': give one of "response" and "completion"',
    ),
    "an empty response": (
        {"prompt": "x", "response": ""},
        ": the response is empty; there is nothing to learn from it",
    ),
    "a response that is a number": ({"prompt": "x", "response": 3}, ": 'response' is a int, not a text"),
    "half a character": (
        b'{"prompt": "x", "response": "a\\ud83d"}',
        ": the response is not UTF-8: it has the lone surrogate U+D83D as character 3",
    ),
    "an end inside a response": (
        {"prompt": "x", "response": "With <|endoftext|> and nothing after it."},
        ": the response contains the end-of-text token '<|endoftext|>'; remove it, or pass allow_special_tokens "
        "(--allow-special-tokens) if it is meant",
    ),
    "two ends": (
        {"prompt": "x", "response": "y<|endoftext|><|endoftext|>"},
        ": the response contains the end-of-text token '<|endoftext|>'; remove it, or pass allow_special_tokens "
        "(--allow-special-tokens) if it is meant",
    ),
    # References and choices.
    "references that are a text": (
        {"prompt": "x", "response": "y", "references": "abc"},
        ': \'references\' is a str, not a list of texts; write ["...", "..."]',
    ),
    "references that are a number": (
        {"prompt": "x", "response": "y", "references": 3},
        ': \'references\' is a int, not a list of texts; write ["...", "..."]',
    ),
    "a reference that is a list": (
        {"prompt": "x", "response": "y", "references": ["a", ["b"]]},
        ": references[1] is a list, not a text",
    ),
    "choices that are a text": (
        {"prompt": "x", "response": "y", "choices": "yn"},
        ': \'choices\' is a str, not a list of texts; write ["...", "..."]',
    ),
    "choices that are an object": (
        {"prompt": "x", "response": "y", "choices": {"A": "y"}},
        ': \'choices\' is a dict, not a list of texts; write ["...", "..."]',
    ),
    "a choice that is a number": (
        {"prompt": "x", "response": "1", "choices": [1, 2]},
        ": choices[0] is a int, not a text",
    ),
    "an empty choice": ({"prompt": "x", "response": "y", "choices": ["y", ""]}, ": choices[1] is empty"),
    "references of two turns": (
        chat(USER, ANSWER, USER, ANSWER, references=["The cat."]),
        ": references and choices need one response, and 2 turns are learnt",
    ),
    # A system text and tools.
    "a system text that is a number": (
        {"system": 3, "prompt": "x", "response": "y"},
        ": 'system' is a int, not a text",
    ),
    "two system texts": (
        chat({"role": "system", "content": "a"}, USER, ANSWER, system="b"),
        ': both "system" and a system message; give one of them',
    ),
    "tools without messages": ({"prompt": "x", "response": "y", "tools": []}, ': "tools" go with "messages"'),
    "tools that are names": (
        chat(USER, ANSWER, tools=["add"]),
        ': "tools" is a list of objects, each the JSON schema of a function',
    ),
    "tools that the template ignores": (
        chat(USER, ANSWER, tools=[{"type": "function", "function": {"name": "add"}}]),
        ': the chat template does not write "tools"; remove them, or give another template',
    ),
    # Messages.
    "messages that are a text": (chat() | {"messages": "x"}, ': "messages" is a list of {"role", "content"} objects'),
    "messages that are texts": (chat("x"), ': "messages" is a list of {"role", "content"} objects'),
    "no role": (chat({"content": "x"}), ': "messages" is a list of {"role", "content"} objects'),
    "messages and a prompt": (chat(USER, ANSWER, prompt="x"), ": both \"messages\" and 'prompt'; give one of them"),
    "messages and a response": (
        chat(USER, ANSWER, response="x"),
        ": both \"messages\" and 'response'; give one of them",
    ),
    "no assistant": (chat(USER), ": no message has the role assistant; there is nothing to learn"),
    "the assistant first": (
        chat(ANSWER, USER, ANSWER),
        ": message 1 is the assistant's, with no prompt before it; put a message in front of it",
    ),
    "another role": (
        chat(USER, {"role": "asistant", "content": "The cat."}),
        f": message 2: unknown role 'asistant'; did you mean 'assistant'? {ROLES}",
    ),
    "a role that is a number": (
        chat(USER, {"role": 1, "content": "The cat."}),
        f": message 2: unknown role 1. {ROLES}",
    ),
    "no content": (chat({"role": "user"}, ANSWER), ": message 1: no text under \"content\" (role 'user')"),
    "null content": (
        chat(USER, {"role": "assistant", "content": None}),
        ": message 2: no text under \"content\" (role 'assistant')",
    ),
    "empty content of the assistant": (
        chat(USER, {"role": "assistant", "content": " "}),
        ": message 2: the response is empty; there is nothing to learn from it",
    ),
    "content that is a number": (
        answer(content=3),
        ': message 2: "content" is a int, not a text or a list of text parts',
    ),
    "content that is an object": (
        answer(content={"type": "text", "text": "x"}),
        ': message 2: "content" is a dict, not a text or a list of text parts',
    ),
    "an image": (
        chat({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, ANSWER),
        ': message 1: "content" has a part of type \'image_url\'; only parts of type "text" are read',
    ),
    "a part that is a text": (
        answer(content=["The cat."]),
        ': message 2: "content" has a part of type \'str\'; only parts of type "text" are read',
    ),
    "a part without a text": (
        answer(content=[{"type": "text"}]),
        ': message 2: "content" has a text part without a text',
    ),
    "a part with another key": (
        answer(content=[{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}]),
        ": message 2: unknown key of a text part 'cache_control'. Known: text, type",
    ),
    "a weight between": (
        answer(weight=0.5),
        ': message 2: "weight" is 0.5; it is 1 for a turn that is learnt and 0 for one that is not',
    ),
    "a weight that is true": (
        answer(weight=True),
        ': message 2: "weight" is True; it is 1 for a turn that is learnt and 0 for one that is not',
    ),
    "a weight of the user's": (
        chat({**USER, "weight": 1}, ANSWER),
        ": message 1: \"weight\" is 1 and the role is 'user'; only turns of the assistant are learnt",
    ),
    "no turn with a weight": (
        answer(weight=0),
        ": every assistant turn has the weight 0; there is nothing to learn",
    ),
    "train": (answer(train=False), f": message 2: 'train' {MARK}"),
    "training": (answer(training=False), f": message 2: 'training' {MARK}"),
    "loss": (answer(loss=False), f": message 2: 'loss' {MARK}"),
    "loss_mask": (answer(loss_mask=0), f": message 2: 'loss_mask' {MARK}"),
    "a key that no template writes": (
        answer(colour="red"),
        f": message 2 (assistant): the chat template does not write 'colour'; {LEFT_OUT}",
    ),
    "a name that the template ignores": (
        chat({**USER, "name": "Ann"}, ANSWER),
        f": message 1 (user): the chat template does not write 'name'; {LEFT_OUT}",
    ),
    "reasoning that the template ignores": (
        answer(reasoning_content="Cats sit."),
        f": message 2 (assistant): the chat template does not write 'reasoning_content'; {LEFT_OUT}",
    ),
    "a tool call that the template ignores": (
        answer(tool_calls=[{"type": "function", "function": {"name": "look", "arguments": "{}"}}]),
        f": message 2 (assistant): the chat template does not write 'tool_calls'; {LEFT_OUT}",
    ),
    "calls that are none": (
        answer(tool_calls="look"),
        ': message 2: "tool_calls" is a list of {"type": "function", "function": {"name", "arguments"}} objects',
    ),
    "a call without a name": (call(arguments="{}"), ': message 2: a tool call has no "name" in its "function"'),
    "arguments that are no JSON": (
        call(name="look", arguments="{"),
        ": message 2: \"arguments\" of the call of 'look' are not JSON: Expecting property name enclosed in double "
        "quotes: line 1 column 2 (char 1)",
    ),
    "arguments that are a list": (
        call(name="look", arguments=[1]),
        ": message 2: \"arguments\" of the call of 'look' are not a JSON object",
    ),
    "an end inside a turn": (
        answer(content="The <|endoftext|> cat."),
        ": the response contains the end-of-text token '<|endoftext|>'; remove it, or pass allow_special_tokens "
        "(--allow-special-tokens) if it is meant",
    ),
}
