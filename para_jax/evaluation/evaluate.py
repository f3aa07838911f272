"""`evaluate`: answers and scores the held-out rows of several tenants together."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from statistics import fmean
from typing import Any

from para_jax.adapters.bank import AdapterBank
from para_jax.backbones.decoder import Backbone
from para_jax.backbones.loading import Loading
from para_jax.checks import COUNT
from para_jax.convert.adapter_tokenizer import ends
from para_jax.data.examples import Example, check_ids
from para_jax.data.reading import Reader, Source
from para_jax.data.table import raise_problems
from para_jax.decoding.generate import Completion, complete
from para_jax.errors import ParaJaxError, unknown
from para_jax.evaluation.choices import choice_log_likelihoods
from para_jax.evaluation.metrics import corpus_bleu, exact_match, majority, squeezed, token_f1

Report = Callable[[int, int], None]


def evaluate(
    backbone: Backbone | Loading,
    tokenizer: Any,
    tenants: Mapping[str, Source],
    bank: AdapterBank | None,
    *,
    tokenizers: Mapping[str, Any] | None = None,
    max_new_tokens: int | Mapping[str, int] = 64,
    batch_size: int = 32,
    progress: Report | None = None,
    show: Callable[[str], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Answers every row greedily, the tenants' rows mixed in the same batches, and scores each tenant.

    Args:
      backbone: the frozen model. With a backbone that is still being read (`Loading`), compilation overlaps with
        reading.
      tokenizer: a transformers tokenizer.
      tenants: each tenant's rows: a source (`read_rows`) such as "mail.jsonl", a list of {"prompt", "response"}, or
        examples with their texts (`encode_rows`).
      bank: the tenants' adapters. With None, the bare backbone answers all rows.
      tokenizers: by tenant, the tokenizers of tenants that have their own (`adapter_tokenizer`).
      max_new_tokens: the maximum number of tokens of an answer, for all tenants or by tenant.
      batch_size: the number of rows, or of pairs of a row and a choice, that run together.
      progress: is called with the numbers of these done and in total.
      show: is called with lines of progress while rows are read.

    Returns for each tenant a JSON-serializable dict:
      rows: the number of rows.
      exact_match, token_f1: means over the rows, against the best of a row's references, or its response if it has
        none.
      bleu: corpus BLEU of all rows with references, 0 to 100, if there are any.
      choice_accuracy: for the rows with choices, if there are any: how often the likeliest choice, followed by the
        end-of-text token, is the response.
      majority: the accuracy of always giving the most frequent response.
      predictions: for each row its prompt, response, prediction and finish reason, and for rows with choices the chosen
        one and all log-likelihoods. If one of these is NaN, the choice is None and counts as wrong.

    Raises ParaJaxError for a tenant without rows or without an adapter, a row without a response, a response that is
    not among its row's choices, or a prompt that leaves no room in the context.
    """
    if not isinstance(max_new_tokens, Mapping):
        max_new_tokens = dict.fromkeys(tenants, max_new_tokens)
    loading = Loading.of(backbone)
    config = loading.shapes.config
    by_name = {name: (tokenizers or {}).get(name, tokenizer) for name in tenants}
    eos = {name: ends(tokenizer, by_name[name], config) for name in tenants}
    examples = {
        name: Reader(by_name[name], eos[name], keep_texts=True, allow_special_tokens=True, show=show)(name, source)
        for name, source in tenants.items()
    }
    _check(examples, bank, config.max_position_embeddings, max_new_tokens)
    for tenant_rows in examples.values():
        check_ids(tenant_rows, config.vocab_size)
    rows = [example for tenant in examples for example in examples[tenant]]
    names = [tenant for tenant in examples for _ in examples[tenant]]
    row_tenants = [None if bank is None else name for name in names]
    choosing = [i for i, row in enumerate(rows) if row.choices]
    total = len(rows) + sum(len(rows[i].choices) for i in choosing)

    def report(before: int) -> Report:
        return lambda done, _: None if progress is None else progress(before + done, total)

    prompts = [row.prompt_ids.tolist() for row in rows]
    completions = complete(
        loading, [by_name[name] for name in names], prompts, bank=bank, tenants=row_tenants,
        max_new_tokens=[max_new_tokens[name] for name in names], eos_token_id=[eos[name] for name in names],
        batch_size=batch_size, progress=report(0),
    )  # fmt: skip
    choices = [[(*ids, *eos[names[i]][:1]) for ids in rows[i].choice_ids] for i in choosing]
    likelihoods = choice_log_likelihoods(
        loading.backbone(), [prompts[i] for i in choosing], choices, bank=bank,
        tenants=[row_tenants[i] for i in choosing], batch_size=batch_size, progress=report(len(rows)),
    )  # fmt: skip
    chosen = dict(zip(choosing, likelihoods, strict=True))
    predictions = (_prediction(row, completions[i], chosen.get(i)) for i, row in enumerate(rows))
    return {
        tenant: _scores(tenant, list(islice(predictions, len(examples[tenant]))), examples[tenant])
        for tenant in examples
    }


