"""A run of many tenants: turns, leaving, failing, stopping early, best adapters, and all of it resumed exactly."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

from para_jax import AdapterBank, LoraConfig, load_adapter
from para_jax.adapters.para import ParaConfig
from para_jax.data.batches import one_row_each
from para_jax.data.examples import Example
from para_jax.errors import ParaJaxError
from para_jax.training.finetune import finetune
from para_jax.training.loss import tenant_losses
from para_jax.training.places import Schedule, TenantLayout
from para_jax.training.settings import Settings
from para_jax.training.signals import Interrupted
from tests.helpers import SMALL, random_adapter, random_backbone

NAMES = [f"t{i}" for i in range(7)]
STEPS = {name: 3 + i % 3 for i, name in enumerate(NAMES)}
# One shape of batch, and so few programs: prompts of 4 tokens, responses of 2.
CONFIG = ParaConfig(r=2)


def rows_of(seed: int, count: int) -> list[Example]:
    rng = np.random.default_rng(seed)
    return [Example.of(tuple(map(int, rng.integers(1, 61, 4))), (int(rng.integers(1, 61)), 0)) for _ in range(count)]


@pytest.fixture(scope="module")
def backbone():
    return random_backbone(stacked=True)


def bank_of(names, poison=()):
    adapters = {n: random_adapter(CONFIG, SMALL, NAMES.index(n), 0.1) for n in names}
    for name in poison:
        adapters[name] = jax.tree.map(lambda x: x * np.float32("nan"), adapters[name])
    return AdapterBank.stack(adapters, SMALL)


def tune(backbone, out, names=NAMES, poison=(), settings=None, **more):
    settings = settings or {n: Settings(steps=STEPS[n], lr=1e-2) for n in names}
    data = {n: rows_of(NAMES.index(n), 5 + NAMES.index(n)) for n in names}
    quiet = {"rows": 2, "show": lambda line: None, **more}
    return finetune(backbone, data, out, methods=bank_of(names, poison), settings=settings, **quiet)


def files(out: Path) -> dict[str, bytes]:
    """What a run leaves behind, without pictures, and reports, which say how long it took."""
    found = [p for p in out.rglob("*") if p.is_file() and "checkpoints" not in p.parts]
    found = [p for p in found if p.suffix != ".png" and p.stem != "report"]
    return {str(p.relative_to(out)): p.read_bytes() for p in found}


def lines_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_turns_change_nothing_for_a_tenant(backbone, tmp_path) -> None:
    """Seven tenants at three places: each ends where it ends with all of them in every step."""
    all_at_once, in_turns = (tune(backbone, tmp_path / str(most), tenants_per_step=most) for most in (None, 3))
    for name in NAMES:
        for key, x in all_at_once[name].tensors().items():
            np.testing.assert_allclose(in_turns[name].tensors()[key], x, rtol=1e-2, atol=1e-4)
    held = [list(line["loss"]) for line in lines_of(tmp_path / "3")]
    assert {n: sum(n in turn for turn in held) for n in NAMES} == STEPS
    assert max(map(len, held)) == 3 and len(held) == math.ceil(sum(STEPS.values()) / 3)


def test_whoever_is_behind_has_its_turn() -> None:
    bank = bank_of(NAMES[:4])
    settings = {n: Settings(steps=40, weight=2.0 if n == "t1" else 1.0) for n in NAMES[:4]}
    schedule = Schedule(bank, settings, TenantLayout.of(None, 4, 2), most=2)
    taken = dict.fromkeys(NAMES[:4], 0)
    for _ in range(20):
        (turn,) = schedule.step_tenants(taken, ())
        taken |= {n: taken[n] + 1 for n in turn}
    assert taken == {"t0": 8, "t1": 16, "t2": 8, "t3": 8}
    assert schedule.step_tenants(taken, {"t0", "t1", "t2"}) == [["t3", None]], "a place stays, empty"
    assert schedule.step_tenants(taken, set(NAMES)) is None
    assert schedule.steps_left(taken, ()) == 60


@pytest.mark.slow
def test_one_that_fails_leaves_the_others_alone(backbone, tmp_path) -> None:
    said: list[str] = []
    with pytest.raises(ParaJaxError, match=r"t2 \(step 1\) was NaN or infinite; .* 6 other tenants are done"):
        tune(backbone, tmp_path / "broken", poison=["t2"], show=said.append)
    assert "step 1: t2's gradient is NaN or infinite; it stops here, the others continue" in said
    tune(backbone, tmp_path / "whole")
    broken, whole = files(tmp_path / "broken"), files(tmp_path / "whole")
    assert not any(path.startswith("t2/") for path in broken)
    assert whole.keys() - broken.keys() == {path for path in whole if path.startswith("t2/")}
    # To rounding: with one less, rows stand in other micro-batches. Where they stand in the same it is to the last bit
    # (tests/laws/test_tenants_alone.py).
    for name in set(NAMES) - {"t2"}:
        a, b = (load_adapter(tmp_path / run / name, SMALL).tensors() for run in ("broken", "whole"))
        for key, x in a.items():
            np.testing.assert_allclose(x, b[key], rtol=1e-3, atol=1e-5, err_msg=f"{name} {key}")
    losses = [line["loss"].get("t2", 0) for line in lines_of(tmp_path / "broken")]
    assert losses[0] is None, "JSON has no NaN"
    assert "t2" not in lines_of(tmp_path / "broken")[-1]["loss"]


@pytest.mark.slow
def test_beyond_float16s_range_is_said_at_the_first_step(tmp_path) -> None:
    """gate * up of one inner feature, which float16 cannot hold and float32 can."""
    backbone = jax.tree.map(lambda x: x, random_backbone())
    for block in backbone.blocks:
        block["gate_up"][...] = block["gate_up"][...].at[:, 5].mul(2000)
    half, said, lines = jax.tree.map(lambda x: x.astype("float16"), backbone), [], []
    told = "step 1: t0's gradient is NaN or infinite; it stops here, the others continue. "
    reason = "The cause may be float16's range, which ends at 65504: try --dtype float32"
    run = {"names": NAMES[:1], "settings": {"t0": Settings(steps=6)}}
    with pytest.raises(ParaJaxError, match=rf"t0 \(step 1\) was NaN or infinite; .*{reason}\. 0 other tenants"):
        tune(half, tmp_path / "half", **run, show=said.append, loggers=[lambda line: lines.append((line, [*said]))])
    (first, by_then), _ = lines  # the second step has begun by then
    assert math.isnan(first["loss"]["t0"])
    assert told + reason in by_then
    tune(backbone, tmp_path / "exact", **run)
    assert all(line["loss"]["t0"] < 1e3 for line in lines_of(tmp_path / "exact"))


WATCHED = {
    "t0": Settings(steps=12, lr=0.3, eval_every=1, patience=2),
    "t1": Settings(steps=6, lr=1e-2, eval_every=2),
    "t2": Settings(steps=8, lr=0.3, eval_every=3, patience=1),
    "t3": Settings(steps=5, lr=1e-2),
}
DEV = {name: rows_of(50 + i, 3 + i) for i, name in enumerate(("t0", "t1", "t2"))}


def watched(backbone, out, **more):
    return tune(backbone, out, list(WATCHED), settings=WATCHED, dev=DEV, **more)


@pytest.mark.slow
def test_the_best_adapter_is_kept_and_patience_ends(backbone, tmp_path) -> None:
    final = watched(backbone, tmp_path / "out")
    looks: dict[str, list[float]] = {}
    for line in lines_of(tmp_path / "out"):
        for name, loss in line.get("dev_loss", {}).items():
            looks.setdefault(name, []).append(loss)
    assert len(looks["t1"]) == 3 and "t3" not in looks
    best = int(np.argmin(looks["t0"]))
    assert len(looks["t0"]) == best + 3 < 12, "two looks without a better one"
    for name in DEV:
        kept = load_adapter(tmp_path / "out" / name, backbone.config)
        bank = AdapterBank.stack({name: kept}, SMALL)
        batch = one_row_each(DEV[name])
        rows = bank.rows([name], repeats=len(DEV[name]))
        loss = jax.jit(tenant_losses)(backbone, rows, batch)
        np.testing.assert_allclose(float(loss[0, 0]), min(looks[name]), rtol=1e-4)
    last = load_adapter(tmp_path / "out" / "t3", backbone.config)
    for key, x in final["t3"].tensors().items():
        np.testing.assert_array_equal(last.tensors()[key], x)


@pytest.mark.slow
@pytest.mark.parametrize(("step", "dtype"), [(1, "float32"), (4, "float32"), (4, "float16"), (7, "float32")])
def test_stopped_and_resumed(backbone, tmp_path, step, dtype) -> None:
    """SIGTERM at any step: the files afterwards are those of a run that was left alone, to the last bit."""
    backbone = jax.tree.map(lambda x: x.astype(dtype), backbone)
    watched(backbone, tmp_path / "whole", tenants_per_step=2)

    def stop(line) -> None:
        if line["step"] == step:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted) as stopped:
        watched(backbone, tmp_path / "out", tenants_per_step=2, loggers=[stop])
    assert stopped.value.preempted and stopped.value.step >= step
    watched(backbone, tmp_path / "out", tenants_per_step=2, resume=True)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@pytest.mark.slow
def test_a_best_adapter_that_was_removed(backbone, tmp_path) -> None:
    """The checkpoint has it, and the metrics of the steps before."""
    watched(backbone, tmp_path / "out")
    before = files(tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "t1")
    (tmp_path / "out" / "t2" / "adapter_model.safetensors").write_bytes(b"")
    watched(backbone, tmp_path / "out", resume=True)
    assert files(tmp_path / "out") == before


@pytest.mark.slow
def test_other_dev_rows_are_another_run(backbone, tmp_path) -> None:
    watched(backbone, tmp_path / "out")
    with pytest.raises(ParaJaxError, match="dev_sha256"):
        tune(backbone, tmp_path / "out", list(WATCHED), settings=WATCHED, dev={"t0": rows_of(9, 3)}, resume=True)


def test_no_rows_and_epochs(backbone, tmp_path) -> None:
    with pytest.raises(ParaJaxError, match="tenant 'acme' has no rows to train on"):
        finetune(backbone, {"acme": []}, tmp_path / "out", methods=CONFIG)
    assert not (tmp_path / "out").exists()
    assert Settings(epochs=2).of_rows(7, 4).steps == 4


@pytest.mark.slow
def test_the_order_of_tenants_means_nothing(backbone, tmp_path) -> None:
    """Also where they have different methods, and so groups of their own: a run resumes with them in any order."""
    configs = {"b": ParaConfig(r=2), "a": LoraConfig(r=2), "c": LoraConfig(r=4)}
    adapters = {n: random_adapter(c, SMALL, ord(n), 0.1) for n, c in configs.items()}
    settings = {n: Settings(steps=6, lr=1e-2) for n in configs}

    def go(names: str, out: str, **more) -> None:
        bank = AdapterBank.stack({n: adapters[n] for n in names}, SMALL)
        data = {n: rows_of(ord(n), 5) for n in names}
        quiet = {"rows": 2, "show": lambda line: None, **more}
        finetune(backbone, data, tmp_path / out, methods=bank, settings=settings, **quiet)

    def stop(line) -> None:
        if line["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    go("abc", "whole")
    with pytest.raises(Interrupted):
        go("bca", "out", loggers=[stop])
    go("cab", "out", resume=True)
    for name in configs:
        a, b = (tmp_path / run / name / "adapter_model.safetensors" for run in ("whole", "out"))
        assert a.read_bytes() == b.read_bytes()


def test_another_model_of_the_same_sizes_is_refused(backbone, tmp_path) -> None:
    tune(backbone, tmp_path / "out", ["t0"])
    with pytest.raises(ParaJaxError, match=r"weights was [0-9a-f]{40} and is"):
        tune(random_backbone(seed=1, stacked=True), tmp_path / "out", ["t0"], resume=True)


def test_settings_out_of_range() -> None:
    with pytest.raises(ParaJaxError, match="lr must be a finite number above 0, not inf"):
        Settings(lr=float("inf"))
    with pytest.raises(ParaJaxError, match="set eval_every, the steps between them"):
        Settings(patience=2)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"methods": {"t1": "lora"}}, r"unknown tenant in methods 't1'"),
        ({"methods": "parra"}, "did you mean 'para'"),
        ({"settings": {"t1": Settings()}}, r"unknown tenant in settings 't1'"),
        ({"dev": {"t1": "rows.jsonl"}}, r"unknown tenant in dev 't1'"),
        ({"templates": {"t0": "glue/sst2"}}, "it is for a source, and these rows are in memory"),
        ({"methods": AdapterBank.create({"t1": CONFIG}, SMALL)}, "the same tenants"),
        ({"max_length": 100}, "all rows are encoded examples, so max_length has no effect"),
        ({"truncate": True, "allow_special_tokens": True}, "so truncate, allow_special_tokens has no effect"),
    ],
)
def test_what_a_run_is_given_by_tenant(backbone, tmp_path, given, words) -> None:
    with pytest.raises(ParaJaxError, match=words):
        finetune(backbone, {"t0": rows_of(0, 3)}, tmp_path / "out", **given)
    with pytest.raises(ParaJaxError, match="the rows of 't0' are text; pass tokenizer="):
        finetune(backbone, {"t0": [{"prompt": "Who sat?", "response": "The cat."}]}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"keep": 1}, "keep must be a whole number from 2 to 2147483647, not 1"),
        ({"checkpoint_every": 0.5}, "checkpoint_every must be a whole number from 1 to 2147483647, not 0.5"),
        ({"seed": -1}, "seed must be a whole number from 0 to 4294967295, not -1"),
        ({"rows": True}, "rows must be a whole number from 1 to 2147483647, not True"),
        ({"resume": True, "overwrite": True}, "give one of them"),
        ({"settings": {"t0": Settings(eval_every=2)}}, "no tenant has any; give dev rows"),
        ({"settings": {"t0": Settings(weight=2.0)}}, "set tenants_per_step"),
        ({"tenants_per_step": 0}, "tenants_per_step must be a whole number from 1 to"),
        ({"spread": True}, "both have size 1"),
    ],
)
def test_what_would_mean_nothing_is_refused(backbone, tmp_path, options, words) -> None:
    with pytest.raises(ParaJaxError, match=words):
        tune(backbone, tmp_path / "out", ["t0"], **options)
    assert not (tmp_path / "out").exists()
