"""The parser of the command line: errors in one line, numbers in range, and valid UTF-8."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn, TypeVar

from para_jax.checks import Number, Whole, check_text
from para_jax.errors import ParaJaxError, unknown

N = TypeVar("N", int, float)

# More rows of a tenant than a step can have.
ROWS = Whole(1, 2**20)


class Parser(argparse.ArgumentParser):
    """Raises ParaJaxError, prefixed with the name of the command, instead of exiting."""

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ")
        name, colon, rest = message.partition(": ")
        if colon and rest.startswith("must be"):
            message = f"{name} {rest}"
        if rest.startswith("expected "):
            message += f"; write a value that starts with - as {name.split('/')[0]}=VALUE"
        raise ParaJaxError(f"{self.prog}: {message}")

    def parse(self, args: Sequence[str] | None = None) -> argparse.Namespace:
        """Like `parse_args`, but the error for an unknown option suggests the nearest one."""
        found, more = self.parse_known_args(args)
        if not more:
            return found
        verbs = next(action for action in self._actions if isinstance(action, argparse._SubParsersAction))
        verb = verbs.choices[found.verb]
        name = more[0].partition("=")[0]
        if not name.startswith("-"):
            raise ParaJaxError(f"{verb.prog}: {more[0]!r} belongs to no option; put a text with spaces in quotes")
        raise ParaJaxError(f"{verb.prog}: {unknown('option', name, verb._option_string_actions)}")


def number(
    parser: Any, name: str, kind: Whole | Number, text: str | None, default: Any = None, metavar: str | None = "N",
    **options: Any,
) -> None:  # fmt: skip
    """Adds an option whose value is a number in a range."""

    def parsed(value: str) -> int | float:
        try:
            return kind.parse(value)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    parser.add_argument(name, type=parsed, default=default, metavar=metavar, help=text, **options)


def repeated(parser: Any, name: str, metavar: str, text: str) -> None:
    """Adds an option that may be given several times."""
    parser.add_argument(name, metavar=metavar, action="append", default=[], help=text)


def flag(parser: Any, name: str, text: str) -> None:
    parser.add_argument(name, action="store_true", help=text)


def add_output(parser: Any, name: str, metavar: str, text: str) -> None:
    """Adds an option with a file to write, and --overwrite."""
    parser.add_argument(name, metavar=metavar, help=text)
    flag(parser, "--overwrite", f"replace {name} if it exists")


def check_texts(args: argparse.Namespace) -> None:
    """Raises ParaJaxError for an option with an empty or invalid UTF-8 value."""
    for name, value in vars(args).items():
        option = name_of(name)
        for text in value if isinstance(value, list) else [value]:
            if not isinstance(text, str):
                continue
            if not text:
                raise ParaJaxError(f"{option} is empty; give it a value, or leave it out")
            if "\0" in text:
                raise ParaJaxError(f"{option} has a null character, which names cannot have")
            check_text(option, text)


def name_of(dest: str) -> str:
    """An option as written on the command line.

    >>> name_of("max_new_tokens")
    '--max-new-tokens'
    """
    return "--" + dest.replace("_", "-")


def refuse(args: argparse.Namespace, names: Sequence[str], why: str) -> None:
    """Raises ParaJaxError if one of these options was given; `why` explains why it has no effect."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value is not False and value != []:
            raise ParaJaxError(f"{name_of(name)} has no effect {why}")
