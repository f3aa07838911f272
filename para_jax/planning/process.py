"""Plans are made in a process of their own: what the compiler for TPUs needs has to be said before JAX starts, and a
compiler that breaks down takes its process with it."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from para_jax.adapters.method import config_from_dict
from para_jax.convert.families import config_from_hf
from para_jax.errors import ParaJaxError
from para_jax.planning.chips import parse_topology
from para_jax.planning.job import Job
from para_jax.planning.topology import environment


def plan_aside(
    jobs: Sequence[Job],
    topology: str,
    mesh: str | None = None,
    tries: int = 3,
    show: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """`planning.plan.plan` in a process of its own.

    Raises ParaJaxError for what it raises there, for an unknown topology, and if the compiler broke down.
    """
    found = parse_topology(topology)
    request = {"jobs": [_as_json(job) for job in jobs], "topology": topology, "mesh": mesh, "tries": tries}
    command = [sys.executable, "-m", "para_jax.planning"]
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
            env={**os.environ, **environment(found)},
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
    raise ParaJaxError(f"the compiler ended with code {process.returncode} and no plan; it said:\n  {last}")


def serve() -> None:
    """The other side: a request on stdin, answers on stdout, a line each."""
    from para_jax.planning.plan import plan

    # Whatever else is printed here is none of the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**fields: Any) -> None:
        print(json.dumps(fields), file=answers, flush=True)

    request = json.load(sys.stdin)
    try:
        jobs = [_from_json(fields) for fields in request["jobs"]]
        topology = parse_topology(request["topology"])
        made = plan(jobs, topology, request["mesh"], request["tries"], lambda line: answer(show=line))
    except ParaJaxError as error:
        answer(error=str(error))
    except Exception as error:
        answer(fault=f"{type(error).__name__}: {error}", traceback=traceback.format_exc())
    else:
        answer(plan=made)


def _as_json(job: Job) -> dict[str, Any]:
    """What `_from_json` makes the job of again."""
    fields = {f.name: getattr(job, f.name) for f in dataclasses.fields(job)}
    config, method = job.config, job.method
    return {
        **fields,
        "config": {"name": config.name, "hf": json.loads(config.hf)},
        "method": {"method": method.method, **dataclasses.asdict(method)},
    }


def _from_json(fields: dict[str, Any]) -> Job:
    config, method = fields.pop("config"), fields.pop("method")
    backbone = config_from_hf(config["hf"], config["name"])
    return Job(backbone, config_from_dict(method.pop("method"), method), **fields)
