"""Answer prompts of several tenants in one batch.

--input has rows {"tenant": NAME or null, "prompt": TEXT} (or "messages"). --output has the same rows in order, with
"text" and "finish_reason" added; other keys are kept. A tenant may be names with adapter weights: {"mail": 0.5} takes
half of an adapter, {"mail": 0.5, "faq": 0.5} half of each.

  para-jax generate --adapters runs/first --tenant mail --prompt "Dear customer,"
  para-jax generate --adapters runs/first --input rows.jsonl --output answers.jsonl

Answers are written to OUT.partial as they come, in order, and become OUT when all rows are answered. After a kill or a
full disk, the same command with --resume continues, and the result is the same file.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from para_jax.checks import COUNT, POSITIVE, SEED, UINT32, Number, Whole
from para_jax.cli import common
from para_jax.cli.adapters import RowTokenizers, adapter_folders, load_bank
from para_jax.cli.answers import ANSWER, Answers, digest, stamps
from para_jax.cli.options import add_output, flag, number, refuse, repeated
from para_jax.cli.outputs import check_files
from para_jax.data.sources import KEYS, read_jsonl
from para_jax.errors import ParaJaxError
from para_jax.files import remove
from para_jax.progress import Pace, to_stderr

# The number of batches whose rows are sorted together, and written together.
WINDOW = 8
# Unknown keys that are more similar to a known key are errors: tenant_id to tenant is 0.80, tennant 0.92.
NEAR = 0.84


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_model(parser)
    common.add_adapters(parser)
    parser.add_argument("--input", metavar="ROWS.jsonl", help="rows to answer")
    add_output(parser, "--output", "OUT.jsonl", "where the answered rows go")
    flag(parser, "--resume", "continue with the answers in OUT.jsonl.partial, if any")
    parser.add_argument("--tenant", metavar="NAME", help="with --prompt: whose adapter (default: none)")
    parser.add_argument("--prompt", metavar="TEXT", help="one prompt; the answer is printed")
    number(parser, "--max-new-tokens", COUNT, "default: 64", 64)
    number(parser, "--temperature", Number(0), "0, the default, is greedy", 0.0, None)
    number(parser, "--top-k", Whole(0), "sample from the k likeliest tokens (default: all)", metavar="K")
    number(parser, "--top-p", Number(0, 1), "sample from the likeliest tokens that sum to p", metavar="P")
    number(parser, "--min-p", Number(0, 1), "sample from tokens p times as likely as the likeliest", metavar="P")
    number(parser, "--repetition-penalty", POSITIVE, "above 1: less repetition", 1.0, None)
    number(parser, "--num-beams", COUNT, "beam search if above 1", 1, None)
    repeated(parser, "--stop", "TEXT", "end a text before this; repeat")
    number(parser, "--seed", SEED, "seed of the first row (default: 0); row i has seed + i", metavar=None)
    number(parser, "--batch-size", COUNT, "rows decoded together (default: 32)", metavar=None)


def run(args: argparse.Namespace) -> int:
    check(args)

    from para_jax.convert.adapter_tokenizer import ends
    from para_jax.distributed import is_main_process

    if args.input is None:
        placed = [("--prompt", {"prompt": args.prompt, "tenant": args.tenant})]
    else:
        placed = read_jsonl(args.input)
    rows = [row for _, row in placed]
    names = tenants_of(placed, args.adapters)
    answers, lines = None, list[str]()
    if args.output is not None:
        answers = Answers(args.output, len(rows), WINDOW * (args.batch_size or 32))
        answers.check(args.resume, args.overwrite)
        lines = other_keys(placed, args.input)
        if args.resume and not args.overwrite and answers.output.exists() and not answers.partial.exists():
            if not answers.finished(rows):
                raise ParaJaxError(f"{args.output} exists and answers other rows; choose another --output")
            remove(answers.inputs)  # a kill between two removals may leave it
            print(f"{len(rows)} rows were in {args.output} already")
            return 0
    if names:
        adapter_folders(args.adapters, names)  # raises before the model is read
    loading, tokenizer = common.begin_model(args)
    if is_main_process():
        print("".join(line + "\n" for line in lines), end="", file=sys.stderr)
    config = loading.shapes.config
    bank = load_bank(args.adapters, names, config, not args.allow_nan)
    tokenizers = tokenizers_of(placed, RowTokenizers(tokenizer, args.adapters, config.vocab_size))
    prompts = prompts_of(placed, tokenizers)
    options = {"bank": bank, "tenants": [row.get("tenant") for row in rows], **decoding(args, len(rows))}
    options["eos_token_id"] = [ends(tokenizer, each, config) for each in tokenizers]
    if answers is None:
        from para_jax.decoding.generate import complete

        print(complete(loading, tokenizers, prompts, **options)[0].text)
        return 0
    answer(args, answers, rows, names, (loading, tokenizers, prompts), options)
    print(f"{len(rows)} rows in {args.output}")
    return 0


def check(args: argparse.Namespace) -> None:
    """Raises ParaJaxError for options that conflict or have no effect, before anything is read."""
    if (args.prompt is None) == (args.input is None):
        raise ParaJaxError("give either --prompt TEXT, or --input ROWS.jsonl and --output OUT.jsonl")
    if args.input is not None:
        if args.output is None:
            raise ParaJaxError("--input needs --output OUT.jsonl")
        if args.tenant is not None:
            raise ParaJaxError('with --input the tenant is in each row, under "tenant"')
    else:
        why = "with --prompt, whose one answer is printed; give --input ROWS.jsonl"
        refuse(args, ("output", "overwrite", "resume", "batch_size"), why)
        if args.adapters is not None and args.tenant is None:
            raise ParaJaxError("--adapters has no effect without --tenant NAME, which says whose adapter answers")
    if args.adapters is not None and not Path(args.adapters).is_dir():
        raise ParaJaxError(f"--adapters {args.adapters} is not a folder; give the --out folder of para-jax finetune")
    if args.adapters is None:
        refuse(args, ("allow_nan",), "without --adapters")
    check_files(args, "output", kept=["output"])
    if args.input is not None and Path(args.input).resolve() in Answers(args.output, 0, 1).partial_files:
        raise ParaJaxError(f"--input {args.input} is the file for partial answers of --output; rename it")
    if args.temperature == 0:
        refuse(args, ("top_k", "top_p", "min_p", "seed"), "without sampling; give --temperature above 0")
    elif args.num_beams > 1:
        raise ParaJaxError("--num-beams is a beam search, and --temperature samples; leave out one")


def tenants_of(placed: Sequence[tuple[str, dict[str, Any]]], adapters: str | None) -> list[str]:
    """The names of the tenants of all rows. Raises ParaJaxError, with the row's place, for an invalid tenant."""
    from para_jax.adapters.rows import adapter_weights

    names: dict[str, None] = {}
    for place, row in placed:
        tenant = row.get("tenant")
        try:
            named = adapter_weights(tenant)
        except ParaJaxError as error:
            raise ParaJaxError(f'{place}: "tenant": {error}') from None
        if named and adapters is None:
            raise ParaJaxError(f"{place}: tenant {tenant!r} needs --adapters DIR")
        names |= dict.fromkeys(named)
    if adapters is not None and not any("tenant" in row for _, row in placed):
        raise ParaJaxError('--adapters has no effect: no row has a "tenant"; name one in each row, or null for none')
    return list(names)


