"""Each tenant's settings of a run, from the options of `para-jax finetune`."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from para_jax.checks import POSITIVE
from para_jax.cli import common
from para_jax.cli.options import name_of
from para_jax.errors import ParaJaxError, unknown

if TYPE_CHECKING:
    from para_jax.training.optimizer import Settings


def tuning(
    args: argparse.Namespace, names: Sequence[str], dev: Collection[str]
) -> tuple[dict[str, Settings], dict[str, float]]:
    """Each tenant's settings, and for how many epochs some are tuned, for whom the steps are not known yet.

    Raises ParaJaxError for a value out of its range, and for one that would have no effect.
    """
    from para_jax.training.optimizer import RANGES, Settings

    values = {
        key: common.per_tenant(getattr(args, key), name_of(key), names, kind.parse) for key, kind in RANGES.items()
    }
    epochs = common.per_tenant(args.epochs, "--epochs", names, POSITIVE.parse)
    for name in [n for n in epochs if n in values["steps"]]:
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
    return {n: Settings.checked(**{k: v[n] for k, v in values.items() if n in v}) for n in names}, epochs
