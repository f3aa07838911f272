"""`BackboneConfig`: the `Architecture` that a config.json describes, with what follows from it.

That is the sites of each layer, the stacks of layers, and the number of parameters.
"""

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
from para_jax.families.architecture import Architecture, Site, Stack, all_sites
from para_jax.families.reading import CONFIG, architecture_from_hf, as_token_ids, ignored_line

GENERATION = "generation_config.json"


@dataclass(frozen=True)
class BackboneConfig(Architecture):
    """The shape of a decoder. Fields have the names of transformers' configs where it has them.

    The defaults of the fields from `family` on are those of Llama.

    Attributes:
      layer_kinds, kind_of_layer: the kinds of layers, and the index of each layer's kind; empty if all layers have the
        first kind.
      biases: the projections that have a bias, which may include "lm_head"; "norm", if the layers' norms and the final
        norm have one; and "qk_norm", if the norms of queries and keys have one.
      eos_token_ids: the end tokens in config.json or generation_config.json, in order. If there are none, the
        tokenizer's is used (`convert.tokenizer.end_tokens`).
      norm: RMS norm, or layer norm.
      norm_weights: whether norms have weights.
      embedding_norm: whether the embeddings go through a norm.
      qk_norm: the norm of queries and keys: per head, with shared ("head") or separate ("each") weights, or over all
        heads.
      qk_norm_last: whether this norm comes after the rotary embedding.
      pre_norm, post_norm: whether attention and feed-forward have a norm before and after them.
      norm_offset: added to the weights of norms; 1 if checkpoints store them minus one.
      parallel: whether attention and feed-forward have the same input, and both outputs are added at once.
      parallel_norms: whether each of them then has a norm of its own.
      gated: whether the feed-forward is down(act(gate(x)) * up(x)), or down(act(up(x))).
      rope_pairs: the features that are rotated together: those half a head apart, or neighbours.
      position_offset: the row of the first position in the table of learned positions, which has a row for each of
        `max_position_embeddings` and is added to the embeddings; None if there is no such table.
      attention_scale: the scale of attention scores; None for head_dim ** -0.5.
      attn_logit_softcapping, final_logit_softcapping: c, if scores or logits x become c tanh(x / c).
      attention_sinks: whether each head has a learned score that joins the softmax of every query and has no value.
      embedding_scale, residual_scale, logits_scale: factors of embeddings, of the outputs of attention and
        feed-forward, and of logits.
      value_norm: whether values have a norm, which has no weights.
      layer_scale: whether the output of a layer has a factor.
      per_layer_inputs: the vocabulary and features of an embedding with an input for every layer.
      hf: the config.json that this was read from. It is written again when the backbone is saved.

    >>> from para_jax import tiny_backbone_path
    >>> BackboneConfig.from_pretrained(tiny_backbone_path()).sites["q_proj"].path
    'self_attn.q_proj'
    """

    @cached_property
    def stacks(self) -> tuple[Stack, ...]:
        """The layers by the shapes of their arrays."""
        return parameters.stacks(self)

    @cached_property
    def sites(self) -> Mapping[str, Site]:
        """The projections that adapters may adjust in any layer, by Hugging Face name.

        For a mixture of experts this includes the up projection, which one vector scales in all experts. If layers have
        different sizes, these are the sizes of the first layer that has the projection; see `sites_of`.
        """
        return all_sites(self.sites_of(stack.layers[0]) for stack in self.stacks)

    def sites_of(self, layer: int) -> Mapping[str, Site]:
        """The projections that adapters may adjust in one layer."""
        return self._sites_of_layers[layer]

    @cached_property
    def _sites_of_layers(self) -> tuple[Mapping[str, Site], ...]:
        of_stack = {layer: parameters.sites(self, stack.layers[0]) for stack in self.stacks for layer in stack.layers}
        return tuple(of_stack[layer] for layer in range(self.num_hidden_layers))

    @cached_property
    def linear_sites(self) -> Mapping[str, Site]:
        """The sites that can have a low-rank pair."""
        return {name: site for name, site in self.sites.items() if site.linear}

    @property
    def layers_path(self) -> str:
        """The path of the list of layers, for names of modules; as in Llama, for every family."""
        return "model.layers"

    @property
    def hf_layers(self) -> str:
        """Where transformers has the layers: "model.layers", or "transformer.h" in GPT-2."""
        names = parameters.names_of(self)
        return f"{names.stem}.{names.layers}"

    @property
    def size(self) -> int:
        """The number of parameters."""
        return parameters.size(self)

    @classmethod
    def from_pretrained(cls, path_or_hub_id: str | Path) -> BackboneConfig:
        """Reads the config of a folder or hub id, without the weights.

        Raises ParaJaxError if it is not a checkpoint, or its architecture or a setting is not supported.
        """
        folder = checkpoint_folder(path_or_hub_id, [CONFIG, GENERATION])
        return cls.from_folder(folder, name=str(path_or_hub_id))

    @classmethod
    def from_folder(cls, folder: Path, name: str = "") -> BackboneConfig:
        """Reads the config from a folder of `checkpoint_folder`.

        End tokens are those of generation_config.json, where chat models list theirs, or else of config.json. A
        `logging` warning reports end tokens that are only in config.json.
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
        """Converts the fields of config.json, as written by transformers 4 or 5.

        A `logging` warning lists unused keys, which do not change what the model computes.
        """
        config = cls(**vars(architecture_from_hf(fields, name)))
        if line := ignored_line(fields, name):
            logging.getLogger(__name__).warning("%s", line)
        return config


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object. Raises ParaJaxError with the file's name for anything else."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not JSON, not text, or nested too deep
        raise ParaJaxError(f"{path} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ParaJaxError(f"{path} is not a JSON object")
    return fields


def checkpoint_folder(path_or_hub_id: str | Path, patterns: list[str]) -> Path:
    """The folder of a checkpoint. For a hub id, downloads the files that match `patterns`.

    Raises ParaJaxError for a folder without config.json, or a hub id that cannot be downloaded.
    """
    folder = Path(path_or_hub_id).expanduser()
    if folder.is_dir():
        if not (folder / CONFIG).is_file():
            adapter = (folder / "adapter_config.json").is_file()
            way = ", but an adapter's adapter_config.json; give the backbone it was trained on" if adapter else ""
            raise ParaJaxError(f"{folder} is not a checkpoint: it has no config.json{way}")
        return folder
    name = str(path_or_hub_id)
    if folder.exists() or name.count("/") > 1 or name.startswith((".", "~")):
        raise ParaJaxError(f"{name} is not a folder; give a folder with config.json and *.safetensors, or a hub id")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise hub.not_had(name, error) from error
