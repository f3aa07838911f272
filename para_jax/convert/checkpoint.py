"""Loads a backbone's weights from a Hugging Face folder, and saves a backbone as one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (teaches NumPy the names bfloat16 and int4)
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from para_jax.adapters.adapter import named_leaves
from para_jax.adapters.files import TEMPLATE
from para_jax.config import CONFIG, GENERATION, BackboneConfig, checkpoint_folder
from para_jax.convert.renamed import Renamed, as_named, check_tensors
from para_jax.convert.tensors import INDEX, open_tensors
from para_jax.convert.wrapped import Unread, cast
from para_jax.errors import ParaJaxError, check_known
from para_jax.families.wrappers import QUANTIZED as FORMATS
from para_jax.families.wrappers import Wrapper, wrapper_of
from para_jax.families.writing import hf_fields, with_dtype
from para_jax.files import as_json, copy, new_folder, safetensors, write_file
from para_jax.parameters import Parameter, leaf, names_of, table
from para_jax.quantization import QUANTIZED, Quantize, quantized

FILES = ["*.json", "model*.safetensors", "tokenizer*", "*.jinja"]
TORCH_FILES = ["*.json", "pytorch_model*.bin", "tokenizer*", "*.jinja"]
WRITTEN = ("float32", "bfloat16", "float16")
# Other files of a checkpoint.
OTHER_FILES = (GENERATION, "LICENSE*", "NOTICE*")
TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*",
             "additional_chat_templates")  # fmt: skip
PROCESSOR = ("*processor_config.json",)  # for images and audio


def fetched(path_or_hub_id: str | Path) -> Path:
    """The folder of a checkpoint. For a hub id, downloads its safetensors, or its .bin files if it has none."""
    folder = checkpoint_folder(path_or_hub_id, FILES)
    if not Path(path_or_hub_id).expanduser().is_dir() and not any(folder.glob("*.safetensors")):
        return checkpoint_folder(path_or_hub_id, TORCH_FILES)
    return folder


class Weights(Protocol):
    """The part of `Backbone` that this module needs: a pytree whose leaves have the names of `para_jax.parameters`."""

    config: BackboneConfig
    quantize: Quantize | None
    stacked: bool

    @property
    def dtype(self) -> jnp.dtype: ...


W = TypeVar("W", bound=Weights)
Tensors = Mapping[str, np.ndarray | Unread]


def load_weights(folder: Path, shapes: W, check_finite: bool = False) -> W:
    """Reads the weights of a folder into the shapes, dtypes and shardings of `shapes`.

    A host's memory holds its devices' shards and its part of one more tensor.
    """
    config, quantize, compute, stacked = shapes.config, shapes.quantize, shapes.dtype, shapes.stacked
    layers = range(config.num_hidden_layers)
    outside, inside = table(config), [table(config, layer) for layer in layers]
    names = _shapes(config)
    files = as_named(folder, open_tensors(folder, names_of(config).spare), config, names)
    check_tensors(folder, files, config, names)
    abstract = named_leaves(shapes)
    shardings: dict[str, Any] = {name: x.sharding for name, x in abstract.items()}

    def read(entry: Parameter, at: str = "") -> Iterator[tuple[str, jax.Array]]:
        """One leaf by name, or the two leaves that it is quantized to: values and scales."""
        is_quantized = abstract[f"{at}{entry.name}"].dtype != compute
        stored = {name: files.read(name) for name in dict.fromkeys(part.name for part in entry.parts)}
        tensors = [part.of(stored[part.name]) for part in entry.parts]

        @cache  # several devices may need the same block
        def convert(*ends: tuple[int, int]) -> tuple[np.ndarray, ...]:
            ours = np.empty([stop - start for start, stop in ends], "float32" if is_quantized else compute)
            with np.errstate(over="ignore"):  # `_check_range` checks for overflow
                entry.block(tensors, tuple(slice(*x) for x in ends), out=ours)
            _check_range(folder, entry, tensors, ours)
            if check_finite and not np.isfinite(ours.astype(np.float32)).all():
                raise ParaJaxError(f"{folder}: {', '.join(p.name for p in entry.parts)} has NaN or infinite values")
            return quantized(ours, QUANTIZED[quantize]) if is_quantized and quantize is not None else (ours,)

        def block(which: int, index: tuple[slice, ...]) -> np.ndarray:
            ends = [x.indices(n)[:2] for x, n in zip(index, entry.shape, strict=True)]
            if not is_quantized:
                return convert(*ends)[which]
            # A scale is computed from all inputs, even if a device gets only some of them.
            return convert(*ends[:-1], (0, entry.shape[-1]))[which][..., index[-1]]

        for which, name in enumerate((entry.name, entry.scale) if is_quantized else (entry.name,)):
            array, sharding = abstract[f"{at}{name}"], shardings[f"{at}{name}"]
            shape = array.shape[array.ndim - len(entry.shape) :]
            # A transfer keeps its source in memory until it is done, so one runs at a time.
            yield f"{at}{name}", _to_devices(shape, sharding, partial(block, which)).block_until_ready()

    leaves = dict(pair for entry in outside for pair in read(entry))
    if stacked:
        for stack in config.stacks:
            at = f"blocks.{stack.name}{'.' if stack.name else ''}"
            for i in range(len(inside[stack.layers[0]])):
                for index, layer in enumerate(stack.layers):
                    for name, x in read(inside[layer][i], at):
                        empty = partial(jnp.zeros, abstract[name].shape, x.dtype, device=shardings[name])
                        leaves[name] = _put(leaves[name] if index else empty(), x, index, shardings[name])
    else:
        for layer in layers:
            leaves |= dict(pair for entry in inside[layer] for pair in read(entry, f"blocks.{layer}."))
    return jax.tree.unflatten(jax.tree.structure(shapes), [leaves[name] for name in abstract])


def _check_range(folder: Path, entry: Parameter, tensors: list[np.ndarray], ours: np.ndarray) -> None:
    """Raises ParaJaxError if `tensors` are beyond the range of float16, the dtype of `ours`."""
    if ours.dtype != np.float16 or not np.isinf(ours).any():
        return
    with np.errstate(over="ignore"):
        beyond = [p.name for p, x in zip(entry.parts, tensors, strict=True) if np.isinf(x.astype(np.float16)).any()]
    raise ParaJaxError(
        f"{folder}: {', '.join(beyond)} has weights beyond float16's range, which ends at 65504; load it in float32 "
        "(--dtype float32)"
    )


def _to_devices(
    shape: tuple[int, ...], sharding: NamedSharding | None, block: Callable[[Any], np.ndarray]
) -> jax.Array:
    """The array that `block` returns by index, sharded. `sharding` may have one more axis, for stacked layers."""
    if sharding is None:
        return jnp.asarray(block((slice(None),) * len(shape)))
    if len(sharding.spec) > len(shape):
        sharding = NamedSharding(sharding.mesh, P(*sharding.spec[1:]))
    return jax.make_array_from_callback(shape, sharding, block)


@partial(jax.jit, donate_argnums=0, static_argnums=3)
def _put(stack: jax.Array, x: jax.Array, layer: int, sharding: NamedSharding | None) -> jax.Array:
    """Writes one layer into a stack, which is donated."""
    if sharding is not None:
        stack = jax.lax.with_sharding_constraint(stack, sharding)
    if not jnp.issubdtype(stack.dtype, jnp.floating):
        return jax.lax.dynamic_update_index_in_dim(stack, x, layer, 0)
    # As integers, because XLA on CPU would convert all of a bfloat16 stack to float32 and back for every layer.
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
    text_only: bool = False,
    tokenizer: Any = None,
    chat_template: str | None = None,
    shard_size: int = 5_000_000_000,
    overwrite: bool = False,
) -> None:
    """Writes a checkpoint that transformers opens: config.json and safetensors.

    A backbone that is the text part of a larger model is written back into that model. The other parts' tensors come
    from `like`, bit for bit unless the weights are cast, and all tensors have the same names as there.

    Args:
      dtype: the dtype that weights are cast to; by default they are not cast.
      like: the folder that the weights came from. Its tokenizer and generation config are copied.
      text_only: write the text part of a larger model as a separate model.
      tokenizer: a transformers tokenizer, instead of the one in `like`.
      chat_template: the tokenizer's chat template, instead of the one in `like`.
      shard_size: the maximum bytes of a file, unless one tensor (or all experts of a layer) is larger. A larger model
        is split into several files with an index; one is in memory at a time.

    Raises ParaJaxError if the folder exists and `overwrite` is False or it is not a checkpoint, if it cannot be
    written, if the weights are quantized, if a weight is too large for the dtype, or if `like` lacks the other parts.
    """
    config, leaves = backbone.config, named_leaves(backbone)
    if backbone.quantize is not None:
        raise ParaJaxError(
            "a quantized backbone does not have its original weights; load it without quantize to save it"
        )
    check_known("dtype", [] if dtype is None else [dtype], WRITTEN)
    written = np.dtype(dtype or str(backbone.dtype))
    wrapper = wrapper_of(config)
    original = None if wrapper is None or text_only else _original(like, config, wrapper)

    def tensors(layer: int | None, entry: Parameter) -> Tensors:
        if layer is None:
            weight = leaves[entry.name]
        else:
            name, index = leaf(config, backbone.stacked, layer, entry.name)
            weight = leaves[name] if index is None else leaves[name][index]
        ours = entry.tensors(cast(entry.parts[0].name, weight, written))
        return ours if original is None else original.to_stored(ours)

    pieces = [
        Piece(entry.size * written.itemsize, partial(tensors, layer, entry))
        for layer in (None, *range(config.num_hidden_layers))
        for entry in table(config, layer)
    ]
    fields = hf_fields(config, text_only)
    same_dtype = original is not None and {*original.dtype.values()} == {str(written)}
    if original is not None:
        pieces += [Piece(x.nbytes, partial(dict, {x.name: x})) for x in original.rest(None if same_dtype else written)]
    # auto_map names Python files of the original folder, which are not copied; transformers has the class. The weights
    # are written in floating point, whatever they were read from.
    fields = {key: value for key, value in fields.items() if key not in ("auto_map", *FORMATS)}
    with new_folder(folder, CONFIG, overwrite=overwrite) as partial_folder:
        _write(partial_folder, pieces, shard_size)
        fields = fields if same_dtype else with_dtype(fields, str(written))
        write_file(partial_folder / CONFIG, [as_json(fields, 2).encode()])
        _copy_other_files(partial_folder, like, tokenizer, chat_template, original is not None)


def _original(like: str | Path | None, config: BackboneConfig, wrapper: Wrapper) -> Renamed:
    """The decoder's tensors in the larger model that a backbone came from. Raises ParaJaxError if `like` lacks them."""
    if like is None:
        raise ParaJaxError(
            f"the backbone is the text part of a {wrapper.architecture}; give like=FOLDER, the checkpoint it was read "
            "from, to write it back into the whole model, or text_only=True to write it as a separate model"
        )
    shapes = _shapes(config)
    original = as_named(Path(like), open_tensors(Path(like), names_of(config).spare), config, shapes)
    for name, shape in shapes.items():
        if original.shape.get(name) != shape:
            raise ParaJaxError(
                f"{like} is not the checkpoint that the backbone was read from: it has no {original.in_files(name)} "
                f"{[*shape]}"
            )
    return Renamed(original.files, {name: original.places[name] for name in shapes}, original.parts)


