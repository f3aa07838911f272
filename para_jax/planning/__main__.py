"""`python -m para_jax.planning`: the subprocess that makes plans (`planning/process.py`)."""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Any

from para_jax.errors import ParaJaxError
from para_jax.planning.chips import parse_topology
from para_jax.planning.plan import plan
from para_jax.planning.process import job_from_json


def serve() -> None:
    """Reads a request from stdin, and writes answers to stdout as JSON lines."""
    # Anything else that is printed goes to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**fields: Any) -> None:
        print(json.dumps(fields), file=answers, flush=True)

    request = json.load(sys.stdin)
    try:
        jobs = [job_from_json(fields) for fields in request["jobs"]]
        topology = parse_topology(request["topology"])
        result = plan(jobs, topology, request["mesh"], request["tries"], lambda line: answer(show=line))
    except ParaJaxError as error:
        answer(error=str(error))
    except Exception as error:
        answer(fault=f"{type(error).__name__}: {error}", traceback=traceback.format_exc())
    else:
        answer(plan=result)


if __name__ == "__main__":
    serve()
