"""Fine-tuning many tenants, as one file that is read from top to bottom.

    python train/finetune.py tiny_cpu --out runs/tiny

A config of train/configs/ says what is tuned on what; its docstring says what it takes and what comes out. OUT gets a
folder with the adapter of every tenant, report.html, metrics.jsonl, checkpoints/ and scores.json. The same with more
options and no config is `para-jax finetune`, `para-jax evaluate` and `para-jax generate`.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import configs
import jax

from para_jax import (
    AdapterBank,
    Backbone,
    BackboneConfig,
    ParaJaxError,
    auto_mesh,
    complete,
    default_stacked,
    encode_rows,
    end_tokens,
    evaluate,
    finetune,
    load_tokenizer,
    make_mesh,
    read_examples,
)
from para_jax.convert.tokenizer import check_vocabulary
from para_jax.data.examples import Examples
from para_jax.distributed import first, start
from para_jax.files import write_json
from para_jax.memory import keep_freed_memory
from para_jax.training.loggers import Loggers
from para_jax.training.signals import Interrupted


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

    # The devices, and a mesh over them. A CPU's are simulated, and there is nothing to gain.
    keep_freed_memory()
    if args.several_hosts:
        start()
    say = print if first() else lambda *_, **__: None
    loggers = Loggers(args.log, args.out)
    shape = BackboneConfig.from_pretrained(recipe.model)
    recipe.check(shape)
    mesh = None
    if jax.device_count() > 1 and jax.default_backend() != "cpu":
        mesh = make_mesh(recipe.mesh or auto_mesh(shape, jax.device_count()))

    # The frozen backbone: every tensor goes to its place on the mesh while it is read. With its layers stacked, one of
    # them is compiled instead of all.
    backbone = Backbone.from_pretrained(recipe.model, stacked=True, quantize=recipe.quantize, mesh=mesh)
    tokenizer = load_tokenizer(recipe.model)
    check_vocabulary(tokenizer, shape.vocab_size)
    where = "one device" if mesh is None else ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    say(f"{recipe.model}: {shape.size / 1e6:,.1f}M parameters in {backbone.dtype} on {where}")

    # Every tenant's rows, as tokens.
    how = {"tokenizer": tokenizer, "eos_token_ids": end_tokens(shape, tokenizer), "max_length": recipe.max_length}

    def examples(source: configs.Source, **options: bool) -> Examples:
        if isinstance(source, str):
            return read_examples(source, **how, truncate=True, **options)
        rows = [(f"row {i}", row) for i, row in enumerate(source, 1)]
        return encode_rows(rows, **how, truncate=True, **options)

    # Only PARA needs the turns of a chat apart: it prepares an adapter from all that is before each.
    chats = {name: {"one_pass": not tenant.method.reads_prompt} for name, tenant in recipe.tenants.items()}
    train = {name: examples(tenant.train, **chats[name]) for name, tenant in recipe.tenants.items()}
    dev = {name: examples(tenant.dev, **chats[name]) for name, tenant in recipe.tenants.items()}
    test = {name: examples(tenant.test, keep_texts=True)[: recipe.test_rows] for name, tenant in recipe.tenants.items()}

    # A bank of fresh adapters, each the identity.
    bank = AdapterBank.create({name: tenant.method for name, tenant in recipe.tenants.items()}, shape)
    for name, tenant in recipe.tenants.items():
        size = tenant.method.size(shape)
        say(f"{name}: {tenant.method.method}, {size:,} parameters; {len(train[name]):,} rows such as")
        prompt, response = map(tokenizer.decode, (train[name][0].prompt_ids, train[name][0].response_ids))
        say(f"  {prompt[-80:]!r} -> {response!r}")

    # All of them in the same steps. OUT/NAME gets the adapter that was best on the tenant's dev rows: this is the
    # export, a folder that AdapterBank.load, para-jax and, for LoRA, peft open.
    with loggers:
        finetune(
            backbone, bank, train, dict.fromkeys(recipe.tenants, recipe.settings), args.out, dev=dev, rows=recipe.rows,
            micro_batch_tokens=recipe.micro_batch_tokens, checkpoint_every=recipe.checkpoint_every, resume=args.resume,
            show=say, loggers=loggers,
        )  # fmt: skip
    bank = AdapterBank.load({name: args.out / name for name in recipe.tenants}, shape)
    if not default_stacked():  # a CPU decodes faster with the layers apart
        del backbone  # never twice in memory
        backbone = Backbone.from_pretrained(recipe.model, quantize=recipe.quantize, mesh=mesh)

    # One batch with a row of every tenant, and the bare backbone on the same prompts.
    prompts = [test[name][0].prompt_ids for name in recipe.tenants]
    longest = max(tenant.max_new_tokens for tenant in recipe.tenants.values())
    tenants = [*recipe.tenants, *[None] * len(prompts)]
    answers = complete(backbone, tokenizer, prompts * 2, bank=bank, tenants=tenants, max_new_tokens=longest)
    for i, name in enumerate(recipe.tenants):
        say(f"{name}: {test[name][0].prompt[-80:]!r}")
        got, bare = (answers[j].text.strip() for j in (i, i + len(prompts)))
        say(f"  wanted {test[name][0].response!r}, got {got!r}, from the bare backbone {bare!r}")

    # Scores on rows that nobody has seen, all tenants' in the same batches.
    limits = {name: tenant.max_new_tokens for name, tenant in recipe.tenants.items()}
    scored = evaluate(backbone, tokenizer, test, bank, max_new_tokens=limits, batch_size=recipe.batch_size)
    scores = {name: {key: x for key, x in of.items() if key != "predictions"} for name, of in scored.items()}
    for name, of in scores.items():
        say(f"{name}: " + ", ".join(f"{key} {x:.3f}" for key, x in of.items() if isinstance(x, float)))
    if first():
        write_json(args.out / "scores.json", scores)
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
