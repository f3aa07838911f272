"""Tune several tenants together on one frozen backbone.

Every step takes rows of every tenant; each has its own loss, gradient clipping, learning rate, schedule and number
of steps, and ends where it would have ended alone. OUT then holds NAME/ with each tenant's adapter, loss.png,
metrics.jsonl, run.json and checkpoints/. Ctrl-C saves; --resume goes on as if nothing had happened.

  para-jax finetune --tenant mail=mail.jsonl --tenant faq=faq.jsonl --steps 500 --lr 3e-3 --out runs/first
"""

from __future__ import annotations

import argparse

from para_jax.cli import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_model(parser)
    common.add_tenants(parser)
    parser.add_argument("--out", metavar="DIR", required=True, help="folder for adapters, checkpoints and metrics")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out, if there is one")
    parser.add_argument("--overwrite", action="store_true", help="replace --out if it exists")

    method = parser.add_argument_group("method")
    method.add_argument("--method", default="para", help="para (default)")
    method.add_argument("--r", type=int, help="width of the bottleneck (default: 12)")
    method.add_argument("--target-modules", nargs="+", metavar="SITE", help="default: q_proj v_proj up_proj")
    method.add_argument("--pooling", help="last, mean, max or attention (default: last)")
    method.add_argument("--activation", help="gelu, relu, silu or rational (default: gelu)")
    method.add_argument(
        "--normalize",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="RMS-normalise the pooled vector",
    )
    method.add_argument("--bias", action="store_true", default=None, help="a bias in the generator's up-projection")

    tuning = parser.add_argument_group("tuning", "VALUE is for every tenant, NAME=VALUE for one; options repeat")
    for name, default, text in (
        ("--steps", "1000", "steps"),
        ("--lr", "1e-3", "highest learning rate"),
        ("--warmup-ratio", "0.06", "share of the steps in which the rate rises; then it falls to zero"),
        ("--weight-decay", "0.0", "AdamW's weight decay"),
        ("--max-grad-norm", "1.0", "the norm to which a tenant's gradient is clipped"),
    ):
        tuning.add_argument(
            name, metavar="[NAME=]VALUE", action="append", help=f"{text} (default: {default})", default=[]
        )
    tuning.add_argument("--rows", type=int, default=16, help="rows of each tenant in a step (default: 16)")
    tuning.add_argument(
        "--micro-batches",
        type=int,
        default=1,
        help="parts a step is computed in, to save memory (default: 1)",
    )
    tuning.add_argument("--seed", type=int, default=0, help="of the first weights and the order of rows")
    tuning.add_argument("--max-length", type=int, help="tokens of a row (default: the backbone's context)")
    tuning.add_argument("--truncate", action="store_true", help="cut prompts that are too long at their beginning")
    tuning.add_argument(
        "--remat",
        action=argparse.BooleanOptionalAction,
        help="recompute activations in the backward pass, for less memory (default: on accelerators)",
    )
    tuning.add_argument("--checkpoint-every", type=int, default=500, metavar="N", help="steps (default: 500)")


def run(args: argparse.Namespace) -> int:
    files = common.pairs(args.tenant, "--tenant")
    names = list(files)

    from para_jax.adapters.bank import AdapterBank
    from para_jax.adapters.method import config_from_dict
    from para_jax.data.examples import read_examples
    from para_jax.training.loop import finetune
    from para_jax.training.optimizer import Settings

    options = {k: getattr(args, k) for k in ("r", "target_modules", "pooling", "activation", "normalize", "bias")}
    config = config_from_dict(args.method, {k: v for k, v in options.items() if v is not None})
    values: dict[str, dict[str, float]] = {
        "steps": common.per_tenant(args.steps, "--steps", names, int),
        "lr": common.per_tenant(args.lr, "--lr", names, float),
        "warmup_ratio": common.per_tenant(args.warmup_ratio, "--warmup-ratio", names, float),
        "weight_decay": common.per_tenant(args.weight_decay, "--weight-decay", names, float),
        "max_grad_norm": common.per_tenant(args.max_grad_norm, "--max-grad-norm", names, float),
    }
    settings = {n: Settings.checked(**{k: v[n] for k, v in values.items() if n in v}) for n in names}

    backbone, tokenizer = common.load_model(args)
    size = config.size(backbone.config)  # raises for a target that is none, before the data is read
    length = min(args.max_length or backbone.config.max_position_embeddings, backbone.config.max_position_embeddings)
    eos = backbone.config.eos_token_ids
    examples = {n: read_examples(f, tokenizer, eos, length, truncate=args.truncate) for n, f in files.items()}
    bank = AdapterBank.create(dict.fromkeys(names, config), backbone.config, args.seed)
    rows = sum(map(len, examples.values()))
    print(
        f"{len(names)} tenants, {rows:,} rows; backbone {backbone.config.size / 1e6:.1f}M parameters, "
        f"{args.method} {size:,} a tenant",
        flush=True,
    )
    finetune(
        backbone,
        bank,
        examples,
        settings,
        args.out,
        rows=args.rows,
        micro_batches=args.micro_batches,
        seed=args.seed,
        checkpoint_every=args.checkpoint_every,
        resume=args.resume,
        overwrite=args.overwrite,
        remat=args.remat,
        show=lambda line: print(line, flush=True),
    )
    print(f"saved {', '.join(names)} and loss.png in {args.out}")
    return 0
