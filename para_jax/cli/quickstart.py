"""Tune three tenants on the tiny backbone that ships, and let them answer the same prompts in one batch.

Needs no network, no accelerator and under three minutes on two CPU cores. Prints what each tenant learned, and
writes the adapters, the losses, the numbers and a picture to OUT.
"""

from __future__ import annotations

import argparse
from typing import Any

from para_jax.checks import COUNT, POSITIVE, SEED
from para_jax.cli import common
from para_jax.cli.options import within
from para_jax.cli.outputs import check_folder
from para_jax.cli.quickstart_plot import plot
from para_jax.data.quickstart import quickstart_rows
from para_jax.files import write_json
from para_jax.progress import duration
from para_jax.training.metrics import can_draw


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out",
        metavar="DIR",
        default="para-jax-quickstart",
        help="folder to write (default: ./para-jax-quickstart)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    parser.add_argument("--steps", type=within(COUNT), default=250, help="default: 250")
    parser.add_argument("--lr", type=within(POSITIVE), default=5e-3, help="highest learning rate (default: 5e-3)")
    parser.add_argument("--seed", type=within(SEED), default=0)
    common.add_compile_cache(parser)
    parser.set_defaults(
        model=None, dtype="auto", quantize=None, mesh="auto", coordinator=None, processes=None, process=None
    )


def run(args: argparse.Namespace) -> int:
    import json
    import time
    from pathlib import Path

    import jax

    from para_jax.adapters.bank import AdapterBank
    from para_jax.adapters.para import ParaConfig
    from para_jax.convert.tokenizer import end_tokens
    from para_jax.data.examples import encode_rows
    from para_jax.decoding.generate import complete
    from para_jax.evaluation.evaluate import evaluate
    from para_jax.training.claim import check_out
    from para_jax.training.loop import finetune
    from para_jax.training.optimizer import Settings

    check_out(Path(args.out), False, args.overwrite)
    check_folder(args)
    began = time.monotonic()
    loading, tokenizer = common.begin_model(args, stacked=True)
    backbone = loading.shapes
    eos = end_tokens(backbone.config, tokenizer)
    train, held_out = (
        {name: encode_rows(numbered(name, rows), tokenizer, eos, keep_texts=True) for name, rows in part.items()}
        for part in quickstart_rows(args.seed)
    )
    names = tuple(train)

    print(
        f"backbone: {backbone.config.size / 1e6:.1f}M parameters, pre-trained on novels, frozen; "
        f"on {jax.default_backend()}"
    )
    for name in names:
        e = train[name][0]
        print(f"tenant {name}: {len(train[name])} rows such as {e.prompt!r} -> {e.response!r}")
    config = ParaConfig()
    bank = AdapterBank.create(dict.fromkeys(names, config), backbone.config, args.seed)
    print(f"\ntuning {len(names)} tenants together, {config.size(backbone.config):,} parameters each", flush=True)
    started = time.monotonic()
    bank = finetune(
        loading,
        bank,
        train,
        {n: Settings.checked(steps=args.steps, lr=args.lr) for n in names},
        args.out,
        seed=args.seed,
        overwrite=args.overwrite,
        show=lambda line: print(line, flush=True),
    )
    tuning_seconds = time.monotonic() - started
    # Its layers lie as decoding likes it from here on; it is small enough to be read twice.
    backbone, _ = common.load_model(args)

    print(f"\nanswering {sum(map(len, held_out.values()))} held-out prompts, before and after", flush=True)
    scores = {
        when: evaluate(backbone, tokenizer, held_out, b, max_new_tokens=16, batch_size=60)
        for when, b in (("before", None), ("after", bank))
    }
    rows = [[n, s["before"][n]["exact_match"], s["after"][n]["exact_match"]] for s in [scores] for n in names]
    size = sum(p.stat().st_size for p in Path(args.out, names[0]).iterdir())
    print(
        common.table(
            ["tenant", "exact match before", "after", "adapter"],
            [[n, f"{before:.2f}", f"{after:.2f}", f"{size / 1e3:.0f} kB"] for n, before, after in rows],
        )
    )

    prompts = [held_out[names[0]][i].prompt for i in range(4)]
    askers = [None, *names]
    batch = [(prompt, asker) for prompt in prompts for asker in askers]
    ask = lambda: complete(  # noqa: E731
        backbone,
        tokenizer,
        [p for p, _ in batch],
        bank=bank,
        tenants=[a for _, a in batch],
        max_new_tokens=16,
    )
    ask()
    started = time.monotonic()
    answers = ask()
    seconds = time.monotonic() - started
    generated = sum(len(c.tokens) + 1 for c in answers)
    print(f"\nthe same prompts, {len(batch)} rows of {len(names)} tenants and none in one batch:")
    for i, prompt in enumerate(prompts):
        print(f"\n  {prompt}")
        for asker, answer in zip(askers, answers[i * len(askers) : (i + 1) * len(askers)], strict=True):
            print(f"    {asker or '(bare backbone)':16}{answer.text.strip()!r}")

    lines = [json.loads(line) for line in Path(args.out, "metrics.jsonl").read_text().splitlines()]
    tokens = sum(line["tokens"] for line in lines)
    report: dict[str, Any] = {
        "seconds": round(time.monotonic() - began, 1),
        "tuning": {"seconds": round(tuning_seconds, 1), "tokens_per_second": round(tokens / tuning_seconds)},
        "decoding": {"rows": len(batch), "tokens_per_second": round(generated / seconds)},
        "parameters": {"backbone": backbone.config.size, "adapter": config.size(backbone.config)},
        "adapter_bytes": size,
        "exact_match": {n: {"before": before, "after": after} for n, before, after in rows},
        "answers": [{"prompt": p, "tenant": a, "text": c.text} for (p, a), c in zip(batch, answers, strict=True)],
    }
    write_json(Path(args.out, "quickstart.json"), report)
    drawn = can_draw(print)
    if drawn:
        plot(lines, report, Path(args.out, "quickstart.png"))
    print(
        f"\ntuning {report['tuning']['tokens_per_second']:,} tokens/s (compilation included), "
        f"decoding {report['decoding']['tokens_per_second']:,} tokens/s, "
        f"{duration(time.monotonic() - began)} in all\n"
        f"adapters, quickstart.json{' and quickstart.png' if drawn else ''} are in {args.out}\n"
        f"next: para-jax generate --adapters {args.out} --tenant {names[0]} --prompt {prompts[0]!r}"
    )
    return 0


def numbered(name: str, rows: list[dict[str, str]]) -> list[tuple[str, dict[str, str]]]:
    """Rows with a place to name in an error."""
    return [(f"{name} row {i}", row) for i, row in enumerate(rows, 1)]
