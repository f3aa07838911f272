"""What train/finetune.py runs: one module for each, whose docstring gives the command, the time and the score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import jax

from para_jax import BackboneConfig, MethodConfig, ParaConfig, ParaJaxError, Settings, auto_mesh, make_mesh
from para_jax.errors import unknown

# A source of `para_jax.data.sources.read_rows`, or rows {"prompt", "response"} themselves.
Source = str | Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Tenant:
    """One tenant: its rows, how long its answers may be, and its method."""

    train: Source
    dev: Source
    test: Source
    max_new_tokens: int
    method: MethodConfig = field(default_factory=ParaConfig)


@dataclass(frozen=True)
class Recipe:
    """A fine-tuning run from the backbone to the scores.

    Attributes:
      model: a folder or a hub id.
      tenants: by name.
      settings: of every tenant's optimizer.
      rows: of each tenant in a step.
      max_length: tokens of a row; longer prompts are cut at their beginning.
      micro_batch_tokens: that a device computes at once, at most; None for what suits it.
      quantize: "int8" or "int4" for the backbone's layers.
      mesh: as fsdp=8,tensor=2; None for what suits the devices.
      topology: the chips it is meant for, as `para-jax plan` names them; None for any CPU.
      test_rows: of each tenant, that are scored.
      batch_size: rows that are answered together.
    """

    model: str
    tenants: Mapping[str, Tenant]
    settings: Settings
    rows: int
    max_length: int
    micro_batch_tokens: int | None = None
    quantize: Any = None
    mesh: str | None = None
    topology: str | None = None
    checkpoint_every: int = 500
    test_rows: int = 1000
    batch_size: int = 64

    def check(self, shape: BackboneConfig) -> None:
        """Raises ParaJaxError unless every tenant's method fits the backbone, and its rows the context."""
        for tenant in self.tenants.values():
            tenant.method.size(shape)
        if self.max_length > shape.max_position_embeddings:
            raise ParaJaxError(
                f"max_length={self.max_length} is more than the {shape.max_position_embeddings} tokens of "
                f"{self.model}'s context"
            )

    def mesh_of(self, shape: BackboneConfig) -> Any:
        """The mesh over all devices; None on one, and on a CPU, whose devices are simulated and gain nothing."""
        if jax.device_count() == 1 or jax.default_backend() == "cpu":
            return None
        return make_mesh(self.mesh or auto_mesh(shape, jax.device_count()))


def names() -> list[str]:
    """The configs there are."""
    return sorted(module.name for module in iter_modules(__path__) if not module.name.startswith("_"))


def load(name: str) -> Recipe:
    """A config by its name. Raises ParaJaxError, with the nearest, if there is none."""
    if name not in names():
        raise unknown("config", name, names())
    return import_module(f"{__name__}.{name}").recipe
