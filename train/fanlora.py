"""FanLoRA's four steps, from JSONL files to a tuned adapter that peft opens.

    python train/fanlora.py --mixture sst2/train.jsonl trec/train.jsonl --held-out sst2/dev.jsonl trec/dev.jsonl \
        --task subj=subj/train.jsonl --keep 2 --out runs/fanlora

Files have rows {"prompt", "response"}. `--mixture` is what LoRA on every linear module is tuned on, `--held-out` other
rows of the same kind to score its modules on, `--task` the new task, which neither may hold. Each step is also a
command of para-jax, and is printed as such before it runs. OUT gets mixture.jsonl, everywhere/ (step a), setting/ with
fanlora.json, scores.json and importance.png (b and c) and task/NAME/, the adapter (d).

On the tiny backbone that ships and two CPU cores the two tunings take minutes, and scoring its 28 modules on 64 rows
of each file (57 forward passes over them) less than that. The defaults are for that backbone: one of 7B wants a rate
near 1e-4.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from para_jax import (
    Adapter,
    Backbone,
    FanLoraConfig,
    LoraConfig,
    Settings,
    encode_rows,
    end_tokens,
    finetune,
    importance_scores,
    keep_number,
    keep_within,
    load_tokenizer,
    plot_importance,
    read_rows,
    tiny_backbone_path,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=tiny_backbone_path(), help="folder or hub id (default: the tiny backbone)")
    parser.add_argument("--mixture", nargs="+", type=Path, required=True, metavar="FILE")
    parser.add_argument("--held-out", nargs="+", type=Path, required=True, metavar="FILE")
    parser.add_argument("--task", required=True, metavar="NAME=FILE")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--keep", type=int, help="modules of each layer")
    size.add_argument("--budget", type=int, help="parameters of the task's adapter")
    parser.add_argument("--score", default="ablation", help="ablation, gradient, norm or random")
    parser.add_argument("--score-rows", type=int, default=64, help="rows of each held-out file")
    parser.add_argument("--r", type=int, default=8, help="rank of LoRA on every module")
    parser.add_argument("--task-r", type=int, help="rank of the setting (default: --r)")
    parser.add_argument("--steps", type=int, default=400, help="of each tuning")
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--rows", type=int, default=16, help="rows of a step")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"{args.out} exists; choose another --out")
    task, equals, task_file = args.task.partition("=")
    if not equals or not task or not task_file:
        parser.error(f"--task takes NAME=FILE, not {args.task!r}")

    # Nothing is decoded here: with its layers stacked, one of them is compiled instead of all.
    backbone, tokenizer = Backbone.from_pretrained(args.model, stacked=True), load_tokenizer(args.model)
    shape = backbone.config
    eos = end_tokens(shape, tokenizer)
    args.out.mkdir(parents=True)
    common = f"--model {args.model} --steps {args.steps} --lr {args.lr} --rows {args.rows} --seed {args.seed}"

    def tuned(name: str, file: Path, config: Any, out: Path) -> Adapter:
        """One tenant, tuned on one file."""
        settings = Settings(steps=args.steps, lr=args.lr)
        given = {"methods": config, "settings": settings, "tokenizer": tokenizer, "rows": args.rows, "seed": args.seed}
        return finetune(backbone, {name: file}, out, **given)[name]

    mixture, everywhere, setting = args.out / "mixture.jsonl", args.out / "everywhere", args.out / "setting"
    say("(a) LoRA on every linear module, tuned on the instruction mixture",
        f"cat {' '.join(map(str, args.mixture))} > {mixture}",
        f"para-jax finetune {common} --method lora --r {args.r} --option lora_alpha={args.r} "
        f"--target-modules all-linear --tenant mixture={mixture} --out {everywhere}")  # fmt: skip
    mixture.write_text("".join(f"{json.dumps(row)}\n" for file in args.mixture for _, row in read_rows(file)))
    all_linear = LoraConfig(r=args.r, lora_alpha=args.r, target_modules="all-linear")
    adapter = tuned("mixture", mixture, all_linear, everywhere)

    r = args.task_r or args.r
    say("(b) the importance of every module on held-out rows; (c) the most important ones of each layer kept",
        f"para-jax fanlora --model {args.model} --adapter {everywhere / 'mixture'} --score {args.score} "
        f"{' '.join(f'--data {file}' for file in args.held_out)} --rows {args.score_rows} --seed {args.seed} "
        f"{f'--budget {args.budget}' if args.keep is None else f'--keep {args.keep}'} --r {r} --lora-alpha {r} "
        f"--out {setting}")  # fmt: skip
    held_out = []
    for file in args.held_out:
        rows = list(read_rows(file))
        some = random.Random(args.seed).sample(rows, min(args.score_rows, len(rows)))
        held_out += encode_rows(some, tokenizer, eos, shape.max_position_embeddings, one_pass=True)
    scores = importance_scores(args.score, backbone, adapter, held_out, seed=args.seed)
    kept = keep_within(scores, shape, args.budget, r) if args.keep is None else keep_number(scores, shape, args.keep)
    config = FanLoraConfig.of(kept, shape, r=r, lora_alpha=r)
    config.save(setting / "fanlora.json")
    record = {"score": args.score, "sites": list(shape.linear_sites), "scores": scores.tolist(), "kept": kept}
    (setting / "scores.json").write_text(json.dumps(record, indent=1) + "\n")
    plot_importance(scores, kept, shape, setting / "importance.png", f"{args.score} score; framed: kept")
    for layer, sites in enumerate(kept):
        print(f"layer {layer}: {', '.join(sites)}")
    print(f"{config.size(shape):,} parameters; LoRA on every module has {all_linear.size(shape):,}")

    say("(d) the setting, tuned on the new task; peft opens the adapter as LoRA",
        f"para-jax finetune {common} --method {setting / 'fanlora.json'} --tenant {args.task} "
        f"--out {args.out / 'task'}")  # fmt: skip
    tuned(task, Path(task_file), config, args.out / "task")
    print(
        f"\nscore it: para-jax evaluate --model {args.model} --adapters {args.out / 'task'} --tenant {task}=TEST.jsonl"
    )


def say(title: str, *commands: str) -> None:
    """A step, and the commands that do the same."""
    print("\n".join(["", title, *(f"  $ {command}" for command in commands)]), flush=True)


if __name__ == "__main__":
    main()
