"""An adapter as a folder: adapter_config.json and adapter_model.safetensors.

adapter_config.json holds `peft_type` (the method), the method's own hyper-parameters, `base_model_name_or_path`,
`base_model` (the sizes that have to match) and `para_jax_version`. The weights are float32, a tensor a name, with
the layers stacked on the first axis.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from para_jax.adapters.bank import Adapter, named_leaves
from para_jax.adapters.method import BackboneShape, config_from_dict
from para_jax.errors import ParaJaxError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OURS = ("peft_type", "base_model_name_or_path", "base_model", "para_jax_version")


def save_adapter(adapter: Adapter, folder: str | Path, base: BackboneShape, *, overwrite: bool = False) -> None:
    """Writes an adapter so that `load_adapter` gives it back bit for bit.

    The folder appears whole or not at all: it is written beside its place and renamed. Raises ParaJaxError if the
    folder exists and `overwrite` is False; what it held is removed only once its successor is complete.
    """
    from safetensors.numpy import save_file

    from para_jax import __version__

    config = {
        "peft_type": adapter.config.method.upper(),
        **dataclasses.asdict(adapter.config),  # type: ignore[call-overload]
        "base_model_name_or_path": getattr(base, "name", ""),
        "base_model": base_sizes(base),
        "para_jax_version": __version__,
    }
    with new_folder(folder, overwrite=overwrite) as partial:
        (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        save_file({k: np.asarray(v) for k, v in adapter.tensors().items()}, partial / WEIGHTS)


def load_adapter(folder: str | Path, shape: BackboneShape) -> Adapter:
    """Reads an adapter for a backbone of this shape.

    Raises ParaJaxError if the folder is no adapter, names an unknown method or option, was made for a backbone of
    other sizes, or holds a missing, extra or misshapen tensor (all of them are listed).
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    folder = Path(folder)
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise ParaJaxError(f"{folder} is not an adapter: it has no {' and no '.join(missing)}")
    try:
        fields = json.loads((folder / CONFIG).read_text())
        tensors = load_file(folder / WEIGHTS)
    except (json.JSONDecodeError, SafetensorError) as error:
        raise ParaJaxError(f"{folder} is damaged: {error}") from error
    if "peft_type" not in fields:
        raise ParaJaxError(f"{folder / CONFIG} has no peft_type, so its method is not known")
    wanted, made_for = base_sizes(shape), fields.get("base_model")
    if made_for != wanted:
        raise ParaJaxError(
            f"{folder} was made for another backbone ({fields.get('base_model_name_or_path') or 'unnamed'}: "
            f"{_differences(made_for or {}, wanted)}); load the backbone it was tuned on, or tune it again"
        )
    options = {k: v for k, v in fields.items() if k not in OURS}
    config = config_from_dict(fields["peft_type"].lower(), options)
    abstract = jax.eval_shape(lambda key: Adapter.create(config, shape, key), jax.random.key(0)).layers
    expected = named_leaves(abstract)
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    problems += [f"{name} is not expected" for name in tensors if name not in expected]
    for name, x in tensors.items():
        if name in expected and (x.shape != expected[name].shape or x.dtype != np.float32):
            problems.append(f"{name} is {x.dtype}{list(x.shape)}, not float32{list(expected[name].shape)}")
    if problems:
        raise ParaJaxError(f"{folder / WEIGHTS}: " + "; ".join(problems))
    leaves = [jnp.asarray(tensors[name]) for name in expected]
    return Adapter(config, jax.tree.unflatten(jax.tree.structure(abstract), leaves))


def base_sizes(shape: BackboneShape) -> dict[str, Any]:
    """The sizes of a backbone that an adapter depends on."""
    return {
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_hidden_layers,
        "sites": {name: list(site) for name, site in shape.sites.items()},
    }


def _differences(made_for: dict[str, Any], wanted: dict[str, Any]) -> str:
    keys = [k for k in wanted if made_for.get(k) != wanted[k]]
    return ", ".join(f"{k} {made_for.get(k)} there and {wanted[k]} here" for k in keys)


@contextmanager
def new_folder(folder: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to fill that takes its final name only when the block ends without an error."""
    folder = Path(folder)
    if folder.exists() and not overwrite:
        raise ParaJaxError(f"{folder} exists; choose another folder, or pass overwrite")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        partial.chmod(0o755)
        yield partial
        if folder.exists():
            previous = partial.with_name(partial.name + "-previous")
            os.replace(folder, previous)
            os.replace(partial, folder)
            shutil.rmtree(previous)
        else:
            os.replace(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
