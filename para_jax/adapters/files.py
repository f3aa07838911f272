"""An adapter as a folder: adapter_config.json and adapter_model.safetensors.

Methods that PEFT has, LoRA and (IA)3, have its form (`para_jax.adapters.peft`). The others have ours:
adapter_config.json holds `peft_type` (the method), the method's own hyper-parameters, `base_model_name_or_path`,
`base_model` (the sizes that it depends on) and `para_jax_version`; the weights are float32, a tensor a name, with the
layers stacked on the first axis. docs/adapters.md describes both.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from para_jax import __version__
from para_jax.adapters import peft
from para_jax.adapters.adapter import Adapter, abstract_layers, mismatches, named_leaves
from para_jax.adapters.method import BackboneShape, MethodConfig
from para_jax.adapters.registry import METHODS, PEFT, config_from_dict
from para_jax.adapters.weights import CONFIG, WEIGHTS, Weights, read_config, read_weights, refuse_nonfinite
from para_jax.adapters.wrapped import written_for
from para_jax.errors import ParaJaxError, unknown
from para_jax.files import as_json, new_folder, safetensors, write_file

TEMPLATE, TOKENIZER = "chat_template.jinja", "tokenizer_config.json"
OURS = ("peft_type", "base_model_name_or_path", "base_model", "para_jax_version")


def save_adapter(
    adapter: Adapter,
    folder: str | Path,
    base: BackboneShape,
    *,
    chat_template: str | None = None,
    model_type: str | None = None,
    overwrite: bool = False,
) -> None:
    """Writes an adapter so that `load_adapter` gives it back bit for bit, and LoRA and (IA)3 so that `peft` opens it.

    The folder appears whole or not at all: it is written beside its place and renamed. With `overwrite` it takes
    the place of the adapter that was there, all of whose files go once their successors are complete. The chat template
    that the adapter was tuned with is kept beside it: the one given, or else the adapter's own.

    LoRA and (IA)3 are written for the model that `base` was read from, which may have the decoder among other parts.
    With `model_type` they are written for another with such a decoder, "gemma3" or "gemma3_text"; both are read.

    Raises ParaJaxError if the folder exists and `overwrite` is False or it holds no adapter, if it cannot be
    written, or if the adapter does not fit `base`.
    """
    adapter.check(base)
    wrapper = written_for(base, model_type)
    chat_template = adapter.chat_template if chat_template is None else chat_template
    if adapter.config.peft_type:
        config, tensors, metadata = peft.to_peft(adapter, base, wrapper)
    else:
        config = {
            "peft_type": adapter.config.method.upper(),
            **dataclasses.asdict(adapter.config),
            "base_model_name_or_path": getattr(base, "name", ""),
            "base_model": base_sizes(base, _sites(adapter.config, base)),
            "para_jax_version": __version__,
        }
        tensors, metadata = {k: np.asarray(v) for k, v in adapter.tensors().items()}, {"format": "pt"}
    with new_folder(folder, CONFIG, overwrite=overwrite) as partial:
        write_file(partial / CONFIG, [as_json(config, 2).encode()])
        write_file(partial / WEIGHTS, safetensors(tensors, metadata))
        if chat_template is not None:
            write_file(partial / TEMPLATE, [chat_template.encode()])


def load_chat_template(folder: str | Path) -> str | None:
    """The chat template that is kept with an adapter, if there is one.

    It is in chat_template.jinja or, as transformers wrote it before, in tokenizer_config.json; of several the one
    named default. Raises ParaJaxError for what is no text.
    """
    path = Path(folder) / TEMPLATE
    try:
        if path.is_file():
            return path.read_bytes().decode()  # bytes: line ends count in a template
        path = Path(folder) / TOKENIZER
        kept = json.loads(path.read_text(encoding="utf-8")).get("chat_template") if path.is_file() else None
        if isinstance(kept, list):
            kept = {entry["name"]: entry["template"] for entry in kept}
        kept = kept.get("default") if isinstance(kept, dict) else kept
    except UnicodeDecodeError as error:
        raise ParaJaxError(f"{path} is no text in UTF-8: {error}; save the template again, or remove it") from error
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise ParaJaxError(f"{path} is damaged: {error!r}; save the tokenizer again, or remove it") from error
    if kept is not None and not isinstance(kept, str):
        raise ParaJaxError(f"{path}: chat_template is {kept!r}, which is no text; remove it")
    return kept


def load_adapter(folder: str | Path, shape: BackboneShape, *, check_finite: bool = True) -> Adapter:
    """Reads an adapter for a backbone of this shape: a folder of `save_adapter`, or a LoRA or (IA)3 of PEFT's.

    Weights are float32, whatever the file has. Without `check_finite`, NaN and infinite weights are read as well.

    Raises ParaJaxError if the folder is no adapter, names an unknown method or an option that is not implemented, was
    made for a backbone of other sizes, holds a missing, extra or misshapen tensor (all of them are listed), or a
    tensor with NaN or infinite values.

    >>> from tempfile import TemporaryDirectory
    >>> from para_jax import AdapterBank, BackboneConfig, ParaConfig, save_adapter, tiny_backbone_path
    >>> shape = BackboneConfig.from_pretrained(tiny_backbone_path())
    >>> bank = AdapterBank.create({"acme": ParaConfig(r=2)}, shape)
    >>> with TemporaryDirectory() as folder:
    ...     save_adapter(bank["acme"], f"{folder}/acme", shape)
    ...     load_adapter(f"{folder}/acme", shape).config.r
    2
    """
    folder = Path(folder).expanduser()
    fields = read_config(folder)
    method = fields["peft_type"].lower()
    if method.upper() not in PEFT and method not in METHODS:
        merge = f"; or {peft.MERGE}" if method.upper() in peft.MERGEABLE else ""
        raise ParaJaxError(f"{folder}: {unknown('method', method, METHODS)}{merge}")
    weights = read_weights(folder)
    template = load_chat_template(folder)
    if method.upper() in PEFT:
        adapter = peft.from_peft(folder, fields, weights, shape)
    else:
        adapter = _of_ours(folder, method, fields, weights, shape)
    if check_finite:
        refuse_nonfinite(weights)
    return dataclasses.replace(adapter, chat_template=template)


def _of_ours(folder: Path, method: str, fields: dict[str, Any], weights: Weights, shape: BackboneShape) -> Adapter:
    """An adapter in the form that PEFT does not have."""
    made_for = fields.get("base_model")
    try:
        config = config_from_dict(method, {k: v for k, v in fields.items() if k not in OURS})
        # Targets may have no place in a backbone of other sizes, which are looked at first.
        differences = _differences(made_for, base_sizes(shape, ())) or _differences(
            made_for, base_sizes(shape, _sites(config, shape))
        )
    except ParaJaxError as error:
        raise ParaJaxError(f"{folder / CONFIG}: {error}") from error
    if differences:
        raise ParaJaxError(
            f"{folder} was made for another backbone ({fields.get('base_model_name_or_path') or 'unnamed'}: "
            f"{differences}); load the backbone it was tuned on, or tune it again"
        )
    if problems := mismatches(weights.tensors, config, shape):
        raise ParaJaxError(f"{weights.path}: {'; '.join(problems)}")
    abstract = abstract_layers(config, shape)
    leaves = [jax.device_put(weights.tensors[name]) for name in named_leaves(abstract)]
    return Adapter(config, jax.tree.unflatten(jax.tree.structure(abstract), leaves))


def _sites(config: MethodConfig, shape: BackboneShape) -> list[str]:
    """The sites that an adapter adapts in any layer."""
    return list(dict.fromkeys(site for own in config.modules(shape) for site in own))


def base_sizes(shape: BackboneShape, sites: Iterable[str] | None = None) -> dict[str, Any]:
    """The sizes of a backbone that an adapter of these sites depends on; of all sites, if None."""
    return {
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_hidden_layers,
        "sites": {name: [*shape.sites[name][:2]] for name in (shape.sites if sites is None else sites)},
    }


def _differences(made_for: Any, wanted: dict[str, Any]) -> str:
    """Where the sizes that a file records are not those wanted. It may record more sites than its adapter uses."""
    made_for = made_for if isinstance(made_for, dict) else {}
    recorded = made_for.get("sites") if isinstance(made_for.get("sites"), dict) else {}
    there = {**made_for, "sites": {name: recorded.get(name) for name in wanted["sites"]}}
    keys = [k for k in wanted if there.get(k) != wanted[k]]
    return ", ".join(f"{k} {there.get(k)} there and {wanted[k]} here" for k in keys)
