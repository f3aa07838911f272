"""Runs planning in a subprocess: the TPU compiler needs environment variables before JAX starts, and a compiler that
crashes ends its process."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

from para_jax.errors import ParaJaxError
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
    command = [sys.executable, "-m", "para_jax.planning"]
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
            env={**os.environ, **environment(parsed)},
        ) as process:  # fmt: skip
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(pickle.dumps((jobs, parsed, mesh, tries)))
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
