"""Options out of their range, of no effect, or in no text: one line that names the option, before anything is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from para_jax.cli import main, parser

INT = "2147483647"
LINE = {"prompt": "The house is", "response": "old"}

# A verb with the options that it needs; names of files that exist are filled in.
NEEDED = {
    "finetune": ["--tenant", "a={rows}", "--tenant", "b={rows}", "--out", "{new}"],
    "evaluate": ["--tenant", "a={rows}"],
    "generate": ["--prompt", "x"],
    "methods": [],
    "plan": ["--topology", "gpu:h100x1"],
    "convert": ["--out", "{new}"],
    "fanlora": ["--adapter", "{folder}", "--data", "{rows}", "--keep", "1", "--out", "{new}"],
    "quickstart": ["--out", "{new}"],
}
OUT_OF_RANGE = [
    ("finetune", "--seed", "-1", "a whole number from 0 to 4294967295"),
    ("finetune", "--seed", "99999999999", "a whole number from 0 to 4294967295"),
    ("finetune", "--seed", "1.5", "a whole number from 0 to 4294967295"),
    ("finetune", "--epochs", "inf", "a finite number above 0"),
    ("finetune", "--epochs", "a=nan", "a finite number above 0"),
    ("finetune", "--epochs", "0", "a finite number above 0"),
    ("finetune", "--lr", "inf", "a finite number above 0"),
    ("finetune", "--lr", "b=nan", "a finite number above 0"),
    ("finetune", "--lr", "0", "a finite number above 0"),
    ("finetune", "--lr", "1e39", "a finite number above 0"),
    ("finetune", "--lr", "1e-60", "a finite number above 0"),
    ("finetune", "--lr", "quick", "a finite number above 0"),
    ("finetune", "--steps", "0", f"a whole number from 1 to {INT}"),
    ("finetune", "--steps", "many", f"a whole number from 1 to {INT}"),
    ("finetune", "--steps", "a=10000000000", f"a whole number from 1 to {INT}"),
    ("finetune", "--warmup-ratio", "1.5", "a number from 0 to 1"),
    ("finetune", "--warmup-ratio", "nan", "a number from 0 to 1"),
    ("finetune", "--weight-decay", "-0.1", "a finite number from 0"),
    ("finetune", "--weight-decay", "inf", "a finite number from 0"),
    ("finetune", "--max-grad-norm", "0", "a finite number above 0"),
    ("finetune", "--weight", "a=-1", "a finite number above 0"),
    ("finetune", "--eval-every", "-5", f"a whole number from 0 to {INT}"),
    ("finetune", "--patience", "1.5", f"a whole number from 0 to {INT}"),
    ("finetune", "--rows", "0", "a whole number from 1 to 1048576"),
    ("finetune", "--rows", "True", "a whole number from 1 to 1048576"),
    ("finetune", "--micro-batch-tokens", "0", f"a whole number from 1 to {INT}"),
    ("finetune", "--tenants-per-step", "0", f"a whole number from 1 to {INT}"),
    ("finetune", "--max-length", "1", f"a whole number from 2 to {INT}"),
    ("finetune", "--checkpoint-every", "0", f"a whole number from 1 to {INT}"),
    ("finetune", "--keep-checkpoints", "1", f"a whole number from 2 to {INT}"),
    ("finetune", "--profile", "-1", f"a whole number from 1 to {INT}"),
    ("finetune", "--r", "0", f"a whole number from 1 to {INT}"),
    ("finetune", "--processes", "0", f"a whole number from 1 to {INT}"),
    ("finetune", "--process", "-1", f"a whole number from 0 to {INT}"),
    ("evaluate", "--limit", "-1", f"a whole number from 1 to {INT}"),
    ("evaluate", "--limit", "0", f"a whole number from 1 to {INT}"),
    ("evaluate", "--batch-size", "2.0", f"a whole number from 1 to {INT}"),
    ("evaluate", "--max-new-tokens", "a=0", f"a whole number from 1 to {INT}"),
    ("generate", "--max-new-tokens", "0", f"a whole number from 1 to {INT}"),
    ("generate", "--max-new-tokens", "-1", f"a whole number from 1 to {INT}"),
    ("generate", "--max-new-tokens", "1.5", f"a whole number from 1 to {INT}"),
    ("generate", "--temperature", "nan", "a finite number from 0"),
    ("generate", "--temperature", "-1", "a finite number from 0"),
    ("generate", "--top-k", "-1", f"a whole number from 0 to {INT}"),
    ("generate", "--top-p", "1.5", "a number from 0 to 1"),
    ("generate", "--min-p", "nan", "a number from 0 to 1"),
    ("generate", "--repetition-penalty", "0", "a finite number above 0"),
    ("generate", "--num-beams", "2.5", f"a whole number from 1 to {INT}"),
    ("generate", "--seed", "-1", "a whole number from 0 to 4294967295"),
    ("generate", "--batch-size", "0", f"a whole number from 1 to {INT}"),
    ("methods", "--rows", "0", f"a whole number from 1 to {INT}"),
    ("plan", "--length", "0", f"a whole number from 1 to {INT}"),
    ("plan", "--tenants", "0", f"a whole number from 1 to {INT}"),
    ("plan", "--rows", "-4", f"a whole number from 1 to {INT}"),
    ("fanlora", "--budget", "0", f"a whole number from 1 to {INT}"),
    ("fanlora", "--variants", "0", f"a whole number from 1 to {INT}"),
    ("fanlora", "--lora-alpha", "inf", "a finite number above 0"),
    ("fanlora", "--seed", "-1", "a whole number from 0 to 4294967295"),
    ("quickstart", "--steps", "0", f"a whole number from 1 to {INT}"),
    ("quickstart", "--lr", "nan", "a finite number above 0"),
    ("quickstart", "--seed", "4294967296", "a whole number from 0 to 4294967295"),
]
NO_EFFECT = [
    ("finetune", "--weight 2", "--weight has no effect without --tenants-per-step below 2: every tenant is in every"),
    ("finetune", "--weight a=2 --tenants-per-step 2", "--weight has no effect without --tenants-per-step below 2"),
    ("finetune", "--eval-every 5", "--eval-every has no effect without --dev NAME=SOURCE"),
    ("finetune", "--dev a={rows} --eval-every b=5", "--eval-every has no effect on b, which has no --dev rows"),
    ("finetune", "--dev a={rows} --eval-every 1 --patience b=5", "--patience has no effect on b, which has no --dev"),
    ("finetune", "--data-dir {folder}", "--data-dir has no effect without a source tfds:NAME"),
    ("evaluate", "--data-dir {folder}", "--data-dir has no effect without a source tfds:NAME"),
    ("evaluate", "--overwrite", "--overwrite has no effect without --json or --predictions"),
    ("methods", "--overwrite", "--overwrite has no effect without --json"),
    ("plan", "--overwrite", "--overwrite has no effect without --json"),
    ("generate", "--adapters {folder}", "--adapters has no effect without --tenant NAME, which says whose adapter"),
    (
        "generate",
        "--adapters {folder}/no --tenant a",
        "--adapters {folder}/no is not a folder; give the --out folder of",
    ),
    ("generate", "--output {new}", "--output has no effect with --prompt, whose one answer is printed; give"),
    ("generate", "--overwrite", "--overwrite has no effect with --prompt"),
    ("generate", "--resume", "--resume has no effect with --prompt"),
    ("generate", "--batch-size 4", "--batch-size has no effect with --prompt"),
    ("generate", "--top-p 0.9", "--top-p has no effect without sampling; give --temperature above 0"),
    ("generate", "--top-k 5", "--top-k has no effect without sampling"),
    ("generate", "--min-p 0.1", "--min-p has no effect without sampling"),
    ("generate", "--seed 3", "--seed has no effect without sampling"),
    ("generate", "--num-beams 2 --temperature 1", "--num-beams is a beam search, and --temperature"),
    ("fanlora", "--score random", "--data has no effect with --score random, which is computed without rows"),
    ("fanlora", "--score gradient --variants 4", "--variants has no effect with --score gradient; it is for"),
    ("fanlora", "--data-dir {folder}", "--data-dir has no effect without a source tfds:NAME"),
    ("finetune", "--process 1", "--processes and --process go with --coordinator HOST:PORT"),
    ("finetune", "--coordinator here --processes 2 --process 0", "--coordinator must be HOST:PORT or auto, not 'here'"),
    ("finetune", "--coordinator a:1 --processes 2 --process 2", "--process must be from 0 to 1 of 2 processes, not 2"),
]
ALONE = [
    (["convert", "--check", "--dtype", "bfloat16"], "--dtype has no effect without --out DIR: nothing is written"),
    (["convert", "--check", "--shard-size", "1GB"], "--shard-size has no effect without --out DIR"),
    (["convert", "--check", "--overwrite"], "--overwrite has no effect without --out DIR"),
    (["generate", "--input", "{rows}", "--output", "{new}", "--adapters", "{folder}"],
     '--adapters has no effect: no row has a "tenant"; name one in each row, or null for none'),
    (["generate", "--prompt", "x", "--tempt", "1"], "unknown option '--tempt'; did you mean '--temperature'? Known: "),
    (["generate", "--prompt", "hello", "world"], "'world' belongs to no option; put a text with spaces in quotes"),
    (["generate", "--prompt", "-x"], "--prompt: expected one argument; write a value that starts with - as --prom"),
    (["generate", "--prompt", ""], "--prompt is empty; give it a value, or leave it out"),
    (["generate", "--prompt", "x", "--stop", ""], "--stop is empty; give it a value, or leave it out"),
    (["methods", "--json", ""], "--json is empty; give it a value, or leave it out"),
    (["generate", "--prompt", "caf\udce9"], "--prompt is not UTF-8: it has the byte 0xe9 as character 4"),
    (["generate", "--prompt", "\ud83d"], "--prompt is not UTF-8: it has the lone surrogate U+D83D as character 1"),
    (["generate", "--prompt", "x", "--stop", "a\udcff"], "--stop is not UTF-8: it has the byte 0xff as character 2"),
    (["generate", "--prompt", "x", "--tenant", "\udcff", "--adapters", "{folder}"], "--tenant is not UTF-8"),
    (["finetune", "--tenant", "\udcff={rows}", "--out", "{new}"], "--tenant is not UTF-8: it has the byte 0xff as"),
    (["finetune", "--tenant", "a={rows}", "--out", "{new}\udcff"], "--out is not UTF-8: it has the byte 0xff as"),
    (["methods", "--json", "{new}\udcff"], "--json is not UTF-8"),
    (["methods", "--json", "a\0b"], "--json has a null character, which names cannot have"),
    (["finetune", "--tenant", "a/b={rows}", "--out", "{new}"], "tenant name 'a/b' cannot be a folder's name; choose"),
    (["finetune", "--tenant", "a\nb={rows}", "--out", "{new}"], r"tenant name 'a\nb' cannot be a folder's name"),
    (["finetune", "--tenant", f"{'a' * 300}={{rows}}", "--out", "{new}"], "cannot be a folder's name; choose another"),
]  # fmt: skip
OUTPUTS = [
    (["evaluate", "--tenant", "a={rows}", "--json", "{new}", "--predictions", "{new}"],
     "--json and --predictions are both {new}; choose two files"),
    (["evaluate", "--tenant", "a={rows}", "--json", "{new}", "--predictions", "{folder}/in/../new"],
     "--json and --predictions are both {folder}/in/../new; choose two files"),
    (["evaluate", "--tenant", "a={rows}", "--json", "{rows}", "--overwrite"],
     "--json {rows} would replace --tenant {rows}; choose another file"),
    (["evaluate", "--tenant", "a={rows}", "--predictions", "{folder}"],
     "--predictions {folder} is a folder; name a file in it"),
    (["evaluate", "--tenant", "a={rows}", "--json", "{rows}/scores.json"],
     "--json {rows}/scores.json cannot be written: Not a directory"),
    (["evaluate", "--tenant", "a={rows}", "--json", "{file}"],
     "{file} exists; choose another --json or pass --overwrite"),
    (["generate", "--input", "{rows}", "--output", "{rows}", "--overwrite"],
     "--output {rows} would replace --input {rows}; choose another file"),
    (["generate", "--input", "{rows}", "--output", "{file}"],
     "{file} exists; choose another --output or pass --overwrite"),
    (["generate", "--input", "{rows}", "--output", "/dev/full", "--overwrite"],
     "--output /dev/full is not a regular file; choose another, or leave it out"),
    (["generate", "--input", "{folder}/a.partial", "--output", "{folder}/a"],
     "--input {folder}/a.partial is the file for partial answers of --output; rename it"),
    (["methods", "--json", "{file}"], "{file} exists; choose another --json or pass --overwrite"),
    (["methods", "--json", "{folder}"], "--json {folder} is a folder; name a file in it"),
    (["methods", "--json", "n" * 250], f"--json {'n' * 250} has a name of more than 240 bytes; choose a shorter one"),
    (["methods", "--json", "n" * 300], f"{'n' * 300}: File name too long"),
    (["methods", "--model", "{model}", "--json", "{model}/config.json", "--overwrite"],
     "--json {model}/config.json would replace --model {model}; choose another file"),
    (["finetune", "--tenant", "a={rows}", "--out", "{file}"], "{file} is a file; choose a folder"),
    (["finetune", "--tenant", "a={rows}", "--out", "{file}/out"], "--out {file}/out cannot be written: Not a director"),
    (["finetune", "--tenant", "a={run}/rows.jsonl", "--out", "{run}", "--overwrite"],
     "--out {run} holds --tenant {run}/rows.jsonl, which it would replace; choose another folder"),
    (["finetune", "--tenant", "a={rows}", "--out", "{run}"],
     "{run} exists; pass --resume to continue it, --overwrite to replace it, or choose another folder"),
    (["convert", "--model", "{model}", "--out", "{model}", "--overwrite"],
     "--out {model} holds --model {model}, which it would replace; choose another folder"),
    (["convert", "--out", "{file}"], "{file} exists; choose another --out or pass --overwrite"),
    (["quickstart", "--out", "{run}"], "{run} exists; pass --resume to continue it, --overwrite to replace it, or"),
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("options")
    (folder / "rows.jsonl").write_text(json.dumps(LINE) + "\n")
    (folder / "a.partial").write_text(json.dumps(LINE) + "\n")
    (folder / "file").write_text("years of work")
    (folder / "in").mkdir()
    for name, file in (("run", "run.json"), ("model", "config.json")):
        (folder / name).mkdir()
        (folder / name / file).write_text("{}")
    (folder / "run" / "rows.jsonl").write_text(json.dumps(LINE) + "\n")
    names = {"rows": "rows.jsonl", "new": "new", "file": "file", "run": "run", "model": "model"}
    return {"folder": str(folder), **{name: str(folder / of) for name, of in names.items()}}


def refused(capsys: pytest.CaptureFixture[str], place: dict[str, str], arguments: list[str]) -> str:
    """What is said, in one line, when nothing is done."""
    folder = Path(place["folder"])
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert main([text.format(**place) for text in arguments]) == 1
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and said.out == "" and "Traceback" not in said.err
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before, "nothing is left behind"
    assert said.err.startswith(f"para-jax {arguments[0]}: ")
    return said.err.removeprefix(f"para-jax {arguments[0]}: ").rstrip("\n")


@pytest.mark.parametrize(("verb", "option", "value", "wanted"), OUT_OF_RANGE)
def test_out_of_range(capsys, place, verb: str, option: str, value: str, wanted: str) -> None:
    needed = [x for x in NEEDED[verb] if not (option == "--budget" and x in ("--keep", "1"))]
    text = value.rpartition("=")[2]
    said = refused(capsys, place, [verb, *needed, option, value])
    assert said.startswith(f"{option} must be {wanted}, not {text!r}")


@pytest.mark.parametrize(("verb", "options", "wanted"), NO_EFFECT)
def test_no_effect(capsys, place, verb: str, options: str, wanted: str) -> None:
    assert refused(capsys, place, [verb, *NEEDED[verb], *options.split()]).startswith(wanted.format(**place))


@pytest.mark.parametrize(("arguments", "wanted"), [*ALONE, *OUTPUTS])
def test_refused(capsys, place, arguments: list[str], wanted: str) -> None:
    assert wanted.format(**place) in refused(capsys, place, arguments)


def test_a_folder_that_cannot_be_written(capsys, place) -> None:
    # Not even root makes files there.
    said = refused(capsys, place, ["methods", "--json", "/proc/self/a.json"])
    assert said.startswith("--json /proc/self/a.json cannot be written: ")


def test_a_negative_number_is_a_value() -> None:
    assert parser().parse(["generate", "--prompt=-x", "--top-k", "3"]).prompt == "-x"
