"""Reads a checkpoint's files: the shapes of all tensors at once, and their contents one at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from para_jax.config import read_json
from para_jax.convert.mxfp4 import BLOCKS, BYTES, PACKED, SCALES, widened
from para_jax.errors import ParaJaxError
from para_jax.torch_files import as_numpy, read_torch

INDEX = "model.safetensors.index.json"
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class TensorFiles(Protocol):
    """The shapes, dtypes and contents of a checkpoint's tensors."""

    shape: dict[str, tuple[int, ...]]
    dtype: dict[str, str]

    def read(self, key: str) -> np.ndarray:
        """One tensor. The caller copies it and keeps no reference."""


def open_tensors(folder: Path, spare: tuple[str, ...] = ()) -> TensorFiles:
    """Opens the safetensors files of a folder, or else PyTorch's .bin files. Tensors in MXFP4 are widened.

    Tensors whose names end with one of `spare` may have any dtype; they are left out if it is not supported.

    Raises ParaJaxError if there are no such files, or one is missing, damaged or has an unsupported dtype.
    """
    for index, single, kind in (
        (INDEX, "model.safetensors", SafetensorsFiles),
        ("pytorch_model.bin.index.json", "pytorch_model.bin", TorchFiles),
    ):
        files = [single]
        if (folder / index).is_file() and not (folder / single).is_file():  # transformers prefers the single file, too
            try:
                files = sorted({str(name) for name in read_json(folder / index)["weight_map"].values()})
            except (KeyError, AttributeError, TypeError) as error:
                raise ParaJaxError(
                    f"{folder / index} is damaged: it has no weight_map from tensors to files"
                ) from error
        missing = [name for name in files if not (folder / name).is_file()]
        if not missing:
            return Widened(kind(folder, files, spare))
        if files != [single]:
            raise ParaJaxError(f"{folder} lacks {', '.join(missing)}, which {index} names; download it again")
    raise ParaJaxError(f"{folder} has no weights: neither model.safetensors nor pytorch_model.bin, nor their index")


class SafetensorsFiles:
    """The tensors of safetensors files, mapped into memory."""

    def __init__(self, folder: Path, files: list[str], spare: tuple[str, ...]):
        from safetensors import SafetensorError, safe_open

        self.shape: dict[str, tuple[int, ...]] = {}
        self.dtype: dict[str, str] = {}
        self._place: dict[str, tuple[Path, int]] = {}  # the file, and the first byte in it
        for path in (folder / name for name in files):
            try:
                with safe_open(path, framework="numpy"), path.open("rb") as f:  # raises for a damaged file
                    # A file is eight bytes, a JSON header and the contents.
                    start = 8 + int.from_bytes(f.read(8), "little")
                    header = json.loads(f.read(start - 8))
            except SafetensorError as error:
                raise ParaJaxError(f"{path} is damaged: {error}") from error
            header.pop("__metadata__", None)
            for key, entry in sorted(header.items()):
                known = {**DTYPES, "U8": "uint8"} if key.endswith(PACKED) else DTYPES
                if entry["dtype"] not in known:
                    if key.endswith(spare):
                        continue
                    raise ParaJaxError(f"{path}: {key} is {entry['dtype']}; supported: {', '.join(sorted(DTYPES))}")
                self.shape[key], self.dtype[key] = tuple(entry["shape"]), known[entry["dtype"]]
                self._place[key] = path, start + entry["data_offsets"][0]

    def read(self, key: str) -> np.ndarray:
        """One tensor, as a view of the file.

        The safetensors reader would make two copies. The file is mapped again for every tensor, so that pages already
        read do not accumulate in memory.
        """
        path, offset = self._place[key]
        return np.memmap(path, np.dtype(self.dtype[key]), "r", offset, self.shape[key])


class TorchFiles:
    def __init__(self, folder: Path, files: list[str], spare: tuple[str, ...]):
        self._tensors: dict[str, Any] = {}
        for name in files:
            self._tensors |= read_torch(folder / name, tuple(DTYPES.values()), spare)
        self.shape = {key: tuple(x.shape) for key, x in self._tensors.items()}
        self.dtype = {key: str(x.dtype).removeprefix("torch.") for key, x in self._tensors.items()}

    def read(self, key: str) -> np.ndarray:
        """One tensor, as a view of the file."""
        return as_numpy(self._tensors[key])


class Widened:
    """The tensors of files, with those in MXFP4 under the name and shape of the tensors that they stand for.

    Attributes:
      packed: the names of tensors in MXFP4.
    """

    def __init__(self, files: TensorFiles):
        """Raises ParaJaxError if blocks and scales do not fit."""
        self.files = files
        of_bytes = [name for name, dtype in files.dtype.items() if dtype == "uint8"]
        names = {name: name.removesuffix(end) for name in of_bytes for end in PACKED if name.endswith(end)}
        self.packed = set(names.values())
        self.shape = {name: shape for name, shape in files.shape.items() if name not in names}
        self.dtype = {name: dtype for name, dtype in files.dtype.items() if name not in names}
        for name in sorted(self.packed):
            blocks, scales = (files.shape.get(f"{name}{end}", ()) for end in PACKED)
            if len(blocks) != 4 or blocks[-1] != BYTES or blocks[:-1] != scales:
                raise ParaJaxError(
                    f"{name} in MXFP4 takes {BLOCKS} [experts, outputs, groups, {BYTES}] and {SCALES} [experts, "
                    f"outputs, groups]; the files have {[*blocks]} and {[*scales]}"
                )
            experts, outputs, groups, _ = blocks
            self.shape[name], self.dtype[name] = (experts, 2 * BYTES * groups, outputs), "bfloat16"

    def read(self, key: str) -> np.ndarray:
        """One tensor. One in MXFP4 is widened one expert at a time."""
        if key not in self.packed:
            return self.files.read(key)
        blocks, scales = (self.files.read(f"{key}{end}") for end in PACKED)
        experts, inputs, outputs = self.shape[key]
        found = np.empty((experts, outputs, inputs), ml_dtypes.bfloat16)
        for expert in range(experts):
            found[expert] = widened(blocks[expert], scales[expert])
        return found.swapaxes(1, 2)