def _check(
    examples: Mapping[str, Sequence[Example]], bank: AdapterBank | None, context: int, limits: Mapping[str, int]
) -> None:
    problems = []
    for tenant in examples:
        if bank is not None and tenant not in bank:
            raise unknown("tenant", tenant, bank.names)
        if tenant not in limits:
            raise ParaJaxError(f"max_new_tokens has no value for tenant {tenant!r}; give one for each, or one number")
        if not examples[tenant]:
            problems.append(f"tenant {tenant!r} has no rows to evaluate")
        room = context - COUNT.check("max_new_tokens", limits[tenant])
        for e in examples[tenant]:
            where = e.place or f"a row of tenant {tenant!r}"
            if not e.prompt:
                problems.append(f"{where}: the example has no texts; read the rows with keep_texts=True")
            elif not e.response:
                problems.append(f"{where}: there is no response to compare with")
            elif e.choices and squeezed(e.response) not in map(squeezed, e.choices):
                problems.append(f"{where}: the response {e.response!r} is not one of its choices {list(e.choices)}")
            if len(e.prompt_ids) > room:
                problems.append(
                    f"{where}: the prompt has {len(e.prompt_ids)} tokens, and the context without the new tokens holds "
                    f"{room}; shorten it, or lower max_new_tokens"
                )
    raise_problems(problems)


def _prediction(example: Example, completion: Completion, likelihoods: Sequence[float] | None) -> dict[str, Any]:
    prediction = {
        "prompt": example.prompt,
        "response": example.response,
        "prediction": completion.text.strip(),
        "finish_reason": completion.finish_reason,
    }
    if likelihoods is None:
        return prediction
    best = None  # NaN cannot be compared
    if not any(math.isnan(x) for x in likelihoods):
        best = example.choices[max(range(len(likelihoods)), key=lambda i: likelihoods[i])]
    finite = [x if math.isfinite(x) else None for x in likelihoods]  # JSON has no NaN
    return {**prediction, "choice": best, "log_likelihoods": finite}


def _scores(tenant: str, predictions: Sequence[dict[str, Any]], examples: Sequence[Example]) -> dict[str, Any]:
    texts = [p["prediction"] for p in predictions]
    pairs = [(text, e.references or (e.response,)) for text, e in zip(texts, examples, strict=True)]
    scores: dict[str, Any] = {
        "rows": len(pairs),
        "exact_match": fmean(exact_match(*pair) for pair in pairs),
        "token_f1": fmean(token_f1(*pair) for pair in pairs),
        "majority": majority([e.response for e in examples]),
    }
    referenced = [(text, e.references) for text, e in zip(texts, examples, strict=True) if e.references]
    if referenced:
        scores["bleu"] = corpus_bleu(*zip(*referenced, strict=True))
    choices = [(p["choice"], p["response"]) for p in predictions if "choice" in p]
    if choices:
        right = [choice is not None and squeezed(choice) == squeezed(response) for choice, response in choices]
        scores["choice_accuracy"] = fmean(right)
    if none := sum(choice is None for choice, _ in choices):
        logging.getLogger(__name__).warning(
            "%s: log-likelihoods are NaN in %d of %d rows with choices, so no choice is the likeliest; they count as "
            "wrong. The adapter or the backbone has NaN or infinite weights (para-jax convert --check)",
            tenant, none, len(choices),
        )  # fmt: skip
    return {**scores, "predictions": list(predictions)}
