"""Score adapters on held-out rows, all tenants mixed in the same batches.

Reported for each tenant: exact match, token F1, the accuracy of always giving the most frequent response, corpus
BLEU where rows have "references", and accuracy by the likelihood of each choice where rows have "choices". Without
--adapters the bare backbone answers.

  para-jax evaluate --adapters runs/first --tenant mail=mail-test.jsonl --json scores.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

from para_jax.checks import COUNT
from para_jax.cli import common
from para_jax.cli.adapters import RowTokenizers, adapter_folders, load_bank
from para_jax.cli.options import flag, number, refuse, repeated
from para_jax.cli.outputs import check_data_dir, check_files
from para_jax.data.sources import Rows, read_rows
from para_jax.errors import ParaJaxError, check_known
from para_jax.files import json_line, write_json, write_text
from para_jax.progress import Pace, to_stderr


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_model(parser)
    common.add_adapters(parser)
    common.add_tenants(parser)
    parser.add_argument("--json", metavar="OUT.json", help="write the scores")
    parser.add_argument("--predictions", metavar="OUT.jsonl", help="write every row with its answer")
    flag(parser, "--overwrite", "replace these files if they exist")
    repeated(parser, "--max-new-tokens", "[NAME=]N", "maximum length of an answer (default: 64); repeat")
    number(parser, "--batch-size", COUNT, "rows that run together (default: 32)", 32, None)
    number(parser, "--limit", COUNT, "only the first N rows of each tenant")
    text = "use all distinct responses of a tenant's rows as the choices of each row; repeat"
    repeated(parser, "--choose", "NAME", text)


def run(args: argparse.Namespace) -> int:
    check_files(args, "json", "predictions")
    check_data_dir(args)
    if args.adapters is None:
        refuse(args, ("allow_nan",), "without --adapters")
    sources = common.tenant_sources(args)
    check_known("tenant in --choose", args.choose, sources)
    templates = common.row_templates(args, sources)
    limits = common.per_tenant(["64", *args.max_new_tokens], "--max-new-tokens", list(sources), COUNT.parse)

    from para_jax.data.rows import check_tenant
    from para_jax.distributed import is_main_process
    from para_jax.evaluation.evaluate import evaluate

    if args.adapters is not None:
        adapter_folders(args.adapters, list(sources))  # raises before the model is read
    loading, tokenizer = common.begin_model(args)
    config = loading.shapes.config
    bank = load_bank(args.adapters, list(sources), config, not args.allow_nan)
    row_tokenizers = RowTokenizers(tokenizer, args.adapters, config.vocab_size)
    tenants, tokenizers = {}, {}
    for name, source in sources.items():
        rows = source if not isinstance(source, str) else read_rows(source, templates.get(name), args.data_dir)
        check_tenant(rows, name)
        if name in args.choose:
            rows = with_choices(f"tenant {name!r}", rows)
        tenants[name], tokenizers[name] = rows[: args.limit], row_tokenizers.get([name])

    pace, show = Pace("rows and choices" if args.choose else "rows"), to_stderr if is_main_process() else None
    options = {"max_new_tokens": limits, "batch_size": args.batch_size, "progress": pace, "show": show}
    scores = evaluate(loading, tokenizer, tenants, bank, tokenizers=tokenizers, **options)
    print(score_table(scores))
    answered = {name: s.pop("predictions") for name, s in scores.items()}
    if not is_main_process():
        return 0
    if args.json:
        write_json(args.json, {"model": Path(config.name).name, "tenants": scores})
        print(f"scores in {args.json}")
    if args.predictions:
        write_text(args.predictions, "".join(json_line({"tenant": n, **row}) for n in answered for row in answered[n]))
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


def with_choices(whose: str, rows: Rows) -> Rows:
    """The rows, with all of their responses as the choices of every row without choices.

    Raises ParaJaxError for too many responses, and if all rows have choices already.
    """
    answers = sorted({row["response"] for _, row in rows if isinstance(row.get("response"), str)})
    if len(answers) > MOST_CHOICES:
        raise ParaJaxError(f"{whose} has {len(answers)} different responses, too many for --choose")
    if not answers:
        raise ParaJaxError(f'--choose needs texts under "response", and no row of {whose} has one')
    if all("choices" in row for _, row in rows):
        raise ParaJaxError(f"--choose has no effect on {whose}: all rows have choices already")
    return [(place, {"choices": answers, **row}) for place, row in rows]


def score_table(scores: dict[str, dict[str, float]]) -> str:
    columns = [(key, title) for key, title in COLUMNS if any(key in s for s in scores.values())]

    def cell(key: str, s: dict[str, float]) -> str:
        return "-" if key not in s else f"{s[key]:.1f}" if key == "bleu" else f"{s[key]:.3f}"

    rows = [[name, s["rows"], *(cell(key, s) for key, _ in columns)] for name, s in scores.items()]
    return common.table(["tenant", "rows", *(title for _, title in columns)], rows)
