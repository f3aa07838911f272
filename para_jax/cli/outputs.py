"""Checks outputs before the work starts: they can be written, and do not replace inputs."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from para_jax.cli.options import name_of
from para_jax.data.sources import mixture
from para_jax.errors import ParaJaxError
from para_jax.mounts import check_creatable, check_mounted, remedy

# Options with files, folders or sources of rows to read, optionally after NAME=.
SOURCES = ("tenant", "tenant_from", "dev", "dev_from", "data")
INPUTS = ("model", "adapters", "adapter", "input", *SOURCES, "template", "chat_template", "method")
LONGEST = 240  # bytes of a name; file systems allow 255, and temporary names are longer


def check_files(args: argparse.Namespace, *options: str, kept: Sequence[str] = ()) -> None:
    """Raises ParaJaxError if one of these options, if given, names a file that cannot be written.

    Without --overwrite the file must be new. Its folder must be writable. It must not be an input or another output.
    `kept` names options whose existing file is checked by the caller.
    """
    given = {name: Path(getattr(args, name)) for name in options if getattr(args, name) is not None}
    if not given and getattr(args, "overwrite", False):
        raise ParaJaxError(f"--overwrite has no effect without {' or '.join(map(name_of, options))}")
    read, seen = inputs(args), dict[Path, str]()
    for name, path in given.items():
        option, place = name_of(name), path.resolve()
        if place in seen:
            raise ParaJaxError(f"{seen[place]} and {option} are both {path}; choose two files")
        seen[place] = option
        if path.is_dir():
            raise ParaJaxError(f"{option} {path} is a folder; name a file in it")
        if len(path.name.encode()) > LONGEST:
            raise ParaJaxError(f"{option} {path} has a name of more than {LONGEST} bytes; choose a shorter one")
        for what, source in read.items():
            if source == place or (place.exists() and _needed(place, source)):
                raise ParaJaxError(f"{option} {path} would replace {what}; choose another file")
        if path.exists() and not path.is_file():
            raise ParaJaxError(f"{option} {path} is not a regular file; choose another, or leave it out")
        if path.exists() and not args.overwrite and name not in kept:
            raise ParaJaxError(f"{path} exists; choose another {option} or pass --overwrite")
        _check_place(option, path)


def check_folder(args: argparse.Namespace, marker: str | None = None) -> None:
    """Raises ParaJaxError unless --out can be created as a folder without replacing an input.

    With `marker`, an existing folder is replaced only with --overwrite, and only if it has a file of this name.
    """
    path = Path(args.out)
    if marker is not None and path.exists() and not args.overwrite:
        raise ParaJaxError(f"{path} exists; choose another --out or pass --overwrite")
    if path.exists() and not path.is_dir():
        raise ParaJaxError(f"--out {path} is a file; choose a folder")
    for what, source in inputs(args).items():
        if args.overwrite and source.is_relative_to(path.resolve()):
            raise ParaJaxError(f"--out {path} holds {what}, which it would replace; choose another folder")
    if marker is not None and path.exists() and not (path / marker).is_file():
        raise ParaJaxError(f"{path} exists and holds no {marker}; remove it yourself or choose another folder")
    _check_place("--out", path)


def inputs(args: argparse.Namespace) -> dict[str, Path]:
    """The existing files and folders that options read, by their description in messages."""
    found = {}
    for name in INPUTS:
        value = getattr(args, name, None)
        for text in value if isinstance(value, list) else [value]:
            for path in _paths(text) if isinstance(text, str) else ():
                with suppress(OSError):  # such as a name that is too long for a path
                    if path.exists():
                        found[f"{name_of(name)} {path}"] = path.resolve()
    return found


def _paths(text: str) -> Iterator[Path]:
    """The possible paths in the value of an option, such as NAME=0.7*FILE.jsonl+0.3*hf:FOLDER:SPLIT."""

    for value in (text, text.partition("=")[2]):
        try:
            sources = [source for _, source in mixture(value)]
        except ParaJaxError:  # raised again when it is read
            continue
        for source in filter(None, sources):
            yield Path(source.removeprefix("hf:").partition(":")[0] if source.startswith("hf:") else source)


def _needed(place: Path, source: Path) -> bool:
    """Whether an existing file belongs to an input folder: a checkpoint, or an adapter."""
    if not source.is_dir() or not place.is_relative_to(source):
        return False
    return any((folder / "adapter_config.json").is_file() for folder in place.parents) or (
        (source / "config.json").is_file() and place.parent == source
    )


def _check_place(option: str, path: Path) -> None:
    check_mounted(path)
    try:
        check_creatable(path.resolve())
    except OSError as error:
        parts = f"{option} {path} cannot be written: {error.strerror or error}", remedy(error, path)
        raise ParaJaxError("; ".join(filter(None, parts))) from None


def check_data_dir(args: argparse.Namespace) -> None:
    """Raises ParaJaxError for --data-dir without a tfds: source."""
    sources = [source for name in SOURCES for source in getattr(args, name, ())]
    if args.data_dir is not None and not any("tfds:" in source for source in sources):
        raise ParaJaxError("--data-dir has no effect without a source tfds:NAME")
