"""Converts the tensor names of adapter files to PEFT's names.

PEFT writes `base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight`. State dicts that are saved by other means
may have the adapter's name (`lora_A.default.weight`), names of training wrappers (`module.`, `_orig_mod.`), no prefix,
or another one: the text part of a model with images is `model.language_model.layers.3...`. Ambiguous names are errors.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from para_jax.adapters.method import BackboneShape, ShapeView
from para_jax.errors import ParaJaxError
from para_jax.families.wrappers import WRAPPERS

PREFIX = "base_model.model."
TRAINING_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# The names of a model's text decoder, and of parts that are not for text. The latter include parts of models that this
# library does not load.
TEXT = {"model", "language_model", "text_model"}
NOT_TEXT = {
    "vision_model", "vision_encoder", "image_encoder", "audio_tower", "speech_encoder", "embed_vision", "embed_audio",
    *(part for wrapper in WRAPPERS.values() for part in wrapper.others),
}  # fmt: skip
_NAMED = re.compile(
    r"(?P<part>.*\.(?:lora_A|lora_B|lora_embedding_A|lora_embedding_B|ia3_l))\.(?P<name>[^.]+)(?P<end>\.weight)?"
)


class Names(NamedTuple):
    """An adapter's tensors by PEFT's names in a causal language model.

    Attributes:
      in_file: the name of each tensor in the file.
      stem: the path of the tuned model's decoder: usually "model".
      not_text: the paths of adapted modules that are not for text.
    """

    tensors: dict[str, np.ndarray]
    in_file: dict[str, str]
    stem: str
    not_text: tuple[str, ...] = ()


def as_peft(path: Path, tensors: Mapping[str, np.ndarray], shape: BackboneShape) -> Names:
    """The tensors of a file by PEFT's names in a model of this shape, without those for images and audio.

    Raises ParaJaxError if the file has several adapters, two tensors with one name, or no tensor for text.
    """
    usual, _, layers = shape.layers_path.rpartition(".")
    in_layer = re.compile(rf"(?:(?P<stem>.*)\.)?(?P<module>{layers}\.\d+\..*)")
    kept: dict[str, np.ndarray] = {}
    in_file: dict[str, str] = {}
    adapters: dict[str, str] = {}
    stems: dict[str, str] = {}
    not_text: dict[str, str] = {}
    for key, x in tensors.items():
        name = ".".join(part for part in key.split(".") if part not in TRAINING_WRAPPERS)
        named = _NAMED.fullmatch(name)
        if named and named["name"] != "weight":
            name = named["part"] + (named["end"] or "")
            adapters.setdefault(named["name"], key)
        bare = name.removeprefix(PREFIX)
        if NOT_TEXT & set(bare.split(".")):
            not_text[key] = re.sub(r"\.(lora_\w+|ia3_l)(\.weight)?$", "", bare)
            continue
        layer = in_layer.fullmatch(bare)
        if layer and set((layer["stem"] or usual).split(".")) <= {*TEXT, *usual.split(".")}:
            stems.setdefault(layer["stem"] or "", key)
            name = f"{PREFIX}{usual}.{layer['module']}"
        if name in kept:
            raise ParaJaxError(f"{path} has {in_file[name]} and {key}, which are one tensor; take one of them out")
        kept[name], in_file[name] = x, key
    _check_one(
        path, adapters, "adapters of several names", "save each in its own folder: model.save_pretrained(folder)"
    )
    _check_one(path, stems, "layers in several places", "save the adapter of each model in its own folder")
    if not_text:
        first = next(iter(not_text))
        if not kept:
            raise ParaJaxError(f"{path} adapts only parts that are not for text, such as {first}")
        logging.getLogger(__name__).warning(
            "%s: %d tensors of parts that are not for text are ignored, such as %s", path, len(not_text), first
        )
    return Names(kept, in_file, next(iter(stems), usual), tuple(dict.fromkeys(not_text.values())))


def _check_one(path: Path, found: Mapping[str, str], what: str, fix: str) -> None:
    if len(found) > 1:
        raise ParaJaxError(f"{path} has {what}: {' and '.join(list(found.values())[:2])}; {fix}")


@dataclass(frozen=True)
class At(ShapeView):
    """A backbone's shape, in a model whose decoder is at the path `stem`."""

    stem: str

    @property
    def layers_path(self) -> str:
        layers = self.shape.layers_path.rpartition(".")[2]
        return f"{self.stem}.{layers}" if self.stem else layers
