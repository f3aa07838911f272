"""One tenant tuned by a plain loop over peft's LoRA: the process that `benchmarks/real.py` compares ours with.

    python benchmarks/peft_loop.py --model DIR --tenant NAME=FILE.jsonl --out DIR --steps 24 --rows 8 --r 8

It reads the same JSONL file as `para-jax finetune`, makes the same tokens of it, takes the same rows in the same order,
and has the same optimizer and schedule. A batch is padded to its longest row. A chat is one row, with the loss on all
of its assistant turns. OUT then holds the adapter, and metrics.jsonl with a line for each step.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

NO_LOSS = -100  # torch's label for a token that has no loss
WARMUP_RATIO, MAX_GRAD_NORM = 0.06, 1.0  # the defaults of `para-jax finetune`


class Row(NamedTuple):
    """The token ids of a row, and the same ids where there is a loss, else `NO_LOSS`."""

    ids: list[int]
    labels: list[int]


def read(path: str | Path, tokenizer: Any) -> list[Row]:
    """The rows of a JSONL file of prompts and responses, or of chats."""
    lines = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n") if line.strip()]
    if "messages" in lines[0]:
        return [chat_row(line["messages"], tokenizer) for line in lines]
    return prompt_rows([(line["prompt"], line["response"]) for line in lines], tokenizer)


def prompt_rows(pairs: Sequence[tuple[str, str]], tokenizer: Any) -> list[Row]:
    """A row of each prompt and response. A prompt has the tokens that it has alone, and the row ends with EOS."""
    answers = [answer if prompt[-1].isspace() or answer[0].isspace() else f" {answer}" for prompt, answer in pairs]
    texts = [prompt + answer for (prompt, _), answer in zip(pairs, answers, strict=True)]
    prompts, wholes = (tokenizer(some, verbose=False)["input_ids"] for some in ([prompt for prompt, _ in pairs], texts))
    rows = []
    for prompt, whole, answer in zip(prompts, wholes, answers, strict=True):
        rest = whole[len(prompt) :]
        if whole[: len(prompt)] != prompt:
            rest = tokenizer(answer, add_special_tokens=False)["input_ids"]
        rest = [*rest, tokenizer.eos_token_id]
        rows.append(Row(prompt + rest, [NO_LOSS] * len(prompt) + rest))
    return rows


def chat_row(messages: Sequence[dict[str, str]], tokenizer: Any) -> Row:
    """A whole chat: a loss on each assistant turn, from behind the template's opening of it to its first EOS."""

    def text(count: int, opened: bool = False) -> str:
        return tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=opened)

    encoded = tokenizer(text(len(messages)), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, starts = encoded["input_ids"], [start for start, _ in encoded["offset_mapping"]]
    labels = [NO_LOSS] * len(ids)
    for turn in (i for i, message in enumerate(messages) if message["role"] == "assistant"):
        begin, end = len(text(turn, opened=True)), len(text(turn + 1))
        own = [i for i, start in enumerate(starts) if begin <= start < end]
        last = next((i for i in own if ids[i] == tokenizer.eos_token_id), own[-1])
        labels[own[0] : last + 1] = ids[own[0] : last + 1]
    end = max(i for i, label in enumerate(labels) if label != NO_LOSS) + 1
    return Row(ids[:end], labels[:end])  # nothing is learnt from what the template writes behind the last turn


def batch(rows: Sequence[Row], device: str) -> dict[str, Any]:
    """Padded on the right to the longest row."""
    import torch

    longest = max(len(row.ids) for row in rows)
    ids, mask = (torch.zeros(len(rows), longest, dtype=torch.long) for _ in range(2))
    labels = torch.full_like(ids, NO_LOSS)
    for i, row in enumerate(rows):
        size = len(row.ids)
        ids[i, :size], mask[i, :size], labels[i, :size] = torch.tensor(row.ids), 1, torch.tensor(row.labels)
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device), "labels": labels.to(device)}


def schedule(steps: int, step: int) -> float:
    """The share of the highest rate: a linear rise, then a linear fall.

    >>> [schedule(24, step) for step in (0, 1, 2, 13)]
    [0.5, 1.0, 1.0, 0.5]
    """
    warmup = math.ceil(WARMUP_RATIO * steps)
    return min(1.0, (step + 1) / warmup, (steps - step) / max(1, steps - warmup))


def train(args: argparse.Namespace) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from para_jax.data.order import order  # which rows a step has

    tenant, _, file = args.tenant.partition("=")
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = read(file, AutoTokenizer.from_pretrained(args.model))
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).to(device)
    config = LoraConfig(r=args.r, lora_alpha=args.r, target_modules=args.sites, task_type="CAUSAL_LM")
    model: Any = get_peft_model(base, config).train()
    weights = [p for p in model.parameters() if p.requires_grad]
    print(f"{len(rows):,} rows; an adapter has {sum(p.numel() for p in weights):,} parameters", flush=True)
    adamw = torch.optim.AdamW(weights, lr=args.lr, weight_decay=0.0)
    rate = torch.optim.lr_scheduler.LambdaLR(adamw, lambda step: schedule(args.steps, step))
    args.out.mkdir(parents=True)
    with (args.out / "metrics.jsonl").open("w") as metrics:
        for step in range(args.steps):
            own = [rows[i] for i in order(args.seed, tenant, rows, range(step * args.rows, (step + 1) * args.rows))]
            loss = model(**batch(own, device), use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, MAX_GRAD_NORM)
            lr = rate.get_last_lr()[0]
            adamw.step(), rate.step(), adamw.zero_grad()
            tokens = sum(len(row.ids) for row in own)
            line = {"step": step + 1, "tokens": tokens, "loss": {tenant: loss.item()}, "lr": {tenant: lr}}
            print(json.dumps(line), file=metrics, flush=True)
    model.save_pretrained(args.out)
    print(f"saved {tenant} in {args.out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="DIR", help="Hugging Face checkpoint")
    parser.add_argument("--tenant", required=True, metavar="NAME=FILE.jsonl")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rows", type=int, default=8, help="in a step")
    parser.add_argument("--lr", type=float, default=1e-3, help="highest learning rate")
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--sites", nargs="+", default=["q_proj", "v_proj"])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the backbone")
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
