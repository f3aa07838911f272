"""Law 7 on other devices: a run that goes on on more or fewer of them has the same state, rows and random keys."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
import pytest

from para_jax import Backbone, LoraConfig, ParaConfig, load_adapter
from para_jax.convert.checkpoint import save_backbone
from para_jax.data.examples import Example
from para_jax.sharding import make_mesh
from para_jax.training.finetune import finetune
from para_jax.training.settings import Settings
from para_jax.training.signals import Interrupted
from tests.helpers import random_backbone

pytestmark = pytest.mark.usefixtures("few_programs")

STEPS, STOP = 8, 4
CONFIGS = {"acme": ParaConfig(r=2), "globex": LoraConfig(r=2, lora_dropout=0.3), "initech": ParaConfig(r=2)}
DRAWN = np.random.default_rng(0).integers(1, 61, (len(CONFIGS), 12, 9))
ROWS = {
    name: [Example.of(row[: 4 + i % 4], row[4 + i % 4 :]) for i, row in enumerate(of)]
    for name, of in zip(CONFIGS, DRAWN.tolist(), strict=True)
}
LOSSES = 1e-5  # as docs/finetuning.md states


def tune(model: Path, out: Path, mesh: str | None, stop: int = 0) -> list[dict]:
    """A run, or what is left of it, on the first devices, as many as the mesh has; returns the metrics."""

    def logger(line: Mapping) -> None:
        if line["step"] == stop:
            os.kill(os.getpid(), signal.SIGTERM)

    devices = 1 if mesh is None else int(np.prod([int(size.split("=")[1]) for size in mesh.split(",")]))
    there = None if mesh is None else make_mesh(mesh, jax.devices()[:devices])
    backbone = Backbone.from_pretrained(model, dtype="float32", mesh=there, stacked=True)
    settings = {n: Settings(steps=STEPS, lr=1e-2, eval_every=2 * (n == "initech")) for n in CONFIGS}
    try:
        finetune(
            backbone, {n: rows[:8] for n, rows in ROWS.items()}, out, methods=CONFIGS, settings=settings,
            dev={"initech": ROWS["initech"][8:]}, rows=4, resume=True, show=lambda line: None, loggers=[logger],
        )  # fmt: skip
    except Interrupted as stopped:
        assert stop <= stopped.step < STEPS
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_backbone(random_backbone(vocab_size=64), folder / "model")
    return folder / "model"


@pytest.mark.parametrize(
    "meshes",
    [
        pytest.param((None, "fsdp=8"), marks=pytest.mark.whole),
        pytest.param(("data=8", "fsdp=4"), marks=pytest.mark.whole),
        ("fsdp=4,tensor=2", None),
        (None, "data=2,fsdp=2", "data=2,fsdp=2,tensor=2"),
    ],
    ids=str,
)
def test_resumed_on_other_devices(model: Path, tmp_path: Path, meshes: tuple[str | None, ...]) -> None:
    """From one to eight, from eight to four, to one that has no mesh, and on once more."""
    wanted = tune(model, tmp_path / "whole", meshes[0])
    for turn, mesh in enumerate(meshes, 1):
        lines = tune(model, tmp_path / "out", mesh, stop=0 if turn == len(meshes) else STOP // (len(meshes) - 1) * turn)
    worst = 0.0
    for a, b in zip(lines, wanted, strict=True):
        assert (a["step"], a["tokens"], a["lr"]) == (b["step"], b["tokens"], b["lr"]), "the same rows and rates"
        for key in ("loss", "dev_loss"):
            assert a.get(key, {}).keys() == b.get(key, {}).keys()
            worst = max([worst, *(abs(a[key][name] / loss - 1) for name, loss in b.get(key, {}).items())])
    assert worst < LOSSES, f"{worst:.1e}"
    shape = random_backbone(vocab_size=64).config
    for name in CONFIGS:
        theirs = load_adapter(tmp_path / "whole" / name, shape).tensors()
        for key, x in load_adapter(tmp_path / "out" / name, shape).tensors().items():
            np.testing.assert_allclose(x, theirs[key], rtol=1e-2, atol=2e-4, err_msg=f"{name} {key}")
