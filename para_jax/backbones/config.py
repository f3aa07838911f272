"""A backbone's sizes and settings, whatever family of Hugging Face checkpoints it comes from."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from para_jax import hub
from para_jax.adapters.method import Site
from para_jax.errors import ParaJaxError

CONFIG, GENERATION = "config.json", "generation_config.json"
ATTENTION_SITES = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_SITES = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding.

    Attributes:
      theta: the base of the wavelengths.
      rope_type: how frequencies are stretched for long contexts, a type of transformers' (`backbones/rope.py`).
      partial_rotary_factor: the share of a head's features that is turned.
      options: what the type needs to know, by transformers' names.
    """

    theta: float = 10000.0
    rope_type: str = "default"
    partial_rotary_factor: float = 1.0
    options: tuple[tuple[str, Any], ...] = ()

    def dim(self, head_dim: int) -> int:
        """How many features of a head are turned."""
        return int(head_dim * self.partial_rotary_factor)


@dataclass(frozen=True)
class AttentionKind:
    """What layers of one model may differ in: how far back a token sees, and how positions are told.

    Attributes:
      window: a token sees itself and `window - 1` tokens before it; all, if None.
      rope: None where queries and keys have no positions (NoPE).
    """

    window: int | None = None
    rope: Rope | None = Rope()


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of the feed-forward block.

    Attributes:
      count, per_token: how many there are, and how many of them a token is sent to.
      width: the inner features of one.
      normalized: whether the weights of a token's experts are made to sum to one.
    """

    count: int
    per_token: int
    width: int
    normalized: bool


@dataclass(frozen=True)
class BackboneConfig:
    """The shape of a decoder, with the field names of transformers' configs where it has them.

    Left at their defaults, the fields from `family` on make a Llama.

    Attributes:
      attention_kinds, kind_of_layer: the kinds there are, and the number of each layer's; empty, if all have the first.
      biases: the projections that have one.
      eos_token_ids: the end tokens that config.json or generation_config.json names, in order. Where they name none,
        the tokenizer may have one (`convert.tokenizer.end_tokens`).
      qk_norm: RMS norm of queries and keys, of each head or of all heads together, before positions are told.
      pre_norm, post_norm: whether a layer's two halves have a norm before and behind them.
      norm_offset: added to the weights of norms; 1 where they are stored as their distance from one.
      attention_scale: of the scores; head_dim ** -0.5, if None.
      attn_logit_softcapping, final_logit_softcapping: c, where scores or logits x become c tanh(x / c).
      embedding_scale: what embeddings are multiplied by.
      hf: the config.json that this was read from, which is what is written out again.

    >>> from para_jax import tiny_backbone_path
    >>> BackboneConfig.from_pretrained(tiny_backbone_path()).sites["q_proj"].path
    'self_attn.q_proj'
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    attention_kinds: tuple[AttentionKind, ...] = (AttentionKind(),)
    kind_of_layer: tuple[int, ...] = ()
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 2048
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    name: str = ""
    family: str = "llama"
    hidden_act: str = "silu"
    biases: tuple[str, ...] = ()
    qk_norm: Literal["none", "head", "all"] = "none"
    pre_norm: bool = True
    post_norm: bool = False
    norm_offset: float = 0.0
    attention_scale: float | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    embedding_scale: float = 1.0
    experts: Experts | None = None
    hf: str = field(default="", compare=False, repr=False)

    @cached_property
    def sites(self) -> Mapping[str, Site]:
        """The projections of a layer that adapters may adjust, by Hugging Face name.

        Of experts it is the up projection, which one vector scales in all of them.
        """
        # What a family calls its tensors is the business of convert/, which builds on this module.
        from para_jax.convert.families import FAMILIES

        names = FAMILIES[self.family].names
        d, f = self.hidden_size, self.intermediate_size
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        attention = {
            "q_proj": Site(d, q, "self_attn.q_proj", fused=names.qkv),
            "k_proj": Site(d, kv, "self_attn.k_proj", fused=names.qkv),
            "v_proj": Site(d, kv, "self_attn.v_proj", fused=names.qkv),
            "o_proj": Site(q, d, "self_attn.o_proj"),
        }
        if self.experts is not None:
            return {**attention, "up_proj": Site(d, self.experts.width, "mlp.experts.up_proj", linear=False)}
        return {
            **attention,
            "gate_proj": Site(d, f, "mlp.gate_proj", fused=names.gate_up),
            "up_proj": Site(d, f, "mlp.up_proj", fused=names.gate_up),
            "down_proj": Site(f, d, "mlp.down_proj"),
        }

    @cached_property
    def linear_sites(self) -> Mapping[str, Site]:
        """Those that a low-rank pair can stand beside."""
        return {name: site for name, site in self.sites.items() if site.linear}

    @property
    def size(self) -> int:
        """The number of parameters."""
        from para_jax.convert.families import entries

        of_layers = [entry for layer in range(self.num_hidden_layers) for entry in entries(self, layer)]
        return sum(entry.size for entry in [*entries(self), *of_layers])

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
        # What the families' options mean is the business of convert/, which builds on this module.
        from para_jax.convert.families import config_from_hf, ignored_line

        config = config_from_hf(fields, name)
        if line := ignored_line(fields, name):
            logging.getLogger(__name__).warning("%s", line)
        return config


def as_token_ids(value: Any, file: str) -> tuple[int, ...]:
    """Token ids as config files have them: one, several, or none. Raises ParaJaxError, with the file, for others.

    >>> as_token_ids(2, "config.json"), as_token_ids([3, 4], "config.json"), as_token_ids(None, "config.json")
    ((2,), (3, 4), ())
    """
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise ParaJaxError(f"{file} has eos_token_id={value!r}, which is no token id and no list of token ids")
    return tuple(dict.fromkeys(ids))


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
