"""A backbone from a Hugging Face folder and back to one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (teaches NumPy the names bfloat16 and int4)
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from para_jax.adapters.adapter import named_leaves
from para_jax.adapters.files import TEMPLATE
from para_jax.config import CONFIG, GENERATION, BackboneConfig, checkpoint_folder
from para_jax.convert.renamed import as_named, check_tensors
from para_jax.convert.tensors import INDEX, open_tensors
from para_jax.errors import ParaJaxError, unknown
from para_jax.families.writing import hf_fields
from para_jax.files import as_json, copy, new_folder, safetensors, write_file
from para_jax.parameters import Parameter, table
from para_jax.quantization import QUANTIZED, Quantize, quantized

FILES = ["*.json", "model*.safetensors", "tokenizer*", "*.jinja"]
TORCH_FILES = ["*.json", "pytorch_model*.bin", "tokenizer*", "*.jinja"]
WRITTEN = ("float32", "bfloat16", "float16")
# What belongs to a checkpoint and says nothing about its weights.
BESIDE = (GENERATION, "LICENSE*", "NOTICE*")
TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*",
             "additional_chat_templates")  # fmt: skip


def fetched(path_or_hub_id: str | Path) -> Path:
    """The folder of a checkpoint; of a hub id its safetensors are downloaded, or its .bin files if it has none."""
    folder = checkpoint_folder(path_or_hub_id, FILES)
    if not Path(path_or_hub_id).expanduser().is_dir() and not any(folder.glob("*.safetensors")):
        return checkpoint_folder(path_or_hub_id, TORCH_FILES)
    return folder


class Weights(Protocol):
    """What is known here of a `Backbone`, a pytree whose leaves have the names of `para_jax.parameters`."""

    config: BackboneConfig
    quantize: Quantize | None
    stacked: bool

    @property
    def dtype(self) -> jnp.dtype: ...


W = TypeVar("W", bound=Weights)


def load_weights(folder: Path, shapes: W, check_finite: bool = False) -> W:
    """The weights of a folder, as `shapes` says. A host holds its devices' part of the model and of one tensor."""
    config, quantize, compute, stacked = shapes.config, shapes.quantize, shapes.dtype, shapes.stacked
    layers = range(config.num_hidden_layers)
    outside, inside = table(config), [table(config, layer) for layer in layers]
    every = [*outside, *(entry for layer in inside for entry in layer)]
    names = {part.name: part.tensor_shape for entry in every for part in entry.parts}
    files = as_named(open_tensors(folder), config, names)
    check_tensors(folder, files, config, names)
    abstract = named_leaves(shapes)
    where: dict[str, Any] = {name: x.sharding for name, x in abstract.items()}

    def read(entry: Parameter, at: str = "") -> Iterator[tuple[str, jax.Array]]:
        """Our tensor of this name, or what it is quantised to."""
        few = abstract[f"{at}{entry.name}"].dtype != compute
        tensors = [part.of(files.read(part.name)) for part in entry.parts]

        @cache  # several devices may have the same
        def made(*ends: tuple[int, int]) -> tuple[np.ndarray, ...]:
            ours = np.empty([stop - start for start, stop in ends], "float32" if few else compute)
            with np.errstate(over="ignore"):  # looked for in the next line
                entry.block(tensors, tuple(slice(*x) for x in ends), out=ours)
            _check_range(folder, entry, tensors, ours)
            if check_finite and not np.isfinite(ours.astype(np.float32)).all():
                raise ParaJaxError(f"{folder}: {', '.join(p.name for p in entry.parts)} has values that are no number")
            return quantized(ours, QUANTIZED[quantize]) if few and quantize is not None else (ours,)

        def block(which: int, index: tuple[slice, ...]) -> np.ndarray:
            ends = [x.indices(n)[:2] for x, n in zip(index, entry.shape, strict=True)]
            if not few:
                return made(*ends)[which]
            # A scale is of a whole row of inputs, whatever part of it a device gets.
            return made(*ends[:-1], (0, entry.shape[-1]))[which][..., index[-1]]

        for which, name in enumerate((entry.name, entry.scale) if few else (entry.name,)):
            leaf, sharding = abstract[f"{at}{name}"], where[f"{at}{name}"]
            # Transfers run in the background and hold what they copy: one at a time.
            shape = leaf.shape[leaf.ndim - len(entry.shape) :]
            yield f"{at}{name}", _placed(shape, sharding, partial(block, which)).block_until_ready()

    leaves = dict(leaf for entry in outside for leaf in read(entry))
    if stacked:
        for i in range(len(inside[0])):
            for layer in layers:
                for name, x in read(inside[layer][i], "blocks."):
                    empty = partial(jnp.zeros, abstract[name].shape, x.dtype, device=where[name])
                    leaves[name] = _put(leaves[name] if layer else empty(), x, layer, where[name])
    else:
        for layer in layers:
            leaves |= dict(leaf for entry in inside[layer] for leaf in read(entry, f"blocks.{layer}."))
    return jax.tree.unflatten(jax.tree.structure(shapes), [leaves[name] for name in abstract])


def _check_range(folder: Path, entry: Parameter, tensors: list[np.ndarray], ours: np.ndarray) -> None:
    """Raises ParaJaxError if float16 cannot hold what `ours` was made of."""
    if ours.dtype != np.float16 or not np.isinf(ours).any():
        return
    with np.errstate(over="ignore"):
        beyond = [p.name for p, x in zip(entry.parts, tensors, strict=True) if np.isinf(x.astype(np.float16)).any()]
    raise ParaJaxError(
        f"{folder}: {', '.join(beyond)} has weights beyond float16's range, which ends at 65504; load it in float32 "
        "(--dtype float32)"
    )


