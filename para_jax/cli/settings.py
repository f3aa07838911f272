"""Each tenant's settings, from the options of `para-jax finetune`."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from para_jax.checks import POSITIVE
from para_jax.cli import common
from para_jax.cli.options import name_of, repeated
from para_jax.errors import ParaJaxError, check_known

if TYPE_CHECKING:
    from para_jax.training.settings import Settings


def add_settings(group: Any) -> None:
    """The options of `Settings`, and the sources of dev rows."""
    for name, metavar, text in (
        ("--steps", "[NAME=]N", "steps (default: 1000)"),
        ("--epochs", "[NAME=]N", "number of passes over the rows, instead of --steps"),
        ("--lr", "[NAME=]RATE", "peak learning rate (default: 1e-3)"),
        ("--warmup-ratio", "[NAME=]SHARE", "share of the steps with a rising rate; then it decays (default: 0.06)"),
        ("--weight-decay", "[NAME=]DECAY", "AdamW's weight decay (default: 0.0)"),
        ("--max-grad-norm", "[NAME=]NORM", "the norm to which a tenant's gradient is clipped (default: 1.0)"),
        ("--weight", "[NAME=]W", "how often a tenant is scheduled, with --tenants-per-step (default: 1)"),
        ("--dev", "NAME=SOURCE", "held-out rows that select a tenant's best adapter"),
        ("--dev-from", "SOURCE", "dev rows of several tenants, as --tenant-from"),
        ("--eval-every", "[NAME=]N", "a tenant's steps between evaluations on dev rows (default: at its end)"),
        ("--patience", "[NAME=]N", "evaluations without a lower dev loss before a tenant stops (default: never)"),
    ):
        repeated(group, name, metavar, text)


def tenant_settings(args: argparse.Namespace, names: Sequence[str], dev: Collection[str]) -> dict[str, Settings]:
    """Each tenant's settings.

    Raises ParaJaxError for a value out of range, and for one that has no effect.
    """
    from para_jax.training.settings import RANGES, Settings

    kinds = RANGES | {"epochs": POSITIVE}
    values = {
        key: common.per_tenant(getattr(args, key), name_of(key), names, kind.parse) for key, kind in kinds.items()
    }
    for name in [n for n in values["epochs"] if n in values["steps"]]:
        raise ParaJaxError(f"{name} has both --steps and --epochs; give one of them")
    check_known("tenant in --dev", dev, names)
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
    return {name: Settings(**options) for name, options in given.items()}
