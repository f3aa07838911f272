"""Print what each method costs on a backbone: parameters, bytes stored, bytes in flight, bytes read while decoding.

The figures need config.json only, no weights. A request in flight has its prepared adapter in the compute dtype, and
every decode step reads it. The backbone's weights are read once for all rows. Keys and values are left out, because
they are the same for all methods. Every row counts as a different tenant. If layers are stacked, modules that only some
layers have (FanLoRA) are padded to all layers; this padding is not counted.

  para-jax methods --model DIR --rows 32
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from para_jax.checks import COUNT
from para_jax.cli import common
from para_jax.cli.options import add_output, number
from para_jax.cli.outputs import check_files
from para_jax.files import write_json

if TYPE_CHECKING:
    from para_jax.adapters.method import BackboneShape, MethodConfig

COMPUTE = ("bfloat16", "float16", "float32")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_config(parser)
    number(parser, "--rows", COUNT, "rows in a decoding batch (default: 8)", 8)
    parser.add_argument("--dtype", choices=COMPUTE, default="bfloat16", help="dtype of computation (default: bfloat16)")
    add_output(parser, "--json", "OUT.json", "write the figures")


def run(args: argparse.Namespace) -> int:
    from para_jax.backbones.cost import adapter_cost, step_bytes

    check_files(args, "json")
    shape = common.load_config(args.model)
    weights = step_bytes(shape, args.rows, args.dtype)
    costs = {name: adapter_cost(config, shape, args.dtype) for name, config in usual(shape).items()}
    print(
        f"{shape.size:,} parameters; a decode step of {args.rows} rows reads {human(weights)} of the backbone's "
        f"{args.dtype} weights"
    )
    header = ["method", "parameters", "stored", "in flight", f"read by {args.rows} rows", "of the backbone's"]
    rows = []
    for name, c in costs.items():
        read = args.rows * c.in_flight
        sizes = [human(x) for x in (c.stored, c.in_flight, read)]
        rows.append([name, f"{c.parameters:,}", *sizes, f"{100 * read / weights:.2f} %"])
    print(common.table(header, rows))
    if args.json:
        figures = {
            "model": Path(shape.name).name,
            "rows": args.rows,
            "dtype": args.dtype,
            "backbone": {"parameters": shape.size, "bytes_read_a_step": weights},
            "methods": {
                name: {
                    "parameters": c.parameters,
                    "bytes_stored_a_tenant": c.stored,
                    "bytes_in_flight_a_request": c.in_flight,
                    "bytes_read_a_step": args.rows * c.in_flight,
                }
                for name, c in costs.items()
            },
        }
        write_json(args.json, figures)
        print(f"figures in {args.json}")
    return 0


def usual(shape: BackboneShape) -> Mapping[str, MethodConfig]:
    from para_jax.adapters.registry import METHODS

    return {name: config for method in METHODS.values() for name, config in method.usual(shape).items()}


def human(size: float) -> str:
    """Bytes with a unit.

    >>> human(1_228_800), human(512), human(13_476_831_232)
    ('1.23 MB', '512 B', '13.5 GB')
    """
    if size < 1000:
        return f"{size:.0f} B"
    for unit in ("kB", "MB", "GB", "TB"):
        size /= 1000
        if size < 999.5 or unit == "TB":
            break
    return f"{size:#.3g}".rstrip(".") + f" {unit}"
