"""Tune three tenants on the tiny backbone that ships, and answer the same prompts with all of them in one batch.

It needs no network and no accelerator, and takes under three minutes on two CPU cores. It prints what each tenant
learned, and writes the adapters, the losses, the scores and a plot to OUT.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from para_jax.checks import COUNT, POSITIVE, SEED
from para_jax.cli import common
from para_jax.cli.options import flag, number
from para_jax.cli.outputs import check_folder
from para_jax.data.quickstart import Rows, quickstart_rows
from para_jax.files import write_json
from para_jax.progress import duration, say
from para_jax.training.metrics import can_draw, read_metrics, save_figure

DEFAULT = ("model", "quantize", "coordinator", "processes", "process")  # not options here


def add_arguments(parser: argparse.ArgumentParser) -> None:
    text = "folder to write (default: ./para-jax-quickstart)"
    parser.add_argument("--out", metavar="DIR", default="para-jax-quickstart", help=text)
    flag(parser, "--overwrite", "replace --out if it exists")
    number(parser, "--steps", COUNT, "default: 250", 250, None)
    number(parser, "--lr", POSITIVE, "peak learning rate (default: 5e-3)", 5e-3, None)
    number(parser, "--seed", SEED, None, 0, None)
    common.add_compile_cache(parser)
    parser.set_defaults(dtype="auto", mesh="auto", **dict.fromkeys(DEFAULT))


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
        loading, train, args.out, methods=config, settings=Settings(steps=args.steps, lr=args.lr), tokenizer=tokenizer,
        seed=args.seed, overwrite=args.overwrite, show=say,
    )  # fmt: skip
    seconds = time.monotonic() - started
    lines = read_metrics(Path(args.out, METRICS))
    # Read again with unstacked layers, which decode faster.
    backbone = common.begin_model(args)[0].backbone()
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


def plot(lines: list[dict[str, Any]], report: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    names = list(report["exact_match"])
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in names:
        left.plot([line["step"] for line in lines], [line["loss"][name] for line in lines], label=name)
    left.set(
        xlabel="step", ylabel="loss (nats a response token)", title="three tenants tuned in one step", ylim=(0, None)
    )
    left.legend(frameon=False)
    for i, when in enumerate(("before", "after")):
        at = [j + (i - 0.5) * 0.35 for j in range(len(names))]
        values = [report["exact_match"][name][when] for name in names]
        bars = right.bar(at, values, width=0.33, color=("0.75", "C0")[i], label=when)
        right.bar_label(bars, [f"{v:.2f}" for v in values])
    right.set_xticks(range(len(names)), names)
    right.set(ylabel="exact match on held-out prompts", title="the same backbone, before and after", ylim=(0, 1.25))
    right.legend(frameon=False, loc="upper left", ncols=2)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)
