"""Loggers and the report, read back by the programs that they are for."""

import base64
import json
import signal
from html.parser import HTMLParser

import jax
import pytest
from jax.profiler import ProfileData
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from para_jax import AdapterBank, LoraConfig, ParaConfig, ParaJaxError
from para_jax.data.examples import Example
from para_jax.training import loggers as loggers_module
from para_jax.training.finetune import finetune
from para_jax.training.loggers import Loggers, Profile
from para_jax.training.report import page
from para_jax.training.settings import Settings
from para_jax.training.signals import Interrupted
from tests.helpers import random_backbone

# All rows are of one length, so that there is one program.
ROWS = [Example.of((5 + i, 6, 7), (8 + i % 3, 0)) for i in range(8)]


@pytest.fixture(scope="module")
def backbone():
    return random_backbone(num_hidden_layers=1)


def run(backbone, out, loggers=(), steps=10, names=("acme", "globex"), dev=("acme",), bank=None, settings=(), **more):
    configs = {name: ParaConfig(r=2) if i == 0 else LoraConfig(r=2) for i, name in enumerate(names)}
    bank = bank or AdapterBank.create(configs, backbone.config)
    rules = {n: Settings(steps=steps, lr=1e-2, eval_every=4 if dev else 0) for n in bank.names} | dict(settings)
    return finetune(
        backbone, dict.fromkeys(bank.names, ROWS[:6]), out, methods=bank, settings=rules,
        dev=dict.fromkeys(dev, ROWS[6:]), rows=2, loggers=loggers, show=lambda line: None,
        **{"checkpoint_every": 5, **more},
    )  # fmt: skip


def crash_at(step):
    def logger(line):
        if line["step"] == step:
            raise RuntimeError("the machine is gone")

    return logger


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_tenants_keep_their_order(backbone, tmp_path):
    """That of the caller in every line, whatever the methods."""
    for names in (("acme", "globex"), ("globex", "acme")):
        run(backbone, tmp_path / names[0], steps=1, names=names, dev=())
        assert [list(line[key]) for line in metrics(tmp_path / names[0]) for key in ("loss", "lr")] == [[*names]] * 2


# TensorBoard


