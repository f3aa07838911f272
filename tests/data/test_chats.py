"""A chat in one pass: the same tokens predicted from the same tokens as by its turns apart, or the turns apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from para_jax import IA3Config, LoraConfig, ParaConfig, ParaJaxError
from para_jax.adapters.method import MethodConfig
from para_jax.cli import main
from para_jax.convert.tokenizer import with_chat_template
from para_jax.data.batches import one_row_each
from para_jax.data.buffers import Example, Examples
from para_jax.data.chats import in_one_pass
from para_jax.data.examples import encode_rows, read_examples
from para_jax.training import finetune
from para_jax.training.loss import target_nll
from para_jax.training.tuning import Tuning
from tests.helpers import random_backbone, random_bank

EOS = (0,)
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who are you?"},
    {"role": "assistant", "content": "A captain, and no friend of the sea."},
    {"role": "user", "content": "Where to?"},
    {"role": "assistant", "content": "London."},
    {"role": "user", "content": "When will you be there, do you think?"},
    {"role": "assistant", "content": "Tomorrow, or on the day after."},
]
# What ChatML has; here its marks are ordinary text.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{{ m.content }}<|im_end|>{{ end }}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SAID = "{{ m.content }}<|im_end|>"
MARKED = CHATML.replace(SAID + "{{ end }}", "{% generation %}" + SAID + "{% endgeneration %}")
# A turn's reasoning is in the prompt of no later turn.
REASONING = CHATML.replace("<|im_end|>{{ end }}", "{% if loop.last %} (so I think){% endif %}<|im_end|>")
TEMPLATES = {
    "its own": None,
    "no end": CHATML.replace("{{ end }}", ""),
    "end of text": CHATML.replace("{{ end }}", "<|endoftext|>"),
    "marked": MARKED,
    "marked, end of text": MARKED.replace("{% endgeneration %}", "{% endgeneration %}<|endoftext|>"),
}
# A turn ends in the middle of a word.
JOINED = "{% for m in messages %}{{ m.content }}{% endfor %}"
WORD = [
    {"role": "user", "content": "The"},
    {"role": "assistant", "content": " wh"},
    {"role": "user", "content": "at"},
    {"role": "assistant", "content": " slept"},
]
CONFIGS = {"its own": LoraConfig(r=2, target_modules="all-linear"), "no end": IA3Config(), "marked": ParaConfig(r=2)}


def both(tokenizer: Any, template: str | None, messages: list[dict[str, str]] = CHAT) -> tuple[Examples, Examples]:
    """The turns apart, and in one pass where that can be."""
    spoken, rows = with_chat_template(tokenizer, template), [("chats.jsonl:3", {"messages": messages})]
    apart, one = (encode_rows(rows, spoken, EOS, one_pass=together) for together in (False, True))
    return apart, one


def predictions(examples: Examples) -> list[tuple[tuple[int, ...], int]]:
    """Each target, after the tokens that it is predicted from."""
    return [
        (tuple(e.ids[: place + 1].tolist()), int(e.targets[place]))
        for e in examples
        for place in np.flatnonzero(e.targets >= 0)
    ]


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_one_pass_predicts_the_same_tokens_from_the_same_tokens(tiny: Any, template: str | None) -> None:
    apart, one = both(tiny[1], template)
    assert len(apart) == 3 and len(one) == 1 and one[0].place == "chats.jsonl:3"
    assert predictions(one) == predictions(apart)
    assert [target for _, target in predictions(one)].count(0) == 3, "each turn has its end"
    assert one[0].prompt_length == apart[0].prompt_length and len(one[0]) == len(apart[-1])
    assert one.target_counts.sum() == apart.target_counts.sum()


@pytest.mark.parametrize(("template", "messages"), [(REASONING, CHAT), (JOINED, WORD)], ids=["reasoning", "joined"])
def test_turns_stay_apart_where_one_pass_would_be_another_chat(tiny: Any, template: str, messages: Any) -> None:
    apart, one = both(tiny[1], template, messages)
    assert len(apart) == len(one) == sum(m["role"] == "assistant" for m in messages)
    assert predictions(one) == predictions(apart)


@pytest.mark.parametrize(("template", "config"), CONFIGS.items(), ids=CONFIGS)
def test_the_loss_is_that_of_the_turns_apart(tiny: Any, config: MethodConfig, template: str) -> None:
    tokenizer, backbone = tiny[1], random_backbone(stacked=True, vocab_size=4096, max_position_embeddings=512)
    bank = random_bank({"acme": config}, backbone.config, scale=0.1)

    def nll(examples: Examples) -> np.ndarray:
        batch = one_row_each(list(examples))
        rows = bank.rows(["acme"], repeats=len(examples))
        return np.asarray(jax.jit(target_nll)(backbone, rows, batch))[0]

    apart, one = map(nll, both(tokenizer, TEMPLATES[template]))
    alike = np.allclose(one, apart, rtol=1e-4, atol=1e-4)
    assert alike == (not config.reads_prompt), "an adapter that reads the prompt is another one at every turn"
    if alike:
        np.testing.assert_allclose(one.sum(), apart.sum(), rtol=1e-5)


def test_what_cannot_be_merged() -> None:
    first = Example.of([5, 6], [7, 0])
    assert in_one_pass([first, Example.of([5, 6, 8, 9], [4, 0])]) is None, "another token in the history"
    # Two targets at the place of 7: the end of the first turn, and the first token of the second.
    assert in_one_pass([first, Example.of([5, 6, 7], [3, 0])]) is None
    assert in_one_pass([Example.of([5, 6], [7, 8, 0]), Example.of([5], [6, 7, 0])]) is None


def test_chats_and_other_rows_in_one_source(tiny: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "Call", "response": "me"}, {"messages": CHAT}, {"messages": CHAT[:3]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    one = read_examples(path, tiny[1], EOS, one_pass=True)
    assert [e.place for e in one] == [f"{path}:{i}" for i in (1, 2, 3)]
    assert one.target_counts.sum() == read_examples(path, tiny[1], EOS).target_counts.sum()
    with pytest.raises(ParaJaxError, match="keep_texts needs an example for each turn"):
        read_examples(path, tiny[1], EOS, one_pass=True, keep_texts=True)


def test_a_chat_that_is_too_long(tiny: Any) -> None:
    rows = [("chats.jsonl:7", {"messages": CHAT}), ("chats.jsonl:8", {"messages": CHAT[:3]})]
    (whole, _) = encode_rows(rows, tiny[1], EOS, one_pass=True)
    limit = len(whole) - 1
    with pytest.raises(
        ParaJaxError, match=rf"1 of 2 rows are longer .* \(the longest has {limit + 1}: chats.jsonl:7\)"
    ):
        encode_rows(rows, tiny[1], EOS, limit, one_pass=True)
    cut, apart = (encode_rows(rows, tiny[1], EOS, limit, truncate=True, one_pass=one) for one in (True, False))
    assert [e.place for e in cut] == ["chats.jsonl:7"] * 3 + ["chats.jsonl:8"]
    assert predictions(cut) == predictions(apart)


def test_finetune_learns_a_chat_in_one_pass_where_the_method_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": CHAT}) + "\n")
    seen: dict[str, list[int]] = {}

    def instead(_loading: Any, _bank: Any, tuning: Tuning) -> None:
        seen.update({name: [len(rows), len(tuning.dev[name])] for name, rows in tuning.examples.items()})

    monkeypatch.setattr(finetune, "train", instead)
    names = ("para", "lora", "ia3")
    arguments = [f"--{option}={name}={path}" for name in names for option in ("tenant", "dev")]
    methods = [f"--method={name}={name}" for name in names]
    assert main(["finetune", *arguments, *methods, "--out", str(tmp_path / "out")]) == 0
    assert seen == {"para": [3, 3], "lora": [1, 1], "ia3": [1, 1]}
