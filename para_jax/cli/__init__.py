"""The command line: `para-jax VERB`. Verbs import what they need when they run, so that --help is quick."""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from para_jax import __version__
from para_jax.cli import convert, evaluate, fanlora, finetune, generate, methods, plan, quickstart
from para_jax.compile_cache import quiet_loading

VERBS = {
    "quickstart": quickstart,
    "finetune": finetune,
    "fanlora": fanlora,
    "evaluate": evaluate,
    "generate": generate,
    "methods": methods,
    "plan": plan,
    "convert": convert,
}


def parser() -> argparse.ArgumentParser:
    """The parser of every verb and option."""
    top = argparse.ArgumentParser(
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
    """The process of `para-jax`: runs `main`, and leaves the garbage collector little to do.

    Imports make some 300,000 objects that stay. To look through them again and again takes a second of a start, and
    another one of the end.
    """
    gc.set_threshold(100_000)
    code = main()
    gc.freeze()
    sys.exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a verb and returns its exit code: 0, 1 for a mistake of the caller, 130 for Ctrl-C.

    One of several processes that does not succeed ends here and now; the others are not to wait for it.
    """
    args = parser().parse_args(argv)
    quiet_loading()
    # transformers would say that torch is missing, which nothing here needs.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        code = _run(args)
    except Exception as error:
        if not _of_several():
            raise
        print(
            f"para-jax {args.verb}: stopped by {type(error).__name__}: {str(error).partition(chr(10))[0]}; if another "
            "process stopped before this one, its own output says why",
            file=sys.stderr,
        )
        code = 1
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
    from para_jax.errors import ParaJaxError

    try:
        return VERBS[args.verb].run(args) or 0
    except ParaJaxError as error:
        print(f"para-jax {args.verb}: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        return 1
    except OSError as error:
        print(f"para-jax {args.verb}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        print(f"para-jax {args.verb}: {stop or 'stopped'}", file=sys.stderr)
        # A machine that is taken away is no failure: whoever started the run starts it again.
        return 0 if getattr(stop, "preempted", False) else 130