def scalars(folder):
    """What TensorBoard shows: {name: [(step, value), ...]}."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


@pytest.mark.slow
def test_tensorboard_shows_the_metrics(backbone, tmp_path):
    with Loggers(["tensorboard"], tmp_path / "out") as loggers:
        run(backbone, tmp_path / "out", loggers)
    lines, shown = metrics(tmp_path / "out"), scalars(tmp_path / "out" / "tensorboard")
    for key in ("loss", "grad_norm", "lr", "dev_loss"):
        for name in ("acme", "globex"):
            expected = [(line["step"], pytest.approx(line[key][name])) for line in lines if name in line.get(key, {})]
            assert shown.get(f"{key}/{name}", []) == expected
    assert [step for step, _ in shown["dev_loss/acme"]] == [4, 8, 10]
    assert [step for step, _ in shown["tokens_per_second"]] == list(range(2, 11))
    assert all(rate > 0 for _, rate in shown["tokens_per_second"])


def test_a_resumed_run_shows_every_step_once(backbone, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(RuntimeError, match="gone"), Loggers(["tensorboard"], out) as loggers:
        run(backbone, out, [*loggers, crash_at(8)])
    assert [step for step, _ in scalars(out / "tensorboard")["loss/acme"]] == list(range(1, 9))
    with Loggers(["tensorboard"], out) as loggers:
        run(backbone, out, loggers, resume=True)
    assert [line["step"] for line in metrics(out)] == list(range(1, 11)), "it went on behind the checkpoint of step 5"
    expected = [(line["step"], pytest.approx(line["loss"]["acme"])) for line in metrics(out)]
    assert scalars(out / "tensorboard")["loss/acme"] == expected
    assert len(list((out / "tensorboard").iterdir())) == 2


def test_what_is_not_installed_or_not_known_is_named(monkeypatch, tmp_path):
    with pytest.raises(ParaJaxError, match="did you mean 'tensorboard'"):
        Loggers(["tensorbord"], tmp_path)
    monkeypatch.setattr(loggers_module, "find_spec", lambda name: None)
    with pytest.raises(ParaJaxError, match=r"--log tensorboard needs tensorboardX.*pip install tensorboardX"):
        Loggers(["tensorboard"], tmp_path)
    with pytest.raises(ParaJaxError, match=r"--log wandb needs wandb.*pip install wandb"):
        Loggers(["wandb"], tmp_path)


def leveldb_log(file):
    """The records of an offline run's file: a head of 7 bytes, and LevelDB's log in blocks of 32 kB."""
    at, record = 7, b""
    while at + 7 <= len(file):
        if 2**15 - at % 2**15 < 7:
            at += 2**15 - at % 2**15
            continue
        size, kind = int.from_bytes(file[at + 4 : at + 6], "little"), file[at + 6]
        record += file[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


@pytest.mark.slow
def test_weights_and_biases(backbone, tmp_path, monkeypatch):
    from wandb.proto import wandb_internal_pb2 as records

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    out = tmp_path / "out"
    with pytest.raises(RuntimeError, match="gone"), Loggers(["wandb"], out) as loggers:
        run(backbone, out, [*loggers, crash_at(8)])
    with Loggers(["wandb"], out) as loggers:
        run(backbone, out, loggers, resume=True)
    shown, ids = [], set()
    for file in sorted((out / "wandb").glob("offline-run-*/*.wandb")):
        for data in leveldb_log(file.read_bytes()):
            record = records.Record.FromString(data)
            ids |= {record.run.run_id} - {""}
            items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            if items:
                shown.append((items["_step"], items["loss/acme"]))
    assert ids == {(out / "wandb" / "id").read_text()}
    assert sorted(set(shown)) == [(line["step"], line["loss"]["acme"]) for line in metrics(out)]


# Profile


def traced_steps(folder):
    (file,) = folder.glob("plugins/profile/*/*.xplane.pb")
    events = [e for p in ProfileData.from_file(str(file)).planes for line in p.lines for e in line.events]
    assert not [e for e in events if "backend_compile" in e.name.lower()], "a step in it compiles"
    return sorted(dict(e.stats)["step_num"] for e in events if e.name == "train")


def test_a_profile_has_the_steps_that_were_asked_for(backbone, tmp_path):
    said = []
    with Loggers([], tmp_path / "out", 3, said.append) as loggers:
        # The first checkpoint compiles its copies, and the last step the adapter's.
        run(backbone, tmp_path / "out", loggers, steps=14, dev=(), names=("acme",), checkpoint_every=100)
    steps = traced_steps(tmp_path / "out" / "profile")
    assert len(steps) == 3 and steps[0] > 2 and steps[-1] - steps[0] == 2
    assert said == [f"profile of 3 steps in {tmp_path / 'out' / 'profile'}; open it with xprof"]


def test_a_profile_waits_for_steps_that_compile_nothing(tmp_path):
    profile = Profile(tmp_path, 1, lambda line: None)
    for step in range(1, 5):
        jax.jit(lambda x, step=step: x + step)(1)
        profile({"step": step})
        assert not (tmp_path / "profile").exists()
    for step in range(5, 9):
        profile({"step": step})
    profile.close()
    assert list((tmp_path / "profile").glob("plugins/profile/*/*.xplane.pb"))


def test_a_run_too_short_for_a_profile_says_so(backbone, tmp_path):
    said = []
    with Loggers([], tmp_path / "out", 3, said.append) as loggers:
        run(backbone, tmp_path / "out", loggers, steps=1, dev=(), names=("acme",))
    assert len(said) == 1 and said[0].startswith("no profile was made") and "took 1 step" in said[0]
    assert not (tmp_path / "out" / "profile").exists()


# Report


class Page(HTMLParser):
    """The tables, by id, and the pictures of a page."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.images, self.open, self.outside = {}, [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.outside += [attrs[k] for k in ("src", "href") if k in attrs and not attrs[k].startswith("data:")]
        if tag == "table":
            self.rows = self.tables.setdefault(attrs["id"], [])
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag == "img":
            self.images.append(attrs["src"])
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] in (["td"], ["th"]):
            self.rows[-1][-1] += data


