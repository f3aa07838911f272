"""Sources of rows and the templates that make prompts of them; TFDS has a file of its own."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

from para_jax.cli import main
from para_jax.data.examples import Examples, read_examples
from para_jax.data.order import Mixture, read_mixture
from para_jax.data.sources import mixture, read_rows
from para_jax.data.templates import Template
from para_jax.errors import ParaJaxError
from para_jax.training.folder import fingerprint

EOS = (0,)
ASKED = {"prompt": "Q: {{q}}\nA:", "response": "{{a}}"}


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def mistake(source: object, template: str | None = None) -> str:
    with pytest.raises(ParaJaxError) as error:
        read_rows(source, template)
    return str(error.value)


# Templates


def test_jsonl_of_other_columns_through_a_template(tmp_path: Path) -> None:
    rows = write(tmp_path / "faq.jsonl", {"q": "Who sat?", "a": "The cat."}, {"q": "Who ran?", "a": "The dog."})
    template = str(write(tmp_path / "ask.json", ASKED))
    assert read_rows(rows, template)[1] == (f"{rows}:2", {"prompt": "Q: Who ran?\nA:", "response": "The dog."})


def test_choices_and_references_are_lists_or_expressions() -> None:
    fields = {"prompt": "{{q}}", "response": "{{choices[best]}}", "choices": "options", "references": ["{{a}}", "b"]}
    row = Template(fields).row({"q": "Which?", "options": ["x", 2], "best": 1, "a": "A"})
    assert row == {"prompt": "Which?", "response": "2", "choices": ["x", "2"], "references": ["A", "b"]}
    named = Template({"prompt": "{{row['a-b']}}", "response": "{{row['a-b'] | upper}}"})
    assert named.row({"a-b": "yes"}) == {"prompt": "yes", "response": "YES"}
    # A data set may have a column of that name; the template's choices are made of it.
    own = Template({"prompt": "{{q}}", "response": "{{choices[0]}}", "choices": "choices.text"})
    assert own.row({"q": "?", "choices": {"text": ["first"]}})["response"] == "first"


def test_mistakes_in_templates(tmp_path: Path) -> None:
    rows = write(tmp_path / "faq.jsonl", {"q": "Who sat?", "a": "The cat."}, {"q": "Who ran?"})

    def wrong(fields: object) -> str:
        return mistake(rows, str(write(tmp_path / "t.json", fields)))

    assert "unknown field of" in wrong({"promt": "{{q}}", "response": ""}) and "'prompt'" in wrong({"promt": "{{q}}"})
    assert "has no response; write a template such as" in wrong({"prompt": "{{q}}"})
    assert "is not a template" in wrong(["{{q}}"])
    assert "prompt must be a text" in wrong({"prompt": ["{{q}}"], "response": "x"})
    assert "choices must be a text or a list of them" in wrong({**ASKED, "choices": [1]})
    assert "is not jinja2" in wrong({"prompt": "{{q", "response": "x"})
    assert "unknown column in" in wrong({**ASKED, "references": "answers"})
    # The second row has no answer.
    assert f"{rows}:2: " in wrong(ASKED) and "'a' is undefined (columns: q)" in wrong(ASKED)
    assert "list object has no element 5" in wrong({**ASKED, "response": "{{['x'][5]}}"})
    assert "unsafe" in wrong({**ASKED, "response": "{{q.__class__.__mro__}}"})
    (tmp_path / "t.json").write_text("{")
    assert "t.json is not JSON" in mistake(rows, str(tmp_path / "t.json"))
    assert "is not a file; write a template to it" in mistake(rows, str(tmp_path / "none.json"))
    assert "did you mean 'squad'?" in mistake(rows, "squadd")


def test_the_page_has_the_templates_that_ship() -> None:
    docs = Path(__file__).parents[2] / "docs"
    table = "\n".join(runpy.run_path(str(docs / "templates_table.py"))["lines"]())
    assert table in (docs / "data.md").read_text(), "run python docs/templates_table.py and put it into the page"


# Folders of Hugging Face's datasets


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one of each form."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    folder = tmp_path_factory.mktemp("hf")
    kinds = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["negative", "positive"])}
    )
    reviews = {"sentence": ["fine ", "dull ", "who knows "], "label": [1, 0, -1]}
    train = datasets.Dataset.from_dict(reviews, features=kinds)
    hidden = datasets.Dataset.from_dict({"sentence": ["new"], "label": [-1]}, features=kinds)
    datasets.DatasetDict(train=train, test=hidden).save_to_disk(folder / "splits")
    train.select(range(2)).save_to_disk(folder / "one")
    (folder / "files").mkdir()
    ready = [{"id": i, "prompt": f"{i} + 1 =", "response": str(i + 1)} for i in range(10)]
    write(folder / "files" / "train.jsonl", *ready)
    write(folder / "files" / "test.jsonl", *ready[:3])
    (folder / "parquet").mkdir()
    datasets.Dataset.from_list([{"question": "Who?", "answer": "I"}]).to_parquet(folder / "parquet" / "rows.parquet")
    return folder


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where datasets keeps what it made of files, rather than in the home of whoever runs the tests."""
    if "datasets" in sys.modules:
        cache = str(tmp_path_factory.getbasetemp() / "datasets")
        monkeypatch.setattr(sys.modules["datasets"].config, "HF_DATASETS_CACHE", cache)


