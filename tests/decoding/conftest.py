"""One random model here and in transformers, with the tokenizer that ships."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.helpers import random_backbone

# Prompts of mixed lengths, the longest exactly a bucket.
PROMPTS = [[int(token) for token in np.random.default_rng(length).integers(2, 61, length)] for length in (5, 1, 16, 9)]


class Reference:
    """transformers' own generate on the same weights, all rows in one left-padded batch."""

    def __init__(self, model):
        self.model = model

    def generate(self, prompts, eos_token_id=(), **options) -> list[list[int]]:
        """The ids generated for every row, up to the first eos."""
        length = max(len(prompt) for prompt in prompts)
        ids = torch.tensor([[1] * (length - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        eos = list(eos_token_id)
        with torch.no_grad():
            out = self.model.generate(
                ids, attention_mask=mask, do_sample=False, pad_token_id=1, eos_token_id=eos or None, **options
            )
        rows = out[:, length:].tolist()
        return [row[: next((i for i, token in enumerate(row) if token in eos), None)] for row in rows]


@pytest.fixture(scope="session")
def tokenizer(tiny):
    return tiny[1]


@pytest.fixture(scope="session")
def backbone():
    """With layers stacked, of which one is compiled."""
    return random_backbone(3, stacked=True)


@pytest.fixture(scope="session")
def reference(backbone, tmp_path_factory):
    from transformers import LlamaForCausalLM

    from para_jax.convert.checkpoint import save_backbone

    folder = tmp_path_factory.mktemp("model") / "random"
    save_backbone(backbone, folder)
    return Reference(LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())
