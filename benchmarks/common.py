"""What the benchmarks share: workers in processes of their own, spreads over rounds, tables, JSON.

Systems are compared in rounds A B C A B C ..., so that what else happens on the machine meets all of them. A
ratio is taken within each round; the median over the rounds is reported, with the extremes beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import multiprocessing
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

LIBRARIES = ["jax", "jaxlib", "flax", "optax", "numpy", "safetensors", "torch", "transformers", "peft"]
HERE = Path(__file__).resolve().parent


class Worker:
    """A system under measurement in a process of its own, which computes only while it is asked to.

    `make(*args)` runs in the new process and returns what can be asked there: a dict of functions by name.
    """

    def __init__(self, threads: int, make: Callable[..., dict[str, Callable[..., Any]]], *args: Any):
        context = multiprocessing.get_context("spawn")
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, threads, make, args), daemon=True)
        self._process.start()
        there.close()
        self._receive()

    def ask(self, name: str, *args: Any) -> Any:
        """Calls a function of the worker and waits for its result."""
        self._pipe.send((name, args))
        return self._receive()

    def close(self) -> None:
        self._pipe.close()
        self._process.join()

    def _receive(self) -> Any:
        try:
            error, value = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise SystemExit(f"a worker ended with exit code {self._process.exitcode}") from None
        if error:
            raise SystemExit(f"in a worker:\n{error}")
        return value


def _serve(pipe: Any, threads: int, make: Callable[..., dict[str, Callable[..., Any]]], args: Any) -> None:
    if threads and hasattr(os, "sched_setaffinity"):
        # Before any library counts the cores: every system gets the same ones.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
        os.environ["OMP_NUM_THREADS"] = str(threads)
    functions: dict[str, Callable[..., Any]] = {}
    asked: tuple[str, Any] = ("", args)
    with contextlib.suppress(EOFError):
        while True:
            name, given = asked
            try:
                if name:
                    value = functions[name](*given)
                else:
                    functions, value = make(*given), None
                pipe.send((None, value))
            except Exception:
                pipe.send((traceback.format_exc(), None))
            asked = pipe.recv()


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what came back. The function has to wait for its own results."""
    start = time.perf_counter()
    value = function()
    return time.perf_counter() - start, value


def count_compilations() -> Callable[[], int]:
    """From now on JAX's compilations in this process are counted; the function returned says how many."""
    import jax

    seen = [0]

    def listen(event: str, _seconds: float, **_: Any) -> None:
        seen[0] += event == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(listen)
    return lambda: seen[0]


def spread(values: Iterable[float]) -> dict[str, Any]:
    """The median over the rounds, the extremes, and the values themselves."""
    rounds = [float(v) for v in values]
    return {"median": statistics.median(rounds), "min": min(rounds), "max": max(rounds), "rounds": rounds}


def ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, Any]:
    """The spread of a quotient, taken round by round."""
    return spread(a / b for a, b in zip(above, below, strict=True))


def shown(value: dict[str, Any] | float | None, digits: int = 2) -> str:
    """A number for a table; a spread as `median (min..max)`."""
    if value is None:
        return "-"
    if not isinstance(value, dict):
        return f"{value:,.{digits}f}"
    median, low, high = (f"{value[key]:,.{digits}f}" for key in ("median", "min", "max"))
    return f"{median} ({low}..{high})"


def goal(what: str, value: Any, *, at_least: float | None = None, at_most: float | None = None) -> dict[str, Any]:
    """A figure to reach; a spread is judged by its median."""
    middle = value["median"] if isinstance(value, dict) else value
    met = (at_least is None or middle >= at_least) and (at_most is None or middle <= at_most)
    wanted = f">= {at_least:g}" if at_least is not None else f"<= {at_most:g}"
    return {"what": what, "value": value, "goal": wanted, "met": met}


def print_table(title: str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """First column flush left, the others flush right."""
    cells = [list(header), *([str(c) for c in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    print(f"\n{title}")
    for number, row in enumerate(cells):
        line = (c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        print("  ".join(line).rstrip())
        if not number:
            print("  ".join("-" * w for w in widths))
    sys.stdout.flush()


def print_goals(goals: Sequence[dict[str, Any]]) -> None:
    rows = [(g["what"], shown(g["value"], 3), g["goal"], "yes" if g["met"] else "no") for g in goals]
    print_table("goals", ("", "measured", "goal", "met"), rows)


def environment(backend: str = "cpu", devices: Sequence[str] = ()) -> dict[str, Any]:
    """What a figure depends on besides the code. Call it before measuring: it notes how busy the machine is.

    No names of machines or folders.
    """
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    if load is not None and load > 0.5:
        print(f"load average {load:.1f}: the machine is busy, and times measured now are worth little", file=sys.stderr)
    versions = {}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": _commit(),
        "backend": backend,
        "devices": list(devices),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_before": load,
        "system": platform.system(),
        "python": platform.python_version(),
        "libraries": versions,
    }


def _cpu() -> str:
    """The model, and the instruction sets that decide how fast a product is."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    fields = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
    flags = fields.get("flags", "").split()
    sets = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    return " ".join([fields.get("model name", platform.machine()), *sets])


def _commit() -> str:
    """The checkout's commit, marked if files differ from it."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(HERE), *words], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        return git("rev-parse", "HEAD") + (" with changes" if git("status", "--porcelain") else "")
    except OSError:
        return ""


def parser(doc: str | None, rounds: int) -> argparse.ArgumentParser:
    """With the options that every benchmark has."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rounds", type=int, default=rounds, help=f"interleaved repeats (default {rounds})")
    made.add_argument("--json", type=Path, help="file to write (benchmarks/results/NAME-BACKEND.json)")
    return made


def write_json(path: Path | None, name: str, report: dict[str, Any], quiet: bool = False) -> None:
    """Writes the report whole or not at all."""
    path = path or HERE / "results" / f"{name}-{report['environment']['backend']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_rounded({"benchmark": name, **report}), indent=1)
    text = re.sub(r"\[[^\[\]{}]*\]", lambda numbers: re.sub(r"\s+", " ", numbers[0]), text)  # A list, a line.
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}-", delete=False) as file:
        file.write(text + "\n")
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)
    if not quiet:
        print(f"\nwrote {path}")


def _rounded(value: Any) -> Any:
    """Six digits are more than any of these figures holds."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list | tuple) else value


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="para-jax-benchmark-") as folder:
        yield Path(folder)
