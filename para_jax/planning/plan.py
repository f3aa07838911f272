"""Plans a job on a slice of chips: whether it fits, an estimate of its speed, and what to change if it does not fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from typing import Any

from para_jax.planning.chips import Chip, Topology
from para_jax.planning.compiling import Program
from para_jax.planning.hlo import total
from para_jax.planning.job import Job
from para_jax.planning.programs import attention, backbone_shapes, check, compile_job, planned_step
from para_jax.planning.roofline import assumptions, estimate
from para_jax.planning.search import Candidate, candidate, candidates, remedies
from para_jax.planning.topology import check_jax
from para_jax.planning.topology import devices as devices_of
from para_jax.sharding import make_mesh

LARGEST = 6  # the number of collectives that are listed
TRIES = 3  # fitting meshes and batches to compare, and remedies to find


def plan(
    jobs: Sequence[Job],
    topology: Topology,
    mesh: str | None = None,
    tries: int = TRIES,
    show: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """The plan, as a JSON-serializable dict.

    Args:
      jobs: one job, or several with different numbers of rows, of which the best is chosen.
      mesh: such as `fsdp=8,tensor=2`; by default meshes are searched.
      tries: how many fitting meshes and batches are compared, and how many remedies are searched.
      show: is called with lines of progress.

    Returns `fits`, `plan` (the fastest that fits, else the one with the lowest peak), `others`, `remedies`,
    `assumptions`, and `attention`: the kernel, and why the chips' own kernel does not compile, if so.
    Raises ParaJaxError for a mesh that does not fit, or if this installation cannot compile for these chips.

    Call it in a separate process without other devices (`planning/process.py`).
    """
    check_jax(topology)
    devices, chip = devices_of(topology), topology.chip
    kernel = attention(jobs[0], devices[0])
    if mesh is None:
        found = candidates(jobs, devices, chip)
    else:
        given = make_mesh(mesh, devices)
        for job in jobs:
            check(job, given)
        found = sorted((candidate(job, given, chip) for job in jobs), key=lambda one: one.guess)
    tried = _try(found, chip, tries, show)
    fitting = [one for one in tried if one["fits"]]
    if fitting:
        best = max(fitting, key=lambda one: one["tokens_per_second"])
        helpful = []
    else:
        best = min(tried, key=lambda one: one["peak"])
        start = next(one for one in found if one.name == best["mesh"] and one.job.rows == best["rows"])
        helpful = list(islice(_remedies(start, devices, chip, show), tries))
    return {
        "fits": bool(fitting),
        "topology": topology.name,
        "devices": topology.size,
        "hbm": chip.hbm,
        "estimated": chip.kind == "gpu",
        "plan": best,
        "others": [one for one in tried if one is not best],
        "remedies": helpful,
        "attention": {"kernel": kernel.kernel, "refused": kernel.why if kernel.refused else ""},
        "assumptions": assumptions(chip),
    }


def _try(found: Sequence[Candidate], chip: Chip, tries: int, show: Callable[[str], None]) -> list[dict[str, Any]]:
    """Compiles candidates in order until `tries` of them fit, and at most twice as many."""
    tried: list[dict[str, Any]] = []
    for one in found:
        tried.append(describe(one, chip, show))
        fit = sum(t["fits"] for t in tried)
        compiled = sum(bool(t["programs"]) for t in tried)
        if fit >= tries or compiled >= 2 * tries:
            break
    return tried


def _remedies(
    start: Candidate, devices: Sequence[Any], chip: Chip, show: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """Changes to a plan that make it fit. Each is compiled."""
    for text, changed in remedies(start.job, start.mesh, devices, chip):
        result = describe(changed, chip, show)
        if result["fits"]:
            yield {"change": text, "peak": result["peak"], "tokens_per_second": result["tokens_per_second"]}


def describe(one: Candidate, chip: Chip, show: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Compiles a candidate, unless its weights alone are too large, and describes it as JSON."""
    job = one.job
    step: dict[str, Any] | None = None
    if job.mode == "train":  # how the step is divided; its seconds are filled in below
        planned = planned_step(job, one.mesh)
        divided = {"micro_batches": planned.micro_batches, "groups": planned.groups}
        step = {**divided, **planned.shape._asdict(), "seconds": None}
    settings = {"mesh": one.name, "rows": job.rows, "remat": job.remat, "quantize": job.quantize, "step": step}
    if one.weights > chip.hbm:
        return {**settings, "fits": False, "peak": one.weights, "weights": one.weights, "programs": []}
    parts = f" in {micro_batches(step)}" if step else ""
    show(f"compiling for {one.name}: {job.rows} rows{parts}{', ' + job.quantize if job.quantize else ''}")
    programs = compile_job(job, one.mesh)
    backbone = backbone_shapes(job, one.mesh)
    shown = [_program(job, program, chip, backbone, one.mesh.size) for program in programs]
    fits = all(program.fits(chip.hbm) for program in programs)
    times = {program["name"]: program["time"] for program in shown}
    # The rate of decoding is that of a decode step.
    rate = times["decode"]["tokens_per_second"] if fits and not step else None
    if step and all(times.values()):
        step["seconds"] = step["micro_batches"] * times["micro_batch"]["seconds"] + times["update"]["seconds"]
        rate = job.tenants * job.rows * job.length / step["seconds"] if fits else None
    return {
        **settings,
        "fits": fits,
        "peak": max(program.peak + program.held for program in programs),
        "weights": one.weights,
        "tokens_per_second": rate,
        "programs": shown,
    }


def micro_batches(step: dict[str, Any]) -> str:
    count, size = step["micro_batches"], f"{step['rows']} x {step['length']} tokens a device"
    return f"a micro-batch of {size}" if count == 1 else f"{count} micro-batches of {size}"


def _program(job: Job, program: Program, chip: Chip, backbone: Any, devices: int) -> dict[str, Any]:
    fields = {name: value for name, value in vars(program).items() if name != "collectives"}
    largest = sorted(program.collectives, key=lambda c: -c.count * c.sent)[:LARGEST]
    found = {"collectives": total(program.collectives), "largest": [asdict(c) for c in largest]}
    if program.problem:
        return {**fields, **found, "time": None}
    time = estimate(job, program, chip, backbone, devices)
    more = {name: getattr(time, name) for name in ("seconds", "tokens_per_second", "bound")}
    return {**fields, **found, "time": {**asdict(time), **more}}
