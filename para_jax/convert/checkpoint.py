"""A backbone from a Hugging Face folder and back to one."""

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
from para_jax.errors import ParaJaxError, unknown
from para_jax.families.wrappers import Wrapper, wrapper_of
from para_jax.families.writing import hf_fields, with_dtype
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
PROCESSOR = ("*processor_config.json",)  # of images and the like


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
Tensors = Mapping[str, np.ndarray | Unread]


def load_weights(folder: Path, shapes: W, check_finite: bool = False) -> W:
    """The weights of a folder, as `shapes` says. A host holds its devices' part of the model and of one tensor."""
    config, quantize, compute, stacked = shapes.config, shapes.quantize, shapes.dtype, shapes.stacked
    layers = range(config.num_hidden_layers)
    outside, inside = table(config), [table(config, layer) for layer in layers]
    names = _shapes(config)
    files = as_named(folder, open_tensors(folder), config, names)
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
    text_only: bool = False,
    tokenizer: Any = None,
    chat_template: str | None = None,
    shard_size: int = 5_000_000_000,
    overwrite: bool = False,
) -> None:
    """Writes a checkpoint that transformers opens: config.json and safetensors.

    A backbone that was read out of a larger model is written back into it: the tensors of the other parts are taken
    from `like`, bit for bit unless the text part's are cast, and all have the names that they have there.

    Args:
      dtype: what the weights are cast to; their own, if None.
      like: the folder they came from, whose tokenizer and generation config are copied.
      text_only: write the text part of such a model as a model of its own.
      tokenizer: of transformers, in place of the one in `like`.
      chat_template: the tokenizer's, in place of the one in `like`.
      shard_size: the most bytes of a file, unless one tensor (or all experts of a layer) is larger. A larger model is
        several files with an index; one is in memory at a time.

    Raises ParaJaxError if the folder exists and `overwrite` is False or it is no checkpoint, if it cannot be
    written, if the weights are quantised, if a weight is too large for the dtype, or if `like` lacks the other parts.
    """
    config, leaves = backbone.config, named_leaves(backbone)
    if backbone.quantize is not None:
        raise ParaJaxError("a quantised backbone has lost what its weights were; load it without quantize to write it")
    if dtype not in (None, *WRITTEN):
        raise unknown("dtype", dtype, WRITTEN)
    written = np.dtype(dtype or str(backbone.dtype))
    wrapper = wrapper_of(config)
    there = None if wrapper is None or text_only else _around(like, config, wrapper)

    def tensors(layer: int | None, entry: Parameter) -> Tensors:
        leaf = leaves[entry.name] if layer is None else _of_layer(backbone, leaves, layer, entry.name)
        ours = entry.tensors(cast(entry.parts[0].name, leaf, written))
        return ours if there is None else there.under_their_names(ours)

    pieces = [
        Piece(entry.size * written.itemsize, partial(tensors, layer, entry))
        for layer in (None, *range(config.num_hidden_layers))
        for entry in table(config, layer)
    ]
    fields = hf_fields(config, text_only)
    as_it_was = there is not None and {*there.dtype.values()} == {str(written)}
    if there is not None:
        pieces += [Piece(x.nbytes, partial(dict, {x.name: x})) for x in there.rest(None if as_it_was else written)]
    # auto_map names code that stands beside the original; transformers has the class.
    fields = {key: value for key, value in fields.items() if key != "auto_map"}
    with new_folder(folder, CONFIG, overwrite=overwrite) as partial_folder:
        _write(partial_folder, pieces, shard_size)
        fields = fields if as_it_was else with_dtype(fields, str(written))
        write_file(partial_folder / CONFIG, [as_json(fields, 2).encode()])
        _copy_beside(partial_folder, like, tokenizer, chat_template, there is not None)


def _around(like: str | Path | None, config: BackboneConfig, wrapper: Wrapper) -> Renamed:
    """The decoder's tensors in the model that a backbone was read out of. Raises ParaJaxError if `like` lacks them."""
    if like is None:
        raise ParaJaxError(
            f"the backbone is the text part of a {wrapper.architecture}; give like=FOLDER, the checkpoint it was read "
            "from, to write it back into all of it, or text_only=True to write it as a model of its own"
        )
    shapes = _shapes(config)
    there = as_named(Path(like), open_tensors(Path(like)), config, shapes)
    for name, shape in shapes.items():
        if there.shape.get(name) != shape:
            raise ParaJaxError(
                f"{like} is not the checkpoint that the backbone was read from: it has no {there.in_files(name)} "
                f"{[*shape]}"
            )
    return Renamed(there.files, {name: there.places[name] for name in shapes}, there.parts)


def _shapes(config: BackboneConfig) -> dict[str, tuple[int, ...]]:
    """Those of all tensors of a family's table."""
    layers = (None, *range(config.num_hidden_layers))
    return {p.name: p.tensor_shape for layer in layers for entry in table(config, layer) for p in entry.parts}


class Piece(NamedTuple):
    """Tensors that go into one file, and their bytes."""

    size: int
    make: Callable[[], Tensors]


def _write(folder: Path, pieces: list[Piece], most: int) -> None:
    """The files of a checkpoint, and their index if there are several."""
    files = _files(pieces, most)
    place: dict[str, str] = {}
    for number, some in enumerate(files, 1):
        name = f"model-{number:05}-of-{len(files):05}.safetensors" if len(files) > 1 else "model.safetensors"
        tensors = {key: x for piece in some for key, x in piece.make().items()}
        write_file(folder / name, safetensors(tensors, {"format": "pt"}))
        place |= dict.fromkeys(tensors, name)
    if len(files) > 1:
        total = sum(piece.size for piece in pieces)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(place.items()))}
        write_file(folder / INDEX, [as_json(index, 2).encode()])


def _copy_beside(folder: Path, like: str | Path | None, tokenizer: Any, chat_template: str | None, whole: bool) -> None:
    """What belongs to a checkpoint beside its weights, of another folder or as it is given."""
    patterns = (*BESIDE, *(TOKENIZER if tokenizer is None else ()), *(PROCESSOR if whole else ()))
    for pattern in patterns if like is not None else ():
        for path in Path(like or "").glob(pattern):
            copy(path, folder / path.name)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if chat_template is not None:
        write_file(folder / TEMPLATE, [chat_template.encode()])


def _of_layer(backbone: Weights, leaves: dict[str, Any], layer: int, name: str) -> Any:
    return leaves[f"blocks.{name}"][layer] if backbone.stacked else leaves[f"blocks.{layer}.{name}"]


def _files(pieces: list[Piece], most: int) -> list[list[Piece]]:
    """Pieces in files of at most so many bytes; one that is larger has a file of its own."""
    files: list[list[Piece]] = []
    left = 0
    for piece in pieces:
        if piece.size > left or not files:
            files.append([])
            left = most
        files[-1].append(piece)
        left -= piece.size
    return files
