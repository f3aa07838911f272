"""Prompt-Aware Representation Adjustment (PARA): one frozen language model for very many tenants, in JAX.

>>> import para_jax
>>> backbone = para_jax.Backbone.from_pretrained(para_jax.tiny_backbone_path())
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# The public names of each module, imported on first use, so that `import para_jax` and `para-jax --help` are quick.
_MODULES = {
    "adapters.adapter": "Adapter", "adapters.bank": "AdapterBank", "adapters.bias": "BiasConfig",
    "adapters.fanlora": "FanLoraConfig", "adapters.files": "load_adapter save_adapter", "adapters.ia3": "IA3Config",
    "adapters.lora": "LoraConfig", "adapters.method": "MethodConfig", "adapters.para": "ParaConfig",
    "backbones.cost": "adapter_cost", "backbones.decoder": "Backbone",
    "backbones.options": "compute_dtype default_stacked", "compile_cache": "keep_compiled",
    "config": "BackboneConfig", "convert.checkpoint": "save_backbone", "convert.merging": "merge_adapter",
    "convert.tokenizer": "end_tokens load_tokenizer", "data.buffers": "Example",
    "data.examples": "encode_rows read_examples", "data.quickstart": "quickstart_rows", "data.reading": "Reader",
    "data.sources": "read_rows", "decoding.generate": "Completion complete generate",
    "distributed": "is_main_process join_processes", "errors": "ParaJaxError", "evaluation.evaluate": "evaluate",
    "importance.scores": "importance_scores", "importance.select": "keep_number keep_within plot_importance",
    "machine": "host_memory", "memory": "keep_freed_memory", "sharding": "auto_mesh make_mesh",
    "training.finetune": "finetune", "training.loggers": "Loggers", "training.settings": "Settings",
    "training.signals": "Interrupted",
}  # fmt: skip
_PUBLIC = {name: f"para_jax.{module}" for module, names in _MODULES.items() for name in names.split()}

__all__ = [*sorted(_PUBLIC), "tiny_backbone_path"]

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
