"""How a tuning step in one fixed shape grows: with the tenants in it, and with the devices that it runs on.

    python benchmarks/scaling.py                                    (the tiny backbone on simulated CPU devices)
    python benchmarks/scaling.py --tenants 1 2 --devices 1 2 --rounds 1 --json small.json      (a smoke test)

*Tenants.* One step with 1, 8 and 64 tenants of 4 rows each, on one device: tokens a second. The least work is the same
number of tokens through the same weights, so at best a step of n tenants takes as long as n steps of one.

*Devices*, weak scaling: 8 tenants of 4 rows for each device, spread. Simulated devices share the machine's cores, so
the work of n devices takes at least n times as long, and what is seen is what meshes add: tokens a second of n devices
over those of one. `fsdp` gathers the weights of every layer, `data` moves nothing within a layer.

Each step takes the same rows, packed into micro-batches of one fixed shape that is planned for them; nothing of its
planning, packing and compiling is timed. The layers are stacked, as in a run.
"""

from __future__ import annotations

import random
from typing import Any

import common


def worker(devices: int, axis: str, tenants: int, rows: int) -> dict[str, Any]:
    """Steps of one size on one mesh."""
    from para_jax import keep_freed_memory

    keep_freed_memory()  # as the command line does
    import jax

    jax.config.update("jax_num_cpu_devices", devices)
    from steps import Steps

    from para_jax import AdapterBank, Backbone, Example, ParaConfig, make_mesh, tiny_backbone_path

    mesh = None if devices == 1 else make_mesh({axis: devices})
    backbone = Backbone.from_pretrained(tiny_backbone_path(), dtype="float32", stacked=True, mesh=mesh)
    names = [f"tenant-{i}" for i in range(tenants)]
    bank = AdapterBank.create(dict.fromkeys(names, ParaConfig(r=12)), backbone.config)
    draw = random.Random(0)

    def ids(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw.randrange(2, backbone.config.vocab_size) for _ in range(draw.randint(low, high)))

    examples = {name: [Example.of(ids(16, 64), ids(2, 24)) for _ in range(rows)] for name in names}
    steps = Steps(backbone, bank, examples, rows)
    batches = steps.batches(examples)
    tokens = sum(len(e) for of in examples.values() for e in of)

    def run(number: int) -> float:
        def go() -> None:
            for _ in range(number):
                values = steps.take(batches)
            jax.block_until_ready(values)

        return tokens * number / common.timed(go)[0]

    return {"run": run, "micro_batch": lambda: f"{len(batches)} x {steps.shape}"}


def main() -> None:
    parser = common.parser(__doc__, rounds=5)
    parser.add_argument("--tenants", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--rows", type=int, default=4, help="of each tenant in a step")
    parser.add_argument("--threads", type=int, default=2, help="cores that a system may use")
    args = parser.parse_args()
    environment = common.environment()

    systems: dict[str, tuple[int, str, int]] = {f"{n} tenants": (1, "", n) for n in args.tenants}
    each = 8
    systems |= {
        f"{axis}={n}, {each * n} tenants": (n, axis, each * n)
        for axis in ("data", "fsdp")
        for n in args.devices
        if n > 1
    }
    one = f"{each} tenants"
    systems.pop(one, None)

    def start(given: tuple[int, str, int]) -> common.Worker:
        made = common.Worker(args.threads, worker, *given, args.rows)
        made.ask("run", 8)  # compiles, and takes the memory that it will keep: several devices' steps differ in it
        return made

    def rate(of: common.Worker, tenants: int) -> float:
        return float(of.ask("run", max(1, 16 // tenants)))

    # Two at a time: each keeps the memory that its steps have freed, and all of them together fill a small machine.
    beside = start((1, "", each))
    shapes = {one: beside.ask("micro_batch")}
    results: dict[str, dict[str, Any]] = {}
    below: list[float] = []
    for name, given in systems.items():
        of = start(given)
        shapes[name] = of.ask("micro_batch")
        pairs = [(rate(beside, each), rate(of, given[2])) for _ in range(args.rounds)]
        of.close()
        of_one, rates = zip(*pairs, strict=True)
        below += of_one
        results[name] = {
            "devices": given[0],
            "tenants": given[2],
            "tokens_per_second": common.spread(rates),
            "over_8_tenants_on_one": common.ratio(rates, of_one),
        }
    below = below or [rate(beside, each)]
    beside.close()
    results = {one: {"devices": 1, "tenants": each, "tokens_per_second": common.spread(below)}} | results
    results = {name: {**of, "micro_batches": shapes[name]} for name, of in results.items()}
    common.print_table(
        f"tiny backbone, float32, {args.rows} rows of each tenant, each step in one fixed shape; {args.rounds} rounds: "
        "median (min..max)",
        ("", "devices", "micro-batches of a device", "tokens/s", f"over {one} on one device"),
        [
            (name, r["devices"], r["micro_batches"], common.shown(r["tokens_per_second"], 0),
             common.shown(r.get("over_8_tenants_on_one")))
            for name, r in results.items()
        ],
    )  # fmt: skip
    report = {"environment": environment, "rows": args.rows, "rounds": args.rounds, "results": results}
    common.write_json(args.json, "scaling", report)


if __name__ == "__main__":
    main()
