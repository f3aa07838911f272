"""Runs planning in a subprocess: the TPU compiler needs environment variables before JAX starts, and a compiler that
crashes ends its process."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

from para_jax.adapters.registry import config_from_dict
from para_jax.config import BackboneConfig
from para_jax.errors import ParaJaxError
from para_jax.families.reading import architecture_from_hf
from para_jax.planning.chips import parse_topology
from para_jax.planning.job import Job
from para_jax.planning.topology import environment


def plan_in_subprocess(
    jobs: Sequence[Job],
    topology: str,
    mesh: str | None = None,
    tries: int = 3,
    show: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Runs `planning.plan.plan` in a subprocess.

    Raises ParaJaxError as `plan` does, for an unknown topology, and if the compiler crashed.
    """
    parsed = parse_topology(topology)
    request = {"jobs": [_as_json(job) for job in jobs], "topology": topology, "mesh": mesh, "tries": tries}
    command = [sys.executable, "-m", "para_jax.planning"]
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
            env={**os.environ, **environment(parsed)},
        ) as process:  # fmt: skip
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(json.dumps(request))
            process.stdin.close()
            for line in process.stdout:
                answer = json.loads(line)
                if "show" in answer:
                    show(answer["show"])
                elif "error" in answer:
                    raise ParaJaxError(answer["error"])
                elif "fault" in answer:
                    fault = RuntimeError(answer["fault"])
                    fault.add_note(answer["traceback"])
                    raise fault
                else:
                    return answer["plan"]
        errors.seek(0)
        last = "\n  ".join(errors.read().strip().splitlines()[-5:])
    raise ParaJaxError(f"the compiler ended with code {process.returncode} and no plan; its last output:\n  {last}")


def _as_json(job: Job) -> dict[str, Any]:
    """The job as JSON, for `job_from_json`."""
    fields = {f.name: getattr(job, f.name) for f in dataclasses.fields(job)}
    config, method = job.config, job.method
    return {
        **fields,
        "config": {"name": config.name, "hf": json.loads(config.hf)},
        "method": {"method": method.method, **dataclasses.asdict(method)},
    }


def job_from_json(fields: dict[str, Any]) -> Job:
    config, method = fields.pop("config"), fields.pop("method")
    backbone = BackboneConfig(**vars(architecture_from_hf(config["hf"], config["name"])))
    return Job(backbone, config_from_dict(method.pop("method"), method), **fields)
