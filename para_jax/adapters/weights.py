"""The files of an adapter's folder: which there are, and the tensors in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from para_jax.errors import ParaJaxError
from para_jax.files import left_of
from para_jax.torch_files import as_numpy, read_torch

CONFIG, WEIGHTS, TORCH_WEIGHTS = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
LFS = b"version https://git-lfs"


class Weights(NamedTuple):
    """The tensors of one file, by the names that they have there, and its metadata."""

    path: Path
    tensors: dict[str, np.ndarray]
    metadata: dict[str, str]


def read_config(folder: Path) -> dict[str, Any]:
    """The fields of adapter_config.json.

    Raises ParaJaxError if the folder is no adapter, and says which is the adapter where that can be told; and if the
    file is damaged or does not say the method.
    """
    if not (folder / CONFIG).is_file() or not any((folder / name).is_file() for name in (WEIGHTS, TORCH_WEIGHTS)):
        raise _no_adapter(folder)
    _check_file(folder / CONFIG)
    try:
        fields = json.loads((folder / CONFIG).read_text(encoding="utf-8-sig"))
    except ValueError as error:  # no JSON, or no text
        raise ParaJaxError(f"{folder / CONFIG} is damaged: {error}") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("peft_type"), str):
        raise ParaJaxError(f"{folder / CONFIG} has no peft_type, so its method is not known")
    return fields


def read_weights(folder: Path) -> Weights:
    """The tensors of adapter_model.safetensors, or else of adapter_model.bin, in which nothing is executed.

    Raises ParaJaxError if the file is damaged or empty, or has a tensor that is no float of 16, 32 or 64 bits.
    """
    path = folder / (WEIGHTS if (folder / WEIGHTS).is_file() else TORCH_WEIGHTS)
    _check_file(path)
    weights = _safetensors(path) if path.name == WEIGHTS else _torch(path)
    if not weights.tensors:
        raise ParaJaxError(
            f"{path} is empty: it holds no tensors. Whatever saved it was not given the adapter's weights (under "
            "DeepSpeed ZeRO-3 and FSDP they have to be gathered first); save it again from a model that has them, or "
            "from the run's own checkpoint"
        )
    return weights


def refuse_nonfinite(weights: Weights) -> None:
    """Raises ParaJaxError for tensors with NaN or infinite values, in float32, naming them and the file."""
    bad = {}
    for name, x in weights.tensors.items():
        with np.errstate(over="ignore"):  # float64 may hold what float32 cannot
            broken = np.count_nonzero(~np.isfinite(x.astype(np.float32)))
        if broken:
            bad[name] = f"{name} has {broken} NaN or infinite values of {x.size}"
    if bad:
        more = f"\n  and {len(bad) - 5} tensors more" if len(bad) > 5 else ""
        listed = "\n  ".join(list(bad.values())[:5])
        raise ParaJaxError(
            f"{weights.path}: an adapter with NaN or infinite values answers nonsense. Its training diverged, or it "
            "was saved in a dtype too small for it: take an earlier checkpoint, or tune it again with a lower learning "
            "rate. To look at it all the same: --allow-nan of generate and evaluate, or check_finite=False\n  "
            f"{listed}{more}"
        )


def _check_file(path: Path) -> None:
    """Raises ParaJaxError for a file that cannot be read, or whose contents did not come along."""
    try:
        with path.open("rb") as f:
            begin = f.read(len(LFS))
    except OSError as error:
        raise ParaJaxError(f"{path} cannot be read: {error}") from error
    if not begin:
        raise ParaJaxError(f"{path} is empty, 0 bytes: the save or the download was cut off; copy the adapter again")
    if begin == LFS:
        raise ParaJaxError(f"{path} is a pointer of Git LFS and not the file itself; run: git lfs pull")


def _safetensors(path: Path) -> Weights:
    from safetensors import SafetensorError, safe_open

    tensors = {}
    try:
        with safe_open(path, framework="numpy") as f:
            names = f.keys()  # it is no mapping
            for key in names:
                dtype = f.get_slice(key).get_dtype()
                if dtype not in DTYPES:
                    raise _no_float(path, key, dtype)
                tensors[key] = f.get_tensor(key)
            return Weights(path, tensors, f.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise ParaJaxError(f"{path} is damaged: {error}") from error


def _no_float(path: Path, key: str, dtype: str) -> ParaJaxError:
    out = "save it in one of these"
    if ".base_layer." in key:
        out = "it is a weight of the model itself. Save the adapter alone: model.save_pretrained(folder)"
    return ParaJaxError(f"{path}: {key} is {dtype}; adapters are read in float32, float16 and bfloat16; {out}")


def _torch(path: Path) -> Weights:
    tensors = read_torch(path, tuple(DTYPES.values()))
    # What is not contiguous, such as a transposed matrix, is a view in torch's memory as well.
    return Weights(path, {str(key): as_numpy(x.detach()) for key, x in tensors.items()}, {})


def adapters_below(folder: Path) -> list[str]:
    """The names of the folders in this one that are adapters."""
    return [path.parent.name for path in sorted(folder.glob(f"[!.]*/{CONFIG}"))]


def _no_adapter(folder: Path) -> ParaJaxError:
    """What this is instead, and what to give."""
    if folder.is_file():
        return ParaJaxError(f"{folder} is a file; an adapter is the folder with {CONFIG}: give {folder.parent}")
    if not folder.exists():
        hub = str(folder).count("/") == 1 and not str(folder).startswith((".", "~", "/"))
        load = f". For an adapter on the Hugging Face hub: hf download {folder} --local-dir DIR" if hub else ""
        left = "".join(f". A process that was killed while it wrote it left {path}" for path in left_of(folder))
        return ParaJaxError(f"there is no folder {folder}; give an adapter's folder, which holds {CONFIG}{load}{left}")
    if names := adapters_below(folder):
        some = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
        return ParaJaxError(f"{folder} is not an adapter but holds adapters: {some}; give {folder / names[0]}, say")
    if (folder / "config.json").is_file() and not (folder / CONFIG).is_file():
        return ParaJaxError(f"{folder} is not an adapter but a whole model; give it as the backbone")
    lacks = [] if (folder / CONFIG).is_file() else [CONFIG]
    lacks += [] if any((folder / name).is_file() for name in (WEIGHTS, TORCH_WEIGHTS)) else [WEIGHTS]
    return ParaJaxError(f"{folder} is not an adapter: it has no {' and no '.join(lacks)}")
