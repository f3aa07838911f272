"""A backbone's sizes and settings, read from a Hugging Face config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from para_jax.adapters.method import Site
from para_jax.errors import ParaJaxError, unknown

CONFIG, GENERATION = "config.json", "generation_config.json"
ARCHITECTURES = ("llama",)
# Settings of the Llama architecture that have one supported value.
FIXED = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu"}


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched: "default" (not at all), "linear", or "llama3" (Llama 3.1 to 3.3)."""

    rope_type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class BackboneConfig:
    """The shape of a Llama-architecture decoder, with the field names of transformers' LlamaConfig.

    >>> from para_jax import tiny_backbone_path
    >>> BackboneConfig.from_pretrained(tiny_backbone_path()).sites["q_proj"]
    Site(inputs=256, outputs=256, path='self_attn.q_proj')
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = RopeScaling()
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 2048
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    name: str = ""

    @cached_property
    def sites(self) -> Mapping[str, Site]:
        """The linear projections of a layer, by Hugging Face name."""
        d, f = self.hidden_size, self.intermediate_size
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        return {
            "q_proj": Site(d, q, "self_attn.q_proj"),
            "k_proj": Site(d, kv, "self_attn.k_proj"),
            "v_proj": Site(d, kv, "self_attn.v_proj"),
            "o_proj": Site(q, d, "self_attn.o_proj"),
            "gate_proj": Site(d, f, "mlp.gate_proj"),
            "up_proj": Site(d, f, "mlp.up_proj"),
            "down_proj": Site(f, d, "mlp.down_proj"),
        }

    @property
    def size(self) -> int:
        """The number of parameters."""
        a_layer = sum(site.inputs * site.outputs for site in self.sites.values()) + 2 * self.hidden_size
        heads = 1 if self.tie_word_embeddings else 2
        return self.num_hidden_layers * a_layer + self.hidden_size * (1 + heads * self.vocab_size)

    @classmethod
    def from_pretrained(cls, path_or_hub_id: str | Path) -> BackboneConfig:
        """Reads config.json alone, of a folder or of a hub id.

        Raises ParaJaxError if it is no checkpoint, or of an architecture or with a setting not supported.
        """
        folder = checkpoint_folder(path_or_hub_id, [CONFIG, GENERATION])
        return cls.from_folder(folder, name=str(path_or_hub_id))

    @classmethod
    def from_folder(cls, folder: Path, name: str = "") -> BackboneConfig:
        """From the folder that `checkpoint_folder` found."""
        fields = read_json(folder / CONFIG)
        if (folder / GENERATION).is_file():
            # The chat models' list of stop tokens is often only here.
            eos = read_json(folder / GENERATION).get("eos_token_id")
            fields["eos_token_id"] = fields.get("eos_token_id") if eos is None else eos
        return cls.from_hf(fields, name)

    @classmethod
    def from_hf(cls, fields: Mapping[str, Any], name: str = "") -> BackboneConfig:
        """From the fields of config.json, in the spelling of transformers 4 or 5."""
        model_type = fields.get("model_type")
        if model_type not in ARCHITECTURES:
            raise ParaJaxError(
                f"{name or 'this checkpoint'} is of architecture {model_type!r}, which is not supported. "
                f"Supported: {', '.join(ARCHITECTURES)}"
            )
        for key, value in FIXED.items():
            if fields.get(key, value) != value:
                raise ParaJaxError(f"config.json has {key}={fields[key]!r}; only {value!r} is supported")
        if fields.get("quantization_config"):
            raise ParaJaxError("config.json has a quantization_config; only float32, float16 and bfloat16 are read")
        required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        missing = [key for key in required if key not in fields]
        if missing:
            raise ParaJaxError(f"config.json lacks {', '.join(missing)}")
        heads = fields["num_attention_heads"]
        kv_heads = fields.get("num_key_value_heads") or heads
        if heads % kv_heads:
            raise ParaJaxError(f"config.json has {heads} attention heads that {kv_heads} key/value heads do not divide")
        eos = fields.get("eos_token_id")
        theta, scaling = _rope(fields)
        return cls(
            **{key: fields[key] for key in required},
            num_key_value_heads=kv_heads,
            head_dim=fields.get("head_dim") or fields["hidden_size"] // heads,
            rms_norm_eps=fields.get("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=fields.get("tie_word_embeddings", False),
            max_position_embeddings=fields.get("max_position_embeddings", 2048),
            bos_token_id=fields.get("bos_token_id"),
            eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
            name=name,
        )

    def to_hf(self) -> dict[str, Any]:
        """The fields of a config.json that transformers opens; inverse of `from_hf`."""
        scaling = {"rope_type": self.rope_scaling.rope_type}
        for key in _ROPE_FIELDS[self.rope_scaling.rope_type]:
            scaling[key] = getattr(self.rope_scaling, key)
        same = (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings",
            "bos_token_id",
        )  # fmt: skip
        eos = self.eos_token_ids
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **{key: getattr(self, key) for key in same},
            **FIXED,
            "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else list(eos),
            "rope_parameters": {"rope_theta": self.rope_theta, **scaling},
        }


_ROPE_FIELDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def _rope(fields: Mapping[str, Any]) -> tuple[float, RopeScaling]:
    """transformers 5 keeps all in `rope_parameters`; 4 has `rope_theta` beside an optional `rope_scaling`."""
    rope = {**(fields.get("rope_scaling") or {}), **(fields.get("rope_parameters") or {})}
    theta = rope.pop("rope_theta", fields.get("rope_theta", 10000.0))
    kind = rope.pop("rope_type", None) or rope.pop("type", "default")
    rope.pop("type", None)
    if kind not in _ROPE_FIELDS:
        raise unknown("rope_type in config.json", kind, _ROPE_FIELDS)
    missing = [key for key in _ROPE_FIELDS[kind] if key not in rope]
    extra = [key for key in rope if key not in _ROPE_FIELDS[kind]]
    if missing or extra:
        raise ParaJaxError(
            f"RoPE scaling of type {kind!r} in config.json takes {list(_ROPE_FIELDS[kind])}; "
            f"missing {missing}, not understood {extra}"
        )
    return float(theta), RopeScaling(kind, **rope)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ParaJaxError, with the file's name, for anything else."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, or no text
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
            raise ParaJaxError(f"{folder} is no checkpoint: it has no config.json")
        return folder
    name = str(path_or_hub_id)
    if folder.exists() or name.count("/") > 1 or name.startswith((".", "~")):
        raise ParaJaxError(f"{name} is no folder; give a folder with config.json and *.safetensors, or a hub id")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise ParaJaxError(
            f"{name} is neither a folder here nor could it be had from the Hugging Face hub "
            f"({type(error).__name__}). Check the spelling and the network, log in for a gated model, or download "
            "it elsewhere and give the folder"
        ) from error
