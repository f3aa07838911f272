"""The first stages of `accelerator.py`: what the device can do, and the quickstart as a user meets it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import common
from accelerator_stages import Context, Figures, last_lines, rate, repeated

ENDING = 3.0  # seconds of the stage's limit that are left when the quickstart is cut off
QUICKSTART_STEPS, QUICK_LIMIT = 250, 15.0


def rates(context: Context) -> None:
    """bfloat16 matmuls, and a copy that reads and writes every byte once."""
    jax = context.jax()
    import jax.numpy as jnp

    n, chain, repeats = (256, 2, 3) if context.quick else (8192, 16, 7)
    size = 2**24 if context.quick else 2**31

    def matmul() -> Figures:
        x, w = (jax.random.normal(jax.random.key(i), (n, n), jnp.bfloat16) for i in range(2))
        scale = jnp.asarray(n**-0.5, jnp.bfloat16)

        @jax.jit
        def run(x: Any, w: Any) -> Any:
            return jax.lax.fori_loop(0, chain, lambda _, y: (y @ w) * scale, x)

        seconds = repeated(lambda: run(x, w), repeats)
        return {"bf16_tflop_per_s": rate(chain * 2 * n**3 / 1e12, seconds), "rows_inputs_outputs": n}

    def copy() -> Figures:
        x = jnp.zeros((size // 4,), jnp.uint32)
        run = jax.jit(lambda x: x + jnp.uint32(1))
        seconds = repeated(lambda: run(x), repeats)
        return {"tb_per_s_read_plus_written": rate(2 * size / 1e12, seconds), "gb": size / 1e9}

    context.attempt("matmul", matmul)
    context.attempt("copy", copy)


def quickstart(context: Context) -> None:
    """`python -m para_jax quickstart` in a process of its own."""
    with common.temporary_folder() as folder:
        out, said = folder / "out", folder / "said.txt"
        words = [sys.executable, "-m", "para_jax", "quickstart", "--out", str(out)]
        words += ["--steps", "3"] if context.quick else []
        limit = QUICK_LIMIT if context.quick else context.seconds - ENDING
        context.attempt("quickstart", lambda: watched(words, out, said, limit, context.quick))


def watched(words: list[str], out: Path, said: Path, limit: float, quick: bool) -> Figures:
    """Runs the quickstart until its end or the limit."""
    metrics = out / "metrics.jsonl"
    with said.open("w") as file:
        began, first, pid, status, used = time.perf_counter(), None, 0, 0, None
        process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT)
        cut_off = False
        while not pid:
            pid, status, used = os.wait4(process.pid, os.WNOHANG)
            seconds = time.perf_counter() - began
            if first is None and metrics.exists() and metrics.stat().st_size:
                first = seconds
            if not pid and seconds > limit and not cut_off:
                cut_off = True
                process.kill()
            time.sleep(0 if pid else 0.02)
        process.returncode = os.waitstatus_to_exitcode(status)
    steps = metrics.read_text().count("\n") if metrics.exists() else 0
    assert used is not None
    found: Figures = {
        "wall_s": seconds,
        "user_s": used.ru_utime,
        "system_s": used.ru_stime,
        "to_first_step_s": first,
        "steps_reached": steps,
        "steps_wanted": 3 if quick else QUICKSTART_STEPS,
        "cut_off": cut_off,
        "exit_code": process.returncode,
    }
    missing = [name for name in ("matplotlib",) if importlib.util.find_spec(name) is None]
    if missing:
        found["not_installed"] = missing
    if (out / "quickstart.json").exists():
        report = json.loads((out / "quickstart.json").read_text())
        found |= {
            "tuning_tokens_per_s": report["tuning"]["tokens_per_second"],
            "decoding_tokens_per_s": report["decoding"]["tokens_per_second"],
        }
    if process.returncode and not cut_off:
        found["failed_with"] = last_lines(said.read_text())
    return found
