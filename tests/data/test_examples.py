"""Rows to tokens: what is read is what was written, and every malformed row is named with its line."""

import json

import pytest

from para_jax import ParaJaxError
from para_jax.convert.tokenizer import check_vocabulary, with_chat_template
from para_jax.data.examples import check_ids, read_examples

EOS = (0,)


@pytest.fixture
def tokenizer(tiny):
    return tiny[1]


def write(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows)
    )
    return path


def test_prompt_and_response_are_joined_by_a_space(tmp_path, tokenizer):
    path = write(tmp_path, {"prompt": "Sentiment:", "response": "good"}, {"prompt": "Sentiment: ", "response": "good"})
    a, b = read_examples(path, tokenizer, EOS, keep_texts=True)
    assert tokenizer.decode([*a.prompt_ids, *a.response_ids]) == "Sentiment: good<|endoftext|>"
    assert a.response == "good" and a.response_ids[-1] == a.targets[-1] == 0
    assert tokenizer.decode([*b.prompt_ids, *b.response_ids]) == "Sentiment: good<|endoftext|>"
    assert list(a.prompt_ids) == tokenizer("Sentiment:")["input_ids"], "as the prompt will be when it is served"


def test_a_completion_goes_on_to_the_letter(tmp_path, tokenizer):
    (e,) = read_examples(write(tmp_path, {"prompt": "The cap", "completion": "tain slept"}), tokenizer, EOS)
    assert tokenizer.decode([*e.prompt_ids, *e.response_ids]) == "The captain slept<|endoftext|>"
    assert list(e.prompt_ids) == tokenizer("The cap")["input_ids"]


def test_every_assistant_turn_is_an_example(tmp_path, tokenizer):
    messages = [
        {"role": "user", "content": "Who are you?"},
        {"role": "assistant", "content": "A captain."},
        {"role": "user", "content": "Where to?"},
        {"role": "assistant", "content": "London."},
    ]
    first, second = read_examples(write(tmp_path, {"messages": messages}), tokenizer, EOS, keep_texts=True)
    assert first.prompt == "User: Who are you?\nAssistant:" and first.response.startswith("A captain.")
    assert second.prompt.startswith(first.prompt) and "Where to?" in second.prompt
    for e, text in ((first, "A captain."), (second, "London.")):
        assert tokenizer.decode(e.response_ids) == f" {text}<|endoftext|>", "ends at the first end-of-text"
    (question,) = read_examples(write(tmp_path, {"messages": messages[:3]}), tokenizer, EOS, need_response=False)
    assert question.prompt_ids.tolist() == second.prompt_ids.tolist() and not question.response_ids.size
    assert len(question) == question.ids.size == second.prompt_length


# Ends a turn with a token of its own, which the assistant says, and a line that it does not.
MARKED = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<end>"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}--- {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_what_a_template_marks_is_the_response(tmp_path, tokenizer):
    messages = [
        {"role": "user", "content": "Who are you?"},
        {"role": "assistant", "content": "A captain."},
        {"role": "user", "content": "Where to?"},
        {"role": "assistant", "content": "London."},
    ]
    path = write(tmp_path, {"messages": messages})
    first, second = read_examples(path, with_chat_template(tokenizer, MARKED), EOS, keep_texts=True)
    assert tokenizer.decode(first.response_ids) == "A captain.<end><|endoftext|>"
    assert first.prompt == "<user>Who are you?--- <assistant>"
    assert tokenizer.decode(second.response_ids) == "London.<end><|endoftext|>"
    assert second.prompt == first.prompt + "A captain.<end>--- <user>Where to?--- <assistant>"
    # The same template without the marks says more.
    plain = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    (more, _) = read_examples(path, with_chat_template(tokenizer, plain), EOS)
    assert tokenizer.decode(more.response_ids) == "A captain.<end>--- <|endoftext|>"
    nothing = plain.replace("{{ m.content }}<end>", "{% generation %}{% endgeneration %}{{ m.content }}<end>")
    with pytest.raises(ParaJaxError, match="marks no part of an assistant turn"):
        read_examples(path, with_chat_template(tokenizer, nothing), EOS)


def test_choices_and_references(tmp_path, tokenizer):
    row = {"prompt": "Kind:", "response": "a b", "choices": ["a b", "c"], "references": ["a b", "b a"]}
    path = write(tmp_path, row)
    (e,) = read_examples(path, tokenizer, EOS, keep_texts=True)
    assert e.choice_ids[0] == tuple(e.response_ids[:-1]) and e.references == ("a b", "b a")


def test_line_separators_inside_a_text_do_not_end_a_row(tmp_path, tokenizer):
    (e,) = read_examples(write(tmp_path, {"prompt": "a\u2028b\x85c", "response": "d"}), tokenizer, EOS, keep_texts=True)
    assert e.prompt == "a\u2028b\x85c"


def test_all_bad_rows_are_counted(tmp_path, tokenizer):
    with pytest.raises(ParaJaxError, match="and 3 more"):
        read_examples(write(tmp_path, *["{"] * 8), tokenizer, EOS)


def test_a_tokenizer_of_another_model(tokenizer):
    check_vocabulary(tokenizer, 4096)
    with pytest.raises(ParaJaxError, match=r"has 4096 tokens, and the backbone's 4000; they are"):
        check_vocabulary(tokenizer, 4000)


def test_a_token_beyond_the_vocabulary(tmp_path, tokenizer):
    examples = read_examples(write(tmp_path, {"prompt": "A captain", "response": "slept"}), tokenizer, EOS)
    check_ids(examples, 4096)
    with pytest.raises(ParaJaxError, match=r"rows.jsonl:1: token \d+ is beyond the backbone's vocabulary of 100"):
        check_ids(examples, 100)


def test_a_tokenizer_with_several_templates(tmp_path, tokenizer):
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "captain"}]
    several = with_chat_template(tokenizer, {"default": tokenizer.chat_template, "tool_use": "{{ tools }}"})
    (e,) = read_examples(write(tmp_path, {"messages": messages}), several, EOS)
    assert tokenizer.decode(e.response_ids) == " captain<|endoftext|>"


def test_no_file_no_rows(tmp_path, tokenizer):
    with pytest.raises(ParaJaxError, match="is not a file"):
        read_examples(tmp_path / "nothing.jsonl", tokenizer, EOS)
    with pytest.raises(ParaJaxError, match="has no rows"):
        read_examples(write(tmp_path, ""), tokenizer, EOS)


def test_long_rows_are_counted_and_cut_only_if_asked(tmp_path, tokenizer):
    rows = [{"prompt": "word " * n + "end:", "response": "yes"} for n in (1, 40, 60)]
    path = write(tmp_path, *rows)
    with pytest.raises(ParaJaxError, match=r"2 of 3 rows are longer than 20 tokens.*rows.jsonl:3.*--truncate"):
        read_examples(path, tokenizer, EOS, 20)
    whole = read_examples(path, tokenizer, EOS)
    cut = read_examples(path, tokenizer, EOS, 20, truncate=True)
    assert [len(e) for e in cut] == [len(whole[0]), 20, 20]
    for a, b in zip(whole, cut, strict=True):
        assert a.response_ids.tolist() == b.response_ids.tolist()
        assert a.prompt_ids[-b.prompt_length :].tolist() == b.prompt_ids.tolist()
