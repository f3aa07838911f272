"""Reads folders and hub data sets with Hugging Face's `datasets`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from para_jax import hub
from para_jax.data.table import Table, check_split
from para_jax.errors import ParaJaxError


def table(source: str) -> Table:
    """The rows of FOLDER[:SPLIT] or OWNER/NAME[/CONFIG][:SPLIT]. The split defaults to train, and may be sliced:
    train[:90%].

    The folder was written by `save_to_disk`, or has json, jsonl, parquet, arrow or csv files. Names that are not local
    folders are downloaded from the hub. Raises ParaJaxError if `datasets` is not installed, if the folder has none of
    these files, if the data set cannot be downloaded, and for an unknown split.
    """
    folder, _, split = (source, "", "") if Path(source).is_dir() else source.partition(":")
    is_local, names = Path(folder).is_dir(), folder.split("/")
    if not is_local and (len(names) > 3 or not all(re.fullmatch(r"\w[\w.-]*", name) for name in names)):
        raise ParaJaxError(f"hf:{source}: {folder} is neither a folder nor a data set on the hub, OWNER/NAME[/CONFIG]")
    try:
        import datasets
    except ImportError as error:
        raise ParaJaxError(f"hf:{source} needs Hugging Face's datasets: pip install datasets ({error})") from None
    try:
        if not is_local:
            found = datasets.load_dataset("/".join(names[:2]), *names[2:])
        else:
            saved = any((Path(folder) / name).is_file() for name in ("state.json", "dataset_dict.json"))
            found = datasets.load_from_disk(folder) if saved else datasets.load_dataset(folder)
    except Exception as error:  # each file format raises its own exceptions
        if not is_local:
            raise hub.not_had("/".join(names[:2]), error, "datasets/") from error
        reason = str(error).strip().partition("\n")[0]
        raise ParaJaxError(f"{folder} cannot be read by datasets: {type(error).__name__}: {reason}") from error
    splits = found if isinstance(found, dict) else {str(found.split or "train"): found}
    split = split or ("train" if len(splits) > 1 else next(iter(splits)))
    check_split(split, splits, f"hf:{folder}")
    try:
        slices = datasets.ReadInstruction.from_spec(split).to_absolute({name: len(d) for name, d in splits.items()})
    except ValueError as error:
        raise ParaJaxError(f"hf:{source} has no such rows: {error}") from None
    parts: list[Any] = [splits[x.splitname].select(range(x.from_ or 0, max(x.from_ or 0, x.to))) for x in slices]
    rows = datasets.concatenate_datasets(parts).with_format(None)
    labels = tuple(key for key, feature in rows.features.items() if isinstance(feature, datasets.ClassLabel))
    rows_with_places = ((f"hf:{folder}:{split} row {i}", row) for i, row in enumerate(rows))
    return Table(tuple(rows.column_names), rows_with_places, labels, "", tuple(splits))
