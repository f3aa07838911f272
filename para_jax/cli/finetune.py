"""Tune several tenants together on one frozen backbone.

By default every step has rows of every tenant. Each has its own loss, gradient clipping, learning rate, schedule and
number of steps, and the same result as if it was tuned alone. OUT then has NAME/ with each tenant's adapter,
report.html and report.json, loss.png, metrics.jsonl, run.json and checkpoints/. Ctrl-C saves; --resume continues with
bit-identical results.

  para-jax finetune --tenant mail=mail.jsonl --tenant faq=faq.jsonl --steps 500 --lr 3e-3 --out runs/first

The tenants of a run may have different methods and options:

  para-jax finetune --tenant mail=mail.jsonl --tenant faq=faq.jsonl --method lora --method faq=para \\
    --option lora.target_modules=all-linear --option lora.r=4 --out runs/mixed
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from para_jax.checks import COUNT, KEEP, SEED
from para_jax.cli import common
from para_jax.cli.options import ROWS, flag, number, repeated
from para_jax.cli.outputs import check_data_dir, check_folder
from para_jax.cli.settings import add_settings, tenant_settings
from para_jax.errors import ParaJaxError, check_known
from para_jax.progress import say

# Options with the names of `finetune`'s.
SAME = (
    "max_length", "truncate", "allow_special_tokens", "data_dir", "rows", "micro_batch_tokens", "tenants_per_step",
    "remat", "seed", "checkpoint_every", "resume", "overwrite",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_model(parser)
    common.add_tenants(parser, more=", or several with weights, 0.7*SOURCE+0.3*SOURCE")
    parser.add_argument("--out", metavar="DIR", required=True, help="folder for adapters, checkpoints and metrics")
    existing = parser.add_mutually_exclusive_group()
    flag(existing, "--resume", "continue the run in --out, if there is one")
    flag(existing, "--overwrite", "replace --out if it exists")
    _add_method(parser.add_argument_group("method"))
    add_settings(parser.add_argument_group("tuning", "VALUE is for every tenant, NAME=VALUE for one; options repeat"))
    _add_rows(parser.add_argument_group("rows"))
    _add_steps(parser.add_argument_group("steps"))
    _add_watching(parser.add_argument_group("watching"))


def _add_method(group: Any) -> None:
    text = 'para (default), lora, ia3, ...; or a JSON file {"method": ..., and its options}; repeat'
    repeated(group, "--method", "[NAME=]METHOD", text)
    text = "an option for all methods of --method, or for METHOD only: pooling=mean, lora.lora_alpha=16, "
    repeated(group, "--option", "[METHOD.]KEY=VALUE", text + "target_modules=q_proj,v_proj; repeat")
    number(group, "--r", COUNT, "short for --option r=... (default: the method's)", metavar=None)
    text = "as --option target_modules=... (default: the method's)"
    group.add_argument("--target-modules", nargs="+", metavar="SITE", help=text)


def _add_rows(group: Any) -> None:
    number(group, "--rows", ROWS, "rows of each tenant in a step (default: 16)", 16, None)
    common.add_length(group)
    text = "chat template for messages, instead of the tokenizer's; saved with the adapter; repeat"
    repeated(group, "--chat-template", "[NAME=]FILE.jinja", text)
    flag(group, "--allow-special-tokens", "allow responses that contain an end-of-text token")
    number(group, "--seed", SEED, "seed of the initial weights and the order of rows", 0, None)


def _add_steps(group: Any) -> None:
    number(group, "--tenants-per-step", COUNT, "maximum number of tenants in a step (default: all)")
    text = "on a mesh: shard tenants over devices, or replicate them and shard their rows (default: by their number)"
    group.add_argument("--spread-tenants", action=argparse.BooleanOptionalAction, help=text)
    text = "maximum tokens in a micro-batch of a device, to save memory (default: 1024 on a CPU, else 8192)"
    number(group, "--micro-batch-tokens", COUNT, text)
    group.add_argument(
        "--remat",
        choices=("none", "layers", "products"),
        help="what the backward pass recomputes to save memory: nothing, layers, or layers without their matmuls "
        "(default: layers on accelerators, products on a CPU)",
    )
    number(group, "--checkpoint-every", COUNT, "steps (default: 500)", 500)
    number(group, "--keep-checkpoints", KEEP, "how many, two or more (default: 2)", 2)


def _add_watching(group: Any) -> None:
    text = "write every step's losses to OUT/tensorboard, or to Weights & Biases; repeat for both"
    group.add_argument("--log", choices=("tensorboard", "wandb"), action="append", default=[], help=text)
    text = "write a trace of N steps (default: 5) without compilation to OUT/profile, for xprof"
    number(group, "--profile", COUNT, text, 0, nargs="?", const=5)


def run(args: argparse.Namespace) -> int:
    from para_jax.training.claim import check_out
    from para_jax.training.finetune import finetune
    from para_jax.training.folder import check_name
    from para_jax.training.loggers import Loggers

    check_out(Path(args.out), args.resume, args.overwrite)
    check_folder(args)
    check_data_dir(args)
    tenants, dev = common.tenant_sources(args), common.tenant_sources(args, "dev")
    names = list(tenants)
    for name in names:
        check_name(name)
    options = [*args.option]
    options += [] if args.r is None else [f"r={args.r}"]
    options += [] if args.target_modules is None else [f"target_modules={','.join(args.target_modules)}"]
    methods = method_configs(names, args.method, options)
    settings = tenant_settings(args, names, dev)
    chat_templates = common.per_tenant(args.chat_template, "--chat-template", names, template_file)
    templates = common.row_templates(args, tenants)

    # Raises for a missing package, before the model is read.
    loggers = Loggers(args.log, args.out, args.profile)
    loading, tokenizer = common.begin_model(args, stacked=True)
    with loggers:
        finetune(
            loading, tenants, args.out, methods=methods, settings=settings, dev=dev, tokenizer=tokenizer,
            templates=templates, chat_templates=chat_templates, spread=args.spread_tenants, keep=args.keep_checkpoints,
            loggers=loggers, **{name: getattr(args, name) for name in SAME},
        )  # fmt: skip
    some = ", ".join(names) if len(names) <= 10 else f"{len(names)} adapters"
    say(f"saved {some} and report.html in {args.out}")
    return 0


def template_file(path: str) -> str:
    """The text of a chat template. Raises ParaJaxError if the file does not exist."""
    if not Path(path).is_file():
        raise ParaJaxError(f"--chat-template: {path} is not a file")
    try:
        return Path(path).read_bytes().decode()  # bytes, to keep line ends
    except UnicodeDecodeError as error:
        raise ParaJaxError(f"--chat-template: {path} is not UTF-8: {error}; save it as UTF-8") from None


def method_configs(names: Sequence[str], chosen: Sequence[str], given: Sequence[str]) -> dict[str, Any]:
    """Each tenant's config, from [NAME=]METHOD and [METHOD.]KEY=VALUE arguments.

    Options apply to methods that are given by name; a JSON file has all of its options. Raises ParaJaxError for an
    unknown method or option, with the nearest valid name, and for an option that applies to no tenant.

    >>> configs = method_configs(["a", "b"], ["b=lora"], ["para.r=4", "target_modules=q_proj,o_proj"])
    >>> configs["a"].r, configs["b"].r, configs["b"].target_modules
    (4, 8, ('q_proj', 'o_proj'))
    """
    from para_jax.adapters.registry import config_from_dict, config_of

    wanted = common.per_tenant(["para", *chosen], "--method", names, str)
    named = {method for method in wanted.values() if not method.endswith(".json")}
    general, particular = _options(given, named)
    configs = {
        method: config_from_dict(method, general | particular[method]) if method in named else config_of(method)
        for method in dict.fromkeys(wanted.values())
    }
    return {name: configs[method] for name, method in wanted.items()}


def _options(given: Sequence[str], methods: Collection[str]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The options for all of these methods, and the options by method."""
    general: dict[str, Any] = {}
    particular: dict[str, dict[str, Any]] = {method: {} for method in methods}
    for argument in given:
        key, equals, text = argument.partition("=")
        if not equals or not key or not text:
            raise ParaJaxError(f"--option takes KEY=VALUE or METHOD.KEY=VALUE, not {argument!r}")
        method, dot, key = key.rpartition(".")
        check_known("method in --option", [method] if dot else [], methods)
        if not methods:
            raise ParaJaxError(f"--option {argument} applies to no tenant: a JSON file of --method has its own options")
        options = particular[method] if dot else general
        if key in options:
            raise ParaJaxError(f"--option gives {key} twice")
        options[key] = option_value(key, text)
    return general, particular


def option_value(key: str, text: str) -> Any:
    r"""The value of an option: JSON if it parses, else a string, or a list of modules separated by commas.

    >>> option_value("normalize", "false"), option_value("pooling", "mean"), option_value("target_modules", "q_proj")
    (False, 'mean', ['q_proj'])
    >>> print(option_value("target_modules", r".*\.[02]\.mlp\..*"), option_value("target_modules", "all-linear"))
    .*\.[02]\.mlp\..* all-linear
    """
    if text in ("True", "False", "None"):
        text = {"True": "true", "False": "false", "None": "null"}[text]
    try:
        return json.loads(text)
    except ValueError:
        if not key.endswith("_modules") or text == "all-linear" or re.search(r"[\\^$*+?|()\[\]{}]", text):
            return text
        return text.split(",")
