"""Tokens of texts that begin alike are those of each text alone, for every kind of tokenizer."""

from __future__ import annotations

import random
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from para_jax.data.tokens import prefix_ids

PIECES = ["<s>", "</s>", "<|end|>", "<|endoftext|>", " ", "  ", "\n", "a", "The cat", "é", "▁", "<", "|end|>", "s>"]
LETTERS = sorted({letter for piece in PIECES for letter in piece} | {"▁"})


def made(normalizer: Any = None, pre_tokenizer: Any = None, **token: Any) -> Any:
    """A tokenizer of letters and a few merges."""
    merges = [("▁", "a"), ("▁", "▁"), ("T", "h"), ("\n", "\n")]
    words = ["<unk>", *LETTERS, *("".join(pair) for pair in merges)]
    vocab = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>"))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.add_special_tokens([AddedToken(text, **token) for text in ("<s>", "</s>", "<|end|>", "<|endoftext|>")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


LLAMA = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
KINDS = {
    "plain": {},
    "Llama 2": {"normalizer": LLAMA},
    "Metaspace, first": {"pre_tokenizer": pre_tokenizers.Metaspace(prepend_scheme="first")},
    "Metaspace, always": {"pre_tokenizer": pre_tokenizers.Metaspace(prepend_scheme="always")},
    "tokens take white space": {"normalizer": LLAMA, "lstrip": True, "rstrip": True},
    "tokens are whole words": {"single_word": True},
    "tokens are normalized": {"normalizer": normalizers.Lowercase(), "normalized": True},
}


@pytest.mark.parametrize("kind", ["the shipped one", *KINDS])
def test_as_each_text_alone(tiny: Any, kind: str) -> None:
    tokenizer = made(**KINDS[kind]) if kind in KINDS else tiny[1]
    drawn = random.Random(3)
    texts = ["".join(drawn.choices(PIECES, k=drawn.randint(1, 14))) for _ in range(200)]
    groups = [[*(text[: drawn.randint(0, len(text))] for _ in range(3)), text, "a" + text[1:]] for text in texts]
    alone = [[tokenizer(text, add_special_tokens=False)["input_ids"] for text in group] for group in groups]
    assert prefix_ids(tokenizer, groups) == alone
