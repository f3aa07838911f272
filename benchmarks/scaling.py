"""How a tuning step grows: with the tenants in it, and with the devices that it runs on.

    python benchmarks/scaling.py                                    (the tiny backbone on simulated CPU devices)
    python benchmarks/scaling.py --tenants 1 2 --devices 1 2 --rounds 1 --json small.json      (a smoke test)

*Tenants.* One step with 1, 8 and 64 tenants of 4 rows each, on one device: tokens a second. The least work is the same
number of tokens through the same weights, so at best a step of n tenants takes as long as n steps of one.

*Devices*, weak scaling: 8 tenants of 4 rows for each device, spread. Simulated devices share the machine's cores, so
the work of n devices takes at least n times as long, and what is seen is what meshes add: tokens a second of n devices
over those of one. `fsdp` gathers the weights of every layer, `data` moves nothing within a layer.
"""

from __future__ import annotations

import random
from typing import Any

import common


def worker(devices: int, axis: str, tenants: int, rows: int) -> dict[str, Any]:
    """Steps of one size on one mesh."""
    from para_jax.memory import keep_freed_memory

    keep_freed_memory()  # as the command line does
    import jax

    jax.config.update("jax_num_cpu_devices", devices)
    from para_jax import AdapterBank, Backbone, ParaConfig, tiny_backbone_path
    from para_jax.data.examples import Example
    from para_jax.sharding import make_mesh
    from para_jax.training.optimizer import Settings
    from para_jax.training.places import Layout, Schedule
    from para_jax.training.step import TrainState, stack_settings, train_step

    mesh = None if devices == 1 else make_mesh({axis: devices})
    backbone = Backbone.from_pretrained(tiny_backbone_path(), dtype="float32", mesh=mesh)
    names = [f"tenant-{i}" for i in range(tenants)]
    layout = Layout.of(mesh, tenants, rows)
    bank = layout.divided(AdapterBank.create(dict.fromkeys(names, ParaConfig(r=12)), backbone.config))
    settings = dict.fromkeys(names, Settings(steps=10**6))
    rules = stack_settings(bank, settings)
    homes = Schedule(bank, settings, layout).turn(dict.fromkeys(names, 0), ())
    assert homes is not None
    draw = random.Random(0)

    def ids(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw.randrange(2, backbone.config.vocab_size) for _ in range(draw.randint(low, high)))

    examples = {name: [Example.of(ids(16, 64), ids(2, 24)) for _ in range(rows)] for name in names}
    parts = layout.parts([[examples[name or ""] for name in home] for home in homes])
    batch, slots = layout.batch(parts), layout.slots(bank, homes)
    tokens = sum(len(e) for of in examples.values() for e in of)
    state = [TrainState.create(bank, mesh, layout.shards)]

    def run(steps: int) -> float:
        def go() -> None:
            for _ in range(steps):
                state[0], values = train_step(backbone, state[0], rules, batch, slots, shards=layout.shards)
            jax.block_until_ready(values)

        return tokens * steps / common.timed(go)[0]

    return {"run": run}


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
    results: dict[str, dict[str, Any]] = {}
    below: list[float] = []
    for name, given in systems.items():
        of = start(given)
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
    common.print_table(
        f"tiny backbone, float32, {args.rows} rows of each tenant; {args.rounds} rounds: median (min..max)",
        ("", "devices", "tokens/s", f"over {one} on one device"),
        [
            (name, r["devices"], common.shown(r["tokens_per_second"], 0), common.shown(r.get("over_8_tenants_on_one")))
            for name, r in results.items()
        ],
    )
    report = {"environment": environment, "rows": args.rows, "rounds": args.rounds, "results": results}
    common.write_json(args.json, "scaling", report)


if __name__ == "__main__":
    main()
