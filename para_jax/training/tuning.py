"""`Tuning`: the arguments of `finetune` after reading: all tenants' examples and settings, and the run's options."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from para_jax.backbones.decoder import Backbone
from para_jax.backbones.options import Remat
from para_jax.checks import COUNT, KEEP, SEED
from para_jax.data.examples import Example, check_ids
from para_jax.data.lengths import check_lengths
from para_jax.errors import ParaJaxError
from para_jax.progress import say
from para_jax.training.settings import Settings

Logger = Callable[[Mapping[str, Any]], None]  # is called with a line of metrics.jsonl


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """The arguments of `finetune` after rows were encoded; everything is by tenant."""

    examples: Mapping[str, Sequence[Example]]
    settings: Mapping[str, Settings]
    out: Path
    dev: Mapping[str, Sequence[Example]] = field(default_factory=dict)
    rows: int = 16
    micro_batch_tokens: int | None = None
    tenants_per_step: int | None = None
    spread: bool | None = None
    remat: Remat | None = None
    seed: int = 0
    checkpoint_every: int = 500
    keep: int = 2
    resume: bool = False
    overwrite: bool = False
    chat_templates: Mapping[str, str] = field(default_factory=dict)
    show: Callable[[str], None] = say
    loggers: Iterable[Logger] = ()

    def check_numbers(self) -> None:
        numbers = {"rows": COUNT, "checkpoint_every": COUNT, "keep": KEEP, "seed": SEED}
        limits = {"tenants_per_step": COUNT, "micro_batch_tokens": COUNT}
        for name, kind in (numbers | {n: kind for n, kind in limits.items() if getattr(self, n) is not None}).items():
            kind.check(name, getattr(self, name))

    def check(self, backbone: Backbone) -> None:
        """Raises ParaJaxError unless rows and settings fit the backbone and each other."""
        for name, examples in self.examples.items():
            if not examples:
                raise ParaJaxError(f"tenant {name!r} has no rows to train on")
            for rows in (examples, self.dev.get(name, ())):
                check_ids(rows, backbone.config.vocab_size)
                check_lengths(rows, backbone.config.max_position_embeddings)
        if not self.dev and any(s.eval_every or s.patience for s in self.settings.values()):
            raise ParaJaxError("eval_every and patience need dev rows, and no tenant has any; give dev rows")
        all_in_step = self.tenants_per_step is None or self.tenants_per_step >= len(self.examples)
        if all_in_step and any(s.weight != 1 for s in self.settings.values()):
            raise ParaJaxError(
                "weights have no effect, because every tenant is in every step; set tenants_per_step below "
                f"{len(self.examples)}, the number of tenants"
            )
        if jax.process_count() > 1 and backbone.mesh is None:
            raise ParaJaxError(
                "several processes need a mesh over all of their devices; load the backbone with mesh=..."
            )
