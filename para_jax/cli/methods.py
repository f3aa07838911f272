"""What each method costs on a backbone: parameters, bytes stored, bytes in flight, bytes read while decoding.

Computed from config.json alone, with no weights. A request in flight holds its prepared adapter in the compute dtype,
and every decode step reads all of it, beside the backbone's weights, which are read once for all rows. Keys and
values, the same for every method, are left out. Every row counts as another tenant's. Where a backbone's layers are
stacked, the pairs of modules that only some layers have (FanLoRA's) are padded to all layers; this is not counted.

  para-jax methods --model DIR --rows 32
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from para_jax.checks import COUNT
from para_jax.cli import common
from para_jax.cli.options import within
from para_jax.cli.outputs import check_files
from para_jax.files import write_json

if TYPE_CHECKING:
    from para_jax.adapters.method import BackboneShape, MethodConfig
    from para_jax.config import BackboneConfig

COMPUTE = ("bfloat16", "float16", "float32")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="DIR", help="a folder or hub id with config.json, or that file (default: the tiny backbone)"
    )
    parser.add_argument(
        "--rows", type=within(COUNT), default=8, metavar="N", help="rows that decode together (default: 8)"
    )
    parser.add_argument("--dtype", choices=COMPUTE, default="bfloat16", help="of computation (default: bfloat16)")
    parser.add_argument("--json", metavar="OUT.json", help="write the figures")
    parser.add_argument("--overwrite", action="store_true", help="replace --json if it exists")


def run(args: argparse.Namespace) -> int:
    check_files(args, "json")
    shape = common.load_config(args.model)
    weights = step_bytes(shape, args.rows, args.dtype)
    costs = {name: cost(config, shape, args.dtype) for name, config in usual(shape).items()}
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


class Cost(NamedTuple):
    """Of one adapter.

    Attributes:
      parameters: their number.
      stored: bytes of the weights of a tenant, float32.
      in_flight: bytes of the prepared Adjustment that each of its requests holds, and a decode step reads.
    """

    parameters: int
    stored: int
    in_flight: int


def cost(config: MethodConfig, shape: BackboneShape, dtype: str = "bfloat16") -> Cost:
    """What an adapter of this config costs on this backbone. Nothing of its size is made.

    >>> from para_jax import BackboneConfig, ParaConfig
    >>> cost(ParaConfig(r=12), BackboneConfig(32000, 4096, 11008, 32, 32, 32, 128))
    Cost(parameters=8945664, stored=35782656, in_flight=1228800)
    """
    import jax
    import jax.numpy as jnp

    from para_jax.adapters.adapter import abstract_layers
    from para_jax.adapters.method import Prompt
    from para_jax.backbones.options import wide

    def prepared(layers: Any) -> list[Any]:
        hidden = jnp.zeros((1, shape.hidden_size), dtype)
        prompt = Prompt(hidden, hidden, jnp.ones((1,), bool))
        return [
            jax.tree.map(lambda x, i=i: x[i], layers).prepare(prompt, i).settled().astype(wide(jnp.dtype(dtype)))
            for i in range(shape.num_hidden_layers)
        ]

    leaves = jax.tree.leaves(jax.eval_shape(prepared, abstract_layers(config, shape)))
    in_flight = sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)
    parameters = config.size(shape)
    return Cost(parameters, 4 * parameters, in_flight)


def step_bytes(shape: BackboneConfig, rows: int, dtype: str) -> int:
    """Bytes of the backbone's weights that a decode step reads: all but the embeddings of other tokens."""
    import jax.numpy as jnp

    # A tied head is the embedding, all of which is read.
    embedding = 0 if shape.tie_word_embeddings else max(0, shape.vocab_size - rows)
    return jnp.dtype(dtype).itemsize * (shape.size - embedding * shape.hidden_size)


def usual(shape: BackboneShape) -> Mapping[str, MethodConfig]:
    """Every method at its usual settings."""
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
