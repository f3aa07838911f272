"""Reads the files of an adapter's folder: the config's fields and the tensors."""

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
    """The tensors of one file, by their names in it, and its metadata."""

    path: Path
    tensors: dict[str, np.ndarray]
    metadata: dict[str, str]


def read_config(folder: Path) -> dict[str, Any]:
    """The fields of adapter_config.json.

    Raises ParaJaxError if the folder is not an adapter, naming the adapter nearby if there is one, and if the file is
    damaged or has no method.
    """
    if not (folder / CONFIG).is_file() or not any((folder / name).is_file() for name in (WEIGHTS, TORCH_WEIGHTS)):
        raise _not_an_adapter(folder)
    _check_file(folder / CONFIG)
    try:
        fields = json.loads((folder / CONFIG).read_text(encoding="utf-8-sig"))
    except ValueError as error:  # neither JSON nor text
        raise ParaJaxError(f"{folder / CONFIG} is damaged: {error}") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("peft_type"), str):
        raise ParaJaxError(f"{folder / CONFIG} has no peft_type, so its method is unknown")
    return fields


def read_weights(folder: Path) -> Weights:
    """The tensors of adapter_model.safetensors, or else of adapter_model.bin, whose code is never executed.

    Raises ParaJaxError if the file is damaged or empty, or has a tensor that is not a float of 16, 32 or 64 bits.
    """
    path = folder / (WEIGHTS if (folder / WEIGHTS).is_file() else TORCH_WEIGHTS)
    _check_file(path)
    if path.name == WEIGHTS:
        weights = _safetensors(path)
    else:
        tensors = read_torch(path, tuple(DTYPES.values()))
        weights = Weights(path, {str(key): as_numpy(x.detach()) for key, x in tensors.items()}, {})
    if not weights.tensors:
        raise ParaJaxError(
            f"{path} is empty: it has no tensors. The adapter's weights were not there when it was saved (with "
            "DeepSpeed ZeRO-3 and FSDP they must be gathered first); save it again from a model that has them, or "
            "from the run's own checkpoint"
        )
    return weights


def refuse_nonfinite(weights: Weights) -> None:
    """Raises ParaJaxError, naming the file and the tensors, for NaN or infinite values in float32."""
    bad = {}
    for name, x in weights.tensors.items():
        with np.errstate(over="ignore"):  # float64 values may be beyond float32's range
            broken = np.count_nonzero(~np.isfinite(x.astype(np.float32)))
        if broken:
            bad[name] = f"{name} has {broken} NaN or infinite values of {x.size}"
    if bad:
        more = f"\n  and {len(bad) - 5} more tensors" if len(bad) > 5 else ""
        listed = "\n  ".join(list(bad.values())[:5])
        raise ParaJaxError(
            f"{weights.path}: an adapter with NaN or infinite values gives useless answers. Its training diverged, or "
            "it was saved in a dtype too small for it: use an earlier checkpoint, or tune it again with a lower "
            "learning rate. To load it anyway: --allow-nan of generate and evaluate, or check_finite=False\n  "
            f"{listed}{more}"
        )


def _check_file(path: Path) -> None:
    """Raises ParaJaxError for a file that cannot be read, is empty, or is a Git LFS pointer."""
    try:
        with path.open("rb") as f:
            begin = f.read(len(LFS))
    except OSError as error:
        raise ParaJaxError(f"{path} cannot be read: {error}") from error
    if not begin:
        raise ParaJaxError(f"{path} is empty, 0 bytes: the save or download is incomplete; copy the adapter again")
    if begin == LFS:
        raise ParaJaxError(f"{path} is a Git LFS pointer instead of the file; run: git lfs pull")


def _safetensors(path: Path) -> Weights:
    from safetensors import SafetensorError, safe_open

    tensors = {}
    try:
        with safe_open(path, framework="numpy") as f:
            for key in f.keys():  # noqa: SIM118  (not a mapping)
                dtype = f.get_slice(key).get_dtype()
                if dtype not in DTYPES:
                    own = "it is a weight of the model itself. Save only the adapter: model.save_pretrained(folder)"
                    fix = own if ".base_layer." in key else "save it in one of these"
                    raise ParaJaxError(
                        f"{path}: {key} is {dtype}; adapters are read in float32, float16 and bfloat16; {fix}"
                    )
                tensors[key] = f.get_tensor(key)
            return Weights(path, tensors, f.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise ParaJaxError(f"{path} is damaged: {error}") from error


def adapters_below(folder: Path) -> list[str]:
    return [path.parent.name for path in sorted(folder.glob(f"[!.]*/{CONFIG}"))]


def _not_an_adapter(folder: Path) -> ParaJaxError:
    """The error that explains what the folder is instead, and what to give."""
    if folder.is_file():
        return ParaJaxError(f"{folder} is a file; an adapter is the folder with {CONFIG}: give {folder.parent}")
    if not folder.exists():
        hub = str(folder).count("/") == 1 and not str(folder).startswith((".", "~", "/"))
        load = f". For an adapter on the Hugging Face hub: hf download {folder} --local-dir DIR" if hub else ""
        left = "".join(f". A process that was killed while writing it left {path}" for path in left_of(folder))
        return ParaJaxError(f"there is no folder {folder}; give an adapter's folder, which has {CONFIG}{load}{left}")
    if names := adapters_below(folder):
        some = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
        return ParaJaxError(f"{folder} is not an adapter but contains adapters: {some}; give e.g. {folder / names[0]}")
    if (folder / "config.json").is_file() and not (folder / CONFIG).is_file():
        return ParaJaxError(f"{folder} is not an adapter but a whole model; give it as the backbone")
    lacks = [] if (folder / CONFIG).is_file() else [CONFIG]
    lacks += [] if any((folder / name).is_file() for name in (WEIGHTS, TORCH_WEIGHTS)) else [WEIGHTS]
    return ParaJaxError(f"{folder} is not an adapter: it has no {' and no '.join(lacks)}")
