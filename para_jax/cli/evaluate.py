"""Score adapters on held-out rows, all tenants mixed in the same batches.

Reported for each tenant: exact match, token F1, the accuracy of always giving the most frequent response, corpus
BLEU where rows have "references", and accuracy by the likelihood of each choice where rows have "choices". Without
--adapters the bare backbone answers.

  para-jax evaluate --adapters runs/first --tenant mail=mail-test.jsonl --json scores.json
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from para_jax.cli import common
from para_jax.errors import ParaJaxError, unknown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_model(parser)
    common.add_adapters(parser)
    common.add_tenants(parser)
    parser.add_argument("--json", metavar="OUT.json", help="write the scores")
    parser.add_argument("--predictions", metavar="OUT.jsonl", help="write every row with what was answered")
    parser.add_argument("--overwrite", action="store_true", help="replace these files if they exist")
    parser.add_argument(
        "--max-new-tokens",
        action="append",
        default=[],
        metavar="[NAME=]N",
        help="of every answer (default: 64); repeat",
    )
    parser.add_argument("--batch-size", type=int, default=32, help="rows that run together (default: 32)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N rows of each tenant")
    parser.add_argument(
        "--choose",
        metavar="NAME",
        action="append",
        default=[],
        help="let a tenant's rows choose among the responses that occur among them, as if they had choices; repeat",
    )


def run(args: argparse.Namespace) -> int:
    sources = common.pairs(args.tenant, "--tenant")
    for option in ("json", "predictions"):
        path = getattr(args, option)
        if path and Path(path).exists() and not args.overwrite:
            raise ParaJaxError(f"{path} exists; choose another --{option} or pass --overwrite")
    for name in args.choose:
        if name not in sources:
            raise unknown("tenant in --choose", name, sources)
    templates = common.per_tenant(args.template, "--template", list(sources), str)

    from para_jax.convert.tokenizer import end_tokens, with_chat_template
    from para_jax.data.examples import encode_rows
    from para_jax.data.sources import read_rows
    from para_jax.evaluation.evaluate import evaluate
    from para_jax.training.metrics import duration

    loading, tokenizer = common.begin_model(args)
    config = loading.shapes.config
    bank = common.load_bank(args.adapters, list(sources), config)
    examples = {}
    for name, source in sources.items():
        rows = read_rows(source, templates.get(name), args.data_dir)
        if name in args.choose:
            answers = sorted({row["response"] for _, row in rows if isinstance(row.get("response"), str)})
            if len(answers) > MOST_CHOICES:
                raise ParaJaxError(f"{source} has {len(answers)} different responses, too many for --choose")
            rows = [(place, {"choices": answers, **row}) for place, row in rows]
        own = with_chat_template(tokenizer, common.kept_template(args.adapters, [name]))
        examples[name] = encode_rows(rows[: args.limit], own, end_tokens(config, tokenizer), keep_texts=True)

    began = shown = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal shown
        now = time.monotonic()
        if now - shown > 5 and done:
            shown = now
            rate = done / (now - began)
            print(f"{done}/{total}  {rate:.0f} rows/s  {duration((total - done) / rate)} left", file=sys.stderr)

    scores = evaluate(
        loading,
        tokenizer,
        examples,
        bank,
        max_new_tokens=common.per_tenant(["64", *args.max_new_tokens], "--max-new-tokens", list(sources), int),
        batch_size=args.batch_size,
        progress=progress,
    )
    print(score_table(scores))
    answered = {name: s.pop("predictions") for name, s in scores.items()}
    if args.json:
        common.write_json(args.json, {"model": Path(config.name).name, "tenants": scores})
        print(f"scores in {args.json}")
    if args.predictions:
        lines = [json.dumps({"tenant": n, **row}, ensure_ascii=False) for n in answered for row in answered[n]]
        common.write_text(args.predictions, "".join(line + "\n" for line in lines))
        print(f"predictions in {args.predictions}")
    return 0


MOST_CHOICES = 50
COLUMNS = (
    ("exact_match", "exact match"),
    ("token_f1", "token F1"),
    ("bleu", "BLEU"),
    ("choice_accuracy", "by choice"),
    ("majority", "majority"),
)


def score_table(scores: dict[str, dict[str, float]]) -> str:
    """The scores that any tenant has, a row a tenant."""
    columns = [(key, title) for key, title in COLUMNS if any(key in s for s in scores.values())]

    def cell(key: str, s: dict[str, float]) -> str:
        return "-" if key not in s else f"{s[key]:.1f}" if key == "bleu" else f"{s[key]:.3f}"

    rows = [[name, s["rows"], *(cell(key, s) for key, _ in columns)] for name, s in scores.items()]
    return common.table(["tenant", "rows", *(title for _, title in columns)], rows)
