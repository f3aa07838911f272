"""Rows of a folder, or of a data set of the hub, that the library `datasets` of Hugging Face reads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from para_jax import hub
from para_jax.data.table import Table, check_split
from para_jax.errors import ParaJaxError


def table(source: str) -> Table:
    """The rows of FOLDER[:SPLIT] or OWNER/NAME[/CONFIG][:SPLIT]; the split is train unless it is given, and may be
    sliced: train[:90%].

    The folder is one of `save_to_disk`, or one of json, jsonl, parquet, arrow or csv files. What is no folder here is
    downloaded from the hub. Raises ParaJaxError if `datasets` is not installed, if the folder is none of these, if the
    hub's data set cannot be had, and for an unknown split.
    """
    folder, _, split = (source, "", "") if Path(source).is_dir() else source.partition(":")
    here, names = Path(folder).is_dir(), folder.split("/")
    if not here and (len(names) > 3 or not all(re.fullmatch(r"\w[\w.-]*", name) for name in names)):
        raise ParaJaxError(f"hf:{source}: {folder} is no folder, nor a data set of the hub, OWNER/NAME[/CONFIG]")
    try:
        import datasets
    except ImportError as error:
        raise ParaJaxError(f"hf:{source} needs Hugging Face's datasets: pip install datasets ({error})") from None
    try:
        if not here:
            found = datasets.load_dataset("/".join(names[:2]), *names[2:])
        else:
            saved = any((Path(folder) / name).is_file() for name in ("state.json", "dataset_dict.json"))
            found = datasets.load_from_disk(folder) if saved else datasets.load_dataset(folder)
    except Exception as error:  # what its readers of files raise differs from format to format
        if not here:
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
    placed = ((f"hf:{folder}:{split} row {i}", row) for i, row in enumerate(rows))
    return Table(tuple(rows.column_names), placed, labels, "", tuple(splits))
