"""The settings of one tenant: its optimizer, how often it is scheduled, and when it stops."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import jax
import numpy as np

from para_jax.checks import COUNT, POSITIVE, Number, Whole
from para_jax.errors import ParaJaxError

if TYPE_CHECKING:
    from typing import Self

# The range of each field of `Settings`.
RANGES: dict[str, Whole | Number] = {
    "steps": COUNT,
    "lr": POSITIVE,
    "warmup_ratio": Number(0, 1),
    "weight_decay": Number(0),
    "max_grad_norm": POSITIVE,
    "weight": POSITIVE,
    "eval_every": Whole(0),
    "patience": Whole(0),
}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Optimizer:
    """The settings of the compiled `optimizer.update`. Stacked, each field is an array with one entry per tenant."""

    steps: int = 1000
    lr: float = 1e-3
    warmup_ratio: float = 0.06
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0

    @classmethod
    def stack(cls, tenants: Sequence[Optimizer]) -> Optimizer:
        """One Optimizer whose fields are arrays: int32 for steps, else float32."""

        def column(name: str) -> np.ndarray:
            return np.array([getattr(x, name) for x in tenants], np.int32 if name == "steps" else np.float32)

        return cls(**{f.name: column(f.name) for f in fields(cls)})  # type: ignore[arg-type]


@dataclass(frozen=True)
class Scheduling:
    """How often a tenant is scheduled (`places.Schedule`)."""

    weight: float = 1.0


@dataclass(frozen=True)
class Stopping:
    """When a tenant is evaluated on its dev rows, and when it stops (`watch.DevTracker`)."""

    eval_every: int = 0
    patience: int = 0


@dataclass(frozen=True)
class Settings(Stopping, Scheduling, Optimizer):
    """The settings of one tenant.

    Attributes:
      steps: how many steps the tenant takes, while others may take more.
      lr: the peak learning rate, after the warm-up. Small backbones need 1e-3 to 5e-3; the papers use 1e-4 at 7B.
      warmup_ratio: the share of the steps in which the learning rate rises from zero; then it decays to zero linearly.
      weight_decay: AdamW's decoupled decay towards the weights of an identity adapter: zero, or one for the vectors of
        (IA)3.
      max_grad_norm: the tenant's gradient is clipped to this norm.
      weight: how often the tenant is scheduled if a step does not hold all tenants. With equal steps, a tenant of
        weight 2 progresses twice as fast as one of weight 1.
      eval_every: the tenant's steps between evaluations on its dev rows; 0 evaluates only after its last step.
      patience: the tenant stops after this number of consecutive evaluations without a lower dev loss; 0 never stops.
      epochs: the number of passes over the tenant's rows. If set, it replaces `steps`.

    Raises ParaJaxError for a value out of range.

    >>> Settings(steps=500, lr=3e-3).warmup_ratio
    0.06
    >>> Settings(lr=-1.0)
    Traceback (most recent call last):
    ...
    para_jax.errors.ParaJaxError: lr must be a finite number above 0, not -1.0
    """

    epochs: float | None = None

    def __post_init__(self) -> None:
        for name, kind in RANGES.items():
            object.__setattr__(self, name, kind.check(name, getattr(self, name)))
        if self.epochs is not None:
            POSITIVE.check("epochs", self.epochs)
        if self.patience and not self.eval_every:
            raise ParaJaxError("patience counts evaluations on dev rows; set eval_every, the steps between them")

    def of_rows(self, examples: int, rows: int) -> Self:
        """The settings with `epochs`, if set, converted to steps, for a number of examples and `rows` per step.

        >>> Settings(epochs=3).of_rows(examples=100, rows=16).steps
        19
        """
        if self.epochs is None:
            return self
        steps = max(1, math.ceil(self.epochs * examples / rows))
        return replace(self, steps=COUNT.check(f"the number of steps of {self.epochs:g} epochs", steps), epochs=None)
