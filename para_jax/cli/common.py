"""Options and functions that several verbs share, for the model and the tenants."""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from para_jax.checks import COUNT, Whole
from para_jax.cli.options import flag, number, repeated
from para_jax.compile_cache import set_up
from para_jax.data.sources import FORMS, read_rows
from para_jax.errors import ParaJaxError, check_known
from para_jax.memory import keep_freed_memory

if TYPE_CHECKING:
    from para_jax.backbones.loading import Loading
    from para_jax.config import BackboneConfig

T = TypeVar("T")
Source = str | list[tuple[str, dict[str, Any]]]  # a source of `read_rows`, or its result


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    text = "Hugging Face checkpoint: a folder or a hub id (default: the tiny model that ships)"
    parser.add_argument("--model", metavar="DIR", help=text)


def add_config(parser: argparse.ArgumentParser) -> None:
    """--model, for `load_config`."""
    text = "a folder or hub id with config.json, or that file (default: the tiny backbone)"
    parser.add_argument("--model", metavar="DIR", help=text)


def add_compile_cache(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--compile-cache",
        metavar="DIR|off",
        help="where compiled programs are kept between runs, 2 GB at most (default: PARA_JAX_COMPILE_CACHE, or "
        "para_jax/compiled in the user's cache folder)",
    )


def add_model(parser: argparse.ArgumentParser, processes: bool = True) -> None:
    """--model, --dtype, --quantize, --mesh, --compile-cache, and with `processes` the multi-process options."""
    add_checkpoint(parser)
    add_compile_cache(parser)
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="dtype of weights and computation (default: bfloat16 on TPU and GPU, float16 on a GPU before Ampere, "
        "float32 on CPU)",
    )
    parser.add_argument(
        "--mesh",
        metavar="AXIS=N,...",
        default="auto",
        help="mesh to shard the model and the rows over: data=2,fsdp=4,tensor=2 (default: all accelerators, in a "
        "mesh that suits the model)",
    )
    parser.set_defaults(coordinator=None, processes=None, process=None)
    if processes:
        text = "join a multi-process run: the address of process 0, or auto on Cloud TPU, SLURM and Kubernetes"
        parser.add_argument("--coordinator", metavar="HOST:PORT", help=text)
        number(parser, "--processes", COUNT, "with --coordinator: their number")
        text = "with --coordinator: the index of this process, from 0"
        number(parser, "--process", Whole(0), text, metavar="I")
    text = "quantize the layers' weights, for small accelerators"
    parser.add_argument("--quantize", choices=("int8", "int4"), help=text)