def _shapes(config: BackboneConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors in the family's table, by name."""
    layers = (None, *range(config.num_hidden_layers))
    return {p.name: p.tensor_shape for layer in layers for entry in table(config, layer) for p in entry.parts}


class Piece(NamedTuple):
    """Tensors that go into the same file, and their size in bytes."""

    size: int
    make: Callable[[], Tensors]


def _write(folder: Path, pieces: list[Piece], shard_size: int) -> None:
    """Writes the weight files of a checkpoint, of at most `shard_size` bytes or one piece, and an index if several."""
    files: list[list[Piece]] = []
    for piece in pieces:
        if not files or sum(other.size for other in files[-1]) + piece.size > shard_size:
            files.append([])
        files[-1].append(piece)
    weight_map: dict[str, str] = {}
    for number, file_pieces in enumerate(files, 1):
        name = f"model-{number:05}-of-{len(files):05}.safetensors" if len(files) > 1 else "model.safetensors"
        tensors = {key: x for piece in file_pieces for key, x in piece.make().items()}
        write_file(folder / name, safetensors(tensors, {"format": "pt"}))
        weight_map |= dict.fromkeys(tensors, name)
    if len(files) > 1:
        total = sum(piece.size for piece in pieces)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_file(folder / INDEX, [as_json(index, 2).encode()])


def _copy_other_files(
    folder: Path, like: str | Path | None, tokenizer: Any, chat_template: str | None, processor: bool
) -> None:
    patterns = (*OTHER_FILES, *(TOKENIZER if tokenizer is None else ()), *(PROCESSOR if processor else ()))
    for pattern in patterns if like is not None else ():
        for path in Path(like or "").glob(pattern):
            copy(path, folder / path.name)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if chat_template is not None:
        write_file(folder / TEMPLATE, [chat_template.encode()])
