"""Devices of a slice that does not exist here, to compile for."""

from __future__ import annotations

import importlib.util
from typing import Any

import jax

from para_jax.compat import compiles_ahead
from para_jax.errors import ParaJaxError
from para_jax.planning.chips import Topology


def check_jax(topology: Topology) -> None:
    """Raises ParaJaxError if this jax version cannot compile for these chips."""
    if topology.chip.kind == "tpu" and not compiles_ahead():
        raise ParaJaxError(
            f"jax {jax.__version__} cannot compile for TPUs without having them; jax 0.8 and later can: pip install "
            '"para-jax[tpu]" in a separate environment'
        )


def environment(topology: Topology) -> dict[str, str]:
    """Environment variables to set before JAX starts, so that it does not look for devices of this machine.

    They also let several processes load the TPU compiler at once.
    """
    if topology.chip.kind == "gpu":
        return {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(topology.size)}
    return {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_LOG_DIR": "disabled",
    }


def devices(topology: Topology) -> list[Any]:
    """Devices to compile for, but not to run on, in a process that was started with `environment`.

    GPUs are replaced by CPU devices, because the GPU compiler needs CUDA. Raises ParaJaxError if libtpu is missing, and
    for an invalid shape.
    """
    if topology.chip.kind == "gpu":
        return jax.devices("cpu")
    if importlib.util.find_spec("libtpu") is None:
        raise ParaJaxError(
            "programs for TPUs are compiled by libtpu, which is not installed; it needs no TPU: "
            'on Linux, pip install "para-jax[tpu]"'
        )
    from jax.experimental import topologies

    options: dict[str, Any] = {}
    if topology.size == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if topology.chip.name == "v4":
        options["chip_config_name"] = "megacore"  # both cores of a chip as one device, as on Cloud TPU
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **options)
    except jax.errors.JaxRuntimeError as error:
        twos = "x".join(["2"] * topology.chip.axes)
        raise ParaJaxError(
            f"{topology.name} is not an existing slice ({error}); slices have one chip, or hosts of four chips: "
            f"{topology.chip.name}:{twos} and its multiples by two"
        ) from error
    return list(found.devices)