@pytest.mark.slow
def test_the_report_tells_how_every_tenant_ended(backbone, tmp_path):
    """One is done, one stops early, one fails; names are no HTML."""
    names = ("a<b>&c", "patient", "broken")
    bank = AdapterBank.create(dict.fromkeys(names, ParaConfig(r=2)), backbone.config)
    broken = jax.tree.map(lambda x: x * float("nan"), bank["broken"].layers)
    bank = bank.replace("broken", type(bank["broken"])(bank["broken"].config, broken))
    settings = {"patient": Settings(steps=10, lr=1e-30, eval_every=1, patience=2)}  # it never gets better
    with pytest.raises(ParaJaxError, match=r"gradient of broken \(step 1\)"):
        run(backbone, tmp_path / "out", bank=bank, settings=settings, dev=("a<b>&c", "patient"))

    report = json.loads((tmp_path / "out" / "report.json").read_text())
    lines, tenants = metrics(tmp_path / "out"), report["tenants"]
    assert [t["state"] for t in tenants.values()] == ["done", "stopped early", "failed at step 1"]
    assert tenants["patient"]["steps"] < tenants["patient"]["steps_planned"] == 10
    done = tenants["a<b>&c"]
    assert done["first_loss"] == lines[0]["loss"]["a<b>&c"] and done["last_loss"] == lines[-1]["loss"]["a<b>&c"]
    looks = {line["step"]: line["dev_loss"]["a<b>&c"] for line in lines if "a<b>&c" in line.get("dev_loss", {})}
    assert done["best_dev_loss"] == min(looks.values()) == looks[done["best_dev_step"]]
    assert tenants["broken"]["last_loss"] is None, "NaN is no JSON"
    assert report["tokens"] == sum(line["tokens"] for line in lines) and report["steps"] == len(lines) == 10
    assert report["throughput"]["steps"] == 9 and report["throughput"]["tokens_per_second"] > 0
    assert report["memory"]["host_peak_bytes"] > 2**20 and len(report["memory"]["devices"]) == jax.local_device_count()

    html = (tmp_path / "out" / "report.html").read_text()
    read = Page(html)
    header, *rows = read.tables["tenants"]
    assert not read.open and not read.outside and len(header) == len(rows[0]) == 9
    assert [(row[0], row[-1]) for row in rows] == [(name, t["state"]) for name, t in tenants.items()]
    assert rows[0][1:4] == ["para", f"{ParaConfig(r=2).size(backbone.config):,}", "10 of 10"]
    assert rows[0][4:7] == [f"{done[key]:.4f}" for key in ("first_loss", "last_loss", "best_dev_loss")]
    (image,) = read.images
    assert base64.b64decode(image.partition("base64,")[2]) == (tmp_path / "out" / "loss.png").read_bytes()
    assert "peak memory of the process" in dict(read.tables["run"])

    report["memory"]["devices"][0]["peak_bytes"] = 3 * 2**30
    facts = dict(Page(page(report, "on a GPU", b"")).tables["run"])
    assert facts[f"peak memory of {jax.devices()[0]}, {jax.devices()[0].device_kind}"] == "3.00 GiB"
    assert "peak memory of the process" not in facts


def test_an_interrupted_run_has_a_report_until_it_is_done(backbone, tmp_path):
    def interrupt(line):
        if line["step"] == 3:
            signal.raise_signal(signal.SIGINT)

    out = tmp_path / "out"
    with pytest.raises(Interrupted):
        run(backbone, out, [interrupt])
    report = json.loads((out / "report.json").read_text())
    assert 3 <= report["steps"] < 10 and {t["state"] for t in report["tenants"].values()} == {"interrupted"}
    run(backbone, out, resume=True)
    report = json.loads((out / "report.json").read_text())
    assert report["steps"] == 10 and {t["state"] for t in report["tenants"].values()} == {"done"}


@pytest.mark.parametrize("name", ["profile", "tensorboard", "wandb", "report.html"])
def test_no_tenant_takes_a_name_of_the_run(backbone, tmp_path, name):
    with pytest.raises(ParaJaxError, match="cannot be a folder's name"):
        run(backbone, tmp_path / "out", names=(name,), dev=())