def _placed(shape: tuple[int, ...], where: NamedSharding | None, block: Callable[[Any], np.ndarray]) -> jax.Array:
    """The whole of `block` on the default device, or on each device its own; `where` may be of a stack of these."""
    if where is None:
        return jnp.asarray(block((slice(None),) * len(shape)))
    if len(where.spec) > len(shape):
        where = NamedSharding(where.mesh, P(*where.spec[1:]))
    return jax.make_array_from_callback(shape, where, block)


@partial(jax.jit, donate_argnums=0, static_argnums=3)
def _put(stack: jax.Array, x: jax.Array, layer: int, where: NamedSharding | None) -> jax.Array:
    if where is not None:
        stack = jax.lax.with_sharding_constraint(stack, where)
    if not jnp.issubdtype(stack.dtype, jnp.floating):
        return jax.lax.dynamic_update_index_in_dim(stack, x, layer, 0)
    # As integers: XLA on CPU would widen the whole of a bfloat16 stack to float32 and back for every layer.
    integer = jnp.dtype(f"uint{8 * stack.dtype.itemsize}")
    bits, new = (jax.lax.bitcast_convert_type(a, integer) for a in (stack, x))
    bits = jax.lax.dynamic_update_index_in_dim(bits, new, layer, 0)
    return jax.lax.bitcast_convert_type(bits, stack.dtype)


def save_backbone(
    backbone: Weights,
    folder: str | Path,
    *,
    dtype: str | None = None,
    like: str | Path | None = None,
    tokenizer: Any = None,
    chat_template: str | None = None,
    shard_size: int = 5_000_000_000,
    overwrite: bool = False,
) -> None:
    """Writes a checkpoint that transformers opens: config.json and safetensors.

    Args:
      dtype: what the weights are cast to; their own, if None.
      like: the folder they came from, whose tokenizer and generation config are copied.
      tokenizer: of transformers, in place of the one in `like`.
      chat_template: the tokenizer's, in place of the one in `like`.
      shard_size: the most bytes of a file, unless one tensor (or all experts of a layer) is larger. A larger model is
        several files with an index; one is in memory at a time.

    Raises ParaJaxError if the folder exists and `overwrite` is False or it is no checkpoint, if it cannot be
    written, if the weights are quantised, or if a weight is too large for the dtype.
    """
    config, leaves = backbone.config, named_leaves(backbone)
    if backbone.quantize is not None:
        raise ParaJaxError("a quantised backbone has lost what its weights were; load it without quantize to write it")
    if dtype not in (None, *WRITTEN):
        raise unknown("dtype", dtype, WRITTEN)
    every = [(layer, e) for layer in (None, *range(config.num_hidden_layers)) for e in table(config, layer)]
    written = np.dtype(dtype or str(backbone.dtype))
    files = _files([(layer, entry, entry.size * written.itemsize) for layer, entry in every], shard_size)
    with new_folder(folder, CONFIG, overwrite=overwrite) as partial_folder:
        place: dict[str, str] = {}
        for number, some in enumerate(files, 1):
            name = f"model-{number:05}-of-{len(files):05}.safetensors" if len(files) > 1 else "model.safetensors"
            tensors: dict[str, np.ndarray] = {}
            for layer, entry in some:
                leaf = leaves[entry.name] if layer is None else _of_layer(backbone, leaves, layer, entry.name)
                cast = np.asarray(leaf.astype(written))
                if np.isinf(cast).any() and not jnp.isinf(leaf).any():
                    raise ParaJaxError(f"{entry.parts[0].name} has a weight beyond {written}; choose another dtype")
                tensors |= entry.tensors(cast)
            write_file(partial_folder / name, safetensors(tensors, {"format": "pt"}))
            place |= dict.fromkeys(tensors, name)
        if len(files) > 1:
            total = sum(entry.size for _, entry in every) * written.itemsize
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(place.items()))}
            write_file(partial_folder / INDEX, [as_json(index, 2).encode()])
        # auto_map names code that stands beside the original; transformers has the class.
        left_out = ("torch_dtype", "auto_map")
        fields = {k: v for k, v in hf_fields(config).items() if k not in left_out} | {"dtype": str(written)}
        write_file(partial_folder / CONFIG, [as_json(fields, 2).encode()])
        _copy_beside(partial_folder, like, tokenizer, chat_template)


def _copy_beside(folder: Path, like: str | Path | None, tokenizer: Any, chat_template: str | None) -> None:
    """What belongs to a checkpoint beside its weights, of another folder or as it is given."""
    patterns = (*BESIDE, *(TOKENIZER if tokenizer is None else ()))
    for pattern in patterns if like is not None else ():
        for path in Path(like or "").glob(pattern):
            copy(path, folder / path.name)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if chat_template is not None:
        write_file(folder / TEMPLATE, [chat_template.encode()])


def _of_layer(backbone: Weights, leaves: dict[str, Any], layer: int, name: str) -> Any:
    return leaves[f"blocks.{name}"][layer] if backbone.stacked else leaves[f"blocks.{layer}.{name}"]


def _files(sized: list[tuple[int | None, Parameter, int]], most: int) -> list[list[tuple[int | None, Parameter]]]:
    """Entries in files of at most so many bytes; one that is larger has a file of its own."""
    files: list[list[tuple[int | None, Parameter]]] = []
    left = 0
    for layer, entry, size in sized:
        if size > left or not files:
            files.append([])
            left = most
        files[-1].append((layer, entry))
        left -= size
    return files
