"""What users meet: `para-jax finetune` and a plain peft loop as processes, from their start to their exit.

    python benchmarks/real.py                                     (the tiny backbone, rows made here)
    python benchmarks/real.py --model DIR --data FOLDER           (FOLDER/NAME/train.jsonl)
    python benchmarks/real.py --tasks e2e sst2 --cases one chat --steps 24 --systems cold cached r8
    python benchmarks/real.py --steps 2 --rounds 1 --most 64 --json small.json      (a smoke test)

Seconds are wall clock: imports, reading and tokenizing the rows, loading the backbone, compiling, every step, and
saving are part of them. Rows have mixed lengths. Both sides take the same rows of the same tokens in the same order,
with the same optimizer and schedule, and have the default number of threads.

    one      one tenant, 8 rows a step: the first task
    eight    eight tenants, 8 rows of each a step: one run of ours, and eight peft runs one after the other
    chat     one tenant, 8 chats of 2 to 12 turns a step, LoRA r=8 on both sides, which pass over a chat once

    cold       `para-jax finetune` with an empty PARA_JAX_COMPILE_CACHE, a folder for compiled programs; PARA, r=12
    cached     the same command again, with what the run before left in that folder
    same-size  `benchmarks/peft_loop.py`: LoRA on PARA's sites, its r chosen for about as many parameters
    r8         the same loop: LoRA r=8 on q_proj and v_proj

Systems take turns within a round, and a ratio is taken within a round: peft's seconds over ours, so that below 1 we
lose. The first step is over when metrics.jsonl has its first line. Memory is the largest that a process had. Before
anything is measured, the tokens of both sides are compared, and afterwards their first losses, which are of fresh
adapters. The JSON is written after every process. The same command again goes on where it was cut off, and more rounds,
cases or steps are added to the runs that are there.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import common
import real_rows
from real_commands import CASES, LR, OURS, PEERS, SYSTEMS, Jobs, Run

TENANTS = 8  # of the case eight
KEY = ("case", "steps", "round", "system", "tenant")  # of a process; one of ours has all tenants


def wanted(args: argparse.Namespace) -> Iterator[tuple[str, int, int, list[str]]]:
    """Case, steps, round and systems, in the order in which they are run."""
    for number in range(args.rounds):
        for case in args.cases:
            systems = [x for x in SYSTEMS if x in args.systems and (case, x) != ("chat", "same-size")]
            yield from ((case, steps, number, systems) for steps in args.steps)


def all_together(runs: Sequence[Run], case: str, steps: int, system: str, tenants: Sequence[str]) -> dict[int, Run]:
    """By round: seconds and tokens of all processes, the largest memory, and the first one's first step."""
    by_round: dict[int, list[Run]] = {}
    for run in runs:
        if (run["case"], run["steps"], run["system"]) == (case, steps, system):
            by_round.setdefault(run["round"], []).append(run)
    whole = {}
    for number, some in sorted(by_round.items()):
        if len(some) < (1 if system in OURS else len(tenants)):
            continue  # cut off
        losses = {key: {name: x for run in some for name, x in run[key].items()} for key in ("first_loss", "last_loss")}
        whole[number] = {
            **{key: sum(run[key] for run in some) for key in ("seconds", "cpu_seconds", "tokens")},
            "first_step_seconds": some[0]["first_step_seconds"],
            "peak_bytes": max(run["peak_bytes"] for run in some),
            "cached_files": some[0].get("cached_files"),
            **losses,
        }
    return whole


