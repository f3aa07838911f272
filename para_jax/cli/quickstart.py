"""Tune three tenants on the tiny backbone that ships, and answer the same prompts with all of them in one batch.

It needs no network and no accelerator, and takes under three minutes on two CPU cores. It prints what each tenant
learned, and writes the adapters, the losses, the scores and a plot to OUT.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from para_jax.checks import COUNT, POSITIVE, SEED
from para_jax.cli import common
from para_jax.cli.options import within
from para_jax.cli.outputs import check_folder
from para_jax.cli.quickstart_plot import plot
from para_jax.data.quickstart import Rows, quickstart_rows
from para_jax.files import write_json
from para_jax.progress import duration
from para_jax.training.metrics import can_draw, read_metrics


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out",
        metavar="DIR",
        default="para-jax-quickstart",
        help="folder to write (default: ./para-jax-quickstart)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    parser.add_argument("--steps", type=within(COUNT), default=250, help="default: 250")
    parser.add_argument("--lr", type=within(POSITIVE), default=5e-3, help="peak learning rate (default: 5e-3)")
    parser.add_argument("--seed", type=within(SEED), default=0)
    common.add_compile_cache(parser)
    parser.set_defaults(
        model=None, dtype="auto", quantize=None, mesh="auto", coordinator=None, processes=None, process=None
    )


def run(args: argparse.Namespace) -> int:
    import jax

    from para_jax.adapters.para import ParaConfig
    from para_jax.training.claim import check_out
    from para_jax.training.finetune import finetune
    from para_jax.training.folder import METRICS
    from para_jax.training.settings import Settings

    check_out(Path(args.out), False, args.overwrite)
    check_folder(args)
    began = time.monotonic()
    loading, tokenizer = common.begin_model(args, stacked=True)
    shape = loading.shapes.config
    train, held_out = quickstart_rows(args.seed)
    print(f"backbone: {shape.size / 1e6:.1f}M parameters, pre-trained on novels, frozen; on {jax.default_backend()}")
    for name, rows in train.items():
        print(f"tenant {name}: {len(rows)} rows such as {rows[0]['prompt']!r} -> {rows[0]['response']!r}")

    config, started = ParaConfig(), time.monotonic()
    bank = finetune(
        loading,
        train,
        args.out,
        methods=config,
        settings=Settings(steps=args.steps, lr=args.lr),
        tokenizer=tokenizer,
        seed=args.seed,
        overwrite=args.overwrite,
        show=partial(print, flush=True),
    )
    seconds = time.monotonic() - started
    lines = read_metrics(Path(args.out, METRICS))
    # Read again with unstacked layers, which decode faster.
    backbone, _ = common.load_model(args)
    bytes_of_adapter = sum(path.stat().st_size for path in Path(args.out, next(iter(train))).iterdir())
    report: dict[str, Any] = {
        "seconds": 0.0,
        "tuning": {"seconds": round(seconds, 1), "tokens_per_second": round(sum(x["tokens"] for x in lines) / seconds)},
        "parameters": {"backbone": shape.size, "adapter": config.size(shape)},
        "adapter_bytes": bytes_of_adapter,
        "exact_match": scores(backbone, tokenizer, bank, held_out, bytes_of_adapter),
    }
    report |= answers(backbone, tokenizer, bank, [row["prompt"] for row in next(iter(held_out.values()))[:4]])
    report["seconds"] = round(time.monotonic() - began, 1)
    write_json(Path(args.out, "quickstart.json"), report)
    drawn = can_draw(print)
    if drawn:
        plot(lines, report, Path(args.out, "quickstart.png"))
    print(
        f"\ntuning {report['tuning']['tokens_per_second']:,} tokens/s (compilation included), "
        f"decoding {report['decoding']['tokens_per_second']:,} tokens/s, {duration(report['seconds'])} in all\n"
        f"adapters, quickstart.json{' and quickstart.png' if drawn else ''} are in {args.out}\n"
        f"next: para-jax generate --adapters {args.out} --tenant {next(iter(train))} "
        f"--prompt {report['answers'][0]['prompt']!r}"
    )
    return 0


def scores(backbone: Any, tokenizer: Any, bank: Any, rows: Rows, bytes_of_adapter: int) -> dict[str, dict[str, float]]:
    """Each tenant's exact match on its held-out rows, with the bare backbone and with its adapter; prints them."""
    from para_jax.evaluation.evaluate import evaluate

    print(f"\nanswering {sum(map(len, rows.values()))} held-out prompts, before and after", flush=True)
    before, after = (
        evaluate(backbone, tokenizer, rows, adapters, max_new_tokens=16, batch_size=60) for adapters in (None, bank)
    )
    found = {n: {"before": before[n]["exact_match"], "after": after[n]["exact_match"]} for n in rows}
    lines = [
        [n, f"{x['before']:.2f}", f"{x['after']:.2f}", f"{bytes_of_adapter / 1e3:.0f} kB"] for n, x in found.items()
    ]
    print(common.table(["tenant", "exact match before", "after", "adapter"], lines))
    return found


def answers(backbone: Any, tokenizer: Any, bank: Any, prompts: Sequence[str]) -> dict[str, Any]:
    """Answers the same prompts as each tenant and as the bare backbone in one batch; prints and times it."""
    from para_jax.decoding.generate import complete

    tenants = [None, *bank.names]
    batch = [(prompt, tenant) for prompt in prompts for tenant in tenants]
    row_prompts, row_tenants = [prompt for prompt, _ in batch], [tenant for _, tenant in batch]
    for _ in range(2):  # the first call compiles
        started = time.monotonic()
        completions = complete(backbone, tokenizer, row_prompts, bank=bank, tenants=row_tenants, max_new_tokens=16)
        seconds = time.monotonic() - started
    print(f"\nthe same prompts, {len(batch)} rows of {len(bank.names)} tenants and none in one batch:")
    for i, ((prompt, tenant), answer) in enumerate(zip(batch, completions, strict=True)):
        if i % len(tenants) == 0:
            print(f"\n  {prompt}")
        print(f"    {tenant or '(bare backbone)':16}{answer.text.strip()!r}")
    generated = sum(len(answer.tokens) + 1 for answer in completions)
    return {
        "decoding": {"rows": len(batch), "tokens_per_second": round(generated / seconds)},
        "answers": [{"prompt": p, "tenant": t, "text": x.text} for (p, t), x in zip(batch, completions, strict=True)],
    }
