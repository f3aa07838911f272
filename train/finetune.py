"""Fine-tuning many tenants, as one file that is read from top to bottom.

    python train/finetune.py tiny_cpu --out runs/tiny

A config of train/configs/ says what is tuned on what; its docstring says what it takes and what comes out. OUT gets a
folder with the adapter of every tenant, report.html, metrics.jsonl, checkpoints/ and scores.json. The same with more
options and no config is `para-jax finetune`, `para-jax evaluate` and `para-jax generate`.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import configs

from para_jax import (
    AdapterBank,
    Backbone,
    BackboneConfig,
    Interrupted,
    Loggers,
    ParaJaxError,
    Reader,
    complete,
    default_stacked,
    end_tokens,
    evaluate,
    finetune,
    is_main_process,
    join_processes,
    keep_freed_memory,
    load_tokenizer,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help=f"one of {', '.join(configs.names())}")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out, if there is one")
    parser.add_argument("--several-hosts", action="store_true", help="one of several processes of a TPU slice or job")
    parser.add_argument("--model", help="another folder or hub id than the config's")
    parser.add_argument("--steps", type=int, help="fewer or more than the config's")
    parser.add_argument("--test-rows", type=int, help="rows of each tenant to score, instead of the config's")
    parser.add_argument("--log", choices=("tensorboard", "wandb"), action="append", default=[], help="repeat for both")
    args = parser.parse_args()

    try:
        recipe = configs.load(args.config)
    except ParaJaxError as error:
        parser.error(str(error))
    recipe = replace(recipe, model=args.model or recipe.model, test_rows=args.test_rows or recipe.test_rows)
    if args.steps:
        recipe = replace(recipe, settings=replace(recipe.settings, steps=args.steps))

    keep_freed_memory()
    if args.several_hosts:
        join_processes()
    say = print if is_main_process() else lambda *_, **__: None
    loggers = Loggers(args.log, args.out)
    shape, tokenizer = BackboneConfig.from_pretrained(recipe.model), load_tokenizer(recipe.model)
    recipe.check(shape)

    # The frozen backbone: every tensor goes to its place on the mesh while it is read. With its layers stacked, one of
    # them is compiled instead of all.
    mesh = recipe.mesh_of(shape)
    backbone = Backbone.from_pretrained(recipe.model, stacked=True, quantize=recipe.quantize, mesh=mesh)
    where = "one device" if mesh is None else ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    say(f"{recipe.model}: {shape.size / 1e6:,.1f}M parameters in {backbone.dtype} on {where}")

    # All tenants in the same steps. OUT/NAME gets the adapter that was best on the tenant's dev rows: this is the
    # export, a folder that AdapterBank.load, para-jax and, for LoRA, peft open.
    with loggers:
        finetune(
            backbone,
            {name: tenant.train for name, tenant in recipe.tenants.items()},
            args.out,
            methods={name: tenant.method for name, tenant in recipe.tenants.items()},
            settings=recipe.settings,
            dev={name: tenant.dev for name, tenant in recipe.tenants.items()},
            tokenizer=tokenizer,
            max_length=recipe.max_length,
            truncate=True,
            rows=recipe.rows,
            micro_batch_tokens=recipe.micro_batch_tokens,
            checkpoint_every=recipe.checkpoint_every,
            resume=args.resume,
            loggers=loggers,
        )
    bank = AdapterBank.load({name: args.out / name for name in recipe.tenants}, shape)
    if not default_stacked():  # a CPU decodes faster with the layers apart
        del backbone  # never twice in memory
        backbone = Backbone.from_pretrained(recipe.model, quantize=recipe.quantize, mesh=mesh)

    # Rows that nobody has seen, as tokens and texts.
    reader = Reader(tokenizer, end_tokens(shape, tokenizer), recipe.max_length, truncate=True, keep_texts=True)
    test = {name: reader(name, tenant.test)[: recipe.test_rows] for name, tenant in recipe.tenants.items()}

    # One batch with a row of every tenant, and the bare backbone on the same prompts.
    prompts = [test[name][0].prompt_ids for name in recipe.tenants]
    longest = max(tenant.max_new_tokens for tenant in recipe.tenants.values())
    tenants = [*recipe.tenants, *[None] * len(prompts)]
    answers = complete(backbone, tokenizer, prompts * 2, bank=bank, tenants=tenants, max_new_tokens=longest)
    for i, name in enumerate(recipe.tenants):
        say(f"{name}: {test[name][0].prompt[-80:]!r}")
        got, bare = (answers[j].text.strip() for j in (i, i + len(prompts)))
        say(f"  wanted {test[name][0].response!r}, got {got!r}, from the bare backbone {bare!r}")

    # Scores, all tenants' rows in the same batches.
    limits = {name: tenant.max_new_tokens for name, tenant in recipe.tenants.items()}
    scored = evaluate(backbone, tokenizer, test, bank, max_new_tokens=limits, batch_size=recipe.batch_size)
    scores = {name: {key: x for key, x in of.items() if key != "predictions"} for name, of in scored.items()}
    for name, of in scores.items():
        say(f"{name}: " + ", ".join(f"{key} {x:.3f}" for key, x in of.items() if isinstance(x, float)))
    if is_main_process():
        (args.out / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")
    say(f"adapters, report.html and scores.json are in {args.out}")


if __name__ == "__main__":
    try:
        main()
    except ParaJaxError as error:
        raise SystemExit(f"finetune.py: {error}") from None
    except Interrupted as stop:
        print(f"finetune.py: {stop}")
        # A machine that is taken away is no failure: whoever started the run starts it again.
        raise SystemExit(0 if stop.preempted else 130) from None