def summary(jobs: Jobs, runs: Sequence[Run]) -> list[Run]:
    """Of every case and number of steps what each system took, and peft's seconds over ours."""
    results = []
    for case, steps in dict.fromkeys((run["case"], run["steps"]) for run in runs):
        tenants = jobs.tenants(case)
        found = {name: all_together(runs, case, steps, name, tenants) for name in SYSTEMS}
        systems: dict[str, Run] = {}
        for name, rounds in found.items():
            if not rounds:
                continue
            keys = ("seconds", "first_step_seconds", "cpu_seconds", "peak_bytes")
            systems[name] = {key: common.spread(run[key] for run in rounds.values()) for key in keys}
            last = next(iter(rounds.values()))
            systems[name] |= {"tokens": last["tokens"], "last_loss": sum(last["last_loss"].values()) / len(tenants)}
            if name in OURS:
                systems[name]["cached_files"] = last["cached_files"]
            for own in (own for own in OURS if name in PEERS):
                both = [number for number in rounds if number in found[own]]
                if both:
                    pairs = [[some[number]["seconds"] for number in both] for some in (rounds, found[own])]
                    systems[name][f"over_{own}"] = common.ratio(*pairs)
        results.append({"case": case, "steps": steps, "systems": systems, "unequal": unequal(jobs, case, found)})
    return results


def unequal(jobs: Jobs, case: str, found: Mapping[str, Mapping[int, Run]]) -> list[str]:
    """What shows that two systems did not have the same rows. Fresh adapters are the identity."""
    if any(jobs.files[tenant]["our_rows"] != jobs.files[tenant]["rows"] for tenant in jobs.tenants(case)):
        return []  # our steps have turns, and peft's have chats
    runs = {name: next(iter(rounds.values())) for name, rounds in found.items() if rounds}
    (name, one), *others = runs.items()
    said, near = [], 1e-3 if jobs.args.dtype == "float32" else 0.05
    for other, run in others:
        if run["tokens"] != one["tokens"]:
            said.append(f"{name} had {one['tokens']:,} tokens and {other} {run['tokens']:,}")
        for tenant, loss in run["first_loss"].items():
            first = one["first_loss"][tenant]
            if not math.isclose(loss, first, rel_tol=near):
                said.append(f"{tenant} began at {first:.4f} in {name}, at {loss:.4f} in {other}")
    return said


def show(jobs: Jobs, result: Run) -> list[dict[str, Any]]:
    """Prints a result's table, and returns its goals."""
    case, steps = result["case"], result["steps"]
    goals, rows, sizes = [], [], jobs.facts["parameters"]
    for name, system in result["systems"].items():
        method = ("r8" if case == "chat" else "para") if name in OURS else name
        shown = [common.shown(system["seconds"], 1), common.shown(system["first_step_seconds"], 1)]
        shown.append(f"{system['peak_bytes']['median'] / 2**30:.2f}")
        over = [common.shown(system.get(f"over_{own}")) for own in OURS]
        rows.append((SYSTEMS[name], f"{sizes[method]:,}", *shown, f"{system['tokens']:,}",
                     f"{system['last_loss']:.3f}", *over))  # fmt: skip
        for own in (own for own in OURS if f"over_{own}" in system):
            what = f"{case}, {steps} steps: {SYSTEMS[name]} / {SYSTEMS[own]}"
            goals.append(common.goal(what, system[f"over_{own}"], at_least=1))
    files = [jobs.files[tenant] for tenant in jobs.tenants(case)]
    lengths = [file["tokens"][key] for key in ("least", "most") for file in files]
    turns = f" ({jobs.our_rows(case)} turns in ours)" if any(x["our_rows"] != x["rows"] for x in files) else ""
    common.print_table(
        f"{case}: {', '.join(jobs.tenants(case))}; {sum(file['rows'] for file in files):,} rows of {min(lengths)} to "
        f"{max(lengths)} tokens, {jobs.args.rows} of each a step{turns}, {steps} steps: median (lowest..highest)",
        ("", "parameters", "seconds", "to first step", "peak GiB", "tokens", "last loss",
         *(f"/ {name}" for name in OURS.values())),
        rows,
    )  # fmt: skip
    if "cached" in result["systems"] and not result["systems"]["cached"]["cached_files"]:
        print("No compiled program was kept in PARA_JAX_COMPILE_CACHE: both runs of ours compiled all of them.")
    for line in result["unequal"]:
        print(f"NOT THE SAME ROWS: {line}")
    return goals


