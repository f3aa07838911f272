"""`benchmarks/real.py`: both sides have the same tokens and rates, what it sums up, and a small run of every case."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from para_jax.data.examples import encode_rows
from para_jax.training.optimizer import learning_rate
from para_jax.training.settings import Settings

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import common
import peft_loop
import real
import real_commands
import real_rows

ROWS = [
    {"prompt": "The house is", "response": "old"},
    {"prompt": "Who sat there?\n", "response": "The cat, at last."},
    {"prompt": "A prompt whose end", "response": " begins with a space"},
    {"prompt": "Where is the nurse?", "response": "At the station.", "choices": ["At the station.", "Nowhere."]},
]


@pytest.mark.parametrize("rows", [ROWS, real_rows.chats_of(ROWS * 12)], ids=["rows", "chats"])
def test_both_sides_have_the_same_tokens(tiny, tmp_path, rows):
    backbone, tokenizer = tiny
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ours = encode_rows([(str(i), row) for i, row in enumerate(rows)], tokenizer, backbone.config.eos_token_ids)
    theirs = peft_loop.read(file, tokenizer)
    real_rows.check(ours, theirs)
    assert all(label in (x, peft_loop.NO_LOSS) for row in theirs for x, label in zip(row.ids, row.labels, strict=True))
    # What differs is seen.
    ids, labels = theirs[1]
    with pytest.raises(SystemExit, match="1: not the same tokens"):
        real_rows.check(ours, [theirs[0], peft_loop.Row([ids[0] + 1, *ids[1:]], labels), *theirs[2:]])
    with pytest.raises(SystemExit, match="1: not the same targets"):
        real_rows.check(ours, [theirs[0], peft_loop.Row(ids, [ids[0], *labels[1:]]), *theirs[2:]])


@pytest.mark.parametrize("steps", [1, 2, 24, 200])
def test_both_sides_have_the_same_rates(steps):
    settings = Settings(steps=steps, lr=1.0)
    ours = [float(learning_rate(settings, jnp.int32(step))) for step in range(steps)]
    assert ours == pytest.approx([peft_loop.schedule(steps, step) for step in range(steps)])


def test_chats_have_two_to_twelve_turns():
    chats = real_rows.chats_of(ROWS * 50)
    assert {len(chat["messages"]) for chat in chats} == {2, 4, 6, 8, 10, 12}
    assert [m["role"] for m in chats[0]["messages"][:2]] == ["user", "assistant"]
    assert sum(len(chat["messages"]) for chat in chats) == 2 * 4 * 50


def test_tenants_come_from_a_folder_or_are_made(tmp_path):
    for name in ("acme", "globex"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    found = real_rows.rows_of_folder(tmp_path, ["globex", "acme"], tenants=3, most=2)
    assert found == {"tenant0-globex": ROWS[:2], "tenant1-acme": ROWS[:2], "tenant2-globex": ROWS[2:]}
    with pytest.raises(SystemExit, match="has no initech; it has acme, globex"):
        real_rows.rows_of_folder(tmp_path, ["initech"], tenants=1, most=2)
    made = real_rows.made_rows((), tenants=4, most=30)
    assert [len(rows) for rows in made.values()] == [30] * 4
    assert made["tenant0-mood"] != made["tenant3-mood"]
    assert len({len(row["prompt"].split(".")) for row in made["tenant1-place"]}) == 8


def test_a_command_is_timed_to_its_first_line_and_to_its_end(tmp_path):
    code = (
        "import sys, time; time.sleep(0.2); file = open(sys.argv[1] + '/metrics.jsonl', 'w')\n"
        'line = \'{"step": 1, "tokens": 5, "loss": {"acme": 2.0}}\'\n'
        "print(line, file=file, flush=True); time.sleep(0.2); print(line, file=file)"
    )
    run = real_commands.measured([sys.executable, "-c", code, str(tmp_path)], tmp_path, os.environ)
    assert 0.2 <= run["first_step_seconds"] < run["seconds"]
    assert run["tokens"] == 10 and run["first_loss"] == {"acme": 2.0} and run["peak_bytes"] > 2**22
    with pytest.raises(SystemExit, match="ended with 3"):
        real_commands.measured([sys.executable, "-c", "raise SystemExit(3)"], tmp_path, os.environ)


def test_ratios_are_taken_within_whole_rounds_and_other_rows_are_seen():
    def run(system, number, tenant, seconds, loss=2.0):
        lost = {name: loss for name in (["a", "b"] if not tenant else [tenant])}
        own = {"case": "eight", "steps": 24, "round": number, "system": system, "tenant": tenant, "seconds": seconds}
        rest = dict.fromkeys(("first_step_seconds", "cpu_seconds", "peak_bytes", "cached_files"), 1.0)
        return {**own, **rest, "tokens": 50 * len(lost), "first_loss": lost, "last_loss": lost}

    # peft's second round was cut off.
    runs = [run("cold", 0, "", 4.0), run("r8", 0, "a", 1.0), run("r8", 0, "b", 2.0), run("cold", 1, "", 8.0)]
    runs.append(run("r8", 1, "a", 9.0))
    file = {"rows": 10, "our_rows": 10}
    jobs = real.Jobs(argparse.Namespace(rows=8, dtype="float32"), Path(), {}, {"a": file, "b": file})
    [result] = real.summary(jobs, runs)
    assert result["systems"]["r8"]["over_cold"]["rounds"] == [0.75]
    assert result["systems"]["cold"]["seconds"]["max"] == 8
    assert result["unequal"] == []
    [result] = real.summary(jobs, [runs[0], runs[1], run("r8", 0, "b", 2.0, loss=2.1)])
    assert result["unequal"] == ["b began at 2.0000 in cold, at 2.1000 in r8"]


@pytest.mark.slow
def test_a_small_run_goes_on_where_it_was_cut_off(tmp_path):
    file = tmp_path / "small.json"
    command = [sys.executable, str(common.HERE / "real.py"), "--most", "40", "--longest", "300", "--json", str(file)]

    def run(*more):
        small = ("--rows", "2", "--steps", "2", "--rounds", "1", "--systems", "cold", "r8")
        done = subprocess.run([*command, *small, *more], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout, json.loads(file.read_text())

    run("--cases", "one")
    output, report = run("--cases", "one", "chat")
    assert "one  2 steps  cold" not in output and "chat  2 steps  r8" in output
    assert [result["case"] for result in report["results"]] == ["one", "chat"]
    assert all(result["unequal"] == [] for result in report["results"]) and len(report["goals"]) == 2
    refused = subprocess.run([*command, "--rows", "4"], capture_output=True, text=True)
    assert refused.returncode and "choose another --json" in refused.stderr
