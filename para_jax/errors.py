"""`ParaJaxError`, the exception for user errors, and helpers for its messages."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable


class ParaJaxError(ValueError):
    """An invalid input. The message names it and says what to do instead.

    The command line prints the message alone, without a traceback.
    """


def unknown(what: str, name: object, known: Iterable[str]) -> ParaJaxError:
    """An error for a name that is not among the known ones.

    >>> print(unknown("tenant", "acne", ["acme", "globex"]))
    unknown tenant 'acne'; did you mean 'acme'? Known: acme, globex
    """
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    shown = ", ".join(names[:20]) + (f", ... ({len(names)} in total)" if len(names) > 20 else "")
    return ParaJaxError(f"unknown {what} {name!r}{hint} Known: {shown or 'none'}")


def check_known(what: str, names: Iterable[object], known: Collection[str]) -> None:
    """Raises `unknown` for the first of these names that is not a known one."""
    for name in names:
        if name not in known:
            raise unknown(what, name, known)


def one_line(error: BaseException, most: int = 300) -> str:
    r"""The message of another library's error, in one line of at most `most` characters.

    >>> one_line(TypeError("Validation error:\n    expected int,  got str"))
    'Validation error: expected int, got str'
    >>> one_line(KeyError())
    'KeyError'
    """
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else f"{text[: most - 3]}..."
