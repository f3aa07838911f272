"""Fine-tuning, from what a person has: a model, rows by tenant, methods by name."""

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
from para_jax.errors import ParaJaxError, unknown
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
    show: Callable[[str], None] = print,
    loggers: Iterable[Logger] = (),
) -> AdapterBank:
    """Tunes an adapter for every tenant, many in one step, over one frozen model.

    All programs are planned from the lengths of the rows, said, and compiled side by side before the first step ends;
    nothing is compiled afterwards.

    Args:
      model: a checkpoint's folder or hub id, which is split over all accelerators; or a backbone, on its own mesh. With
        its layers stacked (`stacked=True`) one layer is compiled and not all of them. While a backbone is being read
        (`Loading`), the programs are compiled already.
      tenants: each tenant's rows: a source (`read_rows`) such as "mail.jsonl", or a mixture of sources
        "0.7*mail.jsonl+0.3*faq.jsonl"; a list of {"prompt", "response"}; or examples (`encode_rows`).
      out: a folder; afterwards it holds NAME/ with each tenant's adapter, metrics.jsonl, loss.png, report.html,
        report.json, run.json and checkpoints/.
      methods: of all tenants or by tenant: a name ("para", "lora", "ia3"), a config such as LoraConfig(r=16), or a JSON
        file of one. Or a bank of adapters, which are tuned on.
      settings: of all tenants or by tenant.
      dev: rows that a tenant does not learn from, for some or all tenants. Of a tenant with dev rows the adapter that
        was best on them is kept, and written as soon as it is found; `Settings` says when to look, and when to stop.
      tokenizer: that the rows are read with; by default the model's own.
      max_length: the most tokens of a row; by default the backbone's context.
      truncate, allow_special_tokens: as for `encode_rows`.
      templates: by tenant, what makes prompts of a source's columns (`read_rows`).
      chat_templates: by tenant, the text of a chat template to use in place of the tokenizer's; kept with the adapter.
      data_dir: where TFDS keeps its data.
      rows: each tenant's rows in a step.
      micro_batch_tokens: the most token slots of a micro-batch on a device; 1024 on a CPU and 8192 on accelerators, if
        None. A step is as many micro-batches as its rows need, whose gradients are summed in float32.
      tenants_per_step: how many tenants a step holds at most; all, if None.
      spread: whether the tenants are spread over a mesh's devices, or whole on each of them (`places.Layout`).
      remat: what the backward pass computes again instead of keeping it (`Backbone.forward`); by default "layers" on
        accelerators and "products" on a CPU.
      seed: of the first weights and of the order of the rows.
      checkpoint_every: steps between checkpoints; there is one at the end, and at Ctrl-C or SIGTERM.
      keep: how many checkpoints are kept, the newest; two or more, because the newest may be lost with its machine.
      resume: go on from the newest checkpoint in `out`, bit for bit as if the run had never stopped; on another mesh
        to rounding, with the same rows. Where there is no checkpoint, the run begins.
      overwrite: replace an existing `out`.
      show: takes a line of progress.
      loggers: take each line of metrics.jsonl, in the main process.

    Returns the bank after the last step. Raises ParaJaxError for rows, methods or settings that are not as described;
    if `out` exists and neither `resume` nor `overwrite` is set, or holds a run with other data or settings; if a
    tenant's gradient was NaN or infinite, when all others are done and saved; if a program does not fit into memory.
    Raises Interrupted at Ctrl-C, when everything is saved.

    >>> from tempfile import TemporaryDirectory
    >>> from para_jax import Settings, finetune, tiny_backbone_path
    >>> rows = [{"prompt": "Who sat?", "response": "The cat."}] * 4
    >>> with TemporaryDirectory() as folder:
    ...     out, settings = Path(folder, "run"), Settings(steps=1)
    ...     bank = finetune(tiny_backbone_path(), {"faq": rows}, out, settings=settings, show=lambda line: None)
    ...     sorted(path.name for path in Path(out, "faq").iterdir())
    ['adapter_config.json', 'adapter_model.safetensors']
    """
    names, dev = tuple(tenants), {name: own for name, own in (dev or {}).items() if own}
    templates, chat_templates = templates or {}, chat_templates or {}
    for what, by_name in (("dev", dev), ("templates", templates), ("chat_templates", chat_templates)):
        _check_names(what, by_name, names)
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

    loading = Loading.of(model)
    config = loading.shapes.config
    configs = _configs(methods, names)
    # Raises for a module that is none, before rows are read.
    sizes = dict.fromkeys(f"{of.method} {of.size(config):,}" for of in configs.values())
    if tokenizer is None and isinstance(model, str | Path):
        tokenizer = load_tokenizer(model)
    if tokenizer is not None:
        check_vocabulary(tokenizer, config.vocab_size)
    reader = Reader(
        tokenizer,
        () if tokenizer is None else end_tokens(config, tokenizer),
        max_length=row_length(max_length, config.max_position_embeddings),
        truncate=truncate,
        allow_special_tokens=allow_special_tokens,
        data_dir=data_dir,
        show=tuning.show,
    )

    def read(some: Mapping[str, Source]) -> dict[str, Sequence[Example]]:
        """The examples of each tenant; of several processes each reads some tenants' rows."""

        def of(name: str) -> Sequence[Example]:
            own, one_pass = reader.with_chat_template(chat_templates.get(name)), not configs[name].reads_prompt
            return own(name, some[name], templates.get(name), one_pass)

        made = share_work({name: partial(of, name) for name, own in some.items() if not are_examples(own)})
        return {name: made[name] if name in made else of(name) for name in some}

    examples = read(tenants)
    settings_of = {name: tuning.settings[name].of_rows(len(examples[name]), rows) for name in names}
    tuning = replace(tuning, examples=examples, dev=read(dev), settings=settings_of)
    tuning.show(_summary(tuning, loading.shapes, sizes))
    bank = methods if isinstance(methods, AdapterBank) else AdapterBank.create(configs, config, seed)
    return train(loading, bank, tuning)


def _configs(methods: Method | Mapping[str, Method] | AdapterBank, names: Sequence[str]) -> dict[str, Any]:
    """Each tenant's method."""
    if not isinstance(methods, AdapterBank):
        by_name: dict[str, Any] = _by_name("methods", methods, names, "para")
        return {name: config_of(method) for name, method in by_name.items()}
    if set(methods.names) != set(names):
        raise ParaJaxError("the bank and the rows have to be of the same tenants")
    return {name: methods.find(name)[0].config for name in names}


def _by_name(what: str, given: T | Mapping[str, T], names: Sequence[str], default: T) -> dict[str, T]:
    """A value for each tenant, of one for all or of some by name."""
    if not isinstance(given, Mapping):
        return dict.fromkeys(names, given)
    _check_names(what, given, names)
    return {name: given.get(name, default) for name in names}


def _check_names(what: str, given: Mapping[str, Any], names: Sequence[str]) -> None:
    for name in given:
        if name not in names:
            raise unknown(f"tenant in {what}", name, names)


def _summary(tuning: Tuning, backbone: Backbone, sizes: Iterable[str]) -> str:
    """What is tuned, in a line."""
    rows = sum(map(len, tuning.examples.values()))
    mesh = "" if backbone.mesh is None else f" on {', '.join(f'{k}={v}' for k, v in backbone.mesh.shape.items())}"
    return (
        f"{len(tuning.examples)} tenants, {rows:,} rows; backbone {backbone.config.size / 1e6:.1f}M parameters{mesh}, "
        f"a tenant's adapter {' or '.join(sizes)}"
    )
