"""`python -m para_jax.planning`: the subprocess that makes plans (`planning/process.py`)."""

from __future__ import annotations

import json
import os
import pickle
import sys
import traceback
from typing import Any

from para_jax.errors import ParaJaxError
from para_jax.planning.plan import plan


def serve() -> None:
    """Reads the arguments of `plan` from stdin, and writes answers to stdout as JSON lines."""
    # Anything else that is printed goes to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**fields: Any) -> None:
        print(json.dumps(fields), file=answers, flush=True)

    jobs, topology, mesh, tries = pickle.load(sys.stdin.buffer)
    try:
        result = plan(jobs, topology, mesh, tries, lambda line: answer(show=line))
    except ParaJaxError as error:
        answer(error=str(error))
    except Exception as error:
        answer(fault=f"{type(error).__name__}: {error}", traceback=traceback.format_exc())
    else:
        answer(plan=result)


if __name__ == "__main__":
    serve()
