"""Maps the tensor names that transformers accepts to the names of a family's table.

base models      layers.0. ... instead of model.layers.0. ..., as `LlamaModel.save_pretrained` writes them; in GPT-2
                 h.0. ... instead of transformer.h.0. ...
tied embeddings  only lm_head.weight for both
experts          all experts of a layer in one gate_up_proj and one down_proj, as in transformers 5; Mixtral's under mlp
                 instead of block_sparse_moe
wrappers         the prefixes of a decoder in a model with other parts (`convert/wrapped.py`)
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import numpy as np

from para_jax.config import BackboneConfig
from para_jax.convert.tensors import TensorFiles
from para_jax.convert.wrapped import Parts, Unread, left_out, parts_of
from para_jax.errors import ParaJaxError
from para_jax.families.architecture import Names
from para_jax.families.wrappers import wrapper_of
from para_jax.parameters import names_of

MAX_LISTED = 20
KEYS_VALUES = ("k_proj", "v_proj", "k_norm", "v_norm")
HEAD = "lm_head."
# The part of a stored tensor; () for all of it.
Index = tuple[int | slice, ...]


class Renamed:
    """The tensors of files under other names. Each is a stored tensor or a part of one.

    Attributes:
      places: the stored tensor of each name, and the part of it.
      parts: the parts of the model that the stored tensors belong to.
    """

    def __init__(self, files: TensorFiles, places: dict[str, tuple[str, Index]], parts: Parts):
        self.files, self.places, self.parts = files, places, parts
        self.dtype = {name: files.dtype[stored] for name, (stored, _) in places.items()}
        # Indexing a broadcast scalar gives the shape of a part without memory.
        full = {name: np.broadcast_to(np.False_, files.shape[stored]) for name, (stored, _) in places.items()}
        self.shape = {name: full[name][index].shape for name, (_, index) in places.items()}

    def read(self, key: str) -> np.ndarray:
        stored, index = self.places[key]
        return self.files.read(stored)[index]

    def in_files(self, name: str) -> str:
        """The name of a tensor in the files, or the expected name if it is missing."""
        if name in self.places:
            return self.places[name][0]
        return f"{self.parts.prefix}{name.removeprefix('model.')}" if name.startswith("model.") else name

    def to_stored(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Converts tensors to those stored in the files. They must include all parts of each stored tensor."""
        result: dict[str, np.ndarray] = {}
        for name, x in tensors.items():
            stored, index = self.places[name]
            if index:
                result.setdefault(stored, np.empty(self.files.shape[stored], x.dtype))[index] = x
            else:
                result[stored] = x
        return result

    def rest(self, dtype: np.dtype | None) -> Iterator[Unread]:
        """The stored tensors that no name refers to, cast if a dtype is given."""
        used = {stored for stored, _ in self.places.values()}
        for stored in self.files.shape:
            if stored not in used:
                yield Unread(self.files, stored, dtype or np.dtype(self.files.dtype[stored]))


def as_named(folder: Path, files: TensorFiles, config: BackboneConfig, expected: Collection[str]) -> Renamed:
    """The tensors of a checkpoint under the names of its family's table, `expected`, if transformers accepts them.

    Tensors with an expected name, or a name that transformers does not accept, keep it. For a checkpoint with other
    parts, only the decoder's tensors are included.
    """
    known, wrapper, (embed, head) = {*expected, _ends(config)[1]}, wrapper_of(config), _ends(config)
    parts = parts_of(folder, files.shape, wrapper)
    places: dict[str, tuple[str, Index]] = {}
    for stored, named in sorted(parts.names.items(), key=lambda pair: pair[1] not in known):
        name = named if wrapper else _base_model_name(named, known, names_of(config))
        found = dict(_expert_parts(name, files.shape[stored], config)) or {name: ()}
        # Of two tensors for one name, the one with the expected name is used, and the other keeps its name.
        found = {stored: ()} if found.keys() & places.keys() else found
        places |= {part: (stored, index) for part, index in found.items()}
    if config.tie_word_embeddings and embed not in places and head in places:
        places[embed] = places.pop(head)
    return Renamed(files, places, parts)


