"""Answer prompts, each as its own tenant, in one batch.

--input holds rows {"tenant": NAME or null, "prompt": TEXT} (or "messages"); --output gets them back in order with
"text" and "finish_reason" added. A tenant may be names with strengths: {"mail": 0.5} takes half of what the adapter
changes, {"mail": 0.5, "faq": 0.5} half of each.

  para-jax generate --adapters runs/first --tenant mail --prompt "Dear customer,"
  para-jax generate --adapters runs/first --input rows.jsonl --output answers.jsonl
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from para_jax.cli import common
from para_jax.errors import ParaJaxError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_model(parser)
    common.add_adapters(parser)
    parser.add_argument("--input", metavar="ROWS.jsonl", help="rows to answer")
    parser.add_argument("--output", metavar="OUT.jsonl", help="where the answered rows go")
    parser.add_argument("--overwrite", action="store_true", help="replace --output if it exists")
    parser.add_argument("--tenant", metavar="NAME", help="with --prompt: whose adapter (default: none)")
    parser.add_argument("--prompt", metavar="TEXT", help="one prompt; the answer is printed")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="default: 64")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    parser.add_argument("--top-k", type=int, default=0, help="sample among the k likeliest tokens (default: all)")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample among the likeliest that sum to p")
    parser.add_argument("--min-p", type=float, default=0.0, help="and are at least p times as likely as the likeliest")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1: repeat less")
    parser.add_argument("--num-beams", type=int, default=1, help="beam search if above 1")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end where this appears; repeat")
    parser.add_argument("--seed", type=int, default=0, help="of the first row; row i has seed + i")
    parser.add_argument("--batch-size", type=int, default=32, help="rows decoded together (default: 32)")


def run(args: argparse.Namespace) -> int:
    if (args.prompt is None) == (args.input is None):
        raise ParaJaxError("give either --prompt TEXT, or --input ROWS.jsonl and --output OUT.jsonl")
    if args.input is not None:
        if args.output is None:
            raise ParaJaxError("--input needs --output OUT.jsonl")
        if args.tenant is not None:
            raise ParaJaxError('with --input the tenant is in each row, under "tenant"')
        if Path(args.output).exists() and not args.overwrite:
            raise ParaJaxError(f"{args.output} exists; choose another --output or pass --overwrite")

    from para_jax.adapters.rows import strengths_of
    from para_jax.convert.tokenizer import end_tokens, with_chat_template
    from para_jax.data.examples import encode_rows
    from para_jax.data.sources import read_jsonl
    from para_jax.decoding.generate import complete

    if args.input is not None:
        placed = read_jsonl(args.input)
    else:
        placed = [("--prompt", {"prompt": args.prompt, "tenant": args.tenant})]
    tenants = [row.get("tenant") for _, row in placed]
    names: dict[str, None] = {}
    for (place, _), tenant in zip(placed, tenants, strict=True):
        try:
            named = strengths_of(tenant)
        except ParaJaxError as error:
            raise ParaJaxError(f'{place}: "tenant": {error}') from None
        if named and args.adapters is None:
            raise ParaJaxError(f"{place}: tenant {tenant!r} needs --adapters DIR")
        names |= dict.fromkeys(named)
    loading, tokenizer = common.begin_model(args)
    config = loading.shapes.config
    bank = common.load_bank(args.adapters, list(names), config)
    # Messages go through the chat template that is kept with the row's adapter.
    of_template: dict[str | None, list[int]] = {}
    for i, (place, row) in enumerate(placed):
        try:
            own = list(strengths_of(tenants[i])) if "messages" in row else []
            of_template.setdefault(common.kept_template(args.adapters, own), []).append(i)
        except ParaJaxError as error:
            raise ParaJaxError(f"{place}: {error}") from None
    prompts: list[list[int]] = [[] for _ in placed]
    for template, places in of_template.items():
        chosen = with_chat_template(tokenizer, template)
        rows = [placed[i] for i in places]
        examples = encode_rows(rows, chosen, end_tokens(config, tokenizer), need_response=False)
        for i, example in zip(places, examples, strict=True):
            prompts[i] = example.prompt_ids.tolist()
    completions = complete(
        loading,
        tokenizer,
        prompts,
        bank=bank,
        tenants=tenants,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        num_beams=args.num_beams,
        stop=args.stop,
        seed=[args.seed + i for i in range(len(placed))],
        batch_size=args.batch_size,
    )
    if args.input is None:
        print(completions[0].text)
        return 0
    lines = [
        json.dumps({**row, "text": c.text, "finish_reason": c.finish_reason}, ensure_ascii=False)
        for (_, row), c in zip(placed, completions, strict=True)
    ]
    common.write_text(args.output, "".join(line + "\n" for line in lines))
    print(f"{len(lines)} rows in {args.output}")
    return 0
