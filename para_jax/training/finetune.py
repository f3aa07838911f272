"""`finetune`: from a model, rows by tenant and methods by name to tuned adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from para_jax.adapters.bank import AdapterBank
from para_jax.adapters.method import MethodConfig
from para_jax.adapters.registry import config_of
from para_jax.backbones.decoder import Backbone
from para_jax.backbones.loading import Loading
from para_jax.backbones.options import Remat
from para_jax.convert.tokenizer import check_vocabulary, end_tokens, load_tokenizer
from para_jax.data.examples import Example
from para_jax.data.lengths import row_length
from para_jax.data.reading import Reader, Source, are_examples
from para_jax.distributed import is_main_process, share_work
from para_jax.errors import ParaJaxError, check_known
from para_jax.progress import say
from para_jax.training.claim import check_out
from para_jax.training.folder import check_name
from para_jax.training.loop import train
from para_jax.training.settings import Settings
from para_jax.training.tuning import Logger, Tuning

T = TypeVar("T")
Method = str | Path | MethodConfig


def finetune(
    model: str | Path | Backbone | Loading,
    tenants: Mapping[str, Source],
    out: str | Path,
    *,
    methods: Method | Mapping[str, Method] | AdapterBank = "para",
    settings: Settings | Mapping[str, Settings] | None = None,
    dev: Mapping[str, Source] | None = None,
    tokenizer: Any = None,
    max_length: int | None = None,
    truncate: bool = False,
    allow_special_tokens: bool = False,
    templates: Mapping[str, str] | None = None,
    chat_templates: Mapping[str, str] | None = None,
    data_dir: str | Path | None = None,
    rows: int = 16,
    micro_batch_tokens: int | None = None,
    tenants_per_step: int | None = None,
    spread: bool | None = None,
    remat: Remat | None = None,
    seed: int = 0,
    checkpoint_every: int = 500,
    keep: int = 2,
    resume: bool = False,
    overwrite: bool = False,
    show: Callable[[str], None] = say,
    loggers: Iterable[Logger] = (),
) -> AdapterBank:
    """Tunes one adapter per tenant on one frozen model, many tenants in one step.

    All programs are planned from the lengths of the rows and compiled in parallel before the first step ends; nothing
    is compiled afterwards.

    Args:
      model: a checkpoint's folder or hub id, which is sharded over all accelerators; or a backbone on its own mesh.
        Stacked layers (`stacked=True`) compile faster: one layer is compiled instead of all. With a backbone that is
        still being read (`Loading`), compilation overlaps with reading.
      tenants: each tenant's rows: a source (`read_rows`) such as "mail.jsonl", or a mixture of sources
        "0.7*mail.jsonl+0.3*faq.jsonl"; a list of {"prompt", "response"}; or examples (`encode_rows`).
      out: a folder; afterwards it holds NAME/ with each tenant's adapter, metrics.jsonl, loss.png, report.html,
        report.json, run.json and checkpoints/.
      methods: for all tenants, or by tenant: a name ("para", "lora", "ia3"), a config such as LoraConfig(r=16), or a
        JSON file with a config. Or a bank of adapters to tune further.
      settings: for all tenants, or by tenant.
      dev: held-out rows for some or all tenants. A tenant with dev rows keeps the adapter with the lowest dev loss,
        which is written as soon as it is found. `Settings` says when dev rows are evaluated, and when a tenant stops.
      tokenizer: encodes the rows; by default the model's own.
      max_length: the maximum number of tokens of a row; by default the backbone's context.
      truncate, allow_special_tokens: as for `encode_rows`.
      templates: by tenant, a template that makes prompts from a source's columns (`read_rows`).
      chat_templates: by tenant, the text of a chat template that replaces the tokenizer's; saved with the adapter.
      data_dir: where TFDS keeps its data.
      rows: the number of rows of each tenant in a step.
      micro_batch_tokens: the maximum number of token slots of a micro-batch on a device; by default 1024 on a CPU and
        8192 on accelerators. A step runs as many micro-batches as its rows need and sums their gradients in float32.
      tenants_per_step: the maximum number of tenants in a step; by default all.
      spread: whether tenants are sharded over a mesh's devices, or replicated (`places.TenantLayout`).
      remat: what the backward pass recomputes (`Backbone.forward`); by default "layers" on accelerators and "products"
        on a CPU.
      seed: seeds the initial weights and the order of the rows.
      checkpoint_every: steps between checkpoints. Checkpoints are also written at the end, and at Ctrl-C or SIGTERM.
      keep: how many of the newest checkpoints are kept; two or more, because a machine that dies may lose the newest.
      resume: continue from the newest checkpoint in `out`, with bit-identical results, or on another mesh with the same
        rows and results up to rounding. Without a checkpoint the run starts from the beginning.
      overwrite: replace an existing `out`.
      show: is called with each line of progress. By default lines are printed, and steps are a bar on a terminal and in
        a notebook.
      loggers: are called with each line of metrics.jsonl, in the main process.

    Returns the bank after the last step. Raises ParaJaxError for rows, methods or settings that are not as described;
    if `out` exists and neither `resume` nor `overwrite` is set; if `out` holds a run with other data or settings; if a
    tenant's gradient was NaN or infinite, after all other tenants are done and saved; if a program does not fit into
    memory. Raises Interrupted at Ctrl-C, after everything is saved.

    >>> from tempfile import TemporaryDirectory
    >>> from para_jax import Settings, finetune, tiny_backbone_path
    >>> rows = [{"prompt": "Who sat?", "response": "The cat."}] * 4
    >>> with TemporaryDirectory() as folder:
    ...     out, settings = Path(folder, "run"), Settings(steps=1)
    ...     bank = finetune(tiny_backbone_path(), {"faq": rows}, out, settings=settings, show=lambda line: None)
    ...     sorted(path.name for path in Path(out, "faq").iterdir())
    ['adapter_config.json', 'adapter_model.safetensors']
    """
    names, dev = tuple(tenants), {name: rows for name, rows in (dev or {}).items() if rows}
    templates, chat_templates = templates or {}, chat_templates or {}
    for what, by_name in (("dev", dev), ("templates", templates), ("chat_templates", chat_templates)):
        check_known(f"tenant in {what}", by_name, names)
    tuning = Tuning(
        examples={}, settings=_by_name("settings", settings or Settings(), names, Settings()), out=Path(out),
        rows=rows, micro_batch_tokens=micro_batch_tokens, tenants_per_step=tenants_per_step, spread=spread, remat=remat,
        seed=seed, checkpoint_every=checkpoint_every, keep=keep, resume=resume, overwrite=overwrite,
        chat_templates=chat_templates, show=show if is_main_process() else lambda line: None, loggers=loggers,
    )  # fmt: skip
    tuning.check_numbers()
    check_out(tuning.out, resume, overwrite)
    for name in names:
        check_name(name)
    for name in templates:
        if not isinstance(tenants[name], str | Path):
            raise ParaJaxError(
                f"the template of {name!r} has no effect: it is for a source, and these rows are in memory"
            )
    text = [name for rows_by_name in (tenants, dev) for name, own in rows_by_name.items() if not are_examples(own)]
    ignored = {"max_length": max_length is not None, "truncate": truncate, "allow_special_tokens": allow_special_tokens}
    if not text and any(ignored.values()):
        given = ", ".join(option for option, is_set in ignored.items() if is_set)
        raise ParaJaxError(f"all rows are encoded examples, so {given} has no effect; pass it to encode_rows")

    loading = Loading.of(model)
    config = loading.shapes.config
    configs = _configs(methods, names)
    # Raises for unknown modules, before rows are read.
    sizes = dict.fromkeys(f"{method.method} {method.size(config):,}" for method in configs.values())
    if text and tokenizer is None and isinstance(model, str | Path):
        tokenizer = load_tokenizer(model)
    if tokenizer is not None:
        check_vocabulary(tokenizer, config.vocab_size)
    reader = Reader(
        tokenizer, () if tokenizer is None else end_tokens(config, tokenizer),
        max_length=row_length(max_length, config.max_position_embeddings), truncate=truncate,
        allow_special_tokens=allow_special_tokens, data_dir=data_dir, show=tuning.show,
    )  # fmt: skip

    def read(name: str, source: Source) -> Sequence[Example]:
        own = reader.with_chat_template(chat_templates.get(name))
        return own(name, source, templates.get(name), one_pass=not configs[name].reads_prompt)

    examples = _examples(tenants, read)
    settings_by_name = {name: tuning.settings[name].of_rows(len(examples[name]), rows) for name in names}
    tuning = replace(tuning, examples=examples, dev=_examples(dev, read), settings=settings_by_name)
    tuning.show(_summary(tuning, loading.shapes, sizes))
    bank = methods if isinstance(methods, AdapterBank) else AdapterBank.create(configs, config, seed)
    return train(loading, bank, tuning)


def _examples(
    sources: Mapping[str, Source], read: Callable[[str, Source], Sequence[Example]]
) -> dict[str, Sequence[Example]]:
    """The examples of each tenant. The processes of a run share the work of reading."""
    found = share_work({n: partial(read, n, source) for n, source in sources.items() if not are_examples(source)})
    return {name: source if are_examples(source) else found[name] for name, source in sources.items()}


def _configs(methods: Method | Mapping[str, Method] | AdapterBank, names: Sequence[str]) -> dict[str, Any]:
    if not isinstance(methods, AdapterBank):
        by_name: dict[str, Any] = _by_name("methods", methods, names, "para")
        return {name: config_of(method) for name, method in by_name.items()}
    if set(methods.names) != set(names):
        raise ParaJaxError("the bank and the rows must have the same tenants")
    return {name: methods.find(name)[0].config for name in names}


def _by_name(what: str, given: T | Mapping[str, T], names: Sequence[str], default: T) -> dict[str, T]:
    """A value for each tenant, from one value for all or from values by name."""
    if not isinstance(given, Mapping):
        return dict.fromkeys(names, given)
    check_known(f"tenant in {what}", given, names)
    return {name: given.get(name, default) for name in names}


def _summary(tuning: Tuning, backbone: Backbone, sizes: Iterable[str]) -> str:
    rows = sum(map(len, tuning.examples.values()))
    mesh = "" if backbone.mesh is None else f" on {', '.join(f'{k}={v}' for k, v in backbone.mesh.shape.items())}"
    return (
        f"{len(tuning.examples)} tenants, {rows:,} rows; backbone {backbone.config.size / 1e6:.1f}M parameters{mesh}, "
        f"a tenant's adapter {' or '.join(sizes)}"
    )