def check_tensors(folder: Path, files: Renamed, config: BackboneConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ParaJaxError, listing all problems, unless all tensors are as expected.

    Tensors that are not a decoder's, such as a value head's, are ignored with a warning, as in transformers. For a
    checkpoint with other parts, a message lists what is left out, and a tensor of an unknown part is an error.
    """
    wrapper, spelled, names, (embed, head) = wrapper_of(config), files.in_files, names_of(config), _ends(config)
    # Tied checkpoints may have the embedding twice.
    spare = {name for name in files.shape if name.endswith(names.spare)}
    if config.tie_word_embeddings:
        spare.add(head)
    # Gemma 4's checkpoints have projections that its layers with shared keys and values do not use.
    shared = {i for i in range(config.num_hidden_layers) if config.kind(i).values == "shared"}
    unused = {f"model.layers.{i}.self_attn.{name}.weight" for i in shared for name in KEYS_VALUES} & {*files.shape}
    spare |= unused
    # The tensors of a decoder. One that the family's table lacks is an error, because it would change the result.
    decoder = {name.removeprefix(f"{names.stem}.").partition(".")[0] for name in (*shapes, HEAD, head)}
    missing = [name for name in shapes if name not in files.shape]
    problems = [f"{spelled(name)} {list(shapes[name])} is missing" for name in missing]
    others = [name for name in files.shape if name not in shapes and name not in spare]
    problems += [
        f"{spelled(name)} is not expected"
        for name in others
        if problems or wrapper or name.removeprefix(f"{names.stem}.").partition(".")[0] in decoder
    ]
    problems += [f"{name} is not expected" for name in files.parts.unknown]
    problems += [
        f"{spelled(name)} is {list(files.shape[name])} and should be {list(shape)}"
        for name, shape in shapes.items()
        if name in files.shape and files.shape[name] != shape
    ]
    twice = not problems and config.tie_word_embeddings and head in files.shape
    if twice and not np.array_equal(files.read(head), files.read(embed)):
        problems = [
            f"{spelled(head)} differs from the embedding: set tie_word_embeddings to false in config.json to use it, "
            "as in transformers 5. If it should not be used, as in transformers 4, take it out of the file"
        ]
    if problems == [f"{head} {list(shapes.get(head, ()))} is missing"]:
        problems[0] += "; if the head is the embedding, set tie_word_embeddings to true in config.json"
    if problems:
        more = len(problems) - MAX_LISTED
        listed = "\n  ".join(problems[:MAX_LISTED] + [f"and {more} more"] * (more > 0))
        raise ParaJaxError(f"{folder}: the tensors do not fit config.json:\n  {listed}")
    log = logging.getLogger(__name__).warning
    if others:
        shown = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
        log("%s: tensors that no decoder has are ignored: %s", folder, shown)
    if unused:
        log("%s: %d tensors of layers with shared keys and values are not used", folder, len(unused))
    if wrapper and files.parts.others:
        log("%s", left_out(folder, files.parts, files.files.shape, wrapper))


def _ends(config: BackboneConfig) -> tuple[str, str]:
    """The names of the weights of the embeddings and of the output layer."""
    names = names_of(config)
    return f"{names.stem}.{names.embed}.weight", f"{names.head}.weight"


def _base_model_name(name: str, known: Collection[str], names: Names) -> str:
    """The name with the model's prefix added or removed, or with the family's name of the output layer, if that makes
    it a known name."""
    if name in known:
        return name
    prefix = f"{names.stem.partition('.')[0]}."
    short, long = name.removeprefix(prefix), f"{prefix}{name}"
    if name.startswith(HEAD) and (head := f"{names.head}.{name.removeprefix(HEAD)}") in known:
        return head
    if short in known:
        return short
    path = f"{names.stem}.{names.layers}".removeprefix(prefix)
    return long if long in known or re.match(rf"{re.escape(path)}\.\d+\.", name) else name


def _expert_parts(name: str, shape: tuple[int, ...], config: BackboneConfig) -> Iterator[tuple[str, Index]]:
    """The tensors in a stored tensor of a mixture of experts, with their parts; empty for other tensors."""
    found = re.fullmatch(r"(model\.layers\.\d+)\.(?:mlp|block_sparse_moe)\.(gate|experts)\.(.+)", name)
    names = names_of(config)
    if config.experts is None or names.expert is None or found is None:
        return
    layer, which, rest = found.groups()
    count, width, d, at = config.experts.count, config.experts.width, config.hidden_size, f"{layer}.{names.experts}"
    gate, up, down = names.expert
    if which == "gate":
        yield f"{layer}.{names.router}.{rest}", ()
    elif rest == "gate_up_proj" and shape == (count, 2 * width, d):
        for e in range(count):
            yield f"{at}.{e}.{gate}.weight", (e, slice(0, width))
            yield f"{at}.{e}.{up}.weight", (e, slice(width, 2 * width))
    elif rest == "down_proj" and shape == (count, d, width):
        yield from ((f"{at}.{e}.{down}.weight", (e,)) for e in range(count))
    else:
        yield f"{at}.{rest}", ()
