import jax
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from para_jax import ParaConfig, ParaJaxError
from para_jax.convert.checkpoint import save_backbone
from para_jax.evaluation import choices as module
from para_jax.evaluation.choices import choice_log_likelihoods
from tests.helpers import random_backbone, random_bank

BACKBONE = random_backbone(3, stacked=True)
BANK = random_bank({"a": ParaConfig(r=3), "b": ParaConfig(r=3), "c": ParaConfig(r=2, pooling="mean")}, BACKBONE.config)
TENANTS = ["a", None, "c", "b", "a", None]


def random_rows(seed=2):
    """Prompts of 1 to 20 tokens with 1 to 4 choices of 1 to 6 tokens."""
    rng = np.random.default_rng(seed)

    def ids(most):
        return rng.integers(1, BACKBONE.config.vocab_size, rng.integers(1, most + 1)).tolist()

    return [ids(20) for _ in TENANTS], [[ids(6) for _ in range(1 + i % 4)] for i in range(len(TENANTS))]


@jax.jit
def log_probabilities(backbone, rows, tokens, mask, prompt_mask):
    hidden, _, _ = backbone.forward(tokens, mask, prompt_mask, rows)
    return jax.nn.log_softmax(backbone.logits(hidden)[0])


def plain_score(prompt, answer, tenant, length=32):
    """From the definition: a batch of one row, padded on the left, and its tokens' log-probabilities summed here."""
    tokens = np.array([[50] * (length - len(prompt + answer)) + prompt + answer])
    place = np.arange(length)[None]
    mask, prompt_mask = place >= length - len(prompt + answer), place < length - len(answer)
    log_p = log_probabilities(BACKBONE, BANK.rows([tenant]), tokens, mask, mask & prompt_mask)
    return sum(float(log_p[length - len(answer) - 1 + i, token]) for i, token in enumerate(answer))


def test_equal_to_transformers_without_adapters(tmp_path):
    save_backbone(BACKBONE, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    prompts, choices = random_rows()
    for prompt, answers, scores in zip(
        prompts, choices, choice_log_likelihoods(BACKBONE, prompts, choices, batch_size=8), strict=True
    ):
        for answer, score in zip(answers, scores, strict=True):
            with torch.no_grad():
                log_p = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            expected = sum(log_p[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer))
            assert score == pytest.approx(expected, rel=1e-4)


def test_mixed_tenants_in_one_batch_are_each_scored_with_their_own_adapter():
    prompts, choices = random_rows()
    scores = choice_log_likelihoods(BACKBONE, prompts, choices, bank=BANK, tenants=TENANTS, batch_size=8)
    assert [len(row) for row in scores] == [len(row) for row in choices]
    for prompt, answers, tenant, row in zip(prompts, choices, TENANTS, scores, strict=True):
        assert row == pytest.approx([plain_score(prompt, a, tenant) for a in answers], rel=1e-4)
    bare = choice_log_likelihoods(BACKBONE, prompts, choices, batch_size=8)
    assert [row != pytest.approx(b, rel=1e-2) for row, b in zip(scores, bare, strict=True)] == [
        tenant is not None for tenant in TENANTS
    ]


def test_a_size_is_compiled_once():
    prompts, choices = random_rows()
    choice_log_likelihoods(BACKBONE, prompts, choices, bank=BANK, tenants=TENANTS, batch_size=8)
    before = module._score._cache_size()
    other = [[1 + (token + 5) % 60 for token in prompt] for prompt in prompts]
    choice_log_likelihoods(BACKBONE, other, choices, bank=BANK, tenants=["b", "c", None, "a", "b", "c"], batch_size=8)
    assert module._score._cache_size() == before


def test_progress_reaches_the_end():
    prompts, choices = random_rows()
    seen = []
    choice_log_likelihoods(BACKBONE, prompts, choices, batch_size=8, progress=lambda *x: seen.append(x))
    total = sum(map(len, choices))
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


@pytest.mark.parametrize(
    ("prompts", "choices", "tenants", "message"),
    [
        ([[1], []], [[[2]], [[2]]], None, "row 1: prompt has no tokens"),
        ([[1]], [[[2], []]], None, "row 0: choice 1 has no tokens"),
        ([[1] * 120], [[[2], [2] * 9]], None, r"choice 1 have 120 \+ 9 tokens; the backbone's context is 128"),
        ([[1]], [], None, "1 prompts and 0 lists of choices"),
        ([[1]], [[[2]]], ["a", "b"], "1 rows but 2 tenants"),
        ([[1]], [[[2]]], ["aa"], "did you mean 'a'"),
    ],
)
def test_what_cannot_be_scored_is_named(prompts, choices, tenants, message):
    with pytest.raises(ParaJaxError, match=message):
        choice_log_likelihoods(BACKBONE, prompts, choices, bank=BANK, tenants=tenants or [None] * len(prompts))


def test_no_rows_no_scores():
    assert choice_log_likelihoods(BACKBONE, [], []) == []
