"""An adapter as a folder: adapter_config.json and adapter_model.safetensors.

LoRA and (IA)3, which PEFT has too, use PEFT's format (`para_jax.adapters.peft`). Other methods use ours:
adapter_config.json has `peft_type` (the method), the method's hyper-parameters, `base_model_name_or_path`, `base_model`
(the sizes that the adapter depends on) and `para_jax_version`. The weights are float32, one tensor per name, with the
layers stacked on the first axis. docs/adapters.md describes both formats.
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
    """Writes an adapter. `load_adapter` reads it back bit for bit, and `peft` opens LoRA and (IA)3.

    The folder is written atomically: to a temporary name beside it, which is then renamed. With `overwrite` it replaces
    an existing adapter, whose files are deleted only after the new ones are complete. The chat template that the
    adapter was tuned with is saved too: `chat_template`, or else the adapter's own.

    LoRA and (IA)3 are written for the model that `base` was read from, which may have other parts than the decoder.
    With `model_type` they are written for another model with such a decoder, such as "gemma3" or "gemma3_text".
    `load_adapter` reads either.

    Raises ParaJaxError if the folder exists and `overwrite` is False or it is not an adapter, if it cannot be written,
    or if the adapter does not fit `base`.
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
    """The chat template in an adapter's folder, or None.

    It is in chat_template.jinja, or in tokenizer_config.json, where older transformers wrote it. Of several templates,
    the one named "default" is used. Raises ParaJaxError for a template that is not text.
    """
    path = Path(folder) / TEMPLATE
    try:
        if path.is_file():
            return path.read_bytes().decode()  # as bytes, to keep line ends unchanged
        path = Path(folder) / TOKENIZER
        template = json.loads(path.read_text(encoding="utf-8")).get("chat_template") if path.is_file() else None
        if isinstance(template, list):
            template = {entry["name"]: entry["template"] for entry in template}
        template = template.get("default") if isinstance(template, dict) else template
    except UnicodeDecodeError as error:
        raise ParaJaxError(f"{path} is not UTF-8 text: {error}; save the template again, or remove it") from error
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise ParaJaxError(f"{path} is damaged: {error!r}; save the tokenizer again, or remove it") from error
    if template is not None and not isinstance(template, str):
        raise ParaJaxError(f"{path}: chat_template is {template!r}, which is not text; remove it")
    return template


def load_adapter(folder: str | Path, shape: BackboneShape, *, check_finite: bool = True) -> Adapter:
    """Reads an adapter for a backbone of this shape: a folder of `save_adapter`, or a LoRA or (IA)3 adapter of PEFT.

    Weights are converted to float32. With `check_finite=False`, NaN and infinite weights are accepted.

    Raises ParaJaxError if the folder is not an adapter, has an unknown method or an option that is not implemented, was
    made for a backbone of other sizes, has missing, extra or misshapen tensors (all are listed), or has NaN or infinite
    values.

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
        adapter = _from_our_format(folder, method, fields, weights, shape)
    if check_finite:
        refuse_nonfinite(weights)
    return dataclasses.replace(adapter, chat_template=template)


def _from_our_format(
    folder: Path, method: str, fields: dict[str, Any], weights: Weights, shape: BackboneShape
) -> Adapter:
    made_for = fields.get("base_model")
    try:
        config = config_from_dict(method, {k: v for k, v in fields.items() if k not in OURS})
        # Targets may not exist in a backbone of other sizes, so sizes are compared first.
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
    return list(dict.fromkeys(site for layer in config.modules(shape) for site in layer))


def base_sizes(shape: BackboneShape, sites: Iterable[str] | None = None) -> dict[str, Any]:
    """The sizes of a backbone that an adapter of these sites, or of all sites, depends on.

    If layers have different shapes, a site has the sizes of each stack of layers that has it.
    """
    sizes: dict[str, Any] = {name: [*shape.sites[name][:2]] for name in (shape.sites if sites is None else sites)}
    if len(shape.stacks) > 1:
        in_stacks = {stack.name: shape.sites_of(stack.layers[0]) for stack in shape.stacks}
        sizes = {name: {at: [*own[name][:2]] for at, own in in_stacks.items() if name in own} for name in sizes}
    return {"hidden_size": shape.hidden_size, "num_hidden_layers": shape.num_hidden_layers, "sites": sizes}


def _differences(made_for: Any, wanted: dict[str, Any]) -> str:
    """Lists the differences between the sizes in a file and those wanted. The file may have more sites."""
    made_for = made_for if isinstance(made_for, dict) else {}
    file_sites = made_for.get("sites") if isinstance(made_for.get("sites"), dict) else {}
    there = {**made_for, "sites": {name: file_sites.get(name) for name in wanted["sites"]}}
    keys = [k for k in wanted if there.get(k) != wanted[k]]
    return ", ".join(f"{k} {there.get(k)} there and {wanted[k]} here" for k in keys)
