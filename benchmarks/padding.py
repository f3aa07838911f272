"""How much of a run's micro-batches is padding: planned shapes on real rows, nothing is computed.

    python benchmarks/padding.py --data FOLDER               (FOLDER/NAME/train.jsonl; the tiny backbone's tokens)
    python benchmarks/padding.py --data FOLDER --model DIR   (another checkpoint's tokens and sizes)

For each task, for all tasks as tenants of one run, and for rows of log-normal length between 5 and 1,000 tokens:

    padding   the share of matmul token slots that hold no token
    pairs     query-key pairs that plain attention computes, over those that are needed

Both are counted on steps other than those that the plan was made from. `cpu` plans two shapes at most and `accelerator`
one.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from para_jax import BackboneConfig, Example, Settings, load_tokenizer, read_examples, tiny_backbone_path
from para_jax.cli.common import table
from para_jax.data.buffers import Examples
from para_jax.data.packing import Sizes, micro_batches
from para_jax.files import write_json
from para_jax.training.places import TenantLayout
from para_jax.training.shapes import Device, Plan, plan_run

STEPS = 200  # of a run, of which the plan looks at fewer


class OneShard:
    """One place for each tenant, as `training.places.Schedule` has them."""

    def __init__(self, names: Sequence[str]):
        self.shards, self.places = [list(names)], len(names)

    def left(self, *_: Any) -> int:
        return STEPS


def log_normal(count: int = 4000) -> Examples:
    """Rows as chats and documents have them: a median of 67 tokens, one in a hundred above 700."""
    rng = np.random.default_rng(0)
    lengths = np.clip(np.exp(rng.normal(4.2, 1.0, count)), 5, 1000).astype(int)
    return Examples.of(Example.of([1] * int(n - n // 3), [2] * int(n // 3 + 1)) for n in lengths)


def counted(rows: Mapping[str, Examples], each: int, planned: Plan) -> tuple[float, float, float]:
    """Padding, pairs, and micro-batches of a step, on all steps of a run with another seed."""
    layout, slots, tokens, computed, needed, passes = TenantLayout.of(None, len(rows), each), 0, 0, 0, 0, 0
    for step in range(STEPS):
        taken = layout.step_rows([list(rows)], rows, 1, dict.fromkeys(rows, step))
        sizes = [Sizes([e.ids.size for e in some], [len(e.response_ids) for e in some]) for some in taken.values()]
        for at, _ in micro_batches(sizes, planned.shapes, 1):
            shape = planned.shapes[at]
            slots, computed, passes = slots + shape.tokens, computed + shape.tokens * shape.length, passes + 1
        tokens += sum(sum(own.tokens) for own in sizes)
        needed += sum(n * (n + 1) // 2 for own in sizes for n in own.tokens)
    return 1 - tokens / slots, computed / needed, passes / STEPS


def main() -> None:
    """Prints the table, and writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, metavar="FOLDER", help="with NAME/train.jsonl for each task")
    parser.add_argument("--model", metavar="DIR", help="checkpoint (default: the tiny one)")
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 16], help="of a tenant in a step (default: 8 16)")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()

    path = args.model or tiny_backbone_path()
    config, tokenizer = BackboneConfig.from_pretrained(path), load_tokenizer(path)
    files = sorted(Path(args.data).glob("*/train.jsonl"))
    tasks = {file.parent.name: read_examples(file, tokenizer, config.eos_token_ids) for file in files}
    runs = {**{name: {name: rows} for name, rows in tasks.items()}, f"all {len(tasks)}": tasks}
    runs["log-normal"] = {"log-normal": log_normal()}

    found = []
    for name, rows in runs.items():
        for each in args.rows:
            for kind, backend in (("cpu", "cpu"), ("accelerator", "gpu")):
                settings = dict.fromkeys(rows, Settings(steps=STEPS))
                layout, device = TenantLayout.of(None, len(rows), each), Device.of(config, None, backend)
                planned = plan_run(rows, {}, settings, layout, OneShard(list(rows)), 0, device)  # type: ignore[arg-type]
                padding, pairs, passes = counted(rows, each, planned)
                shapes = [f"{shape.rows} x {shape.length}" for shape in planned.shapes]
                found.append(
                    {"rows of": name, "rows a step": each, "device": kind, "shapes": " and ".join(shapes),
                     "micro-batches a step": round(passes, 2), "padding": round(padding, 3), "pairs": round(pairs, 1)}
                )  # fmt: skip
    print(table(list(found[0]), [list(one.values()) for one in found]))
    if args.json:
        write_json(args.json, {"model": Path(config.name).name, "steps": STEPS, "runs": found})


if __name__ == "__main__":
    main()