def add_adapters(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adapters", metavar="DIR", help="folder with NAME/ for each tenant (finetune's --out)")
    flag(parser, "--allow-nan", "load adapters that have NaN or infinite values, to inspect them")


def add_tenants(parser: argparse.ArgumentParser, more: str = "") -> None:
    """--tenant, with a source of rows for each, and the options of sources."""
    repeated(parser, "--tenant", "NAME=SOURCE", f"a tenant and its rows: {FORMS}{more}; repeat")
    text = 'rows of several tenants, each with its tenant\'s name under "tenant"; repeat'
    repeated(parser, "--tenant-from", "SOURCE", text)
    add_sources(parser, "[NAME=]", "; repeat", action="append", default=[])


def add_sources(parser: argparse.ArgumentParser, whose: str = "", more: str = "", **options: Any) -> None:
    parser.add_argument(
        "--template",
        metavar=f"{whose}FILE.json",
        help="template that makes prompts from rows with other columns (default: the one that ships for the data set); "
        f"a file, or the name of one that ships, such as glue/sst2{more}",
        **options,
    )
    text = "where tfds: keeps its data (default: TFDS_DATA_DIR, or TFDS's own default)"
    parser.add_argument("--data-dir", metavar="DIR", help=text)


def add_length(parser: Any) -> None:
    number(parser, "--max-length", Whole(2), "most tokens of a row (default: the backbone's context)")
    flag(parser, "--truncate", "cut prompts that are too long at their beginning")


def begin_model(args: argparse.Namespace, stacked: bool | None = None) -> tuple[Loading, Any]:
    """Starts to read the backbone in a thread. Returns it and its tokenizer.

    `stacked` is as for `Backbone.from_pretrained`: True for verbs that fine-tune. Raises ParaJaxError if either cannot
    be loaded.
    """
    from para_jax import tiny_backbone_path
    from para_jax.backbones.loading import Loading, default_mesh
    from para_jax.convert.tokenizer import check_vocabulary, load_tokenizer
    from para_jax.sharding import make_mesh

    set_up(args.compile_cache)
    start_processes(args)
    keep_freed_memory()
    path = args.model or tiny_backbone_path()
    tuning = args.verb not in ("generate", "evaluate")
    mesh = default_mesh(path, tuning) if args.mesh == "auto" else make_mesh(args.mesh)
    loading = Loading(path, dtype=args.dtype, stacked=stacked, quantize=args.quantize, mesh=mesh)
    tokenizer = load_tokenizer(path)
    check_vocabulary(tokenizer, loading.shapes.config.vocab_size)
    return loading, tokenizer


def start_processes(args: argparse.Namespace) -> None:
    """Joins the multi-process run of --coordinator, before JAX initializes devices."""
    if args.coordinator is None:
        if args.processes is not None or args.process is not None:
            raise ParaJaxError("--processes and --process go with --coordinator HOST:PORT")
        return
    from para_jax.distributed import is_main_process, join_processes

    auto = args.coordinator == "auto"
    if not auto and (args.processes is None or args.process is None):
        raise ParaJaxError("--coordinator HOST:PORT needs --processes N and --process I; or pass --coordinator auto")
    if not auto and not re.fullmatch(r".+:\d{1,5}", args.coordinator):
        raise ParaJaxError(f"--coordinator must be HOST:PORT or auto, not {args.coordinator!r}")
    if args.process is not None and args.processes is not None and args.process >= args.processes:
        raise ParaJaxError(
            f"--process must be from 0 to {args.processes - 1} of {args.processes} processes, not {args.process}"
        )
    join_processes(None if auto else args.coordinator, args.processes, args.process)
    if not is_main_process():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (until the process ends)
        # All processes read the same checkpoint; only the main process logs warnings about it.
        logging.getLogger("para_jax").setLevel(logging.ERROR)


def load_config(model: str | None) -> BackboneConfig:
    """The config of a backbone from config.json: a folder, a hub id, or the file; by default the tiny backbone's."""
    from para_jax import tiny_backbone_path
    from para_jax.config import BackboneConfig, read_json

    path = model or tiny_backbone_path()
    if Path(path).is_file():
        return BackboneConfig.from_hf(read_json(Path(path)), name=path)
    return BackboneConfig.from_pretrained(path)


def tenant_sources(args: argparse.Namespace, option: str = "tenant") -> dict[str, Source]:
    """Each tenant's source, or its rows if they come from a source with several tenants.

    `option` is tenant (--tenant and --tenant-from) or dev. Raises ParaJaxError for a tenant with two sources, and if
    there is no tenant.
    """
    from para_jax.data.rows import group_by_tenant

    found: dict[str, Source] = dict(pairs(getattr(args, option), f"--{option}"))
    general = [value for value in args.template if "=" not in value]
    for source in getattr(args, f"{option}_from"):
        for name, rows in group_by_tenant(read_rows(source, general[-1] if general else None, args.data_dir)).items():
            if name in found:
                raise ParaJaxError(f"{rows[0][0]}: tenant {name!r} has another source already; give it one source")
            found[name] = rows
    if not found and option == "tenant":
        raise ParaJaxError("give each tenant's rows: --tenant NAME=SOURCE, or --tenant-from SOURCE for several")
    return found


def row_templates(args: argparse.Namespace, sources: Mapping[str, Source]) -> dict[str, str]:
    """The template of each tenant whose rows are not read yet; `tenant_sources` applied it to those of --tenant-from.

    Raises ParaJaxError for --template NAME=FILE if NAME's rows come from --tenant-from.
    """
    templates = per_tenant(args.template, "--template", list(sources), str)
    for name in (value.rpartition("=")[0] for value in args.template if "=" in value):
        if not isinstance(sources[name], str):
            raise ParaJaxError(
                f"--template {name}=... has no effect: the rows of {name!r} come from a source of several tenants; "
                "give --template FILE.json for that source"
            )
    return {name: template for name, template in templates.items() if isinstance(sources[name], str)}


def pairs(values: Sequence[str], option: str) -> dict[str, str]:
    """NAME=VALUE arguments as a dict, in order.

    >>> pairs(["acme=a.jsonl", "globex=b.jsonl"], "--tenant")
    {'acme': 'a.jsonl', 'globex': 'b.jsonl'}
    """
    found: dict[str, str] = {}
    for value in values:
        name, equals, rest = value.partition("=")
        if not equals or not name or not rest:
            raise ParaJaxError(f"{option} takes NAME=SOURCE, not {value!r}")
        if name in found:
            raise ParaJaxError(f"{option} names {name!r} twice")
        found[name] = rest
    return found


def per_tenant(values: Sequence[str], option: str, names: Sequence[str], kind: Callable[[str], T]) -> dict[str, T]:
    """VALUE for all tenants, or NAME=VALUE for one, which overrides it.

    >>> per_tenant(["100", "acme=300"], "--steps", ["acme", "globex"], Whole(1).parse)
    {'acme': 300, 'globex': 100}

    Raises ParaJaxError for an unknown tenant, and for a value for which `kind` raises ValueError.
    """
    general: dict[str, T] = {}
    particular: dict[str, T] = {}
    for value in values:
        name, equals, rest = value.rpartition("=")
        check_known(f"tenant in {option}", [name] if equals else [], names)
        try:
            (particular if equals else general).update(dict.fromkeys([name] if equals else names, kind(rest)))
        except ValueError as error:
            raise error if isinstance(error, ParaJaxError) else ParaJaxError(f"{option} {error}") from None
    merged = general | particular
    return {name: merged[name] for name in names if name in merged}


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Columns of text, the first left-aligned and the others right-aligned.

    >>> print(table(["tenant", "loss"], [["acme", 1.5], ["globex", 12]]))
    tenant  loss
    acme     1.5
    globex    12
    """
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ([first.ljust(widths[0]), *map(str.rjust, others, widths[1:])] for first, *others in cells)
    return "\n".join("  ".join(line).rstrip() for line in lines)
