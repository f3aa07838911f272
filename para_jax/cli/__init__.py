"""The command line: `para-jax VERB`. Verbs import what they need when they run, so that --help is quick."""

from __future__ import annotations

import argparse
import errno
import gc
import io
import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import NoReturn

from para_jax import __version__
from para_jax.cli import convert, env, evaluate, fanlora, faults, finetune, generate, methods, plan, quickstart
from para_jax.cli.faults import in_one_line
from para_jax.cli.options import Parser, check_texts
from para_jax.compile_cache import quiet_loading
from para_jax.errors import ParaJaxError
from para_jax.mounts import remedy
from para_jax.progress import end_bars
from para_jax.torch_files import hide_torch

STOPPED = 130  # the exit code of Ctrl-C
STDOUT = "stdout could not be written: "

VERBS = {
    "quickstart": quickstart,
    "finetune": finetune,
    "fanlora": fanlora,
    "evaluate": evaluate,
    "generate": generate,
    "methods": methods,
    "plan": plan,
    "convert": convert,
    "env": env,
}


def parser() -> Parser:
    top = Parser(
        prog="para-jax",
        description="Prompt-Aware Representation Adjustment (PARA): tune one frozen language model for many tenants "
        "at once and decode them all in one batch.",
    )
    top.add_argument("--version", action="version", version=f"para-jax {__version__}")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, verb in VERBS.items():
        summary, _, details = (verb.__doc__ or "").partition("\n")
        sub = verbs.add_parser(
            name,
            help=summary.rstrip("."),
            description=summary + details,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        verb.add_arguments(sub)
    return top


def command() -> NoReturn:
    """The entry point of `para-jax`: runs `main`, without torch, and with fewer garbage collections.

    Imports create about 300,000 permanent objects. Collections that scan them would take a second at the start, and
    another one at exit.
    """
    gc.set_threshold(100_000)
    hide_torch()
    # Models may generate characters that the terminal's encoding does not have.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    threading.excepthook = _report_thread_error
    code = main()
    gc.freeze()
    if code == STOPPED:
        # Exit without waiting for threads that compile, and without their tracebacks.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        os._exit(code)
    sys.exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a verb and returns its exit code: 0, 1 for an error, 130 for Ctrl-C.

    In a multi-process run, a process that fails exits at once, so that the others do not wait for it.
    """
    try:
        args = parser().parse(argv)
    except ParaJaxError as error:
        print(error, file=sys.stderr)
        return 1
    quiet_loading()
    # transformers would warn that torch is missing, which is not needed.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    code = _run(args)
    end_bars()
    code = _flushed(args.verb, code)
    if code and _is_multiprocess():
        from para_jax.distributed import exit_at_once

        exit_at_once(code)
    return code


def _is_multiprocess() -> bool:
    if "jax" not in sys.modules:
        return False
    import jax

    return jax.distributed.is_initialized()


def _run(args: argparse.Namespace) -> int:
    try:
        check_texts(args)
        return VERBS[args.verb].run(args) or 0
    except ParaJaxError as error:
        _print_error(args.verb, str(error))
    except BrokenPipeError:
        pass
    except OSError as error:
        where = "" if error.filename is None else f"{error.filename}: "
        way = remedy(error, error.filename) if isinstance(error.filename, str) else ""
        # Errors of files have a filename, so this one comes from stdout.
        full = error.filename is None and error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
        message = f"{STDOUT if full else where}{error.strerror or in_one_line(error)}"
        _print_error(args.verb, f"{message}; {way} and run again" if way else message)
    except KeyboardInterrupt as stop:
        _print_error(args.verb, str(stop) or "stopped")
        # Preemption is not a failure: the scheduler starts the run again.
        return 0 if getattr(stop, "preempted", False) else STOPPED
    except Exception as error:
        _print_error(args.verb, faults.describe(args.verb, error, _is_multiprocess()))
    return 1


def _print_error(verb: str, message: str) -> None:
    end_bars()
    print(f"para-jax {verb}: {message}", file=sys.stderr)


def _flushed(verb: str, code: int) -> int:
    """Flushes stdout and returns the exit code. Otherwise Python would print a traceback at exit if that fails."""
    try:
        sys.stdout.flush()
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            _print_error(verb, f"{STDOUT}{error.strerror}")
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return code or 1
    return code


def _report_thread_error(given: threading.ExceptHookArgs) -> None:
    error = given.exc_value
    if error is not None:
        _print_error("thread", in_one_line(error) if isinstance(error, OSError) else faults.describe("thread", error))
