"""Multimodal models whose text decoder is of a supported family. docs/families.md says how to add one.

Their config.json has the decoder's options in `text_config`, and its tensors' names begin with a prefix. The decoder is
read as a model of its family; the other modules, such as a vision tower, are listed and not read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

from para_jax.errors import ParaJaxError
from para_jax.families.keys import defaults
from para_jax.families.table import FAMILIES, Family

TEXT = "text_config"
# Options of the decoder at the top level of config.json, or else in text_config.
FROM_TOP = ("tie_word_embeddings", "bos_token_id", "eos_token_id")
QUANTIZED = ("quantization_config", "compression_config")  # apply to all modules
# In transformers' class with the head, in its base model, and before transformers 4.52.
PREFIXES = ("model.language_model.", "language_model.", "language_model.model.")
HEADS = ("lm_head.", "language_model.lm_head.")


@dataclass(frozen=True)
class Wrapper:
    """One `model_type` of config.json.

    Attributes:
      models: published models, for the docs.
      architecture: transformers' model class.
      texts: the decoder's family for each `model_type` of text_config. The first is the default.
      others: modules that are not used for text.
      prefixes: the prefixes of the decoder's tensors instead of "model.", in all spellings.
      stem: the path of the decoder in transformers 5.
      flat: whether the decoder's options are at the top level if there is no text_config.
      only: options of text_config with one supported setting, in addition to those of the family.
      neutral: options of text_config that have no effect here, in addition to those of the family.
    """

    models: str
    architecture: str
    texts: Mapping[str, str]
    others: tuple[str, ...]
    prefixes: tuple[str, ...] = PREFIXES
    stem: str = "model.language_model"
    flat: bool = False
    only: Mapping[str, Any] = field(default_factory=dict)
    neutral: tuple[str, ...] = ()


SIGHT = ("vision_tower", "multi_modal_projector")
WRAPPERS: dict[str, Wrapper] = {
    "gemma3": Wrapper(
        "Gemma 3 4B, 12B, 27B",
        "Gemma3ForConditionalGeneration",
        {"gemma3_text": "gemma3_text"},
        SIGHT,
        only={"final_logit_softcapping": None},  # which its class ignores
    ),
    "gemma4": Wrapper(
        "Gemma 4 E2B, E4B, 26B-A4B, 31B",
        "Gemma4ForConditionalGeneration",
        {"gemma4_text": "gemma4_text"},
        ("vision_tower", "audio_tower", "embed_vision", "embed_audio"),
    ),
    "gemma4_unified": Wrapper(
        "Gemma 4 12B",
        "Gemma4UnifiedForConditionalGeneration",
        {"gemma4_unified_text": "gemma4_unified_text"},
        ("vision_embedder", "embed_vision", "embed_audio"),
    ),
    "mistral3": Wrapper(
        "Mistral Small 3.1, 3.2; Ministral 3",
        "Mistral3ForConditionalGeneration",
        {"mistral": "mistral", "ministral3": "ministral3"},
        SIGHT,
    ),
    "qwen2_5_vl": Wrapper(
        "Qwen2.5-VL",
        "Qwen2_5_VLForConditionalGeneration",
        {"qwen2_5_vl_text": "qwen2"},
        ("visual",),
        prefixes=(*PREFIXES, "model."),
        flat=True,
        only={"head_dim": None},  # its class divides hidden_size by the heads
        # Assigns features to three kinds of positions, which are equal for text.
        neutral=("mrope_section",),
    ),
    "qwen3_vl": Wrapper(
        "Qwen3-VL 2B to 32B, not its mixtures of experts",
        "Qwen3VLForConditionalGeneration",
        {"qwen3_vl_text": "qwen3"},
        ("visual",),
        neutral=("mrope_section", "mrope_interleaved"),
    ),
}  # fmt: skip


class Text(NamedTuple):
    """The decoder's options in a config.json. For a text model, these are all options.

    Attributes:
      family: the decoder's family.
      made: the model_type of transformers' config class for the options.
      fields: the options; for a wrapper without those of FROM_TOP.
      top: the values of FROM_TOP.
      wrapper: the multimodal model that contains the decoder; None for a text model.
      sparse: whether missing sizes have the defaults of the class.
    """

    family: str
    made: str
    fields: Mapping[str, Any]
    top: Mapping[str, Any]
    wrapper: Wrapper | None = None
    sparse: bool = False

    @property
    def own(self) -> Family:
        return FAMILIES[self.family]

    @property
    def architecture(self) -> str:
        return self.wrapper.architecture if self.wrapper else self.own.architecture

    @property
    def only(self) -> dict[str, Any]:
        return {**self.own.only, **(self.wrapper.only if self.wrapper else {})}

    @property
    def neutral(self) -> tuple[str, ...]:
        return (*self.own.neutral, *(self.wrapper.neutral if self.wrapper else ()))

    @property
    def at(self) -> str:
        """The prefix of option names in messages."""
        return f"{TEXT}." if self.sparse else ""


def text_of(fields: Mapping[str, Any], name: str = "") -> Text:
    """The decoder's options in a config.json. Raises ParaJaxError if the model or its decoder is not supported."""
    model_type = fields.get("model_type")
    if isinstance(model_type, str) and model_type in FAMILIES:
        return Text(model_type, model_type, fields, {key: fields.get(key) for key in FROM_TOP})
    if not isinstance(model_type, str) or model_type not in WRAPPERS:
        raise ParaJaxError(
            f"{name or 'this checkpoint'} is of architecture {model_type!r}, which is not supported. "
            f"Supported: {', '.join([*FAMILIES, *WRAPPERS])}"
        )
    wrapper, text = WRAPPERS[model_type], fields.get(TEXT)
    usual = next(iter(wrapper.texts))
    if wrapper.flat and text is None:
        made, text = usual, _flat(fields, usual)
    elif not isinstance(text, Mapping):
        problem = "has no text_config" if text is None else f"has text_config={text!r}, which holds no options"
        raise ParaJaxError(f"config.json of {model_type} {problem}; supported is one of {' or '.join(wrapper.texts)}")
    else:
        made = usual if text.get("model_type") is None else text["model_type"]
    if not isinstance(made, str) or made not in wrapper.texts:
        raise ParaJaxError(
            f"{name or 'this checkpoint'} is a {model_type} with a text_config of architecture {made!r}, which is not "
            f"supported; supported is {' or '.join(wrapper.texts)}"
        )
    given = {key: text.get(key) if fields.get(key) is None else fields[key] for key in FROM_TOP}
    if not isinstance(tied := given["tie_word_embeddings"], bool | None):
        raise ParaJaxError(f"config.json has tie_word_embeddings={tied!r}, which is neither true nor false")
    own = {key: value for key, value in text.items() if key not in FROM_TOP}
    own |= {key: fields[key] for key in QUANTIZED if fields.get(key)}
    return Text(wrapper.texts[made], made, own, given, wrapper, fields.get(TEXT) is not None)


def _flat(fields: Mapping[str, Any], made: str) -> dict[str, Any]:
    """The decoder's options at the top level, selected as in transformers."""
    from transformers import CONFIG_MAPPING

    kind: Any = CONFIG_MAPPING[made]
    own = {*defaults(kind), "rope_parameters", "rope_scaling", "rope_theta"}
    return {key: value for key, value in fields.items() if key in own}


def wrapper_of(config: Any) -> Wrapper | None:
    """The multimodal model that a backbone's decoder was read from, by `config.hf`; None for a text model.

    >>> from para_jax import BackboneConfig
    >>> text = {"hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 8, "head_dim": 4}
    >>> config = BackboneConfig.from_hf({"model_type": "gemma3", "text_config": text})
    >>> config.family, wrapper_of(config).others
    ('gemma3_text', ('vision_tower', 'multi_modal_projector'))
    """
    return _wrapper(getattr(config, "hf", ""))


@lru_cache(maxsize=64)
def _wrapper(hf: str) -> Wrapper | None:
    return WRAPPERS.get(json.loads(hf)["model_type"]) if hf else None
