"""The README's first command, from the tuning to the picture."""

import json

import pytest

from para_jax.cli import main

pytestmark = pytest.mark.usefixtures("optimized")


@pytest.mark.slow
def test_quickstart(tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["quickstart", "--out", str(out)]) == 0
    report = json.loads((out / "quickstart.json").read_text())
    for tenant, scores in report["exact_match"].items():
        assert scores["after"] > 0.85 and scores["before"] < 0.1, tenant
    answers = {}
    for answer in report["answers"]:
        answers.setdefault(answer["prompt"], set()).add(answer["text"].strip())
    assert all(len(texts) == 4 for texts in answers.values()), "three tenants and the bare backbone differ"
    assert (out / "quickstart.png").read_bytes().startswith(b"\x89PNG")
    assert main(["quickstart", "--out", str(out)]) == 1
    assert "--overwrite" in capsys.readouterr().err
