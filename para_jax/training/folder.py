"""The folder of a run: the names of its files, and the description of the run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from para_jax.adapters.bank import AdapterBank
from para_jax.adapters.files import base_sizes
from para_jax.backbones.decoder import Backbone
from para_jax.checks import check_text
from para_jax.data.examples import Example, Examples
from para_jax.data.order import Mixture, sources_of
from para_jax.errors import ParaJaxError
from para_jax.training.digest import weights_digest
from para_jax.training.settings import RANGES
from para_jax.training.tuning import Tuning

RUN, METRICS, PLOT, CHECKPOINTS = "run.json", "metrics.jsonl", "loss.png", "checkpoints"
REPORT, REPORT_PAGE = "report.json", "report.html"
BEST = "best"  # in a checkpoint: the adapters with the lowest dev loss
TENSORBOARD, WANDB, PROFILE = "tensorboard", "wandb", "profile"
RESERVED = (RUN, METRICS, PLOT, CHECKPOINTS, REPORT, REPORT_PAGE, TENSORBOARD, WANDB, PROFILE)
LONGEST = 230  # bytes of a tenant's name; file systems allow 255 for a folder's name


def check_name(name: str) -> None:
    """Raises ParaJaxError unless a tenant's name can be a folder's name in a run's folder."""
    check_text(f"tenant name {name!a}", name)
    # The temporary name of a folder is 20 characters longer.
    fits = name == Path(name).name and name.isprintable() and len(name.encode()) <= LONGEST
    if not name or not fits or name.startswith(".") or name in RESERVED:
        raise ParaJaxError(f"tenant name {name!r} cannot be a folder's name; choose another")


def describe(backbone: Backbone, bank: AdapterBank, tuning: Tuning) -> dict[str, Any]:
    """Everything that the result of a run depends on, as JSON."""
    run = {
        "rows": tuning.rows,
        "micro_batch_tokens": tuning.micro_batch_tokens,
        "seed": tuning.seed,
        "dtype": str(backbone.dtype),
        "quantize": backbone.quantize,
        "weights": weights_digest(backbone),
    }
    tenants = {name: _tenant(name, bank, tuning) for name in tuning.examples}
    return json.loads(json.dumps({"tenants": tenants, **run, "base_model": base_sizes(backbone.config)}))


def _tenant(name: str, bank: AdapterBank, tuning: Tuning) -> dict[str, Any]:
    config, rows = bank.find(name)[0].config, tuning.examples[name]
    return {
        "method": config.method,
        **dataclasses.asdict(config),
        **{key: getattr(tuning.settings[name], key) for key in RANGES},
        "examples": len(rows),
        "data_sha256": fingerprint(rows),
        **({"mixture": rows.weights} if isinstance(rows, Mixture) else {}),
        **({"dev_sha256": fingerprint(tuning.dev[name])} if name in tuning.dev else {}),
    }


def fingerprint(rows: Sequence[Example]) -> str:
    """A hash of all ids, targets and lengths by source. It does not depend on how examples are stored.

    >>> rows = [Example.of([5, 6], [7, 0]), Example.of([8], [0])]
    >>> fingerprint(rows) == fingerprint(Examples.of(rows)) != fingerprint(rows[:1])
    True
    """
    digest = hashlib.sha256()
    for source in sources_of(rows):
        examples = Examples.of(source)
        digest.update(len(examples).to_bytes(8, "little"))
        for x in (examples.lengths, examples.prompt_lengths, examples.ids, examples.targets):
            digest.update(np.ascontiguousarray(x, "<i4").data)
    return digest.hexdigest()
