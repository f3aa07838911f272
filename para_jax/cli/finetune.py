"""Tune several tenants together on one frozen backbone.

Every step takes rows of every tenant; each has its own loss, gradient clipping, learning rate, schedule and number
of steps, and ends where it would have ended alone. OUT then holds NAME/ with each tenant's adapter, report.html and
report.json, loss.png, metrics.jsonl, run.json and checkpoints/. Ctrl-C saves; --resume goes on as if nothing had
happened.

  para-jax finetune --tenant mail=mail.jsonl --tenant faq=faq.jsonl --steps 500 --lr 3e-3 --out runs/first

The tenants of one run may differ in method, and in its options:

  para-jax finetune --tenant mail=mail.jsonl --tenant faq=faq.jsonl --method lora --method faq=para \
    --option lora.target_modules=all-linear --option lora.r=4 --out runs/mixed
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from para_jax.checks import COUNT, KEEP, SEED, Whole
from para_jax.cli import common
from para_jax.cli.options import ROWS, within
from para_jax.cli.outputs import check_data_dir, check_folder
from para_jax.cli.settings import tuning
from para_jax.errors import ParaJaxError, unknown

# Options that hold modules, which a shell writes with commas.
MODULES = ("target_modules", "exclude_modules", "feedforward_modules")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_model(parser)
    common.add_tenants(parser, more=", or several with weights, 0.7*SOURCE+0.3*SOURCE")
    parser.add_argument("--out", metavar="DIR", required=True, help="folder for adapters, checkpoints and metrics")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="go on with the run in --out, if there is one")
    existing.add_argument("--overwrite", action="store_true", help="replace --out if it exists")

    method = parser.add_argument_group("method")
    method.add_argument(
        "--method",
        metavar="[NAME=]METHOD",
        action="append",
        default=[],
        help='para (default), lora, ia3, ...; or a JSON file {"method": ..., and its options}; repeat',
    )
    method.add_argument(
        "--option",
        metavar="[METHOD.]KEY=VALUE",
        action="append",
        default=[],
        help="an option of the methods that --method names, or of METHOD alone: pooling=mean, lora.lora_alpha=16, "
        "target_modules=q_proj,v_proj; repeat",
    )
    method.add_argument("--r", type=within(COUNT), help="the same as --option r=... (default: the method's)")
    method.add_argument(
        "--target-modules", nargs="+", metavar="SITE", help="as --option target_modules=... (default: the method's)"
    )

    tuning = parser.add_argument_group("tuning", "VALUE is for every tenant, NAME=VALUE for one; options repeat")
    for name, default, text in (
        ("--steps", "1000", "steps"),
        ("--lr", "1e-3", "highest learning rate"),
        ("--warmup-ratio", "0.06", "share of the steps in which the rate rises; then it falls to zero"),
        ("--weight-decay", "0.0", "AdamW's weight decay"),
        ("--max-grad-norm", "1.0", "the norm to which a tenant's gradient is clipped"),
    ):
        tuning.add_argument(
            name, metavar="[NAME=]VALUE", action="append", help=f"{text} (default: {default})", default=[]
        )
    for name, metavar, text in (
        ("--epochs", "[NAME=]N", "how often the rows are seen, instead of --steps"),
        ("--weight", "[NAME=]W", "how often a tenant has its turn, with --tenants-per-step (default: 1)"),
        ("--dev", "NAME=SOURCE", "rows to choose the best adapter by, which are not learnt from"),
        ("--dev-from", "SOURCE", "such rows of several tenants, as --tenant-from"),
        ("--eval-every", "[NAME=]N", "a tenant's steps between looks at its dev rows (default: at its end)"),
        ("--patience", "[NAME=]N", "looks without a better one after which a tenant stops (default: it does not)"),
    ):
        tuning.add_argument(name, metavar=metavar, action="append", default=[], help=text)
    tuning.add_argument(
        "--tenants-per-step",
        type=within(COUNT),
        metavar="N",
        help="the most that have their turn at once (default: all)",
    )
    tuning.add_argument(
        "--spread-tenants",
        action=argparse.BooleanOptionalAction,
        help="on a mesh: each device has tenants of its own, or a share of the rows of all (default: as divides)",
    )
    tuning.add_argument("--rows", type=within(ROWS), default=16, help="rows of each tenant in a step (default: 16)")
    tuning.add_argument(
        "--micro-batch-tokens",
        type=within(COUNT),
        metavar="N",
        help="the most tokens computed at once on a device, to save memory (default: 1024 on a CPU, else 8192)",
    )
    tuning.add_argument("--seed", type=within(SEED), default=0, help="of the first weights and the order of rows")
    tuning.add_argument(
        "--max-length", type=within(Whole(2)), metavar="N", help="tokens of a row (default: the backbone's context)"
    )
    tuning.add_argument(
        "--chat-template",
        metavar="[NAME=]FILE.jinja",
        action="append",
        default=[],
        help="for rows of messages, instead of the tokenizer's; kept with the adapter; repeat",
    )
    tuning.add_argument("--truncate", action="store_true", help="cut prompts that are too long at their beginning")
    tuning.add_argument(
        "--allow-special-tokens",
        action="store_true",
        help="learn responses that have an end-of-text token inside their text, instead of refusing them",
    )
    tuning.add_argument(
        "--remat",
        choices=("none", "layers", "products"),
        help="what the backward pass computes again, for less memory: nothing, whole layers, or all of them but their "
        "products (default: layers on accelerators, products on a CPU)",
    )
    tuning.add_argument("--checkpoint-every", type=within(COUNT), default=500, metavar="N", help="steps (default: 500)")
    tuning.add_argument(
        "--keep-checkpoints", type=within(KEEP), default=2, metavar="N", help="the newest, two or more (default: 2)"
    )

    watching = parser.add_argument_group("watching")
    watching.add_argument(
        "--log",
        choices=("tensorboard", "wandb"),
        action="append",
        default=[],
        help="write every step's losses to OUT/tensorboard, or to Weights & Biases; repeat for both",
    )
    watching.add_argument(
        "--profile",
        type=within(COUNT),
        nargs="?",
        const=5,
        default=0,
        metavar="N",
        help="trace N steps (5 without a number), after those that compile, into OUT/profile, which xprof opens",
    )


def run(args: argparse.Namespace) -> int:
    from para_jax.adapters.bank import AdapterBank
    from para_jax.convert.tokenizer import end_tokens, with_chat_template
    from para_jax.data.examples import encode_rows, read_examples
    from para_jax.data.order import read_mixture
    from para_jax.distributed import shared
    from para_jax.training.claim import check_out
    from para_jax.training.folder import check_name
    from para_jax.training.loggers import Loggers
    from para_jax.training.loop import finetune, steps_of

    check_out(Path(args.out), args.resume, args.overwrite)
    check_folder(args)
    check_data_dir(args)
    sources, dev_sources = common.tenant_sources(args), common.tenant_sources(args, "dev")
    names = list(sources)
    for name in names:
        check_name(name)

    given = [*args.option]
    given += [] if args.r is None else [f"r={args.r}"]
    given += [] if args.target_modules is None else [f"target_modules={','.join(args.target_modules)}"]
    configs = method_configs(names, args.method, given)
    settings, epochs = tuning(args, names, dev_sources)
    templates = common.per_tenant(args.chat_template, "--chat-template", names, template_file)
    prompts = common.per_tenant(args.template, "--template", names, str)

    show = partial(print, flush=True)
    # Raises for a package that is missing, before the model is read.
    loggers = Loggers(args.log, args.out, args.profile, show)
    loading, tokenizer = common.begin_model(args, stacked=True)
    backbone = loading.shapes
    # Raises for a target that is none, before the data is read.
    sizes = {n: f"{config.method} {config.size(backbone.config):,}" for n, config in configs.items()}
    length = common.row_length(args.max_length, backbone.config)
    eos = end_tokens(backbone.config, tokenizer)

    def read(name: str, source: common.Source, reader: Callable[..., Any]) -> Any:
        given = with_chat_template(tokenizer, templates.get(name)), eos, length
        how = {"truncate": args.truncate, "allow_special_tokens": args.allow_special_tokens, "show": show}
        how["one_pass"] = not configs[name].reads_prompt
        if not isinstance(source, str):
            return encode_rows(source, *given, **how, total=len(source))
        return reader(source, *given, **how, tenant=name, template=prompts.get(name), data_dir=args.data_dir)

    # Of several processes each reads some tenants' rows.
    examples = shared({name: partial(read, name, source, read_mixture) for name, source in sources.items()})
    dev = shared({name: partial(read, name, source, read_examples) for name, source in dev_sources.items()})
    for name, often in epochs.items():
        settings[name] = replace(settings[name], steps=steps_of(often, len(examples[name]), args.rows))
    rows = sum(map(len, examples.values()))
    mesh = "" if backbone.mesh is None else f" on {', '.join(f'{k}={v}' for k, v in backbone.mesh.shape.items())}"
    show(
        f"{len(names)} tenants, {rows:,} rows; backbone {backbone.config.size / 1e6:.1f}M parameters{mesh}, "
        f"a tenant's adapter {' or '.join(dict.fromkeys(sizes.values()))}"
    )
    with loggers:
        finetune(
            loading,
            AdapterBank.create(configs, backbone.config, args.seed),
            examples,
            settings,
            args.out,
            dev=dev,
            rows=args.rows,
            micro_batch_tokens=args.micro_batch_tokens,
            tenants_per_step=args.tenants_per_step,
            spread=args.spread_tenants,
            seed=args.seed,
            checkpoint_every=args.checkpoint_every,
            keep=args.keep_checkpoints,
            resume=args.resume,
            overwrite=args.overwrite,
            remat=args.remat,
            chat_templates=templates,
            show=show,
            loggers=loggers,
        )
    some = ", ".join(names) if len(names) <= 10 else f"{len(names)} adapters"
    show(f"saved {some} and report.html in {args.out}")
    return 0


def template_file(path: str) -> str:
    """The text of a chat template. Raises ParaJaxError if there is no such file."""
    if not Path(path).is_file():
        raise ParaJaxError(f"--chat-template: {path} is no file")
    try:
        return Path(path).read_bytes().decode()  # bytes: line ends count in a template
    except UnicodeDecodeError as error:
        raise ParaJaxError(f"--chat-template: {path} is not UTF-8: {error}; save it as UTF-8") from None


def method_configs(names: Sequence[str], chosen: Sequence[str], given: Sequence[str]) -> dict[str, Any]:
    """Each tenant's config, of [NAME=]METHOD and [METHOD.]KEY=VALUE arguments.

    An option is for the tenants whose method is named; a JSON file says all that it means. Raises ParaJaxError for an
    unknown method or option, with the nearest there is, and for an option that is for no tenant.

    >>> configs = method_configs(["a", "b"], ["b=lora"], ["para.r=4", "target_modules=q_proj,o_proj"])
    >>> configs["a"].r, configs["b"].r, configs["b"].target_modules
    (4, 8, ('q_proj', 'o_proj'))
    """
    from para_jax.adapters.registry import config_from_dict

    wanted = common.per_tenant(["para", *chosen], "--method", names, str)
    named = {method for method in wanted.values() if not method.endswith(".json")}
    general: dict[str, Any] = {}
    particular: dict[str, dict[str, Any]] = {method: {} for method in named}
    for argument in given:
        key, equals, text = argument.partition("=")
        if not equals or not key or not text:
            raise ParaJaxError(f"--option takes KEY=VALUE or METHOD.KEY=VALUE, not {argument!r}")
        method, dot, key = key.rpartition(".")
        if dot and method not in named:
            raise unknown("method in --option", method, named)
        if not named:
            raise ParaJaxError(f"--option {argument} is for no tenant: a JSON file given to --method has its own")
        options = particular[method] if dot else general
        if key in options:
            raise ParaJaxError(f"--option gives {key} twice")
        options[key] = option_value(key, text)

    def config(method: str) -> Any:
        if method in named:
            return config_from_dict(method, general | particular[method])
        return config_from_file(method)

    made = {method: config(method) for method in dict.fromkeys(wanted.values())}
    return {name: made[method] for name, method in wanted.items()}


def config_from_file(path: str) -> Any:
    """A config of a JSON file such as {"method": "lora", "r": 8}. Raises ParaJaxError for any other."""
    from para_jax.adapters.registry import METHODS, config_from_dict
    from para_jax.config import read_json

    fields = read_json(Path(path))
    if not isinstance(fields.get("method"), str):
        raise ParaJaxError(f'{path} has no "method"; write one of {", ".join(METHODS)}')
    return config_from_dict(fields.pop("method"), fields)


def option_value(key: str, text: str) -> Any:
    r"""The value of an option: JSON if it is that, else a string, or names of modules between commas.

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
        if key not in MODULES or text == "all-linear" or re.search(r"[\\^$*+?|()\[\]{}]", text):
            return text
        return text.split(",")
