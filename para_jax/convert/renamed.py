"""Tensors under the other names that transformers reads, given the names of a family's table.

base models      layers.0. ... for model.layers.0. ..., as `LlamaModel.save_pretrained` writes them
tied embeddings  lm_head.weight alone for both
experts          all of a layer in one gate_up_proj and one down_proj, as transformers 5 holds them; and Mixtral's
                 under mlp instead of block_sparse_moe
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import numpy as np

from para_jax.config import BackboneConfig
from para_jax.convert.tensors import TensorFiles
from para_jax.errors import ParaJaxError
from para_jax.parameters import names_of

# What belongs to a decoder: a tensor of these that the family's table lacks would change what it computes.
DECODER = re.compile(r"(model\.)?(layers|embed_tokens|norm|lm_head)\.")
MOST = 20
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Which part of a tensor of the files; all of it, if empty.
Index = tuple[int | slice, ...]


class Renamed:
    """The tensors of files under other names; each is one of theirs or a part of it."""

    def __init__(self, files: TensorFiles, places: dict[str, tuple[str, Index]]):
        self._files, self._places = files, places
        self.dtype = {name: files.dtype[stored] for name, (stored, _) in places.items()}
        self.shape = {name: _part(files.shape[stored], index) for name, (stored, index) in places.items()}

    def read(self, key: str) -> np.ndarray:
        """As `TensorFiles.read`."""
        stored, index = self._places[key]
        return self._files.read(stored)[index]


def as_named(files: TensorFiles, config: BackboneConfig, expected: Collection[str]) -> TensorFiles:
    """The tensors of a checkpoint under the names of its family's table, `expected`, where transformers reads them so.

    What has a name of its own keeps it, and so does what transformers does not read.
    """
    known = {*expected, HEAD}
    places: dict[str, tuple[str, Index]] = {}
    for stored in sorted(files.shape, key=lambda name: name not in known):
        name = _of_base_model(stored, known)
        found = dict(_of_experts(name, files.shape[stored], config)) or {name: ()}
        # Of two tensors for one place, that with the table's own name has it, and the other is not expected.
        found = {stored: ()} if found.keys() & places.keys() else found
        places |= {part: (stored, index) for part, index in found.items()}
    if config.tie_word_embeddings and EMBED not in places and HEAD in places:
        places[EMBED] = places.pop(HEAD)
    return Renamed(files, places)


def check_tensors(
    folder: Path, files: TensorFiles, config: BackboneConfig, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Accounts for every tensor, or raises one ParaJaxError that lists what is wrong.

    Tensors that belong to no decoder, such as a value head's, are ignored with a line, as in transformers.
    """
    # Old checkpoints carry the rotary frequencies; tied ones may carry the embedding twice.
    spare = {name for name in files.shape if name.endswith("rotary_emb.inv_freq")}
    if config.tie_word_embeddings:
        spare.add(HEAD)
    problems = [f"{name} {list(shape)} is missing" for name, shape in shapes.items() if name not in files.shape]
    others = [name for name in files.shape if name not in shapes and name not in spare]
    problems += [f"{name} is not expected" for name in others if problems or DECODER.match(name)]
    problems += [
        f"{name} is {list(files.shape[name])} and should be {list(shape)}"
        for name, shape in shapes.items()
        if name in files.shape and files.shape[name] != shape
    ]
    twice = not problems and config.tie_word_embeddings and HEAD in files.shape
    if twice and not np.array_equal(files.read(HEAD), files.read(EMBED)):
        problems = [
            f"{HEAD} is not the embedding: tie_word_embeddings should be false in config.json for it to be used, as in "
            "transformers 5. If it should not be used, as in transformers 4, take it out of the file"
        ]
    if problems == [f"{HEAD} {list(shapes.get(HEAD, ()))} is missing"]:
        problems[0] += "; if the embedding is the head too, set tie_word_embeddings to true in config.json"
    if problems:
        listed = "\n  ".join(problems[:MOST] + [f"and {len(problems) - MOST} more"] * (len(problems) > MOST))
        raise ParaJaxError(f"{folder}: the tensors do not fit config.json:\n  {listed}")
    if others:
        shown = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
        logging.getLogger(__name__).warning("%s: tensors that no decoder has are ignored: %s", folder, shown)


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
