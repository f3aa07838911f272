"""A backbone from a Hugging Face folder and back to one."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (teaches NumPy the name bfloat16)
import numpy as np

from para_jax.adapters.bank import named_leaves
from para_jax.adapters.files import new_folder
from para_jax.backbones.config import BackboneConfig, checkpoint_folder, read_json
from para_jax.backbones.decoder import Backbone, Dtype, compute_dtype, default_stacked
from para_jax.convert import tables
from para_jax.errors import ParaJaxError

FILES = ["*.json", "*.safetensors", "tokenizer*", "*.jinja"]
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class TensorFiles:
    """The tensors of a folder's safetensors files: shapes from the headers, contents one at a time."""

    def __init__(self, folder: Path):
        """Raises ParaJaxError if there are no such files, or one is missing, damaged or of a dtype not supported."""
        from safetensors import SafetensorError, safe_open

        index = folder / "model.safetensors.index.json"
        files = ["model.safetensors"]
        if index.is_file() and not (folder / files[0]).is_file():  # transformers prefers the single file, too
            try:
                files = sorted(set(read_json(index)["weight_map"].values()))
            except (KeyError, AttributeError, TypeError) as error:
                raise ParaJaxError(f"{index} is damaged: it has no weight_map from tensors to files") from error
        missing = [name for name in files if not (folder / name).is_file()]
        if missing:
            raise ParaJaxError(f"{folder} lacks {', '.join(missing)}; only safetensors checkpoints are read")
        self.file: dict[str, Path] = {}
        self.shape: dict[str, tuple[int, ...]] = {}
        self._place: dict[str, tuple[str, int]] = {}  # NumPy's name of the dtype, first byte in the file
        for name in files:
            try:
                with safe_open(folder / name, framework="numpy") as f:
                    for key in f.keys():  # noqa: SIM118  (no mapping)
                        piece = f.get_slice(key)
                        if piece.get_dtype() not in DTYPES:
                            raise ParaJaxError(
                                f"{folder / name}: {key} is {piece.get_dtype()}; supported: {', '.join(sorted(DTYPES))}"
                            )
                        self.file[key], self.shape[key] = folder / name, tuple(piece.get_shape())
                self._place |= _places(folder / name)
            except SafetensorError as error:
                raise ParaJaxError(f"{folder / name} is damaged: {error}") from error

    def read(self, key: str) -> np.ndarray:
        """One tensor, as a view of the file that is to be copied and let go.

        The safetensors reader would make two copies of it. The file is mapped anew for every tensor, so that the
        pages that were read do not add up in memory.
        """
        dtype, offset = self._place[key]
        return np.memmap(self.file[key], np.dtype(dtype), "r", offset, self.shape[key])