def other_keys(placed: Sequence[tuple[str, dict[str, Any]]], source: str) -> list[str]:
    """Messages about keys that are not read, and about keys that are replaced.

    Raises ParaJaxError for a key that is similar to a known one.
    """
    others: set[str] = set()
    for place, row in placed:
        for key in sorted(row.keys() - {*KEYS, *ANSWER, *others}):
            near = difflib.get_close_matches(key.casefold(), KEYS, n=1, cutoff=NEAR)
            if near:
                raise ParaJaxError(f"{place}: unknown key {key!r}; did you mean {near[0]!r}? If not, rename it")
            others.add(key)
    lines = []
    if others:
        lines.append(f"{source}: keys that are not read are copied to the output: {', '.join(sorted(others))}")
    replaced = [key for key in ANSWER if any(key in row for _, row in placed)]
    if replaced:
        lines.append(f"{source}: the output replaces {' and '.join(replaced)} of the rows")
    return lines


def tokenizers_of(placed: Sequence[tuple[str, dict[str, Any]]], row_tokenizers: RowTokenizers) -> list[Any]:
    """Each row's tokenizer, with its chat template: its adapters', or the backbone's."""
    from para_jax.adapters.rows import adapter_weights

    found = []
    for place, row in placed:
        chat = "messages" in row or row.get("system") is not None
        try:
            found.append(row_tokenizers.get(list(adapter_weights(row.get("tenant"))), chat))
        except ParaJaxError as error:
            raise ParaJaxError(f"{place}: {error}") from None
    return found


