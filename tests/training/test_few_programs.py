"""Law 4 for training: a run compiles the programs that it announces, whatever its rows are, and none after step 1."""

from __future__ import annotations

import logging
import os
import re
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import numpy as np
import pytest

from para_jax.data.examples import Example
from para_jax.training.finetune import finetune
from para_jax.training.settings import Settings
from para_jax.training.signals import Interrupted
from tests.compilations import compilations
from tests.helpers import METHODS, random_backbone

NAMES = ("acme", "globex", "initech")
OURS = {"accumulate", "update", "losses", "copy_arrays", "tenant_adapter", "weight_sums"}


@contextmanager
def named() -> Iterator[Counter]:
    """How often a program of each name is compiled within the block."""
    found: Counter = Counter()

    class Listen(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if name := re.match(r"Finished XLA compilation of jit\((\w+)\)", record.getMessage()):
                found[name[1]] += 1

    logger, listen = logging.getLogger("jax._src.dispatch"), Listen()
    before = logger.propagate, logger.level
    logger.addHandler(listen)
    logger.propagate = False
    logger.setLevel(logging.DEBUG)
    try:
        yield found
    finally:
        logger.removeHandler(listen)
        logger.propagate, logger.level = before


def ragged(seed: int, count: int) -> list[Example]:
    """Rows whose lengths are log-normal, as those of real data."""
    rng = np.random.default_rng(seed)
    sizes = np.clip(np.exp(rng.normal(2.5 + seed % 3 / 3, 0.8, (count, 2))), 1, 60).astype(int)
    return [Example.of(rng.integers(1, 61, p).tolist(), [*rng.integers(1, 61, r).tolist(), 0]) for p, r in sizes]


def run(out, steps: int = 40, stop_at: int = 0, **more) -> tuple[list[str], list[int]]:
    """What a run says, and how much had been compiled after each step."""
    backbone, said, after = random_backbone(stacked=True), [], []
    config = {"acme": METHODS["para"], "globex": METHODS["para"], "initech": METHODS["lora"]}
    settings = {
        # A rate that changes nothing: the first look is the best one, and patience soon at an end.
        "acme": Settings(steps=steps, lr=1e-12, eval_every=4, patience=2),
        "globex": Settings(steps=steps - 7, lr=1e-3, eval_every=9),
        "initech": Settings(steps=steps, lr=1e-3),
    }
    data = {name: ragged(i, 70) for i, name in enumerate(NAMES)}
    dev = {"acme": ragged(7, 9), "globex": ragged(8, 3)}
    with compilations() as compiled:

        def each(line: dict) -> None:
            after.append(len(compiled))
            if line["step"] == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)

        options = {"dev": dev, "rows": 4, "checkpoint_every": 10, "show": said.append, "loggers": [each], **more}
        finetune(backbone, data, out, methods=config, settings=settings, **options)
        after.append(len(compiled))
    return said, after


def test_a_run_compiles_what_it_announces_and_nothing_after_its_first_step(tmp_path) -> None:
    jax.clear_caches()
    with named() as programs, pytest.raises(Interrupted):
        run(tmp_path / "out", stop_at=17)
    with named() as again:
        said, after = run(tmp_path / "out", resume=True)
    assert any("resuming after step 1" in line for line in said)
    assert len(set(after)) == 1, "nothing after the first step, nor at the end"
    announced = int(re.search(r"compiling (\d+) programs", said[1])[1])
    ours = {name: count for name, count in programs.items() if name in OURS}
    assert set(ours) == OURS and sum(ours.values()) == announced
    assert ours["accumulate"] + ours["update"] <= 3
    assert not OURS & set(again), "the resumed run plans the same shapes"
    stopped = [line for line in said if line.startswith("step")]
    assert stopped and "acme" not in stopped[-1], "acme has stopped early, and changed no shape"
