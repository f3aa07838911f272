"""A task's splits: which rows are tuned on, which choose, which are scored."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from para_jax import Backbone, Example, ParaJaxError, encode_rows, end_tokens, read_rows
from para_jax.data.examples import Examples
from para_jax.evaluation.metrics import majority

MOST_CHOICES = 10  # up to so many different responses are labels to choose among


@dataclass(frozen=True)
class Task:
    """A task's rows. `score` is the entry of `evaluate` that counts, `facts` what a report says of the data."""

    name: str
    train: Sequence[Example]
    dev: Sequence[Example]
    test: Sequence[Example]
    score: str
    max_new_tokens: int
    facts: dict[str, Any]


def read_task(
    folder: Path, tokenizer: Any, backbone: Backbone, *, dev_rows: int, test_rows: int, length: int, new_tokens: int
) -> Task:
    """The splits of FOLDER/{train,dev,test}.jsonl; without a dev file, prompts of the training rows are held out.

    A training row whose prompt is in dev or test is left out, and a dev row whose prompt is in test. Rows above the
    99th percentile of length, or above `length` tokens, are left out of tuning: a few long ones would set the length
    of every packed row. Test rows are never left out for their length. What is drawn depends on the task's name only.
    """
    rows = {path.stem: [row for _, row in read_rows(path)] for path in sorted(folder.glob("*.jsonl"))}
    for split in ("train", "test"):
        if split not in rows:
            raise ParaJaxError(f"{folder} has no {split}.jsonl; a task is a folder with train, test and perhaps dev")
    draw = random.Random(folder.name)
    counts = {split: len(some) for split, some in rows.items()}
    prompts = {row["prompt"] for row in rows["test"]}
    train = [row for row in rows["train"] if row["prompt"] not in prompts]
    if "dev" in rows:
        dev = [row for row in rows["dev"] if row["prompt"] not in prompts]
        held_out = {row["prompt"] for row in dev}
    else:
        known = list(dict.fromkeys(row["prompt"] for row in train))
        held_out = set(draw.sample(known, min(dev_rows, len(known) // 2)))
        dev = [row for row in train if row["prompt"] in held_out]
    train = [row for row in train if row["prompt"] not in held_out]
    test = rows["test"]
    test = [test[i] for i in sorted(draw.sample(range(len(test)), min(test_rows, len(test))))]

    answers = sorted({row["response"] for some in rows.values() for row in some})
    labels = {"choices": answers} if len(answers) <= MOST_CHOICES else {}

    def encode(split: str, some: list[dict[str, Any]]) -> Examples:
        placed = [(f"{folder.name} {split} {i}", {**labels, **row}) for i, row in enumerate(some)]
        return encode_rows(placed, tokenizer, end_tokens(backbone.config, tokenizer), keep_texts=True)

    examples = {"train": encode("train", train), "dev": encode("dev", dev), "test": encode("test", test)}
    cut = min(length, int(np.quantile([len(e) for e in examples["train"]], 0.99, method="higher")))
    fit = {split: [e for e in examples[split] if len(e) <= cut] for split in ("train", "dev")}
    for split, some in fit.items():
        if not some:
            raise ParaJaxError(f"{folder.name} has no {split} row of at most {cut} tokens; raise --max-length")
    dev_fit = [fit["dev"][i] for i in sorted(draw.sample(range(len(fit["dev"])), min(dev_rows, len(fit["dev"]))))]
    first = examples["test"][0]
    score = "choice_accuracy" if first.choices else "bleu" if first.references else "exact_match"
    longest_answer = int(examples["train"].target_counts.max())
    facts = {
        "score": score,
        "in_files": counts,
        "used": {"train": len(fit["train"]), "dev": len(dev_fit), "test": len(examples["test"])},
        "left_out_of_train": {
            "prompt_in_dev_or_test": counts["train"] - len(train),
            f"over_{cut}_tokens": len(train) - len(fit["train"]),
        },
        "majority": majority([e.response for e in examples["test"]]) if labels else None,
    }
    # Of a row with choices the text is not scored, so one token of it is enough.
    most = 1 if first.choices else min(new_tokens, longest_answer)
    tuned = Examples.of(fit["train"]), Examples.of(dev_fit)
    return Task(folder.name, *tuned, examples["test"], score, most, facts)


def mixture(tasks: Sequence[Task]) -> Task:
    """All tasks in equal parts, as one task to tune on: FanLoRA's instruction mixture. It has no test rows."""
    draw = random.Random("mixture")
    size = {split: min(len(getattr(task, split)) for task in tasks) for split in ("train", "dev")}
    train, dev = (Examples.of(e for t in tasks for e in draw.sample(getattr(t, s), size[s])) for s in ("train", "dev"))
    return Task("mixture", train, dev, (), "", 1, {"used": {"train": len(train), "dev": len(dev)}})
