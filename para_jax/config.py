"""A backbone's sizes and settings, whatever family of Hugging Face checkpoints it comes from."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from para_jax import hub, parameters
from para_jax.errors import ParaJaxError
from para_jax.families.architecture import Architecture, Site
from para_jax.families.reading import CONFIG, architecture_from_hf, as_token_ids, ignored_line

GENERATION = "generation_config.json"


@dataclass(frozen=True)
class BackboneConfig(Architecture):
    """The shape of a decoder, with the field names of transformers' configs where it has them.

    Left at their defaults, the fields from `family` on make a Llama.

    Attributes:
      attention_kinds, kind_of_layer: the kinds there are, and the number of each layer's; empty, if all have the first.
      biases: the projections that have one, which may be "lm_head"; "norm" if the layers' norms and the last have one,
        and "qk_norm" if those of queries and keys have.
      eos_token_ids: the end tokens that config.json or generation_config.json names, in order. Where they name none,
        the tokenizer may have one (`convert.tokenizer.end_tokens`).
      norm: RMS norm, or layer norm.
      qk_norm: the norm of queries and keys: of each head, with the same weights ("head") or its own ("each"), or of all
        heads together.
      qk_norm_last: whether it comes behind the rotation by positions.
      pre_norm, post_norm: whether a layer's two halves have a norm before and behind them.
      norm_offset: added to the weights of norms; 1 where they are stored as their distance from one.
      parallel: whether the feed-forward reads what the attention reads, and both are added at once.
      gated: whether the feed-forward is down(act(gate(x)) * up(x)), or down(act(up(x))).
      rope_pairs: which features are rotated together, the first with the one in the middle or with its neighbour.
      attention_scale: of the scores; head_dim ** -0.5, if None.
      attn_logit_softcapping, final_logit_softcapping: c, where scores or logits x become c tanh(x / c).
      embedding_scale, residual_scale, logits_scale: what embeddings, the outputs of a layer's halves, and logits are
        multiplied by.
      hf: the config.json that this was read from, which is what is written out again.

    >>> from para_jax import tiny_backbone_path
    >>> BackboneConfig.from_pretrained(tiny_backbone_path()).sites["q_proj"].path
    'self_attn.q_proj'
    """

    @cached_property
    def sites(self) -> Mapping[str, Site]:
        """The projections of a layer that adapters may adjust, by Hugging Face name.

        Of experts it is the up projection, which one vector scales in all of them.
        """
        return parameters.sites(self)

    @cached_property
    def linear_sites(self) -> Mapping[str, Site]:
        """Those that a low-rank pair can stand beside."""
        return {name: site for name, site in self.sites.items() if site.linear}

    @property
    def size(self) -> int:
        """The number of parameters."""
        return parameters.size(self)

    @classmethod
    def from_pretrained(cls, path_or_hub_id: str | Path) -> BackboneConfig:
        """Reads config.json alone, of a folder or of a hub id.

        Raises ParaJaxError if it is no checkpoint, or of an architecture or with a setting not supported.
        """
        folder = checkpoint_folder(path_or_hub_id, [CONFIG, GENERATION])
        return cls.from_folder(folder, name=str(path_or_hub_id))

    @classmethod
    def from_folder(cls, folder: Path, name: str = "") -> BackboneConfig:
        """From the folder that `checkpoint_folder` found.

        End tokens are those of generation_config.json, where chat models have their list, or else of config.json. A
        warning of `logging` says so if config.json has others.
        """
        config = cls.from_hf(read_json(folder / CONFIG), name)
        if not (folder / GENERATION).is_file():
            return config
        eos = as_token_ids(read_json(folder / GENERATION).get("eos_token_id"), GENERATION)
        if eos and not set(config.eos_token_ids) <= set(eos):
            logging.getLogger(__name__).warning(
                "%s: %s ends texts with %s, %s with %s; %s is used",
                *(name or folder, GENERATION, list(eos), CONFIG, list(config.eos_token_ids), list(eos)),
            )
        return replace(config, eos_token_ids=eos) if eos else config

    @classmethod
    def from_hf(cls, fields: Mapping[str, Any], name: str = "") -> BackboneConfig:
        """From the fields of config.json, in the spelling of transformers 4 or 5.

        A warning of `logging` lists the keys that cannot change what the model computes.
        """
        config = cls(**vars(architecture_from_hf(fields, name)))
        if line := ignored_line(fields, name):
            logging.getLogger(__name__).warning("%s", line)
        return config


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ParaJaxError, with the file's name, for anything else."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # no JSON, no text, or brackets without end
        raise ParaJaxError(f"{path} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ParaJaxError(f"{path} holds no JSON object")
    return fields


def checkpoint_folder(path_or_hub_id: str | Path, patterns: list[str]) -> Path:
    """The folder of a checkpoint; files of a hub id that match `patterns` are downloaded first.

    Raises ParaJaxError for a folder without config.json, or a hub id that cannot be had.
    """
    folder = Path(path_or_hub_id).expanduser()
    if folder.is_dir():
        if not (folder / CONFIG).is_file():
            adapter = (folder / "adapter_config.json").is_file()
            way = ", but an adapter's adapter_config.json; give the backbone it was trained on" if adapter else ""
            raise ParaJaxError(f"{folder} is no checkpoint: it has no config.json{way}")
        return folder
    name = str(path_or_hub_id)
    if folder.exists() or name.count("/") > 1 or name.startswith((".", "~")):
        raise ParaJaxError(f"{name} is no folder; give a folder with config.json and *.safetensors, or a hub id")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise hub.not_had(name, error) from error
