"""Keep the most important modules of each layer: a FanLoRA setting from an adapter on all linear modules.

Scores every module of the adapter on held-out rows, keeps the most important ones of each layer, and writes to OUT
fanlora.json (the setting, for finetune's --method), scores.json and importance.png. The ablation score takes
2 x modules + 1 forward passes over the rows.

  para-jax finetune --method lora --target-modules all-linear --tenant all=mixture.jsonl --out runs/all
  para-jax fanlora --adapter runs/all/all --data held-out.jsonl --keep 2 --out runs/setting
  para-jax finetune --method runs/setting/fanlora.json --tenant mail=mail.jsonl --out runs/mail
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from para_jax.checks import COUNT, POSITIVE, SEED
from para_jax.cli import common
from para_jax.cli.options import ROWS, flag, number, refuse, repeated
from para_jax.cli.outputs import check_data_dir, check_folder
from para_jax.data.sources import FORMS, read_rows
from para_jax.errors import ParaJaxError, check_known
from para_jax.files import new_folder, write_json

if TYPE_CHECKING:
    from para_jax.data.examples import Example

SETTING, SCORES_FILE, PICTURE = "fanlora.json", "scores.json", "importance.png"
# Options about the rows that a score is computed on.
OF_ROWS = ("data", "rows", "template", "data_dir", "max_length", "truncate", "batch_size")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_model(parser, processes=False)
    parser.add_argument("--adapter", metavar="DIR", required=True, help="a tuned LoRA adapter on all linear modules")
    repeated(parser, "--data", "SOURCE", f"held-out rows to score on: {FORMS}; repeat")
    common.add_sources(parser)
    number(parser, "--rows", ROWS, "rows drawn from each source (default: 64)")
    number(parser, "--seed", SEED, "seed of the sample of rows, and of the random score", metavar=None)
    parser.add_argument("--out", metavar="DIR", required=True, help="folder to write")
    flag(parser, "--overwrite", "replace --out if it exists")

    scoring = parser.add_argument_group("scoring")
    scoring.add_argument("--score", default="ablation", help="ablation (default), gradient, norm or random")
    number(scoring, "--batch-size", COUNT, "rows in a forward pass (default: 8)")
    number(scoring, "--variants", COUNT, "ablations in one pass; fewer need less memory (default: 16)")
    common.add_length(scoring)

    setting = parser.add_argument_group("setting")
    size = setting.add_mutually_exclusive_group(required=True)
    number(size, "--keep", COUNT, "number of modules to keep in each layer")
    number(size, "--budget", COUNT, "total number of parameters, spread evenly over the layers")
    number(setting, "--r", COUNT, "rank (default: the adapter's)", metavar=None)
    number(setting, "--lora-alpha", POSITIVE, "numerator of the scale (default: the adapter's)", metavar=None)


def run(args: argparse.Namespace) -> int:
    out = Path(args.out)
    check_folder(args, SETTING)

    from para_jax.adapters.fanlora import FanLoraConfig
    from para_jax.adapters.files import load_adapter
    from para_jax.convert.adapter_tokenizer import adapter_tokenizer
    from para_jax.importance.scores import check, importance_scores
    from para_jax.importance.select import keep_number, keep_within, plot_importance, present

    _check_score(args)
    check_data_dir(args)
    loading, tokenizer = common.begin_model(args, stacked=True)
    backbone = loading.backbone()
    shape = backbone.config
    adapter = load_adapter(args.adapter, shape)
    check(adapter, backbone)
    sites, fewest = list(shape.linear_sites), int(present(shape).sum(axis=1).min())
    if args.keep is not None and not 1 <= args.keep <= fewest:  # before the scoring, which is slow
        raise ParaJaxError(f"--keep must be from 1 to {fewest}, the modules of a layer, not {args.keep}")
    examples = held_out(args, adapter_tokenizer(tokenizer, args.adapter, shape.vocab_size), shape)
    scores = importance_scores(
        args.score, backbone, adapter, examples,
        batch_size=args.batch_size or 8, variants=args.variants or 16, seed=args.seed or 0,
    )  # fmt: skip

    lora: Any = adapter.config
    same = {name: getattr(lora, name) for name in ("use_rslora", "lora_dropout", "init_lora_weights")}
    r = lora.r if args.r is None else args.r
    alpha = lora.lora_alpha if args.lora_alpha is None else args.lora_alpha
    kept = keep_within(scores, shape, args.budget, r) if args.keep is None else keep_number(scores, shape, args.keep)
    config = FanLoraConfig.of(kept, shape, r=r, lora_alpha=alpha, **same)
    with new_folder(out, SETTING, overwrite=args.overwrite) as folder:
        config.save(folder / SETTING)
        record = {
            "score": args.score,
            "model": Path(shape.name).name,
            "rows": len(examples),
            "response_tokens": sum(e.response_ids.size for e in examples),
            "sites": sites,
            "scores": scores.tolist(),
            "kept": kept,
            "parameters": config.size(shape),
        }
        write_json(folder / SCORES_FILE, record)
        plot_importance(scores, kept, shape, folder / PICTURE, f"{args.score} score of each module; framed: kept")
    by_layer = [[i, ", ".join(sorted(kept[i], key=lambda s: -scores[i][sites.index(s)]))] for i in range(len(kept))]
    print(common.table(["layer", "kept, by importance"], by_layer))
    print(
        f"{sum(map(len, kept))} of {scores.size} modules, {config.size(shape):,} parameters at r={r} "
        f"(all modules of the adapter: {lora.size(shape):,})"
    )
    print(f"setting, scores and picture in {out}; tune a task with: para-jax finetune --method {out / SETTING} ...")
    return 0


def _check_score(args: argparse.Namespace) -> None:
    from para_jax.importance.scores import NEED_ROWS, SCORES

    check_known("score", [args.score], SCORES)
    if args.score in NEED_ROWS and not args.data:
        raise ParaJaxError(f"the {args.score} score is computed on held-out rows; give --data SOURCE")
    if args.score not in NEED_ROWS:
        refuse(args, OF_ROWS, f"with --score {args.score}, which is computed without rows")
    if args.score != "ablation":
        refuse(args, ("variants",), f"with --score {args.score}; it is for ablations")
    if args.score == "norm":
        refuse(args, ("seed",), "with --score norm, which is not random")


def held_out(args: argparse.Namespace, tokenizer: Any, shape: Any) -> list[Example]:
    from para_jax.convert.tokenizer import end_tokens
    from para_jax.data.examples import encode_rows
    from para_jax.data.lengths import row_length
    from para_jax.data.rows import check_tenant

    length = row_length(args.max_length, shape.max_position_embeddings)
    eos = end_tokens(shape, tokenizer)
    examples: list[Example] = []
    for source in args.data:
        rows = check_tenant(read_rows(source, args.template, args.data_dir), None)
        some = random.Random(args.seed or 0).sample(rows, min(args.rows or 64, len(rows)))
        examples += encode_rows(some, tokenizer, eos, length, truncate=args.truncate, one_pass=True)
    return examples
