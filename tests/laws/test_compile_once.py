"""Law 4: a new tenant, adapter or prompt in a known bucket never compiles anything."""

from __future__ import annotations

import pytest

from para_jax import AdapterBank, ParaConfig, complete
from tests.compilations import compilations
from tests.helpers import METHODS, random_adapter, random_backbone

CONFIG, OTHER = ParaConfig(r=4), ParaConfig(r=3, pooling="mean", bias=True)
PAIRS = {
    "para": (CONFIG, OTHER),
    "lora and ia3": (METHODS["patterned"], METHODS["ia3"]),
    "bias and para": (METHODS["bias"], CONFIG),
}
TENANTS = ["acme", None, "globex", "acme"]


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return tiny[1]


@pytest.fixture(scope="module")
def backbone():
    return random_backbone(5, stacked=True)


def bank_of(configs, backbone) -> AdapterBank:
    """Two configurations with room for more, in which tenants have come and gone before."""
    adapters = {
        name: random_adapter(config, backbone.config, i)
        for i, (name, config) in enumerate(zip(("acme", "globex"), configs, strict=True), 1)
    }
    bank = AdapterBank.stack(adapters, backbone.config, capacity=4)
    for name, config in zip(("old", "older"), configs, strict=True):
        bank = bank.add(name, random_adapter(config, backbone.config, 3))
        bank = bank.replace(name, random_adapter(config, backbone.config, 4)).remove(name)
    return bank


def prompts(*lengths):
    return [[(3 * place + length) % 59 + 2 for place in range(length)] for length in lengths]


KINDS = {
    "greedy": {},
    "sampled": {"temperature": 0.7, "top_k": 9, "repetition_penalty": 1.2, "stop": ["abc"]},
    "beams": {"num_beams": 2, "stop": ["abc"]},
}


@pytest.mark.parametrize(
    ("kind", "pair"),
    [
        *((kind, "para") for kind in KINDS),
        *(("greedy", "lora and ia3"), ("beams", "lora and ia3"), ("greedy", "bias and para")),
    ],
)
def test_what_is_new_compiles_nothing(backbone, tokenizer, kind, pair):
    bank = bank_of(PAIRS[pair], backbone)
    first = {"max_new_tokens": 12, "bank": bank, "tenants": TENANTS, **KINDS[kind]}
    before = complete(backbone, tokenizer, prompts(3, 9, 16, 1), **first)
    adapters = [random_adapter(config, backbone.config, 7) for config in PAIRS[pair]]
    with compilations() as compiled:
        # Another order of the same tenants, and prompts of other lengths.
        after = complete(
            backbone, tokenizer, prompts(14, 2, 5, 8), **{**first, "tenants": ["globex", "globex", "acme", None]}
        )
        # An adapter's next version, and new tenants in free slots of both configurations.
        later = bank.replace("acme", adapters[0]).add("initech", adapters[1]).add("umbrella", adapters[0])
        new = {**first, "bank": later, "tenants": ["initech", "umbrella", "acme", None]}
        newer = complete(backbone, tokenizer, prompts(3, 9, 16, 1), **new)
        # A tenant that leaves, and one batch more of which only half the rows are used.
        smaller = {**first, "bank": later.remove("umbrella"), "tenants": [*TENANTS, "initech", "acme"]}
        complete(backbone, tokenizer, prompts(1, 2, 3, 4, 5, 6), **smaller, batch_size=4)
        # Other adapter weights.
        half = {**first, "tenants": [{"acme": 0.5}, {"acme": 0.0}, {"globex": -2}, {"acme": 1.5}]}
        complete(backbone, tokenizer, prompts(3, 9, 16, 1), **half)
        # Other limits and ends.
        ends = {**first, "max_new_tokens": [16, 1, 3, 11], "eos_token_id": [5, 6, 7]}
        if kind != "beams":  # The number of eos tokens is part of a beam search's program.
            complete(backbone, tokenizer, prompts(3, 9, 16, 1), **ends)
        if kind == "sampled":
            drawn = {"temperature": [0.0, 2.0, 1.0, 0.5], "top_p": 0.8, "seed": [4, 5, 6, 7], "stop": ["x", "\n\n"]}
            complete(backbone, tokenizer, prompts(4, 4, 4, 4), **{**first, **drawn, "top_k": 0})
        if kind == "beams":
            ranked = {"length_penalty": 2.0, "early_stopping": "never", "eos_token_id": 9, "stop": ["yz"]}
            complete(backbone, tokenizer, prompts(4, 4, 4, 4), **{**first, **ranked})
    assert not compiled
    assert len({row.text for row in (*before, *after, *newer)}) > 6


def test_another_bucket_compiles(backbone, tokenizer):
    """The count counts: for one prompt of 17 tokens, prefill and loop are compiled once each."""
    bank = bank_of(PAIRS["para"], backbone)
    options = {"max_new_tokens": 12, "bank": bank, "tenants": TENANTS}
    complete(backbone, tokenizer, prompts(3, 9, 16, 1), **options)
    with compilations() as compiled:
        complete(backbone, tokenizer, prompts(17, 9, 16, 1), **options)
    assert len(compiled) == 2