def test_folders_of_save_to_disk(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = read_rows(f"hf:{saved / 'splits'}:train", "glue/sst2")
    place, row = rows[1]
    assert place == f"hf:{saved / 'splits'}:train row 1" and len(rows) == 2
    assert row["prompt"] == "Sentence: dull\nSentiment:" and row["response"] == "negative"
    assert "1 of 3 rows have no label and are left out" in caplog.text
    assert [row["response"] for _, row in read_rows(f"hf:{saved / 'one'}", "glue/sst2")] == ["positive", "negative"]
    assert "no row has a label in label; its splits: train, test" in mistake(f"hf:{saved / 'splits'}:test", "glue/sst2")


def test_folders_of_files(saved: Path) -> None:
    rows = read_rows(f"hf:{saved / 'files'}")
    assert len(rows) == 10 and rows[4][1] == {"prompt": "4 + 1 =", "response": "5"}, "columns that are ready are taken"
    most = read_rows(f"hf:{saved / 'files'}:train[80%:]+test")
    assert [row["response"] for _, row in most] == ["9", "10", "1", "2", "3"]
    [(place, row)] = read_rows(f"hf:{saved / 'parquet'}", "gsm8k")
    assert row == {"prompt": "Question: Who?\nAnswer:", "response": "I"} and place.endswith("parquet:train row 0")


def test_mistakes_in_folders(saved: Path, tmp_path: Path) -> None:
    assert "'trian'; did you mean 'train'? Known: test, train" in mistake(f"hf:{saved / 'files'}:trian")
    assert "has no such rows" in mistake(f"hf:{saved / 'files'}:train[:5")
    assert "has no usable rows: there are no rows" in mistake(f"hf:{saved / 'files'}:train[5:5]")
    assert "is neither a folder nor a data set on the hub" in mistake(f"hf:{tmp_path / 'none'}")
    assert f"{tmp_path} cannot be read by datasets" in mistake(f"hf:{tmp_path}")
    error = mistake(f"hf:{saved / 'parquet'}")
    assert "has the columns answer, question, and needs a template" in error and '{"prompt": "Question:' in error


def test_without_the_library_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    assert "pip install datasets" in mistake(f"hf:{tmp_path}")
    assert "pip install 'para-jax[data]'" in mistake("tfds:squad")


# Mixtures, and the command line


def test_mixtures_are_read_source_by_source(tiny, tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", *[{"prompt": f"p{i}", "response": "yes"} for i in range(3)])
    second = write(tmp_path / "b+1.jsonl", {"prompt": "q", "response": "no"})
    options = {"tokenizer": tiny[1], "eos_token_ids": EOS}
    mixed = read_mixture(f"2*{first}+1*{second}", **options)
    assert isinstance(mixed, Mixture) and mixed.weights == (2.0, 1.0)
    assert [tiny[1].decode(e.prompt_ids) for e in mixed] == ["p0", "p1", "p2", "q"] and mixed[3].place == f"{second}:1"
    alone, there = read_mixture(str(second), **options), read_examples(second, tiny[1], EOS)
    assert isinstance(alone, Examples) and fingerprint(alone) == fingerprint(there)
    assert mixed.lengths.tolist() == [e.ids.size for e in mixed]
    assert mixed.target_counts.tolist() == [e.response_ids.size for e in mixed]
    assert [mixed[i].place for i in (-1, 0)] == [e.place for e in mixed[::-1]][::3]
    assert fingerprint(mixed) != fingerprint(list(mixed)), "its order depends on its sources"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0*a.jsonl+1*b.jsonl", "must be a weight above 0"),
        ("1*", "must be a weight above 0 and a source"),
        ("a.jsonl+0.5*b.jsonl", "the first source of 'a.jsonl+0.5*b.jsonl' has no weight"),
        ("1.2.3*a.jsonl", "'1.2.3' in '1.2.3*a.jsonl' is not a number"),
    ],
)
def test_mistakes_in_mixtures(text: str, message: str) -> None:
    with pytest.raises(ParaJaxError) as error:
        mixture(text)
    assert message in str(error.value)


@pytest.mark.slow
def test_finetune_and_evaluate_read_other_sources(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    tenants = ["--tenant", f"sums=hf:{saved / 'files'}", "--tenant", f"mood=hf:{saved / 'one'}"]
    templates = ["--template", "mood=glue/sst2"]
    assert main(["finetune", *tenants, *templates, "--rows", "8", "--steps", "1", "--out", str(out)]) == 0
    scores = tmp_path / "scores.json"
    evaluate = ["evaluate", "--adapters", str(out), *tenants, *templates, "--json", str(scores), "--limit", "2"]
    assert main([*evaluate, "--max-new-tokens", "1"]) == 0
    assert "choice_accuracy" in json.loads(scores.read_text())["tenants"]["mood"]
    capsys.readouterr()
    assert main(["finetune", *tenants, "--out", str(tmp_path / "new")]) == 1
    assert "and needs a template that makes prompts from them" in capsys.readouterr().err
    assert main(["finetune", *tenants, "--template", "moo=glue/sst2", "--out", str(tmp_path / "new")]) == 1
    assert "unknown tenant in --template 'moo'; did you mean 'mood'?" in capsys.readouterr().err
