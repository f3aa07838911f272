"""Tensors under the other names that transformers reads, given the names of a family's table.

base models      layers.0. ... for model.layers.0. ..., as `LlamaModel.save_pretrained` writes them
tied embeddings  lm_head.weight alone for both
experts          all of a layer in one gate_up_proj and one down_proj, as transformers 5 holds them; and Mixtral's
                 under mlp instead of block_sparse_moe
wrappers         the prefixes of a decoder among other parts (`convert/wrapped.py`)
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
from para_jax.families.wrappers import wrapper_of
from para_jax.parameters import names_of

# What belongs to a decoder: a tensor of these that the family's table lacks would change what it computes.
DECODER = re.compile(r"(model\.)?(layers|embed_tokens|norm|lm_head)\.")
MOST = 20
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Which part of a tensor of the files; all of it, if empty.
Index = tuple[int | slice, ...]


class Renamed:
    """The tensors of files under other names; each is one of theirs or a part of it.

    Attributes:
      files: these.
      places: the tensor of the files, and the part of it, that each name stands for.
      parts: what the tensors of the files belong to.
    """

    def __init__(self, files: TensorFiles, places: dict[str, tuple[str, Index]], parts: Parts):
        self.files, self.places, self.parts = files, places, parts
        self.dtype = {name: files.dtype[stored] for name, (stored, _) in places.items()}
        self.shape = {name: _part(files.shape[stored], index) for name, (stored, index) in places.items()}

    def read(self, key: str) -> np.ndarray:
        """As `TensorFiles.read`."""
        stored, index = self.places[key]
        return self.files.read(stored)[index]

    def in_files(self, name: str) -> str:
        """The name that a tensor has in the files, or would have if it were there."""
        if name in self.places:
            return self.places[name][0]
        return f"{self.parts.prefix}{name.removeprefix('model.')}" if name.startswith("model.") else name

    def under_their_names(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The tensors of the files from these, which are all parts of each."""
        theirs: dict[str, np.ndarray] = {}
        for name, x in tensors.items():
            stored, index = self.places[name]
            if index:
                theirs.setdefault(stored, np.empty(self.files.shape[stored], x.dtype))[index] = x
            else:
                theirs[stored] = x
        return theirs

    def rest(self, dtype: np.dtype | None) -> Iterator[Unread]:
        """The tensors of the files that stand for none of these, cast if a dtype is given."""
        taken = {stored for stored, _ in self.places.values()}
        for stored in self.files.shape:
            if stored not in taken:
                yield Unread(self.files, stored, dtype or np.dtype(self.files.dtype[stored]))


def as_named(folder: Path, files: TensorFiles, config: BackboneConfig, expected: Collection[str]) -> Renamed:
    """The tensors of a checkpoint under the names of its family's table, `expected`, where transformers reads them so.

    What has a name of its own keeps it, and so does what transformers does not read. Of a checkpoint that has other
    parts they are the decoder's.
    """
    known, wrapper = {*expected, HEAD}, wrapper_of(config)
    parts = parts_of(folder, files.shape, wrapper)
    places: dict[str, tuple[str, Index]] = {}
    for stored, named in sorted(parts.names.items(), key=lambda pair: pair[1] not in known):
        name = named if wrapper else _of_base_model(named, known)
        found = dict(_of_experts(name, files.shape[stored], config)) or {name: ()}
        # Of two tensors for one place, that with the table's own name has it, and the other is not expected.
        found = {stored: ()} if found.keys() & places.keys() else found
        places |= {part: (stored, index) for part, index in found.items()}
    if config.tie_word_embeddings and EMBED not in places and HEAD in places:
        places[EMBED] = places.pop(HEAD)
    return Renamed(files, places, parts)


def check_tensors(folder: Path, files: Renamed, config: BackboneConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Accounts for every tensor, or raises one ParaJaxError that lists what is wrong.

    Tensors that belong to no decoder, such as a value head's, are ignored with a line, as in transformers. Of a
    checkpoint that has other parts, one line says what is left out, and a tensor of no part is an error.
    """
    wrapper, spelled = wrapper_of(config), files.in_files
    # Old checkpoints carry the rotary frequencies; tied ones may carry the embedding twice.
    spare = {name for name in files.shape if name.endswith("rotary_emb.inv_freq")}
    if config.tie_word_embeddings:
        spare.add(HEAD)
    missing = [name for name in shapes if name not in files.shape]
    problems = [f"{spelled(name)} {list(shapes[name])} is missing" for name in missing]
    others = [name for name in files.shape if name not in shapes and name not in spare]
    problems += [f"{spelled(name)} is not expected" for name in others if problems or wrapper or DECODER.match(name)]
    problems += [f"{name} is not expected" for name in files.parts.neither]
    problems += [
        f"{spelled(name)} is {list(files.shape[name])} and should be {list(shape)}"
        for name, shape in shapes.items()
        if name in files.shape and files.shape[name] != shape
    ]
    twice = not problems and config.tie_word_embeddings and HEAD in files.shape
    if twice and not np.array_equal(files.read(HEAD), files.read(EMBED)):
        problems = [
            f"{spelled(HEAD)} is not the embedding: tie_word_embeddings should be false in config.json for it to be "
            "used, as in transformers 5. If it should not be used, as in transformers 4, take it out of the file"
        ]
    if problems == [f"{HEAD} {list(shapes.get(HEAD, ()))} is missing"]:
        problems[0] += "; if the embedding is the head too, set tie_word_embeddings to true in config.json"
    if problems:
        listed = "\n  ".join(problems[:MOST] + [f"and {len(problems) - MOST} more"] * (len(problems) > MOST))
        raise ParaJaxError(f"{folder}: the tensors do not fit config.json:\n  {listed}")
    say = logging.getLogger(__name__).warning
    if others:
        shown = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
        say("%s: tensors that no decoder has are ignored: %s", folder, shown)
    if wrapper and files.parts.others:
        say("%s", left_out(folder, files.parts, files.files.shape, wrapper))


def _of_base_model(name: str, known: Collection[str]) -> str:
    """The name with the prefix of the base model put before it, or taken away, if the model then knows it."""
    if name in known:
        return name
    short, long = name.removeprefix("model."), f"model.{name}"
    if short in known:
        return short
    return long if long in known or re.match(r"layers\.\d+\.", name) else name


def _of_experts(name: str, shape: tuple[int, ...], config: BackboneConfig) -> Iterator[tuple[str, Index]]:
    """The tensors of a mixture of experts that one of theirs holds; none, if it is no such tensor."""
    found = re.fullmatch(r"(model\.layers\.\d+)\.(?:mlp|block_sparse_moe)\.(gate|experts)\.(.+)", name)
    if config.experts is None or found is None:
        return
    (layer, which, rest), names = found.groups(), names_of(config)
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


def _part(shape: tuple[int, ...], index: Index) -> tuple[int, ...]:
    """The shape of a part. Broadcasting one number makes no copy, whatever the shape."""
    return np.broadcast_to(np.False_, shape)[index].shape if index else shape
