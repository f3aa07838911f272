"""The processes of `benchmarks/real.py`: our command line and peft's loop, and what each of them took."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import common
import real_rows

CASES = ("one", "eight", "chat")
OURS = {"cold": "ours, empty cache", "cached": "ours, filled cache"}
PEERS = {"same-size": "peft LoRA, same size", "r8": "peft LoRA, r=8"}
SYSTEMS = OURS | PEERS
LR = 1e-3

Run = dict[str, Any]


def measured(words: Sequence[str], out: Path, environment: Mapping[str, str]) -> Run:
    """Runs a command that writes `out`/metrics.jsonl: its seconds, those to its first step, and its memory."""
    metrics, said = out / "metrics.jsonl", out.with_suffix(".txt")
    with said.open("w") as file:
        began, first = time.perf_counter(), None
        process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, env=environment)
        try:
            pid = 0
            while not pid:
                pid, status, used = os.wait4(process.pid, os.WNOHANG if first is None else 0)
                seconds = time.perf_counter() - began
                if first is None and metrics.exists() and metrics.stat().st_size:
                    first = seconds
                elif not pid:
                    time.sleep(0.01)
            process.returncode = os.waitstatus_to_exitcode(status)
        finally:
            if process.returncode is None:
                process.kill()
                process.wait()
    if process.returncode:
        raise SystemExit(f"{' '.join(words)} ended with {process.returncode}:\n{said.read_text()[-2000:]}")
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "seconds": seconds,
        "first_step_seconds": first,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "peak_bytes": used.ru_maxrss * unit,
        "tokens": sum(line["tokens"] for line in lines),
        "first_loss": lines[0]["loss"],
        "last_loss": lines[-1]["loss"],
    }


class Jobs:
    """The commands of every case, and where they write.

    `args` are those of `real.py`; `facts` and `files` are what `real_rows.preparing` says.
    """

    def __init__(self, args: argparse.Namespace, root: Path, facts: Run, files: Mapping[str, Run]):
        self.args, self.root, self.facts, self.files = args, root, facts, files

    def tenants(self, case: str) -> list[str]:
        own = [name for name in self.files if name != real_rows.CHAT]
        return {"one": own[:1], "eight": own, "chat": [real_rows.CHAT]}[case]

    def our_rows(self, case: str) -> int:
        """Of each tenant in a step: as many as hold the targets of `--rows` rows of peft's."""
        file = self.files[self.tenants(case)[0]]
        return round(self.args.rows * file["our_rows"] / file["rows"])

    def ours(self, case: str, steps: int, out: Path) -> list[str]:
        # -P: the package that is installed, as in this process, and not one in the current folder.
        words = [sys.executable, "-P", "-m", "para_jax", "finetune", "--model", self.args.model, "--out", str(out)]
        words += ["--method", "lora" if case == "chat" else "para", "--dtype", self.args.dtype, "--lr", str(LR)]
        words += ["--rows", str(self.our_rows(case)), "--steps", str(steps)]
        return words + [x for name in self.tenants(case) for x in ("--tenant", f"{name}={self.path(name)}")]

    def peft(self, tenant: str, system: str, steps: int, out: Path) -> list[str]:
        words = [sys.executable, str(common.HERE / "peft_loop.py"), "--model", self.args.model, "--out", str(out)]
        words += ["--dtype", self.args.dtype, "--lr", str(LR), "--rows", str(self.args.rows), "--steps", str(steps)]
        if system == "same-size":
            size = self.facts["same_size"]
            words += ["--r", str(size["r"]), "--sites", *size["sites"]]
        return [*words, "--tenant", f"{tenant}={self.path(tenant)}"]

    def path(self, tenant: str) -> Path:
        return self.root / f"{tenant}.jsonl"

    def run(self, case: str, steps: int, system: str) -> Iterator[Run]:
        """The processes of a system, one after the other. A cold one empties the cache."""
        out, cache = self.root / "out", self.root / "cache"
        environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
        environment |= {"HF_HUB_OFFLINE": "1", "PARA_JAX_COMPILE_CACHE": str(cache)}
        if system == "cold":
            shutil.rmtree(cache, ignore_errors=True)
            cache.mkdir()
        for tenant in [""] if system in OURS else self.tenants(case):
            shutil.rmtree(out, ignore_errors=True)
            command = self.peft(tenant, system, steps, out) if tenant else self.ours(case, steps, out)
            run = {"tenant": tenant, **measured(command, out, environment)}
            if system in OURS:
                run["cached_files"] = sum(1 for x in cache.rglob("*") if x.is_file())
            yield run
