"""What `accelerator.py` prints: a line for each stage as it ends, and the table at the end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import common
from accelerator_stages import STAGES, Stage

# Of each stage's figures: the column's title, the key, and how many digits. The first one is in the stage's line.
DECODE = (
    ("step ms", "step_ms", 2),
    ("tokens/s", "tokens_per_s", 0),
    ("of weight floor", "share_of_weight_floor", 2),
    ("with cache", "share_of_weight_and_cache_floor", 2),
    ("prefill ms", "prefill_ms", 1),
    ("layers", "layers", 0),
    ("compile s", "compile_s", 1),
)
TRAIN = (
    ("tokens/s", "tokens_per_s", 0),
    ("step s", "step_s", 3),
    ("peak GB", "peak_memory_gb", 1),
    ("program GB", "program_memory_gb", 1),
    ("layers", "layers", 0),
    ("compile s", "compile_s", 1),
)
COLUMNS = {
    "device_rates": (("TFLOP/s", "bf16_tflop_per_s", 1), ("TB/s", "tb_per_s_read_plus_written", 3)),
    "quickstart": (
        ("wall s", "wall_s", 1),
        ("user s", "user_s", 1),
        ("system s", "system_s", 1),
        ("to first step s", "to_first_step_s", 1),
        ("steps", "steps_reached", 0),
        ("of", "steps_wanted", 0),
        ("exit code", "exit_code", 0),
    ),
    "decode": DECODE,
    "decode_stacked": DECODE,
    "slice_of_8_layers": DECODE,
    "train": TRAIN,
    "train_peft": (*TRAIN[:3], TRAIN[4]),
    "attention_kernels": (
        ("forward ms", "forward_ms", 3),
        ("with backward ms", "forward_and_backward_ms", 3),
        ("forward error", "forward_error_over_largest", 5),
        ("gradient error", "gradient_error_over_largest", 5),
    ),
}
WORDS = {"timed_out": "timed out", "failed": "FAILED", "skipped": "skipped", "done": ""}


def shown(figures: Mapping[str, Any], key: str, digits: int, short: bool = False) -> str:
    """A figure for a table; seconds of several programs are those of the slowest, since they run side by side."""
    value = figures.get(key)
    if key == "compile_s" and value:
        value = max(value.values())
    if short and isinstance(value, dict):
        value = value["median"]
    return common.shown(value, digits)


def line(stage: str, result: Mapping[str, Any], left: float) -> str:
    """What a stage found, in one line."""
    parts = [WORDS[result["status"]]] if WORDS[result["status"]] else []
    if why := result.get("why"):
        parts.append(why)
    columns = COLUMNS.get(stage, ())
    for name, figures in result.get("results", {}).items():
        if "error" in figures:
            parts.append(f"{name} FAILED")
            continue
        wanted = columns if stage in ("quickstart", "device_rates") else columns[:1]
        said = [f"{shown(figures, key, n, short=True)} {title}" for title, key, n in wanted if key in figures]
        ended = f", ended with {figures['failed_with'][-1]}" if "failed_with" in figures else ""
        parts.append(f"{name} {', '.join(said)}{ended}")
    seconds = f" ({result['seconds']:.0f} s)" if "seconds" in result else ""
    return f"{stage}{seconds}: {'; '.join(parts) or 'nothing'}; {left:.0f} s left"


def print_report(report: Mapping[str, Any], stages: tuple[Stage, ...] = STAGES) -> None:
    """All stages' figures: median (lowest..highest)."""
    device, environment = report.get("device") or {}, report["environment"]
    libraries = ", ".join(f"{name} {version}" for name, version in environment["libraries"].items())
    print(f"\n{device.get('name', 'unknown device')} ({device.get('kind', '?')}); {libraries}")
    print(f"{environment['date']}, commit {environment['commit'] or 'unknown'}; median (lowest..highest)")
    if report["quick"]:
        print("--quick: shapes are small, programs are not optimized, and no figure says anything about speed")
    for stage in stages:
        result, columns = report["stages"].get(stage.name), COLUMNS.get(stage.name, ())
        if result is None:
            continue
        good = {name: f for name, f in result.get("results", {}).items() if "error" not in f}
        used = [(title, key, n) for title, key, n in columns if any(key in figures for figures in good.values())]
        if good:
            rows = [(name, *(shown(figures, key, n) for _, key, n in used)) for name, figures in good.items()]
            common.print_table(stage.title, ("", *(title for title, _, _ in used)), rows)
        else:
            print(f"\n{stage.title}")
        if result["status"] != "done":
            print(f"{WORDS[result['status']]}: {result.get('why', '')}")
        for name, figures in good.items():
            if "failed_with" in figures:
                print(f"{name} ended with: {figures['failed_with'][-1]}")
        failures = {name: f["error"][-1] for name, f in result.get("results", {}).items() if "error" in f}
        for name, error in failures.items():
            print(f"{name} FAILED: {error}")