def _places(path: Path) -> dict[str, tuple[str, int]]:
    """Where a safetensors file keeps its tensors: it is eight bytes, a JSON header and the contents. Checked before."""
    with path.open("rb") as f:
        size = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(size))
    return {
        key: (DTYPES[entry["dtype"]], 8 + size + entry["data_offsets"][0])
        for key, entry in header.items()
        if key != "__metadata__"
    }


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array that JAX on CPU takes as it is; it copies what does not start at a multiple of 64 bytes."""
    size = math.prod(shape) * dtype.itemsize
    room = np.empty(size + 64, np.uint8)
    return room[-room.ctypes.data % 64 :][:size].view(dtype).reshape(shape)


def load_backbone(path_or_hub_id: str | Path, dtype: Dtype = "auto", stacked: bool | None = None) -> Backbone:
    """See `Backbone.from_pretrained`. Holds the model and one of its tensors in host memory, never more."""
    folder = checkpoint_folder(path_or_hub_id, FILES)
    config = BackboneConfig.from_folder(folder, name=str(path_or_hub_id))
    files = TensorFiles(folder)
    layers = range(config.num_hidden_layers)
    outside, inside = tables.llama(config), [tables.llama(config, layer) for layer in layers]
    _check(folder, files, config, [*outside, *(entry for layer in inside for entry in layer)])

    compute = compute_dtype(dtype)
    stacked = default_stacked() if stacked is None else stacked
    make = partial(Backbone, config, dtype=dtype, stacked=stacked)
    abstract = jax.eval_shape(make, jax.random.key(0))

    def read(entry: tables.Entry) -> jax.Array:
        ours = _aligned(entry.shape, np.dtype(compute))
        entry.join([files.read(part.name) for part in entry.parts], out=ours)
        # Transfers run in the background and hold what they copy: one at a time.
        return jnp.asarray(ours).block_until_ready()

    leaves: dict[str, Any] = {entry.name: read(entry) for entry in outside}
    if stacked:
        for i, entry in enumerate(inside[0]):
            leaf = jnp.zeros(named_leaves(abstract)[f"blocks.{entry.name}"].shape, compute)
            for layer in layers:
                leaf = _put(leaf, read(inside[layer][i]), layer)
            leaves[f"blocks.{entry.name}"] = leaf
    else:
        for layer in layers:
            for entry in inside[layer]:
                leaves[f"blocks.{layer}.{entry.name}"] = read(entry)
    return jax.tree.unflatten(jax.tree.structure(abstract), [leaves[name] for name in named_leaves(abstract)])


@partial(jax.jit, donate_argnums=0)
def _put(stack: jax.Array, x: jax.Array, layer: int) -> jax.Array:
    # As integers: XLA on CPU would widen the whole of a bfloat16 stack to float32 and back for every layer.
    integer = jnp.dtype(f"uint{8 * stack.dtype.itemsize}")
    bits, new = (jax.lax.bitcast_convert_type(a, integer) for a in (stack, x))
    bits = jax.lax.dynamic_update_index_in_dim(bits, new, layer, 0)
    return jax.lax.bitcast_convert_type(bits, stack.dtype)


def _check(folder: Path, files: TensorFiles, config: BackboneConfig, entries: list[tables.Entry]) -> None:
    """Every tensor accounted for, or one error that lists all that is wrong."""
    parts = {part.name: part for entry in entries for part in entry.parts}
    # Old checkpoints carry the rotary frequencies; tied ones may carry the embedding twice.
    spare = {name for name in files.shape if name.endswith("rotary_emb.inv_freq")}
    if config.tie_word_embeddings:
        spare.add("lm_head.weight")
    problems = [f"{name} {list(part.shape)} is missing" for name, part in parts.items() if name not in files.shape]
    problems += [f"{name} is not expected" for name in files.shape if name not in parts and name not in spare]
    problems += [
        f"{name} is {list(files.shape[name])} and should be {list(part.shape)}"
        for name, part in parts.items()
        if name in files.shape and files.shape[name] != part.shape
    ]
    twice = not problems and config.tie_word_embeddings and "lm_head.weight" in files.shape
    if twice and not np.array_equal(files.read("lm_head.weight"), files.read("model.embed_tokens.weight")):
        problems = ["lm_head.weight is not the embedding, so tie_word_embeddings should be false"]
    if problems:
        listed = "\n  ".join(problems)
        raise ParaJaxError(f"{folder}: the tensors do not fit config.json:\n  {listed}")


def save_backbone(backbone: Backbone, folder: str | Path, *, dtype: str | None = None, overwrite: bool = False) -> None:
    """Writes config.json and model.safetensors, which transformers opens; `dtype` casts the weights.

    Raises ParaJaxError if the folder exists and `overwrite` is False or it is no checkpoint, or if it cannot be
    written.
    """
    from safetensors.numpy import save_file

    config = backbone.config
    tensors: dict[str, np.ndarray] = {}
    leaves = named_leaves(backbone)
    for layer in (None, *range(config.num_hidden_layers)):
        for entry in tables.llama(config, layer):
            if layer is None:
                leaf = leaves[entry.name]
            elif backbone.stacked:
                leaf = leaves[f"blocks.{entry.name}"][layer]
            else:
                leaf = leaves[f"blocks.{layer}.{entry.name}"]
            tensors |= entry.split(np.asarray(leaf if dtype is None else leaf.astype(dtype)))
    written = dtype or str(backbone.dtype)
    with new_folder(folder, "config.json", overwrite=overwrite) as partial_folder:
        fields = {**config.to_hf(), "dtype": written}
        (partial_folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
        contiguous = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
        save_file(contiguous, partial_folder / "model.safetensors", metadata={"format": "pt"})
