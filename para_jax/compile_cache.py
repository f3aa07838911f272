"""A cache of compiled programs on disk: a command that runs a second time compiles nothing.

This is JAX's persistent compilation cache, in the user's cache folder and with a size limit. The command line turns it
on (`--compile-cache`, PARA_JAX_COMPILE_CACHE); Python programs can call `keep_compiled`. The limit is applied once per
process. JAX's own `jax_compilation_cache_max_size` is slower: it reads the time of every entry whenever a program is
added, which takes 0.15 s with 1,000 entries and 0.9 s with 5,000.

JAX unpickles and runs the files in the folder, so others must not be able to write to it.
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
# JAX's name of an entry: its program and a SHA-256. Other files in the folder are never removed.
ENTRY = re.compile(r".+-[0-9a-f]{64}-cache")
TROUBLE = re.compile(r"Error (reading|writing) persistent compilation cache entry for '([^']+)': (.*)", re.DOTALL)


def keep_compiled(folder: str | Path | None = None, limit: int = LIMIT) -> str:
    """Caches compiled programs in a folder from now on, in this process.

    Args:
      folder: by default `default_folder()`. A URL such as gs://bucket/folder is passed to JAX, and has no limit.
      limit: bytes. The least recently used programs are removed to stay below it.

    Returns the folder. Raises ParaJaxError if it is not writable.

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
    # Cache every program, including small and quickly compiled ones.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    # JAX reads the setting only once, at the first program.
    reset_cache()
    return place


def default_folder() -> Path:
    """para_jax/compiled in the system's folder for caches: $XDG_CACHE_HOME or ~/.cache on Linux.

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
            raise ParaJaxError("there is no home folder to cache compiled programs in") from None
    return base / "para_jax" / "compiled"


def folder() -> Path | None:
    """The cache folder of this process, or before `keep_compiled` and `set_up` the one that `set_up` would use.

    None if caching is off, or if the folder is a URL.
    """
    import jax

    place = jax.config.values["jax_compilation_cache_dir"] or os.environ.get(VARIABLE)
    if not jax.config.values["jax_enable_compilation_cache"] or place == "off" or "://" in (place or ""):
        return None
    try:
        return Path(place).expanduser().absolute() if place else default_folder()
    except (ParaJaxError, RuntimeError):  # there is no home folder
        return None


def set_up(choice: str | None = None) -> None:
    """Turns on the cache for the command line, before it compiles.

    Args:
      choice: a folder, or "off". None means PARA_JAX_COMPILE_CACHE; without that, JAX's own folder and settings
        (JAX_COMPILATION_CACHE_DIR) if they are set; else `default_folder()`.

    If the folder cannot be used, prints a line to stderr and continues without a cache.
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
            _warn(f"{error}; continuing without a cache")
            return
    _explain_trouble(place)


def quiet_loading() -> None:
    """Hides messages that some jaxlib versions print for each cached CPU program. Call it before JAX is imported.

    jaxlib 0.10.0 and 0.10.1 report LLVM's tuning preferences (prefer-no-gather) as missing CPU features, in two error
    lines of 2 kB for each program. This hides all error messages of these versions.
    """
    from importlib.metadata import version

    if "jaxlib" not in sys.modules and version("jaxlib") in ("0.10.0", "0.10.1"):
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def _trim(folder: Path, limit: int) -> None:
    """Removes the least recently used entries until the others fit into `limit` bytes."""
    found = []
    with os.scandir(folder) as files:
        for file in files:
            with suppress(FileNotFoundError):  # another process may trim at the same time
                if ENTRY.fullmatch(file.name) and file.is_file(follow_symlinks=False):
                    stat = file.stat()
                    # Some file systems do not update the access time.
                    found.append((max(stat.st_atime, stat.st_mtime), stat.st_size, Path(file.path)))
    size = sum(bytes for _, bytes, _ in found)
    for _, bytes, path in sorted(found):
        if size <= limit:
            break
        _remove(path)
        size -= bytes


def _remove(path: Path) -> None:
    """Removes an entry, and the access-time file that JAX writes if its own limit is on."""
    for each in (path, path.with_name(f"{path.name.removesuffix('cache')}atime")):
        with suppress(OSError):
            each.unlink()


def _explain_trouble(place: str) -> None:
    """Replaces JAX's warnings about unreadable or unwritable entries by one line for each kind.

    JAX never overwrites an entry, so unreadable entries are removed here. The warning has only the program's name, so
    all entries of that name are removed. The program is then compiled and cached again.
    """
    original, reported = warnings.showwarning, set[str]()

    def show(message, category, filename, lineno, file=None, line=None) -> None:  # type: ignore[no-untyped-def]
        trouble = TROUBLE.match(str(message))
        if trouble is None:
            return original(message, category, filename, lineno, file, line)
        doing, program, why = trouble.groups()
        if doing == "reading" and "://" not in place:
            for path in Path(place).iterdir():
                if ENTRY.fullmatch(path.name) and path.name.startswith(f"{program}-"):
                    _remove(path)
        if doing not in reported:
            reported.add(doing)
            what = "a compiled program in {} is damaged; compiling it again"
            if doing == "writing":
                what = f"{{}} cannot hold compiled programs ({why.splitlines()[0]}); continuing without a cache"
            _warn(what.format(place))
        return None

    warnings.showwarning = show


def _warn(line: str) -> None:
    print(f"para-jax: {line}", file=sys.stderr)