def prepare(args: argparse.Namespace, root: Path) -> tuple[Run, dict[str, Run]]:
    """Writes every tenant's rows. In a process of its own: a child's peak memory is at least its parent's size."""
    made = real_rows.rows_of_folder if args.data else real_rows.made_rows
    given = (args.data,) if args.data else ()
    rows = made(*given, args.tasks, TENANTS, args.most)
    rows[real_rows.CHAT] = real_rows.chats_of(next(iter(rows.values())))
    worker = common.Worker(0, real_rows.preparing, args.model)
    files = {name: worker.ask("write", str(root / f"{name}.jsonl"), own, args.longest) for name, own in rows.items()}
    facts = worker.ask("facts")
    worker.close()
    return facts, files


def earlier(path: Path, same: Mapping[str, Any]) -> list[Run]:
    """The runs that a file holds. Exits if they are of another code, model, machine or rows."""
    if not path.exists():
        return []
    report = json.loads(path.read_text())
    for key, value in json.loads(json.dumps(same)).items():
        if report[key] != value:
            raise SystemExit(f"{path} has runs with another {key}; choose another --json")
    return report["runs"]


def arguments() -> argparse.Namespace:
    parser = common.parser(__doc__, rounds=3)
    parser.add_argument("--model", metavar="DIR", help="Hugging Face checkpoint (default: the tiny one that ships)")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="with NAME/train.jsonl (default: rows made here)")
    parser.add_argument("--tasks", nargs="+", metavar="NAME", default=(), help="the tenants' tasks (default: all)")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--steps", nargs="+", type=int, default=(24, 200))
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=tuple(SYSTEMS))
    parser.add_argument("--rows", type=int, default=8, help="of each tenant in a step (default 8)")
    parser.add_argument("--most", type=int, default=2000, help="rows of a tenant (default 2000)")
    parser.add_argument("--longest", type=int, default=512, help="longer rows are left out (default 512 tokens)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of both sides' backbone")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if "cached" in args.systems and "cold" not in args.systems:
        raise SystemExit("cached needs cold, which fills the cache")
    name = Path(args.model).name if args.model else "tiny"
    if args.model is None:
        from para_jax import tiny_backbone_path

        args.model = tiny_backbone_path()
    # So that the process under measurement ends too, and the temporary folder goes.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    environment = common.environment()
    with common.temporary_folder() as root:
        facts, files = prepare(args, root)
        environment |= {key: facts.pop(key) for key in ("backend", "devices")}
        jobs = Jobs(args, root, facts, files)
        path = args.json or common.HERE / "results" / f"real-{name}-{environment['backend']}.json"
        rules = {key: getattr(args, key) for key in ("rows", "most", "longest", "dtype")}
        same = {"model": name, "data": args.data.name if args.data else "made", "lr": LR, **rules, **facts}
        same |= {"files": files, "commit": environment["commit"], "cpu": environment["cpu"]}
        runs = {tuple(run[key] for key in KEY): run for run in earlier(path, same)}

        def report(**more: Any) -> None:
            whole = {"environment": environment, **same, **more, "runs": list(runs.values())}
            common.write_json(path, "real", whole, quiet=not more)

        for case, steps, number, systems in wanted(args):
            tenants = {x: [""] if x in OURS else jobs.tenants(case) for x in systems}
            there = {x: all((case, steps, number, x, t) in runs for t in tenants[x]) for x in systems}
            if "cached" in systems and not there["cached"]:
                there["cold"] = False  # its cache is gone
            for system in (x for x in systems if not there[x]):
                for run in jobs.run(case, steps, system):
                    run = {"case": case, "steps": steps, "round": number, "system": system, **run}
                    runs[tuple(run[key] for key in KEY)] = run
                    print(f"round {number + 1}  {case}  {steps} steps  {system}  {run['seconds']:.1f} s", flush=True)
                    report()
        results = summary(jobs, list(runs.values()))
        goals = [goal for result in results for goal in show(jobs, result)]
        common.print_goals(goals)
        report(results=results, goals=goals)


if __name__ == "__main__":
    main()
