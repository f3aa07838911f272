"""What a rented accelerator (one GPU or TPU) does with para_jax, in one command of at most seven minutes.

    python benchmarks/accelerator.py
    python benchmarks/accelerator.py --minutes 4 --only decode train
    python benchmarks/accelerator.py --quick          (small shapes, a minute on a CPU: does it run at all?)

It runs from a checkout, without installation or network, and downloads nothing: weights are random, in the shapes of
LLaMA-2 7B. Each stage is a process with a time limit of its own, the most important one first:

    device_rates       bfloat16 matmul TFLOP/s and copy TB/s (bytes read and written)
    quickstart         `para-jax quickstart`: wall, user and system seconds, seconds to the first step, steps reached
    decode             all layers, apart: bare and PARA with a tenant a row, 8 and 64 rows; a step beside its floor, the
                       bytes of the weights at the copy rate
    train              a step of 4 x 2048 tokens with each remat, one tenant and eight
    train_peft         the same tokens in peft: LoRA r=16 on q, v, with and without gradient checkpointing
    slice_of_8_layers  decoding with LoRA on all sites, int8, int4, 128 rows, 2,000-token contexts
    attention_kernels  the device's kernel against plain attention: errors and times
    decode_stacked     as decode, with the layers stacked and scanned

A stage that fails or runs out of time leaves the figures it had and the end of its error, and the next one goes on.
What does not fit into the time left is skipped. The JSON (accelerator-DEVICE.json) is written after every stage. Times
are medians of several runs after a warm-up, with the lowest and highest beside them.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import common
from accelerator_report import line, print_report
from accelerator_stages import STAGES, Context, Stage, last_lines, run_stage

ROOT = common.HERE.parent
sys.path.insert(0, str(ROOT))

SLOWER = 4  # --quick is for CPUs, which compile slowly, and its limits are as many times longer
MARGIN = 5.0  # seconds that are kept for ending a stage and for the table
PLUGINS = ("jax-cuda12-plugin", "jax-cuda13-plugin", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "libtpu")
MEMORY_SHARE = "0.92"  # of a GPU's memory that JAX may take; its default is 0.75
CACHES = ("JAX_COMPILATION_CACHE_DIR", "PARA_JAX_COMPILE_CACHE")  # would hide what compiling costs

Command = Callable[[Stage, Path, float, dict[str, Any]], Sequence[str]]


def run_process(stage: Stage, command: Sequence[str], limit: float, lines: Path, quick: bool = False) -> dict[str, Any]:
    """Runs a stage's process and returns its result: the figures that it reported, however it ended."""
    began, said = time.monotonic(), lines.with_suffix(".txt")
    with said.open("w") as file:
        environment = environment_of(stage, quick)
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        code = None
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(limit)
        finally:
            # With all that it started: the next stage wants the device's memory.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    result: dict[str, Any] = {"status": "done", "seconds": time.monotonic() - began, "limit_s": limit, "results": {}}
    for found in reported(lines):
        if "name" in found:
            result["results"][found["name"]] = found["figures"]
        elif "skipped" in found:
            result |= {"status": "skipped", "why": found["skipped"]}
        else:
            result |= found
    if code is None:
        result |= {"status": "timed_out", "why": f"the limit of {limit:.0f} s", "error": last_lines(said.read_text())}
    elif code:
        result |= {"status": "failed", "why": f"exit code {code}", "error": last_lines(said.read_text())}
    return result


def reported(lines: Path) -> list[dict[str, Any]]:
    """The lines of a stage; the last one may be torn."""
    found = []
    for text in lines.read_text().splitlines() if lines.exists() else ():
        with contextlib.suppress(ValueError):
            found.append(json.loads(text))
    return found


