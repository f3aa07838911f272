"""The tokens that end a text: of generation_config.json, config.json, or the tokenizer; and where they disagree."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from para_jax import Backbone, BackboneConfig, ParaJaxError, complete, tiny_backbone_path
from para_jax.cli import main
from para_jax.convert.checkpoint import save_backbone
from para_jax.convert.tokenizer import end_tokens, load_tokenizer
from para_jax.data.examples import encode_rows
from para_jax.families.table import FAMILIES
from tests.helpers import family_fields, random_backbone

NONE = "neither generation_config.json nor config.json names an end token; "
UNENDED = (
    "neither generation_config.json, config.json nor the tokenizer names an end token, so responses get none and "
    "generated texts end at max_new_tokens only"
)
ABSENT = object()
# eos_token_id of generation_config.json and of config.json, whether the tokenizer has <|endoftext|> (0) as its end
# token; what is used, and what is said.
CASES: list[tuple[Any, Any, bool, tuple[int, ...], list[str]]] = [
    (ABSENT, 0, True, (0,), []),
    (0, 0, True, (0,), []),
    (0, ABSENT, True, (0,), []),
    (None, 0, True, (0,), []),
    ([], 0, True, (0,), []),
    ([5, 0], 0, True, (5, 0), []),  # the chat models' list
    ([5, 0, 5], [0, 5], True, (5, 0), []),
    (ABSENT, [5, 0], True, (5, 0), []),
    (ABSENT, 0, False, (0,), []),
    (ABSENT, ABSENT, True, (0,), [NONE + "0 ('<|endoftext|>') is used"]),
    (None, None, True, (0,), [NONE + "0 ('<|endoftext|>') is used"]),
    (ABSENT, ABSENT, False, (), [UNENDED]),
    (None, [], False, (), [UNENDED]),
    (0, 7, True, (0,), ["generation_config.json ends texts with [0], config.json with [7]; [0] is used"]),
    (ABSENT, 7, True, (7,),
     ["its files end texts with 7 ('&'), its tokenizer with 0 ('<|endoftext|>'); 7 ('&') is used"]),
    ([7, 8], 7, True, (7, 8), ["its files end texts with 7 ('&'), 8 (\"'\"), its tokenizer with 0 ('<|endoftext|>'); "
     "7 ('&'), 8 (\"'\") are used"]),
    (ABSENT, -1, True, (0,), ["end token -1 is not in the vocabulary of 4096 and is not used; " + NONE
     + "0 ('<|endoftext|>') is used"]),
    ([99999, 0], ABSENT, True, (0,),
     ["end token 99999 is not in the vocabulary of 4096 and is not used; 0 ('<|endoftext|>') is used"]),
]  # fmt: skip


def folder_with(to: Path, generation: Any, config: Any, tokenizers: bool) -> Path:
    """The tiny backbone with these end tokens."""
    shutil.copytree(tiny_backbone_path(), to)
    for name, eos in (("generation_config.json", generation), ("config.json", config)):
        fields = json.loads((to / name).read_text()) if (to / name).is_file() else {}
        fields.pop("eos_token_id", None)
        (to / name).write_text(json.dumps(fields if eos is ABSENT else {**fields, "eos_token_id": eos}))
    if not tokenizers:
        fields = json.loads((to / "tokenizer_config.json").read_text())
        (to / "tokenizer_config.json").write_text(json.dumps({**fields, "eos_token": None}))
    return to


@pytest.mark.parametrize(("generation", "config", "tokenizers", "used", "said"), CASES)
def test_where_they_come_from(
    generation: Any, config: Any, tokenizers: bool, used: tuple[int, ...], said: list[str],
    tmp_path: Path, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    folder = folder_with(tmp_path / "a", generation, config, tokenizers)
    caplog.set_level(logging.WARNING)
    tokenizer = load_tokenizer(folder)
    shape = BackboneConfig.from_pretrained(folder)
    assert end_tokens(shape, tokenizer) == end_tokens(shape, tokenizer) == used
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("para_jax")]
    assert lines == [f"{folder}: {line}" for line in said]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_classes_default_is_no_end_token(family: str) -> None:
    fields = {key: value for key, value in family_fields(family).items() if key != "eos_token_id"}
    assert BackboneConfig.from_hf(fields).eos_token_ids == ()


def test_what_is_no_token_id(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "a", "0", 0, True)
    with pytest.raises(ParaJaxError) as error:
        BackboneConfig.from_pretrained(folder)
    assert str(error.value) == (
        "generation_config.json has eos_token_id='0', which is neither a token id nor a list of token ids"
    )


def test_a_checkpoint_without_one_keeps_none(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "a", ABSENT, ABSENT, True)
    save_backbone(Backbone.from_pretrained(folder), tmp_path / "out", like=folder)
    assert "eos_token_id" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert BackboneConfig.from_pretrained(tmp_path / "out").eos_token_ids == ()


def test_responses_and_texts_end_with_the_tokenizers(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "a", ABSENT, ABSENT, True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    eos = end_tokens(BackboneConfig.from_pretrained(folder), tokenizer)
    rows = encode_rows([("row 1", {"prompt": "Who sat?", "response": "The cat."})], tokenizer, eos)
    assert tokenizer.decode(rows[0].response_ids) == " The cat.<|endoftext|>"
    vocab = tokenizer.vocab_size
    backbone = random_backbone(vocab_size=vocab, eos_token_ids=())
    free = complete(backbone, tokenizer, [[5, 6]], max_new_tokens=8, eos_token_id=())[0].tokens
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(free[2])
    ended = complete(backbone, tokenizer, [[5, 6]], max_new_tokens=8)[0]
    assert ended.tokens == free[: free.index(free[2])] and ended.finish_reason == "stop"


@pytest.mark.parametrize("verb", ["finetune", "evaluate", "generate"])
def test_every_verb_says_it_once(verb: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = folder_with(tmp_path / "a", None, None, True)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "Who sat?", "response": "The cat."}) + "\n")
    arguments = {
        "finetune": ["--tenant", f"acme={rows}", "--steps", "1", "--rows", "1", "--out", str(tmp_path / "out")],
        "evaluate": ["--tenant", f"acme={rows}", "--max-new-tokens", "2", "--choose", "acme"],
        "generate": ["--prompt", "Who sat?", "--max-new-tokens", "2"],
    }
    caplog.set_level(logging.WARNING)
    assert main([verb, "--model", str(folder), *arguments[verb]]) == 0
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("para_jax")]
    assert lines == [f"{folder}: {NONE}0 ('<|endoftext|>') is used"]
