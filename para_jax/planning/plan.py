"""From a job and a slice of chips to a plan: what fits, how fast it may be, and what to change if it does not fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from para_jax.planning.chips import Chip, Topology
from para_jax.planning.compiling import Program
from para_jax.planning.hlo import total
from para_jax.planning.job import Job
from para_jax.planning.programs import attention, backbone_shapes, check, compile_job, step_of
from para_jax.planning.roofline import assumptions, estimate
from para_jax.planning.search import Candidate, candidate, candidates, remedies
from para_jax.planning.topology import check_jax
from para_jax.planning.topology import devices as devices_of
from para_jax.sharding import make_mesh

LARGEST = 6  # collectives that are shown one by one
TRIES = 3  # of meshes and batches that fit, and of remedies that help


def plan(
    jobs: Sequence[Job],
    topology: Topology,
    mesh: str | None = None,
    tries: int = TRIES,
    show: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """The plan, as JSON has it.

    Args:
      jobs: one, or several that differ in their rows, of which the best is chosen.
      mesh: as `fsdp=8,tensor=2`; without it meshes are searched.
      tries: how many meshes and batches that fit are compared, and how many remedies that help are looked for.
      show: takes a line of progress.

    Returns `fits`, `plan` (the best that fits, else the least that does not), `others`, `remedies`, `assumptions`, and
    `attention`: the kernel, and what is wrong with the chips' own if it does not compile.
    Raises ParaJaxError for a mesh that does not fit, or no way to compile for these chips.

    To be called in a process of its own (`planning/process.py`), which knows no other devices.
    """
    check_jax(topology)
    devices, chip = devices_of(topology), topology.chip
    kernel = attention(jobs[0], devices[0])
    if mesh is None:
        found = candidates(jobs, devices, chip)
    else:
        at = make_mesh(mesh, devices)
        for job in jobs:
            check(job, at)
        found = sorted((candidate(job, at, chip) for job in jobs), key=lambda one: one.guess)
    tried = _tried(found, chip, tries, show)
    fitting = [one for one in tried if one["fits"]]
    if fitting:
        best = max(fitting, key=lambda one: one["tokens_per_second"])
        ways = []
    else:
        best = min(tried, key=lambda one: one["peak"])
        ways = _ways(best, jobs, found, devices, chip, tries, show)
    return {
        "fits": bool(fitting),
        "topology": topology.name,
        "devices": topology.size,
        "hbm": chip.hbm,
        "estimated": chip.kind == "gpu",
        "plan": best,
        "others": [one for one in tried if one is not best],
        "remedies": ways,
        "attention": {"kernel": kernel.kernel, "refused": kernel.why if kernel.refused else ""},
        "assumptions": assumptions(chip),
    }


def _tried(found: Sequence[Candidate], chip: Chip, tries: int, show: Callable[[str], None]) -> list[dict[str, Any]]:
    """Candidates compiled in their order until so many fit, and never many more than that."""
    tried: list[dict[str, Any]] = []
    for one in found:
        tried.append(described(one, chip, show))
        fit = sum(t["fits"] for t in tried)
        compiled = sum(bool(t["programs"]) for t in tried)
        if fit >= tries or compiled >= 2 * tries:
            break
    return tried


def _ways(
    best: dict[str, Any],
    jobs: Sequence[Job],
    found: Sequence[Candidate],
    devices: Sequence[Any],
    chip: Chip,
    tries: int,
    show: Callable[[str], None],
) -> list[dict[str, Any]]:
    """What to change in the plan that comes nearest: changes that suffice, each compiled too."""
    near = next(one for one in found if one.name == best["mesh"] and one.job.rows == best["rows"])
    ways: list[dict[str, Any]] = []
    for text, changed in remedies(near.job, near.mesh, devices, chip):
        if len(ways) >= tries:
            break
        then = described(changed, chip, show)
        if then["fits"]:
            ways.append({"change": text, "peak": then["peak"], "tokens_per_second": then["tokens_per_second"]})
    return ways


def described(one: Candidate, chip: Chip, show: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """A candidate compiled, unless its weights alone are too large, and what there is to say of it."""
    job = one.job
    step = _step(one) if job.mode == "train" else None
    settings = {
        "mesh": one.name,
        "rows": job.rows,
        "remat": job.remat,
        "quantize": job.quantize,
        "step": step,
    }
    if one.weights > chip.hbm:
        return {**settings, "fits": False, "peak": one.weights, "weights": one.weights, "programs": []}
    parts = f" in {micro_batches(step)}" if step else ""
    show(f"compiling for {one.name}: {job.rows} rows{parts}{', ' + job.quantize if job.quantize else ''}")
    programs = compile_job(job, one.mesh)
    backbone = backbone_shapes(job, one.mesh)
    shown = [_program(job, program, chip, backbone, one.mesh.size) for program in programs]
    fits = all(program.fits(chip.hbm) for program in programs)
    times = {program["name"]: program["time"] for program in shown}
    # Of decoding it is what a step gives, the last of the programs.
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


def _step(one: Candidate) -> dict[str, Any]:
    """How a tuning step is divided; its seconds are known when its programs are compiled."""
    step = step_of(one.job, one.mesh)
    shape = step.shape._asdict()
    return {"micro_batches": step.micro_batches, "groups": step.groups, **shape, "seconds": None}


def micro_batches(step: dict[str, Any]) -> str:
    """The micro-batches of a step."""
    count, of = step["micro_batches"], f"{step['rows']} x {step['length']} tokens a device"
    return f"a micro-batch of {of}" if count == 1 else f"{count} micro-batches of {of}"


def _program(job: Job, program: Program, chip: Chip, backbone: Any, devices: int) -> dict[str, Any]:
    fields = {name: value for name, value in vars(program).items() if name != "collectives"}
    largest = sorted(program.collectives, key=lambda c: -c.count * c.sent)[:LARGEST]
    found = {"collectives": total(program.collectives), "largest": [asdict(c) for c in largest]}
    if program.problem:
        return {**fields, **found, "time": None}
    time = estimate(job, program, chip, backbone, devices)
    more = {name: getattr(time, name) for name in ("seconds", "tokens_per_second", "bound")}
    return {**fields, **found, "time": {**asdict(time), **more}}
