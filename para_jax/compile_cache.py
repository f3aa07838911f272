"""Compiled programs, kept on disk between runs: a command that runs a second time compiles nothing.

This is JAX's persistent compilation cache, in the user's cache folder and bounded. The command line turns it on
(`--compile-cache`, PARA_JAX_COMPILE_CACHE); a Python program may call `keep_compiled`. The bound is our own,
applied once per process: `jax_compilation_cache_max_size` reads every entry's time each time a program is added, 0.15 s
with 1,000 entries and 0.9 s with 5,000.

JAX unpickles and runs what is in the folder. It must not be one that others may write to.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from contextlib import suppress
from pathlib import Path

from para_jax.errors import ParaJaxError

VARIABLE = "PARA_JAX_COMPILE_CACHE"
# Bytes. A program of the tiny backbone takes 20 to 200 kB.
LIMIT = 2 * 10**9
# JAX names an entry by its program and a SHA-256. Nothing else in the folder is ever removed.
ENTRY = re.compile(r".+-[0-9a-f]{64}-cache")
TROUBLE = re.compile(r"Error (reading|writing) persistent compilation cache entry for '([^']+)': (.*)", re.DOTALL)


def keep_compiled(folder: str | Path | None = None, limit: int = LIMIT) -> str:
    """Keeps what JAX compiles in a folder, and uses what is there; of this process, from now on.

    Args:
      folder: by default `default_folder()`. A URL such as gs://bucket/folder goes to JAX as it is, and is not bounded.
      limit: bytes. The programs that were not used for longest are removed until the others fit.

    Returns the folder. Raises ParaJaxError if it cannot be written.

    >>> import para_jax.compile_cache
    >>> folder = para_jax.compile_cache.keep_compiled("/tmp/programs")  # doctest: +SKIP
    """
    import tempfile

    import jax
    from jax.experimental.compilation_cache.compilation_cache import reset_cache

    place = os.fspath(folder or default_folder())
    if "://" not in place:
        path = Path(place).expanduser().absolute()
        place = str(path)
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):
                pass
            _trim(path, limit)
        except OSError as error:
            raise ParaJaxError(f"{place} cannot hold compiled programs: {error.strerror or error}") from error
    jax.config.update("jax_compilation_cache_dir", place)
    # Every program, however quick to compile and however small.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    # JAX looks at its folder once, at the first program.
    reset_cache()
    return place


def default_folder() -> Path:
    """para_jax/compiled in the folder where this system keeps caches: $XDG_CACHE_HOME or ~/.cache on Linux.

    >>> default_folder().parts[-2:]
    ('para_jax', 'compiled')
    """
    given = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME", "")
    if os.path.isabs(given):
        base = Path(given)
    else:
        home = {"win32": "AppData/Local", "darwin": "Library/Caches"}.get(sys.platform, ".cache")
        try:
            base = Path.home() / home
        except RuntimeError:
            raise ParaJaxError("there is no home folder to keep compiled programs in") from None
    return base / "para_jax" / "compiled"


def folder() -> Path | None:
    """Where this process keeps what was found out with a compiler: with its compiled programs.

    Before `keep_compiled` or `set_up` is called, that is where `set_up` would keep them. None, if they are not kept, or
    behind a URL.
    """
    import jax

    asked = os.environ.get(VARIABLE)
    place = jax.config.values["jax_compilation_cache_dir"] or asked
    if not jax.config.values["jax_enable_compilation_cache"] or place == "off" or "://" in (place or ""):
        return None
    try:
        return Path(place).expanduser().absolute() if place else default_folder()
    except (ParaJaxError, RuntimeError):  # there is no home folder
        return None


def set_up(choice: str | None = None) -> None:
    """What the command line does before it compiles: keeps programs where `choice` or the environment says.

    Args:
      choice: a folder, or "off". None means PARA_JAX_COMPILE_CACHE; without that, a folder that JAX has already been
        given (JAX_COMPILATION_CACHE_DIR) stays, with all of JAX's own settings; else `default_folder()`.

    A folder that cannot be used costs one line on stderr, never the run.
    """
    import jax

    choice = choice or os.environ.get(VARIABLE)
    if choice == "off":
        jax.config.update("jax_enable_compilation_cache", False)
        return
    place = jax.config.values["jax_compilation_cache_dir"]
    if choice or not place:
        try:
            place = keep_compiled(choice)
        except ParaJaxError as error:
            _say(f"{error}; going on without")
            return
    _explain_trouble(place)


def quiet_loading() -> None:
    """Hides lines that some jaxlib prints whenever it loads a program for a CPU. Call it before JAX is imported.

    jaxlib 0.10.0 and 0.10.1 report LLVM's tuning preferences (prefer-no-gather) as features that the machine lacks, two
    lines of 2 kB for each program, as errors; later ones do not. What they log as errors is hidden with it.
    """
    from importlib.metadata import version

    if "jaxlib" not in sys.modules and version("jaxlib") in ("0.10.0", "0.10.1"):
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def _trim(folder: Path, limit: int) -> None:
    """Removes the entries that were not used for longest, until the others fit into so many bytes."""
    found = []
    with os.scandir(folder) as files:
        for file in files:
            with suppress(FileNotFoundError):  # another process may be doing the same
                if ENTRY.fullmatch(file.name) and file.is_file(follow_symlinks=False):
                    known = file.stat()
                    # Some file systems do not note when a file is read.
                    found.append((max(known.st_atime, known.st_mtime), known.st_size, Path(file.path)))
    size = sum(bytes for _, bytes, _ in found)
    for _, bytes, path in sorted(found):
        if size <= limit:
            break
        _remove(path)
        size -= bytes


def _remove(path: Path) -> None:
    """Removes an entry, and the time that JAX keeps beside it if it is asked to bound the folder."""
    for each in (path, path.with_name(f"{path.name.removesuffix('cache')}atime")):
        with suppress(OSError):
            each.unlink()


def _explain_trouble(place: str) -> None:
    """JAX's warnings of entries that it cannot read or write become one line each time such a thing first happens.

    JAX never writes over an entry, so one that cannot be read is removed here, with others of its program's name: the
    warning does not say which it is. The program is compiled next, and is kept again.
    """
    shown, said = warnings.showwarning, set[str]()

    def show(message, category, filename, lineno, file=None, line=None) -> None:  # type: ignore[no-untyped-def]
        trouble = TROUBLE.match(str(message))
        if trouble is None:
            return shown(message, category, filename, lineno, file, line)
        doing, program, why = trouble.groups()
        if doing == "reading" and "://" not in place:
            for path in Path(place).iterdir():
                if ENTRY.fullmatch(path.name) and path.name.startswith(f"{program}-"):
                    _remove(path)
        if doing not in said:
            said.add(doing)
            what = "a compiled program in {} is damaged; compiling it again"
            if doing == "writing":
                what = f"{{}} takes no compiled programs ({why.splitlines()[0]}); going on without"
            _say(what.format(place))
        return None

    warnings.showwarning = show


def _say(line: str) -> None:
    print(f"para-jax: {line}", file=sys.stderr)
