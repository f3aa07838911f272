"""How one tenant is tuned: its optimizer, how often it has its turn, and when it stops."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING

import jax
import numpy as np

from para_jax.checks import COUNT, POSITIVE, Number, Whole
from para_jax.errors import ParaJaxError

if TYPE_CHECKING:
    from typing import Self

# What each field of `Settings` may be.
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


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["steps", "lr", "warmup_ratio", "weight_decay", "max_grad_norm"],
    meta_fields=[],
)
@dataclass(frozen=True)
class Optimizer:
    """What the compiled update reads (`optimizer.update`). Stacked, each field is an array with one entry a tenant."""

    steps: int = 1000
    lr: float = 1e-3
    warmup_ratio: float = 0.06
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0

    @classmethod
    def stack(cls, tenants: Sequence[Optimizer]) -> Optimizer:
        """One Optimizer with an array for each field: int32 for steps, else float32."""

        def column(name: str) -> np.ndarray:
            return np.array([getattr(x, name) for x in tenants], np.int32 if name == "steps" else np.float32)

        return cls(**{f.name: column(f.name) for f in fields(cls)})  # type: ignore[arg-type]


@dataclass(frozen=True)
class Turns:
    """When a tenant has its turn (`places.Schedule`)."""

    weight: float = 1.0


@dataclass(frozen=True)
class Stopping:
    """When a tenant's dev rows are looked at, and when it stops (`watch.Watch`)."""

    eval_every: int = 0
    patience: int = 0


@dataclass(frozen=True)
class Settings(Stopping, Turns, Optimizer):
    """How one tenant is tuned.

    Attributes:
      steps: how many steps it takes; afterwards it rests while others go on.
      lr: the highest learning rate, at the end of the warm-up. Small backbones want 1e-3 to 5e-3; 1e-4 is what the
        papers use at 7B.
      warmup_ratio: the share of the steps in which the rate rises from zero; afterwards it falls to zero linearly.
      weight_decay: AdamW's decoupled decay, towards the weights with which the adapter is the identity: zero, and one
        for the vectors of (IA)3.
      max_grad_norm: the tenant's gradient is scaled down to this norm if it is larger.
      weight: how often it has its turn, where a step does not hold all tenants: with as many steps to take, one of
        weight 2 gets on twice as fast as one of weight 1.
      eval_every: its own steps between looks at its dev rows; zero looks after its last step only.
      patience: it stops after so many looks in a row that were no better than the best; zero never does.
      epochs: how often its rows are seen. If set, it takes the place of `steps`.

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
            raise ParaJaxError("patience counts looks at dev rows; set eval_every, the steps between them")

    def of_rows(self, examples: int, rows: int) -> Self:
        """With the steps in which `epochs`, if set, of so many examples are seen, `rows` in each step.

        >>> Settings(epochs=3).of_rows(examples=100, rows=16).steps
        19
        """
        if self.epochs is None:
            return self
        steps = max(1, math.ceil(self.epochs * examples / rows))
        return replace(self, steps=COUNT.check(f"the number of steps of {self.epochs:g} epochs", steps), epochs=None)