def prompts_of(placed: Sequence[tuple[str, dict[str, Any]]], tokenizers: Sequence[Any]) -> list[list[int]]:
    from para_jax.data.examples import encode_rows

    prompts: list[list[int]] = [[] for _ in placed]
    for tokenizer in {id(each): each for each in tokenizers}.values():
        indices = [i for i, each in enumerate(tokenizers) if each is tokenizer]
        rows = [(placed[i][0], {k: v for k, v in placed[i][1].items() if k in KEYS}) for i in indices]
        examples = encode_rows(rows, tokenizer, (), need_response=False, total=len(rows), show=to_stderr)
        for i, example in zip(indices, examples, strict=True):
            prompts[i] = example.prompt_ids.tolist()
    return prompts


def decoding(args: argparse.Namespace, rows: int) -> dict[str, Any]:
    given = {name: getattr(args, name) for name in ("top_k", "top_p", "min_p")}
    return {
        **{name: value for name, value in given.items() if value is not None},
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "repetition_penalty": args.repetition_penalty,
        "num_beams": args.num_beams,
        "stop": args.stop,
        "seed": [((args.seed or 0) + i) % (UINT32 + 1) for i in range(rows)],
        "batch_size": args.batch_size or 32,
    }


def answer(
    args: argparse.Namespace,
    answers: Answers,
    rows: Sequence[dict[str, Any]],
    names: Sequence[str],
    inputs: tuple[Any, Any, list[list[int]]],
    options: dict[str, Any],
) -> None:
    """Answers the rows that are not answered yet. The main process writes the answers."""
    from para_jax import tiny_backbone_path
    from para_jax.convert.checkpoint import fetched
    from para_jax.decoding.generate import Completion, complete
    from para_jax.distributed import broadcast, is_main_process, on_main_process

    loading, _, prompts = inputs
    shapes = loading.shapes
    description = {
        "rows_sha256": digest(rows),
        "prompts_sha256": digest(prompts),
        "model": stamps(fetched(args.model or tiny_backbone_path()), "config.json", "*.safetensors", "*.bin"),
        "adapters": {name: stamps(Path(args.adapters) / name, "adapter_*") for name in names},
        "options": {k: v for k, v in options.items() if k not in ("bank", "tenants", "seed")}
        | {"seed": args.seed or 0},
        "dtype": str(shapes.dtype),
        "quantize": args.quantize,
        "mesh": None if shapes.mesh is None else dict(shapes.mesh.shape),
    }

    def write(completions: Sequence[Completion]) -> None:
        if is_main_process():
            some = zip(rows[answers.done :], completions, strict=False)
            answers.write([{**row, "text": c.text, "finish_reason": c.finish_reason} for row, c in some])

    with answers:
        on_main_process(lambda: answers.open(description, args.resume))
        done = int(broadcast(str(answers.done).encode()))
        if done:
            print(f"continuing after {done} of {len(rows)} rows", file=sys.stderr)
        pace = Pace("rows") if is_main_process() else None
        complete(*inputs, **options, window=answers.window, skip=done, on_window=write, progress=pace)
        on_main_process(answers.finish)
