"""Sources of one tenant and of several, as finetune and evaluate take them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from para_jax.cli import main
from para_jax.evaluation import evaluate
from para_jax.training import finetune
from para_jax.training.tuning import Tuning


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def row(tenant: str | None, prompt: str = "Who sat?") -> dict[str, Any]:
    return {"tenant": tenant, "prompt": prompt, "response": "The cat."}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The rows that `finetune` and `evaluate` are given; neither runs."""
    found: dict[str, Any] = {}

    def tuned(_loading: Any, _bank: Any, tuning: Tuning) -> None:
        train = {name: [e.place for e in rows] for name, rows in tuning.examples.items()}
        found.update(train=train, dev={name: len(rows) for name, rows in tuning.dev.items()})

    def scored(_backbone: Any, _tokenizer: Any, examples: Any, *_: Any, **__: Any) -> dict[str, Any]:
        found.update(test={name: len(x) for name, x in examples.items()})
        return {name: {"rows": len(x), "predictions": []} for name, x in examples.items()}

    monkeypatch.setattr(finetune, "train", tuned)
    monkeypatch.setattr(evaluate, "evaluate", scored)
    return found


def test_a_source_of_several_tenants_gives_each_its_own(tmp_path: Path, seen: dict[str, Any]) -> None:
    both = write(tmp_path / "both.jsonl", row("acme"), row("globex"), row("acme"))
    one, dev = write(tmp_path / "one.jsonl", row(None)), write(tmp_path / "dev.jsonl", row("globex"), row("initech"))
    given = ["--tenant-from", both, "--tenant", f"initech={one}"]
    assert main(["finetune", *given, "--dev-from", dev, "--out", str(tmp_path / "out")]) == 0
    assert seen["train"] == {"initech": [f"{one}:1"], "acme": [f"{both}:1", f"{both}:3"], "globex": [f"{both}:2"]}
    assert seen["dev"] == {"globex": 1, "initech": 1}
    assert main(["evaluate", *given]) == 0
    assert seen["test"] == {"initech": 1, "acme": 2, "globex": 1}


def test_a_template_may_say_whose_row_it_is(tmp_path: Path, seen: dict[str, Any]) -> None:
    rows = write(tmp_path / "rows.jsonl", {"who": "acme", "q": "Who sat?"}, {"who": "globex", "q": "Who ran?"})
    fields = {"prompt": "{{q}}", "response": "A cat.", "tenant": "{{who}}"}
    template = write(tmp_path / "template.json", fields)
    arguments = ["--tenant-from", rows, "--template", template, "--out", str(tmp_path / "out")]
    assert main(["finetune", *arguments]) == 0
    assert seen["train"] == {"acme": [f"{rows}:1"], "globex": [f"{rows}:2"]}


MISTAKES = {
    "another tenant's row": (
        ["--tenant", "acme={both}"],
        "{both}:2: the row names tenant 'globex', and its source belongs to 'acme'; --tenant-from reads "
        "a source with several tenants",
    ),
    "two sources": (
        ["--tenant", "acme={one}", "--tenant-from", "{both}"],
        "{both}:1: tenant 'acme' has another source already; give it one source",
    ),
    "a row of nobody": (["--tenant-from", "{one}"], '{one}:1: no tenant\'s name under "tenant"'),
    "a template of its own for rows that are read already": (
        ["--tenant-from", "{one_of_acme}", "--template", "acme={one}"],
        "--template acme=... has no effect: the rows of 'acme' come from a source of several tenants; "
        "give --template FILE.json for that source",
    ),
    "no source": ([], "give each tenant's rows: --tenant NAME=SOURCE, or --tenant-from SOURCE for several"),
}


@pytest.mark.parametrize("verb", ["finetune", "evaluate"])
@pytest.mark.parametrize(("arguments", "says"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str, arguments: list[str], says: str
) -> None:
    both = write(tmp_path / "both.jsonl", row("acme"), row("globex"))
    files = {"both": both, "one": write(tmp_path / "one.jsonl", row(None))}
    files["one_of_acme"] = write(tmp_path / "acme.jsonl", row("acme"))
    out = ["--out", str(tmp_path / "out")] if verb == "finetune" else []
    assert main([verb, *(x.format(**files) for x in arguments), *out]) == 1
    assert capsys.readouterr().err.strip().splitlines()[-1] == f"para-jax {verb}: {says.format(**files)}"


def test_rows_beyond_the_context(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write(tmp_path / "rows.jsonl", row(None))
    assert main(["finetune", "--tenant", f"a={rows}", "--max-length", "9999", "--out", str(tmp_path / "out")]) == 1
    assert "--max-length must be at most 512, the backbone's context, not 9999" in capsys.readouterr().err


def test_a_chat_template_that_is_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, template = write(tmp_path / "rows.jsonl", row(None)), tmp_path / "own.jinja"
    template.write_bytes("é".encode("latin-1"))
    given = ["--tenant", f"a={rows}", "--chat-template", str(template), "--out", str(tmp_path / "out")]
    assert main(["finetune", *given]) == 1
    assert f"--chat-template: {template} is not UTF-8: 'utf-8' codec can't decode" in capsys.readouterr().err
