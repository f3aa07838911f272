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
from para_jax.mounts import way_out
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
    """The parser of every verb and option."""
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
    """The process of `para-jax`: runs `main`, without torch, and leaves the garbage collector little to do.

    Imports make some 300,000 objects that stay. To look through them again and again takes a second of a start, and
    another one of the end.
    """
    gc.set_threshold(100_000)
    hide_torch()
    # A model may write what a terminal's encoding does not have.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    threading.excepthook = _of_thread
    code = main()
    gc.freeze()
    if code == STOPPED:
        # Whoever presses Ctrl-C again does not wait for threads that compile, and sees no traceback of them.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        os._exit(code)
    sys.exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a verb and returns its exit code: 0, 1 for a mistake of the caller, 130 for Ctrl-C.

    One of several processes that does not succeed ends here and now; the others are not to wait for it.
    """
    try:
        args = parser().parse(argv)
    except ParaJaxError as error:
        print(error, file=sys.stderr)
        return 1
    quiet_loading()
    # transformers would say that torch is missing, which nothing here needs.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    code = _flushed(args.verb, _run(args))
    if code and _of_several():
        from para_jax.distributed import leave

        leave(code)
    return code


def _of_several() -> bool:
    if "jax" not in sys.modules:
        return False
    import jax

    return jax.distributed.is_initialized()


def _run(args: argparse.Namespace) -> int:
    try:
        check_texts(args)
        return VERBS[args.verb].run(args) or 0
    except ParaJaxError as error:
        _say(args.verb, str(error))
    except BrokenPipeError:
        pass
    except OSError as error:
        where = "" if error.filename is None else f"{error.filename}: "
        way = way_out(error, error.filename) if isinstance(error.filename, str) else ""
        # Whoever writes a file names it, so this is what is printed.
        full = error.filename is None and error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
        said = f"{STDOUT if full else where}{error.strerror or in_one_line(error)}"
        _say(args.verb, f"{said}; {way} and run again" if way else said)
    except KeyboardInterrupt as stop:
        _say(args.verb, str(stop) or "stopped")
        # A machine that is taken away is no failure: whoever started the run starts it again.
        return 0 if getattr(stop, "preempted", False) else STOPPED
    except Exception as error:
        _say(args.verb, faults.said(args.verb, error, _of_several()))
    return 1


def _say(verb: str, message: str) -> None:
    print(f"para-jax {verb}: {message}", file=sys.stderr)


def _flushed(verb: str, code: int) -> int:
    """The exit code, when all of stdout is written. Python would say that it cannot be, at its end, in a traceback."""
    try:
        sys.stdout.flush()
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            _say(verb, f"{STDOUT}{error.strerror}")
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return code or 1
    return code


def _of_thread(given: threading.ExceptHookArgs) -> None:
    """What went wrong in a thread that nobody waits for."""
    error = given.exc_value
    if error is not None:
        _say("thread", in_one_line(error) if isinstance(error, OSError) else faults.said("thread", error))
