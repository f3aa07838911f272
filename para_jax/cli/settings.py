"""Each tenant's settings of a run, from the options of `para-jax finetune`."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from para_jax.checks import POSITIVE
from para_jax.cli import common
from para_jax.cli.options import name_of
from para_jax.errors import ParaJaxError, unknown

if TYPE_CHECKING:
    from para_jax.training.settings import Settings


def add_settings(group: Any) -> None:
    """The options of `Settings`, and the sources of dev rows."""
    for name, metavar, text in (
        ("--steps", "[NAME=]N", "steps (default: 1000)"),
        ("--epochs", "[NAME=]N", "how often the rows are seen, instead of --steps"),
        ("--lr", "[NAME=]RATE", "highest learning rate (default: 1e-3)"),
        ("--warmup-ratio", "[NAME=]SHARE", "share of the steps in which the rate rises; then it falls (default: 0.06)"),
        ("--weight-decay", "[NAME=]DECAY", "AdamW's weight decay (default: 0.0)"),
        ("--max-grad-norm", "[NAME=]NORM", "the norm to which a tenant's gradient is clipped (default: 1.0)"),
        ("--weight", "[NAME=]W", "how often a tenant has its turn, with --tenants-per-step (default: 1)"),
        ("--dev", "NAME=SOURCE", "rows to choose the best adapter by, which are not learnt from"),
        ("--dev-from", "SOURCE", "such rows of several tenants, as --tenant-from"),
        ("--eval-every", "[NAME=]N", "a tenant's steps between looks at its dev rows (default: at its end)"),
        ("--patience", "[NAME=]N", "looks without a better one after which a tenant stops (default: it does not)"),
    ):
        group.add_argument(name, metavar=metavar, action="append", default=[], help=text)


def tenant_settings(args: argparse.Namespace, names: Sequence[str], dev: Collection[str]) -> dict[str, Settings]:
    """Each tenant's settings.

    Raises ParaJaxError for a value out of its range, and for one that would have no effect.
    """
    from para_jax.training.settings import RANGES, Settings

    kinds = RANGES | {"epochs": POSITIVE}
    values = {
        key: common.per_tenant(getattr(args, key), name_of(key), names, kind.parse) for key, kind in kinds.items()
    }
    for name in [n for n in values["epochs"] if n in values["steps"]]:
        raise ParaJaxError(f"{name} has both --steps and --epochs; give one of them")
    for name in dev:
        if name not in names:
            raise unknown("tenant in --dev", name, names)
    for option in ("eval_every", "patience"):
        for name in [text.rpartition("=")[0] for text in getattr(args, option)]:
            if name and name not in dev:
                raise ParaJaxError(f"{name_of(option)} has no effect on {name}, which has no --dev rows")
        if getattr(args, option) and not dev:
            raise ParaJaxError(f"{name_of(option)} has no effect without --dev NAME=SOURCE")
    if args.weight and (args.tenants_per_step is None or args.tenants_per_step >= len(names)):
        raise ParaJaxError(
            f"--weight has no effect without --tenants-per-step below {len(names)}: every tenant is in every step"
        )
    given: dict[str, dict[str, Any]] = {n: {k: v[n] for k, v in values.items() if n in v} for n in names}
    return {name: Settings(**own) for name, own in given.items()}
