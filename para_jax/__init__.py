"""Prompt-Aware Representation Adjustment (PARA): one frozen language model for very many tenants, in JAX.

>>> import para_jax
>>> backbone = para_jax.Backbone.from_pretrained(para_jax.tiny_backbone_path())
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Names and where they live. They are imported on first use, so that `import para_jax` and `para-jax --help` are quick.
_PUBLIC = {
    "Adapter": "para_jax.adapters.adapter",
    "AdapterBank": "para_jax.adapters.bank",
    "Backbone": "para_jax.backbones.decoder",
    "BackboneConfig": "para_jax.config",
    "BiasConfig": "para_jax.adapters.bias",
    "Completion": "para_jax.decoding.generate",
    "Example": "para_jax.data.buffers",
    "FanLoraConfig": "para_jax.adapters.fanlora",
    "IA3Config": "para_jax.adapters.ia3",
    "Interrupted": "para_jax.training.signals",
    "Loggers": "para_jax.training.loggers",
    "LoraConfig": "para_jax.adapters.lora",
    "MethodConfig": "para_jax.adapters.method",
    "ParaConfig": "para_jax.adapters.para",
    "ParaJaxError": "para_jax.errors",
    "Reader": "para_jax.data.reading",
    "Settings": "para_jax.training.settings",
    "adapter_cost": "para_jax.backbones.cost",
    "auto_mesh": "para_jax.sharding",
    "complete": "para_jax.decoding.generate",
    "compute_dtype": "para_jax.backbones.options",
    "default_stacked": "para_jax.backbones.options",
    "encode_rows": "para_jax.data.examples",
    "end_tokens": "para_jax.convert.tokenizer",
    "evaluate": "para_jax.evaluation.evaluate",
    "finetune": "para_jax.training.finetune",
    "generate": "para_jax.decoding.generate",
    "host_memory": "para_jax.machine",
    "importance_scores": "para_jax.importance.scores",
    "is_main_process": "para_jax.distributed",
    "join_processes": "para_jax.distributed",
    "keep_compiled": "para_jax.compile_cache",
    "keep_freed_memory": "para_jax.memory",
    "keep_number": "para_jax.importance.select",
    "keep_within": "para_jax.importance.select",
    "load_adapter": "para_jax.adapters.files",
    "load_tokenizer": "para_jax.convert.tokenizer",
    "make_mesh": "para_jax.sharding",
    "merge_adapter": "para_jax.convert.merging",
    "plot_importance": "para_jax.importance.select",
    "quickstart_rows": "para_jax.data.quickstart",
    "read_examples": "para_jax.data.examples",
    "read_rows": "para_jax.data.sources",
    "save_adapter": "para_jax.adapters.files",
    "save_backbone": "para_jax.convert.checkpoint",
}

__all__ = [*_PUBLIC, "tiny_backbone_path"]

if TYPE_CHECKING:
    from para_jax.adapters.adapter import Adapter as Adapter
    from para_jax.adapters.bank import AdapterBank as AdapterBank
    from para_jax.adapters.bias import BiasConfig as BiasConfig
    from para_jax.adapters.fanlora import FanLoraConfig as FanLoraConfig
    from para_jax.adapters.files import load_adapter as load_adapter
    from para_jax.adapters.files import save_adapter as save_adapter
    from para_jax.adapters.ia3 import IA3Config as IA3Config
    from para_jax.adapters.lora import LoraConfig as LoraConfig
    from para_jax.adapters.method import MethodConfig as MethodConfig
    from para_jax.adapters.para import ParaConfig as ParaConfig
    from para_jax.backbones.cost import adapter_cost as adapter_cost
    from para_jax.backbones.decoder import Backbone as Backbone
    from para_jax.backbones.options import compute_dtype as compute_dtype
    from para_jax.backbones.options import default_stacked as default_stacked
    from para_jax.compile_cache import keep_compiled as keep_compiled
    from para_jax.config import BackboneConfig as BackboneConfig
    from para_jax.convert.checkpoint import save_backbone as save_backbone
    from para_jax.convert.merging import merge_adapter as merge_adapter
    from para_jax.convert.tokenizer import end_tokens as end_tokens
    from para_jax.convert.tokenizer import load_tokenizer as load_tokenizer
    from para_jax.data.buffers import Example as Example
    from para_jax.data.examples import encode_rows as encode_rows
    from para_jax.data.examples import read_examples as read_examples
    from para_jax.data.quickstart import quickstart_rows as quickstart_rows
    from para_jax.data.reading import Reader as Reader
    from para_jax.data.sources import read_rows as read_rows
    from para_jax.decoding.generate import Completion as Completion
    from para_jax.decoding.generate import complete as complete
    from para_jax.decoding.generate import generate as generate
    from para_jax.distributed import is_main_process as is_main_process
    from para_jax.distributed import join_processes as join_processes
    from para_jax.errors import ParaJaxError as ParaJaxError
    from para_jax.evaluation.evaluate import evaluate as evaluate
    from para_jax.importance.scores import importance_scores as importance_scores
    from para_jax.importance.select import keep_number as keep_number
    from para_jax.importance.select import keep_within as keep_within
    from para_jax.importance.select import plot_importance as plot_importance
    from para_jax.machine import host_memory as host_memory
    from para_jax.memory import keep_freed_memory as keep_freed_memory
    from para_jax.sharding import auto_mesh as auto_mesh
    from para_jax.sharding import make_mesh as make_mesh
    from para_jax.training.finetune import finetune as finetune
    from para_jax.training.loggers import Loggers as Loggers
    from para_jax.training.settings import Settings as Settings
    from para_jax.training.signals import Interrupted as Interrupted


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'para_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return __all__


def tiny_backbone_path() -> str:
    """The folder of the 4M-parameter Llama-architecture model that ships with the package, with its tokenizer.

    >>> Path(tiny_backbone_path(), "config.json").is_file()
    True
    """
    return str(Path(__file__).parent / "assets" / "tiny-books")
