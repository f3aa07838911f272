"""The names that people's files have for an adapter's tensors, as those that PEFT writes.

PEFT writes `base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight`. A state dict that was saved by other means
has the adapter's name in it (`lora_A.default.weight`), wrappers of the training (`module.`, `_orig_mod.`), no prefix,
or another one: the text part of a model that also sees images is `model.language_model.layers.3...`. What is read one
way only is read.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from para_jax.adapters.method import BackboneShape
from para_jax.errors import ParaJaxError
from para_jax.families.architecture import Site
from para_jax.families.wrappers import WRAPPERS

PREFIX = "base_model.model."
AROUND = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# The names that a text decoder has in models, and those of parts that a text does not go through, also of models that
# are not read here.
TEXT = {"model", "language_model", "text_model"}
OTHERS = {
    "vision_model", "vision_encoder", "image_encoder", "audio_tower", "speech_encoder", "embed_vision", "embed_audio",
    *(part for wrapper in WRAPPERS.values() for part in wrapper.others),
}  # fmt: skip
_LAYER = re.compile(r"(?:(?P<stem>.*)\.)?(?P<module>layers\.\d+\..*)")
_NAMED = re.compile(
    r"(?P<part>.*\.(?:lora_A|lora_B|lora_embedding_A|lora_embedding_B|ia3_l))\.(?P<name>[^.]+)(?P<end>\.weight)?"
)


class Names(NamedTuple):
    """Tensors by the names that PEFT gives them in a causal language model, and what their names in the file say.

    Attributes:
      in_file: the name of each in the file.
      stem: where the model that was tuned has its layers: "model", usually.
      others: the paths of adapted modules that a text does not go through.
    """

    tensors: dict[str, np.ndarray]
    in_file: dict[str, str]
    stem: str
    others: tuple[str, ...] = ()


def as_peft(path: Path, tensors: Mapping[str, np.ndarray]) -> Names:
    """The tensors of a file by PEFT's names; those of parts for images and sounds are left out.

    Raises ParaJaxError if the file has several adapters, two tensors of one name, or nothing for a text.
    """
    kept: dict[str, np.ndarray] = {}
    in_file: dict[str, str] = {}
    adapters: dict[str, str] = {}
    stems: dict[str, str] = {}
    others: dict[str, str] = {}
    for key, x in tensors.items():
        name = ".".join(part for part in key.split(".") if part not in AROUND)
        named = _NAMED.fullmatch(name)
        if named and named["name"] != "weight":
            name = named["part"] + (named["end"] or "")
            adapters.setdefault(named["name"], key)
        bare = name.removeprefix(PREFIX)
        if OTHERS & set(bare.split(".")):
            others[key] = re.sub(r"\.(lora_\w+|ia3_l)(\.weight)?$", "", bare)
            continue
        layer = _LAYER.fullmatch(bare)
        if layer and set((layer["stem"] or "model").split(".")) <= TEXT:
            stems.setdefault(layer["stem"] or "", key)
            name = f"{PREFIX}model.{layer['module']}"
        if name in kept:
            raise ParaJaxError(f"{path} has {in_file[name]} and {key}, which are one tensor; take one of them out")
        kept[name], in_file[name] = x, key
    _one(path, adapters, "adapters of several names", "save each in a folder of its own: model.save_pretrained(folder)")
    _one(path, stems, "layers in several places", "save the adapter of each model in a folder of its own")
    if others:
        first = next(iter(others))
        if not kept:
            raise ParaJaxError(f"{path} adapts parts that texts do not go through, such as {first}, and no other")
        logging.getLogger(__name__).warning(
            "%s: %d tensors of parts that texts do not go through are ignored, such as %s", path, len(others), first
        )
    return Names(kept, in_file, next(iter(stems), "model"), tuple(dict.fromkeys(others.values())))


def _one(path: Path, found: Mapping[str, str], what: str, out: str) -> None:
    if len(found) > 1:
        raise ParaJaxError(f"{path} has {what}: {' and '.join(list(found.values())[:2])}; {out}")


@dataclass(frozen=True)
class At:
    """A backbone's shape, in a model that has its layers in another place: `stem`."""

    shape: BackboneShape
    stem: str

    @property
    def hidden_size(self) -> int:
        return self.shape.hidden_size

    @property
    def num_hidden_layers(self) -> int:
        return self.shape.num_hidden_layers

    @property
    def sites(self) -> Mapping[str, Site]:
        return self.shape.sites

    @property
    def linear_sites(self) -> Mapping[str, Site]:
        return self.shape.linear_sites