def environment_of(stage: Stage, quick: bool) -> dict[str, str]:
    """Of a stage's process: the checkout's package, no network, nothing compiled before."""
    found = {key: value for key, value in os.environ.items() if key not in CACHES}
    found["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    found |= {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    # Newer versions of jaxlib have the shorter name, know both, and refuse the two together.
    chosen = {"XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"} & set(found)
    if not stage.own_environment and not chosen:
        found["XLA_PYTHON_CLIENT_MEM_FRACTION"] = MEMORY_SHARE
    if quick:
        found["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # compiling is most of the time
    return found


def run_stages(
    stages: Sequence[Stage],
    report: dict[str, Any],
    ends: float,
    command: Command,
    write: Callable[[dict[str, Any]], None],
    show: Callable[[str], None] = print,
) -> None:
    """Runs stages until `ends` (of time.monotonic), and writes the report after each of them."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="para-jax-accelerator-") as folder:
        for stage in stages:
            limit = min(stage.seconds * (SLOWER if report["quick"] else 1), ends - time.monotonic() - MARGIN)
            if limit < stage.least:
                why = f"{max(limit, 0):.0f} s were left, and it wants {stage.least:.0f}"
                result: dict[str, Any] = {"status": "skipped", "why": why}
            else:
                lines = Path(folder, f"{stage.name}.jsonl")
                words = command(stage, lines, limit, known_of(report))
                result = run_process(stage, words, limit, lines, report["quick"])
            if device := result.pop("device", None):
                report["device"] = report["device"] or device
            report["stages"][stage.name] = result
            report["seconds"] = time.monotonic() - began
            write(report)
            show(line(stage.name, result, ends - time.monotonic()))


def known_of(report: dict[str, Any]) -> dict[str, Any]:
    """What later stages want to know of earlier ones."""
    found: dict[str, Any] = {"device_kind": (report["device"] or {}).get("kind")}
    copy = report["stages"].get("device_rates", {}).get("results", {}).get("copy", {})
    if rate := copy.get("tb_per_s_read_plus_written"):
        found["copy_bytes_per_s"] = 1e12 * rate["median"]
    return found


def versions() -> dict[str, str]:
    """Of what the libraries run on."""
    found = {}
    for name in PLUGINS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def path_of(report: dict[str, Any], given: Path | None) -> Path:
    name = (report["device"] or {}).get("name", "unknown device")
    return given or Path(f"accelerator-{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.json")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [stage.name for stage in STAGES]
    parser.add_argument("--minutes", type=float, default=7.0, help="in all (default 7)")
    parser.add_argument("--only", nargs="+", choices=names, metavar="STAGE", help="these, and device_rates before them")
    parser.add_argument("--quick", action="store_true", help="small shapes, to see that everything runs")
    parser.add_argument("--json", type=Path, help="file to write (default: accelerator-DEVICE.json)")
    # Of a stage's own process:
    parser.add_argument("--stage", choices=names, help=argparse.SUPPRESS)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--known", type=json.loads, default={}, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    args = arguments()
    if args.stage:
        stage = next(stage for stage in STAGES if stage.name == args.stage)
        return run_stage(stage, Context(args.into, args.quick, args.seconds, args.known))
    ends = time.monotonic() + 60 * args.minutes
    # So that the stage that runs ends too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

    def command(stage: Stage, lines: Path, limit: float, known: dict[str, Any]) -> list[str]:
        words = [sys.executable, str(Path(__file__).resolve()), "--stage", stage.name, "--into", str(lines)]
        words += ["--seconds", f"{limit:.1f}", "--known", json.dumps(known)]
        return [*words, *(["--quick"] if args.quick else [])]

    environment = common.environment("unknown")
    environment["libraries"] |= versions()
    report: dict[str, Any] = {"quick": args.quick, "minutes": args.minutes, "seconds": 0.0, "device": None}
    report |= {"environment": environment, "stages": {}}

    def write(report: dict[str, Any]) -> None:
        device = report["device"] or {}
        environment.update(backend=device.get("kind", "unknown"), devices=[device.get("name", "unknown")])
        common.write_json(path_of(report, args.json), "accelerator", report, quiet=True)

    chosen = [stage for stage in STAGES if args.only is None or stage.name in ("device_rates", *args.only)]
    print(f"{len(chosen)} stages, {args.minutes:g} minutes at the most", flush=True)
    run_stages(chosen, report, ends, command, write, lambda said: print(said, flush=True))
    print_report(report)
    print(f"\nwrote {path_of(report, args.json)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
