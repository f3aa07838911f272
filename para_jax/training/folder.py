"""The folder of a run: what it is a run of, and that no other run's files are lost."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from para_jax.adapters.bank import AdapterBank
from para_jax.adapters.files import base_sizes
from para_jax.backbones.decoder import Backbone
from para_jax.data.examples import Example, Examples
from para_jax.data.order import Mixture, sources_of
from para_jax.distributed import first, told
from para_jax.errors import ParaJaxError
from para_jax.training.digest import weights_digest
from para_jax.training.optimizer import Settings

RUN, METRICS, PLOT, CHECKPOINTS = "run.json", "metrics.jsonl", "loss.png", "checkpoints"
REPORT, REPORT_PAGE = "report.json", "report.html"
TENSORBOARD, WANDB, PROFILE = "tensorboard", "wandb", "profile"
TAKEN = (RUN, METRICS, PLOT, CHECKPOINTS, REPORT, REPORT_PAGE, TENSORBOARD, WANDB, PROFILE)


def check_name(name: str) -> None:
    """Raises ParaJaxError unless a tenant's name can be a folder's beside the run's own files."""
    if not name or name != Path(name).name or name.startswith(".") or name in TAKEN:
        raise ParaJaxError(f"tenant name {name!r} cannot be a folder's name; choose another")


def describe(
    backbone: Backbone,
    bank: AdapterBank,
    examples: Mapping[str, Sequence[Example]],
    dev: Mapping[str, Sequence[Example]],
    settings: Mapping[str, Settings],
    rows: int,
    micro_batch_tokens: int | None,
    seed: int,
) -> dict[str, Any]:
    """All that a run's result depends on, as JSON."""
    tenants = {
        name: {
            "method": bank.find(name)[0].config.method,
            **dataclasses.asdict(bank.find(name)[0].config),
            **dataclasses.asdict(settings[name]),
            "examples": len(examples[name]),
            "data_sha256": fingerprint(examples[name]),
            **({"mixture": own.weights} if isinstance(own := examples[name], Mixture) else {}),
            **({"dev_sha256": fingerprint(dev[name])} if name in dev else {}),
        }
        for name in examples
    }
    run = {
        "rows": rows,
        "micro_batch_tokens": micro_batch_tokens,
        "seed": seed,
        "dtype": str(backbone.dtype),
        "quantize": backbone.quantize,
        "weights": weights_digest(backbone),
    }
    return json.loads(json.dumps({"tenants": tenants, **run, "base_model": base_sizes(backbone.config)}))


def fingerprint(rows: Sequence[Example]) -> str:
    """A hash of all ids, targets and lengths, and of how they are divided into sources; the same in every form.

    >>> rows = [Example.of([5, 6], [7, 0]), Example.of([8], [0])]
    >>> fingerprint(rows) == fingerprint(Examples.of(rows)) != fingerprint(rows[:1])
    True
    """
    digest = hashlib.sha256()
    for source in sources_of(rows):
        own = Examples.of(source).compact()
        digest.update(len(own).to_bytes(8, "little"))
        for x in (own.lengths, own.prompt_lengths, own.ids, own.targets):
            digest.update(np.ascontiguousarray(x, "<i4").data)
    return digest.hexdigest()


def claim(out: Path, description: dict[str, Any], resume: bool, overwrite: bool) -> None:
    """Makes the folder of a new run, or sees that the one to resume is this one.

    Of several processes the first one does; all raise what it raises.
    """
    problem = b""
    if first():
        try:
            _claim(out, description, resume, overwrite)
        except (ParaJaxError, OSError, ValueError) as error:
            problem = str(error).encode()
    if message := told(problem).decode():
        raise ParaJaxError(message)


def _claim(out: Path, description: dict[str, Any], resume: bool, overwrite: bool) -> None:
    """Makes the folder of a new run, or sees that the one to resume is this one."""
    there = out / RUN
    if out.exists() and resume and there.is_file():
        before = json.loads(there.read_text())
        if "weights_sha256" in before:  # a hash of the norm and eight rows of the embedding
            raise ParaJaxError(
                f"{out} holds a run of an earlier version of para_jax, which noted only a few of the backbone's "
                "weights; whether these are the same is not known. Finish it with that version, or pass --overwrite"
            )
        changed = list(_changes(before, description))
        if changed:
            raise ParaJaxError(f"{out} holds another run, which cannot be resumed with these: {'; '.join(changed[:5])}")
        return
    if out.exists() and any(out.iterdir()):
        if not overwrite:
            way = "it holds no run to resume" if resume else "pass --resume to go on with it"
            raise ParaJaxError(f"{out} exists; {way}, --overwrite to replace it, or choose another folder")
        if not there.is_file():
            raise ParaJaxError(
                f"{out} holds no {RUN}, so it is no run to overwrite; remove it or choose another folder"
            )
        aside = out.with_name(f".{out.name}-replaced")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(out, aside)
        shutil.rmtree(aside)
    out.mkdir(parents=True, exist_ok=True)
    fresh = out / f".{RUN}-new"
    fresh.write_text(json.dumps(description, indent=1) + "\n")
    os.replace(fresh, there)


def _changes(before: Any, now: Any, at: str = "") -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {**before, **now}:
            yield from _changes(before.get(key), now.get(key), f"{at}.{key}" if at else key)
    elif before != now:
        yield f"{at} was {str(before)[:40]} and is {str(now)[:40]}"
