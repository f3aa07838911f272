"""Queries the machine without JAX, because JAX would take the accelerator.

The first cell of the notebooks has copies of some of these functions (colab/pair.py), because it runs before this
package is installed.
"""

from __future__ import annotations

import logging
import os
import subprocess
from glob import glob
from importlib.metadata import PackageNotFoundError, version


def accelerator() -> str:
    """The machine's accelerator: "tpu", "gpu" or "" for none.

    Colab's environment variables name the runtime even if the device is not visible.

    >>> accelerator() in ("tpu", "gpu", "")
    True
    """
    if os.environ.get("COLAB_TPU_1VM") or os.environ.get("TPU_ACCELERATOR_TYPE", "").startswith(("v", "tpu")):
        return "tpu"
    if os.environ.get("COLAB_GPU", "0") not in ("", "0") or nvidia_driver():
        return "gpu"
    return "tpu" if glob("/dev/accel*") or glob("/dev/vfio/[0-9]*") else ""


def nvidia_driver() -> str:
    """The version of NVIDIA's driver, or "" if there is no NVIDIA GPU."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.partition("\n")[0].strip() if done.returncode == 0 else ""


def cuda_extra(driver: str) -> str:
    """The extra of para-jax with CUDA libraries that the driver supports. CUDA 13 needs driver 580.

    >>> cuda_extra("550.54.15"), cuda_extra("580.65.06")
    ('cuda12', 'cuda13')
    """
    return "cuda13" if int(driver.partition(".")[0] or 0) >= 580 else "cuda12"


def host_memory() -> dict[str, int | None]:
    """Total and available bytes of host memory; None if unknown.

    >>> sorted(host_memory())
    ['memory', 'memory_available']
    """
    found: dict[str, int | None] = {"memory": None, "memory_available": None}
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            sizes = dict(line.split(":") for line in file)
    except (OSError, ValueError):
        return found
    for name, key in (("memory", "MemTotal"), ("memory_available", "MemAvailable")):
        if key in sizes:
            found[name] = 1024 * int(sizes[key].split()[0])
    return found


def installed(name: str) -> str:
    """The version of a package, or "" if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def unseen(kind: str) -> str:
    """Why JAX does not see an accelerator of this kind; "" if it does, or if `kind` is "".

    This starts JAX, which takes the devices.
    """
    import jax

    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign, assignment]
    logging.getLogger("jax").addHandler(handler)
    try:
        if kind in ("", jax.default_backend()):
            return ""
    except RuntimeError as error:  # JAX_PLATFORMS names a platform that does not start
        return str(error).partition("\n")[0]
    finally:
        logging.getLogger("jax").removeHandler(handler)
    if platforms := jax.config.values["jax_platforms"]:
        return f"JAX_PLATFORMS={platforms} leaves it out"
    try:
        jax.devices({"gpu": "cuda"}.get(kind, kind))
    except RuntimeError as error:
        if "failed to initialize" in str(error):
            return str(error).partition("\n")[0]
    plugins = {"tpu": ("libtpu",), "gpu": ("jax-cuda12-plugin", "jax-cuda13-plugin")}[kind]
    if not any(map(installed, plugins)):
        return f"{' or '.join(plugins)} is not installed"
    driver = nvidia_driver()
    if kind == "gpu" and installed("jax-cuda13-plugin") and cuda_extra(driver) == "cuda12":
        return f"jax-cuda13-plugin needs NVIDIA's driver 580 or later, but the driver is {driver or 'missing'}"
    for record in records:
        if record.levelno >= logging.WARNING:
            return str(record.exc_info[1] if record.exc_info else record.getMessage()).partition("\n")[0]
    return "its plugin did not start; see JAX's log for the reason"
