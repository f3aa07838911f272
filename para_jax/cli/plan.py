"""Plan tuning or decoding on TPUs that you do not have: memory, collectives, and an estimate of time.

It compiles the actual programs for the chips, sharded over a mesh. It needs config.json only, no weights. Without
--mesh it searches meshes, and with several --rows it compares batches. Exit code 0: it fits; 1: it does not fit, and
remedies are printed.

  para-jax plan --model DIR --topology v5e:1x1 --quantize int8 --rows 8 --micro-batch-tokens 2048
  para-jax plan --model DIR --topology v5e:8x8 --mode decode --rows 64,256 --length 1024 --json plan.json

libtpu (pip install "para-jax[tpu]") compiles for TPUs, and needs no TPU. For GPUs (gpu:h100x8) programs are compiled
for as many CPU devices: the size of arguments is exact, the rest is an estimate. docs/plan.md explains the figures.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from para_jax.checks import COUNT
from para_jax.cli import common
from para_jax.cli.finetune import method_configs
from para_jax.cli.methods import human
from para_jax.cli.options import add_output, name_of, number, repeated
from para_jax.cli.outputs import check_files
from para_jax.errors import ParaJaxError
from para_jax.files import write_json
from para_jax.planning.chips import parse_topology

if TYPE_CHECKING:
    from para_jax.planning.job import Job

ROWS = {"train": "16", "decode": "8"}
# Options that only one mode has.
ONLY = {"train": ("micro_batch_tokens", "remat"), "decode": ("new_tokens",)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_config(parser)
    text = "v4:2x2x1, v5e:4x4, v5p:4x4x4, v6e:8x8, ...; gpu:h100x8"
    parser.add_argument("--topology", metavar="CHIP:SHAPE", required=True, help=text)
    parser.add_argument("--mode", choices=("train", "decode"), default="train", help="what to plan (default: train)")
    parser.add_argument("--mesh", metavar="AXIS=N,...", help="such as fsdp=8,tensor=2 (default: search for the best)")
    text = 'method of the tenants: para, lora, ...; or a JSON file {"method": ...}'
    parser.add_argument("--method", default="para", help=text)
    repeated(parser, "--option", "KEY=VALUE", "an option of the method; repeat")
    number(parser, "--tenants", COUNT, "tenants that are tuned or served (default: 1)", 1)
    text = "rows of each tenant in a tuning step (default: 16) or of all in decoding (default: 8); several to try"
    parser.add_argument("--rows", metavar="N[,N...]", help=text)
    text = "tokens of a tuning row (default: 2048) or of a prompt (default: 1024)"
    number(parser, "--length", COUNT, text, metavar="T")
    number(parser, "--new-tokens", COUNT, "maximum new tokens of a decoded row (default: 256)", metavar="T")
    number(parser, "--micro-batch-tokens", COUNT, "maximum tokens in a micro-batch of a device (default: as finetune)")
    text = "what the backward pass recomputes, as in finetune (default: layers)"
    parser.add_argument("--remat", choices=("none", "layers", "products"), help=text)
    parser.add_argument("--quantize", choices=("int8", "int4"), help="quantize the layers' weights")
    text = "dtype of computation (default: bfloat16; on a t4 float16)"
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help=text)
    number(parser, "--tries", COUNT, "fitting meshes, or remedies, to compile (default: 3)", 3)
    add_output(parser, "--json", "OUT.json", "write the plan")


def run(args: argparse.Namespace) -> int:
    check_files(args, "json")

    chip = parse_topology(args.topology).chip
    jobs = jobs_of(args, chip.dtype)

    from para_jax.planning.process import plan_in_subprocess

    made = plan_in_subprocess(jobs, args.topology, args.mesh, args.tries, lambda line: print(line, file=sys.stderr))
    about = {
        "model": Path(jobs[0].config.name).name,
        "parameters": jobs[0].config.size,
        "method": jobs[0].method.method,
        **{name: getattr(jobs[0], name) for name in ("mode", "tenants", "length", "new_tokens", "dtype")},
    }
    made = {"fits": made.pop("fits"), **about, **made}
    print("\n".join(report(made)))
    if args.json:
        write_json(args.json, made)
        print(f"plan in {args.json}")
    return 0 if made["fits"] else 1


def jobs_of(args: argparse.Namespace, dtype: Literal["bfloat16", "float16"]) -> list[Job]:
    """A job for each value of `--rows`, with `dtype` unless `--dtype` is given."""
    from para_jax.planning.job import Job

    for mode, option in ((mode, option) for mode, options in ONLY.items() for option in options):
        if mode != args.mode and getattr(args, option) is not None:
            raise ParaJaxError(f"{name_of(option)} is for --mode {mode}, and has no effect in --mode {args.mode}")
    config = common.load_config(args.model)
    method = method_configs(["tenant"], [args.method], args.option)["tenant"]
    method.size(config)  # raises for an unknown target
    context, training = config.max_position_embeddings, args.mode == "train"
    length = args.length if args.length is not None else min(2048, context) if training else min(1024, context // 2)
    new_tokens = args.new_tokens if args.new_tokens is not None else min(256, max(1, context - length))
    text = args.rows or ROWS[args.mode]
    try:
        every = [COUNT.parse(part) for part in text.split(",")]
    except ValueError as error:
        raise ParaJaxError(f"--rows {error}; separate several values with commas") from None
    same = {name: getattr(args, name) for name in ("mode", "tenants", "micro_batch_tokens", "quantize")}
    same |= {"length": length, "new_tokens": new_tokens, "remat": args.remat or "layers", "dtype": args.dtype or dtype}
    return [Job(config, method, rows=rows, **same) for rows in every]


def report(made: dict[str, Any]) -> list[str]:
    best, hbm = made["plan"], made["hbm"]
    verdict = "fits" if made["fits"] else "does not fit"
    lines = [
        f"{made['model'] or 'the backbone'} ({made['parameters']:,} parameters), {made['method']}, "
        f"{settings(made, best)}: {verdict} {made['topology']}, {human(best['peak'])} of {human(hbm)} a device"
    ]
    if made["estimated"]:
        lines.append("Compiled for CPUs: arguments are exact; temporaries, peak and collectives are estimates.")
    if made["attention"]["refused"]:
        lines.append(f"{made['attention']['refused']}; planned with attention={made['attention']['kernel']!r} instead.")
    if best["programs"]:
        columns = ("arguments", "outputs", "temporaries", "peak", "held")
        rows = [[program["name"], *(human(program[c]) for c in columns)] for program in best["programs"]]
        lines += ["", common.table(["bytes a device", *columns], rows)]
        timed = [program for program in best["programs"] if program["time"]]
        lines += ["", common.table(*time_table(timed))] if timed else []
        if best["step"] and best["tokens_per_second"]:
            lines.append(f"A step takes {best['step']['seconds']:.3g} s: {fast(best)} tokens/s.")
    else:
        lines.append(f"The weights alone are {human(best['weights'])} a device, so nothing was compiled.")
    lines += [f"{program['name']}: {program['problem']}" for program in best["programs"] if program["problem"]]
    kinds = [
        [f"{program['name']}: {kind}", total["count"], human(total["bytes"])]
        for program in best["programs"]
        for kind, total in program["collectives"].items()
    ]
    if kinds:
        lines += ["", common.table(["collectives in a run", "count", "sent by a device"], kinds)]
    others = [best, *made["others"]]
    if len(others) > 1:
        rows = [[one["mesh"], one["rows"], human(one["peak"]), fast(one)] for one in others]
        lines += ["", common.table(["mesh", "rows", "peak", "tokens/s"], rows)]
    if not made["fits"]:
        found = "What would make it fit:" if made["remedies"] else "No single change that was tried makes it fit."
        lines += ["", found]
        lines += [f"  {way['change']}: {human(way['peak'])}, {fast(way)} tokens/s" for way in made["remedies"]]
    return [*lines, "", *assumption_lines(made["assumptions"])]


def settings(made: dict[str, Any], one: dict[str, Any]) -> str:
    from para_jax.planning.plan import micro_batches

    if made["mode"] == "train":
        words = f"tuning {made['tenants']} x {one['rows']} rows of {made['length']} tokens"
        words += f" in {micro_batches(one['step'])}, remat {one['remat']}"
    else:
        words = f"decoding {one['rows']} rows of {made['length']} + {made['new_tokens']} tokens"
    return f"{words}, {one['quantize'] or made['dtype']}, {one['mesh']}"


def fast(one: dict[str, Any]) -> str:
    rate = one.get("tokens_per_second")
    return f"{rate:,.0f}" if rate else "does not fit"


def time_table(programs: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    columns = ("compute", "memory", "collectives", "seconds")
    rows = []
    for program in programs:
        time, rate = program["time"], program["time"]["tokens_per_second"]
        seconds = (f"{time[c]:.3g}" for c in columns)
        rows.append([program["name"], *seconds, "" if rate is None else f"{rate:,.0f}", time["bound"]])
    return ["estimated seconds", *columns[:3], "in all", "tokens/s", "bound by"], rows


def assumption_lines(found: dict[str, Any]) -> list[str]:
    share = found["efficiency"]
    return [
        f"Estimates assume {found['peak_flops'] / 1e12:.0f} TFLOP/s x {share['flops']}, HBM of "
        f"{found['hbm_bytes_per_second'] / 1e9:.0f} GB/s x {share['hbm']}, links of "
        f"{found['link_bytes_per_second'] / 1e9:.0f} GB/s x {share['links']} ({found['source']}), and:",
        *(f"- {words}" for words in found["words"]),
    ]
