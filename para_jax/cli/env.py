"""Print the environment for a bug report: versions, devices, kernels and why, the cache, disk and memory.

It never fails: it reports what is missing or does not start. JAX starts in a subprocess, which uses the accelerator for
that time. In a notebook that already uses the accelerator, call `para_jax.cli.env.environment` instead.

  para-jax env
  para-jax env --model DIR --json env.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from para_jax import machine
from para_jax.cli import common
from para_jax.cli.methods import human
from para_jax.cli.options import add_output
from para_jax.cli.outputs import check_files
from para_jax.compile_cache import folder
from para_jax.errors import one_line
from para_jax.files import write_json

PACKAGES = (
    "para-jax", "jax", "jaxlib", "flax", "optax", "safetensors", "transformers", "numpy", "libtpu",
    "jax-cuda12-plugin", "jax-cuda13-plugin",
)  # fmt: skip
LLAMA = (128256, 4096, 14336, 32, 32, 8, 128)  # the shapes of Llama 3 8B, in the order of BackboneConfig
WAIT = 180  # seconds for JAX to start, and to compile a kernel for the first time


def add_arguments(parser: argparse.ArgumentParser) -> None:
    text = "model to choose kernels for: a folder or hub id with config.json (default: the shapes of Llama 3 8B)"
    parser.add_argument("--model", metavar="DIR", help=text)
    add_output(parser, "--json", "OUT.json", "write everything as JSON")


def run(args: argparse.Namespace) -> int:
    check_files(args, "json")
    found = environment(args.model)
    print("\n".join(lines(found)))
    if args.json:
        write_json(args.json, found)
        print(f"all of it in {args.json}")
    return 0


def environment(model: str | None = None) -> dict[str, Any]:
    """What `para-jax env` prints, as a JSON-serializable dict; None for what does not exist.

    JAX is queried in this process if it is imported already, and otherwise in a subprocess.

    >>> environment()["devices"][0]["platform"] in ("cpu", "gpu", "tpu")
    True
    """
    from_jax = jax_environment(model) if "jax" in sys.modules else _ask_subprocess(model)
    cache = None
    if from_jax["cache"] is not None:
        sizes = [path.stat().st_size for path in Path(from_jax["cache"]).glob("*") if path.is_file()]
        cache = {"folder": from_jax["cache"], "files": len(sizes), "bytes": sum(sizes)}
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "versions": {name: machine.installed(name) or None for name in PACKAGES},
        "accelerator": machine.accelerator() or None,
        "nvidia_driver": machine.nvidia_driver() or None,
        **from_jax,
        "cache": cache,
        "disk_free": {path: _free(path) for path in (os.path.abspath(""), from_jax["cache"]) if path},
        "host": {"cores": os.cpu_count(), **machine.host_memory()},
    }


def jax_environment(model: str | None = None) -> dict[str, Any]:
    """The part of `environment` that needs JAX, which starts and takes its devices."""
    found: dict[str, Any] = {"problem": None, "devices": [], "kernels": {}, "cache": None}
    try:
        import jax

        from para_jax.backbones.choice import choose
        from para_jax.backbones.options import compute_dtype
        from para_jax.config import BackboneConfig

        found["cache"] = None if (place := folder()) is None else str(place)
        kind = machine.accelerator()
        if kind and (why := machine.unseen(kind)):
            found["problem"] = f"this is a {kind.upper()} runtime, but JAX does not see it because {why}"
        found["devices"] = [
            {"platform": d.platform, "kind": d.device_kind, "bytes": (d.memory_stats() or {}).get("bytes_limit")}
            for d in jax.local_devices()
        ]
        # Reading a config.json imports transformers, which takes ten seconds if torch is installed.
        config = BackboneConfig(*LLAMA) if model is None else common.load_config(model)
        choice = choose("auto", config, compute_dtype("auto"))
        found["kernels"]["attention"] = {"kernel": choice.kernel, "why": choice.why}
    except Exception as error:
        found["problem"] = found["problem"] or one_line(error)
    return found


def _ask_subprocess(model: str | None) -> dict[str, Any]:
    code = (
        "import json, sys; from para_jax.cli.env import jax_environment as f; print(json.dumps(f(sys.argv[1] or None)))"
    )
    # Do not preallocate a GPU's memory, which other processes may use.
    environ = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TPU_LOG_DIR": "disabled", **os.environ}
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, model or ""], capture_output=True, text=True, env=environ, timeout=WAIT
        )
    except subprocess.TimeoutExpired:
        problem = f"JAX did not start within {WAIT} seconds"
    else:
        if done.returncode == 0:
            return json.loads(done.stdout.splitlines()[-1])
        last = "; ".join(done.stderr.strip().splitlines()[-3:])
        problem = f"JAX did not start: its process exited with code {done.returncode}; its last output: {last}"
    return {"problem": problem, "devices": [], "kernels": {}, "cache": None}


def _free(path: str) -> int | None:
    """Free bytes of the disk of a folder, which may not exist yet."""
    try:
        existing = next(p for p in (Path(path).absolute(), *Path(path).absolute().parents) if p.exists())
        return shutil.disk_usage(existing).free
    except (OSError, StopIteration):
        return None


def lines(found: dict[str, Any]) -> list[str]:
    def size_text(size: int | None) -> str:
        return "unknown" if size is None else human(size)

    versions = [f"{name} {version}" for name, version in found["versions"].items() if version]
    missing = [name for name, version in found["versions"].items() if not version]
    host, cache, kernels = found["host"], found["cache"], found["kernels"]
    devices = [f"{d['kind']} ({d['platform']}), {size_text(d['bytes'])}" for d in found["devices"]]
    return [
        f"python {found['python']} on {found['system']}",
        ", ".join(versions),
        *([f"not installed: {', '.join(missing)}"] if missing else []),
        *([f"driver: NVIDIA {found['nvidia_driver']}"] if found["nvidia_driver"] else []),
        *(f"devices: {devices.count(one)} x {one} of memory" for one in dict.fromkeys(devices)),
        *(f"{name}: {one['kernel']} ({one['why']})" for name, one in kernels.items()),
        "compiled programs: not kept"
        if cache is None
        else f"compiled programs: {cache['files']} files, {human(cache['bytes'])}, in {cache['folder']}",
        *(f"disk: {size_text(free)} free in {path}" for path, free in found["disk_free"].items()),
        f"host: {host['cores']} cores, {size_text(host['memory_available'])} of {size_text(host['memory'])} of memory "
        "available",
        *([f"problem: {found['problem']}"] if found["problem"] else []),
    ]
