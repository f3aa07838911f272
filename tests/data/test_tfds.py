"""TFDS's own builders, run without TensorFlow on small downloads in the form of the originals."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from para_jax.data.sources import read_rows
from para_jax.data.templates import Template, shipped
from para_jax.data.tfds import builder_of
from para_jax.errors import ParaJaxError
from tests.data.tfds_downloads import BOOLQ, DOWNLOADS, place_downloads

tfds = pytest.importorskip("tensorflow_datasets")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of TFDS with downloads and nothing prepared."""
    import tensorflow_datasets.text  # noqa: F401

    tfds.disable_progress_bar()
    folder = tmp_path_factory.mktemp("tfds")
    place_downloads(folder)
    return folder


def rows(source: str, data_dir: Path, template: str | None = None) -> list[dict]:
    return [row for _, row in read_rows(source, template, data_dir)]


def mistake(source: str, data_dir: Path, template: str | None = None) -> str:
    with pytest.raises(ParaJaxError) as error:
        read_rows(source, template, data_dir)
    return str(error.value)


def test_boolq(data_dir: Path) -> None:
    found = rows("tfds:super_glue/boolq", data_dir)
    assert len(found) == len(BOOLQ), "array_record keeps every row"
    wanted = {
        f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:": "yes" if row["label"] else "no" for row in BOOLQ
    }
    assert {row["prompt"]: row["response"] for row in found} == wanted
    assert all(row["choices"] == ["no", "yes"] for row in found)


def test_copa(data_dir: Path) -> None:
    found = {row["response"]: row for row in rows("tfds:super_glue/copa", data_dir)}
    assert found.keys() == {"It was warm.", "We got wet."}
    assert found["It was warm."] == {
        "prompt": "Premise: The ice melted.\nChoice 1: It was warm.\nChoice 2: It was dark.\n"
        "Question: What was the cause?\nAnswer:",
        "response": "It was warm.",
        "choices": ["It was warm.", "It was dark."],
    }


def test_squad(data_dir: Path) -> None:
    asked = "The cat slept.\nQuestion: Who slept?\nAnswer:"
    answered = {"prompt": asked, "response": "The cat", "references": ["The cat", "cat"]}
    assert rows("tfds:squad:validation", data_dir) == [answered]
    second = sorted(rows("tfds:squad/v2.0", data_dir), key=lambda row: len(row["response"]))
    assert second[0] == answered and second[1]["response"] == "unanswerable" and "references" not in second[1]


def test_sst2_gsm8k_and_trec(data_dir: Path) -> None:
    found = {row["prompt"]: row["response"] for row in rows("tfds:glue/sst2", data_dir)}
    assert found == {
        "Sentence: a fine film\nSentiment:": "positive",
        "Sentence: a dull film\nSentiment:": "negative",
    }
    assert rows("tfds:gsm8k:test", data_dir) == [
        {"prompt": "Question: What is 2 + 2?\nAnswer:", "response": "2 + 2 = <<2+2=4>>4\n#### 4"}
    ]
    [located] = rows("tfds:trec:test", data_dir)
    assert located["prompt"] == "Question: Where is the cat ?\nAnswer type:" and located["response"] == "location"


def test_splits_are_sliced_and_added_and_rows_have_places(data_dir: Path) -> None:
    whole, most = (rows(f"tfds:super_glue/boolq:{split}", data_dir) for split in ("train", "train[:80%]"))
    placed = read_rows("tfds:super_glue/boolq:train[80%:]+validation", None, data_dir)
    assert most == whole[:8] and [row for _, row in placed][:2] == whole[8:] and len(placed) == 4
    assert [place for place, _ in placed][1] == "tfds:super_glue/boolq:train[80%:]+validation row 1"


def test_own_template(data_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "short.json"
    file.write_text(json.dumps({"prompt": "{{question}}?", "response": "{{['No.', 'Yes.'][label]}}"}))
    found = rows("tfds:super_glue/boolq", data_dir, str(file))
    assert {"prompt": "is 2 an even number?", "response": "Yes."} in found
    file.write_text(json.dumps({"prompt": "{{qestion}}?", "response": "{{label}}"}))
    error = mistake("tfds:super_glue/boolq", data_dir, str(file))
    assert "unknown column" in error and "'qestion'; did you mean 'question'?" in error and "passage" in error


def test_mistakes(data_dir: Path, tmp_path: Path) -> None:
    assert "unknown TFDS data set 'squd'; did you mean 'squad'?" in mistake("tfds:squd", data_dir)
    assert "unknown TFDS data set ''" in mistake("tfds:", data_dir)
    assert "unknown config of glue 'sst3'; did you mean 'sst2'?" in mistake("tfds:glue/sst3", data_dir)
    assert "glue has several configs; write tfds:glue/CONFIG: cola, sst2" in mistake("tfds:glue", data_dir)
    error = mistake("tfds:glue/sst2:validaton", data_dir)
    assert "unknown split of tfds:glue/sst2 'validaton'; did you mean 'validation'? Known: test, train" in error
    assert "has no such rows" in mistake("tfds:glue/sst2:train[:900%]", data_dir)
    assert "has no such rows" in mistake("tfds:glue/sst2:train[:5", data_dir)
    error = mistake("tfds:glue/sst2:test", data_dir)
    assert "no usable rows: no row has a label in label; its splits: train, validation, test" in error
    error = mistake("tfds:glue/sst2", data_dir, "glue/cola2")
    assert "unknown template (a name without .json) 'glue/cola2'; did you mean 'glue/cola'?" in error


def test_a_data_set_without_template_names_its_columns(data_dir: Path) -> None:
    """Prepared in a folder under a name that TFDS has no code for."""
    read_rows("tfds:gsm8k", None, data_dir)
    shutil.copytree(data_dir / "gsm8k", data_dir / "my_sums")
    for file in (data_dir / "my_sums" / "1.0.0").iterdir():
        text = file.read_bytes().replace(b'"gsm8k"', b'"my_sums"') if file.suffix == ".json" else file.read_bytes()
        file.with_name(file.name.replace("gsm8k", "my_sums")).write_bytes(text)
    error = mistake("tfds:my_sums", data_dir)
    assert "has the columns annotation, answer, question, short_answer, and needs a template" in error
    assert len(rows("tfds:my_sums", data_dir, "gsm8k")) == 1


def test_other_file_formats_are_refused(data_dir: Path, tmp_path: Path) -> None:
    read_rows("tfds:trec", None, data_dir)
    shutil.copytree(data_dir / "trec", tmp_path / "trec")
    info = tmp_path / "trec" / "1.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    for file in info.parent.glob("*.array_record*"):
        file.rename(file.with_name(file.name.replace("array_record", "tfrecord")))
    assert "was prepared as tfrecord, but only array_record is read" in mistake("tfds:trec", tmp_path)


@pytest.mark.slow
def test_without_a_network_the_error_says_what_to_do(tmp_path: Path) -> None:
    """In a process whose way to the network is closed; one with no such data set prepared."""
    code = (
        "import sys\nfrom tensorflow_datasets.core.download import downloader\ndownloader.MAX_RETRIES = 0\n"
        "from para_jax.cli import main\nsys.exit(main(sys.argv[1:]))"
    )
    closed = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")}
    command = ["finetune", "--tenant", "sums=tfds:gsm8k", "--out", tmp_path / "out", "--data-dir", tmp_path / "data"]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, command)], capture_output=True, text=True, env=os.environ | closed
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    folder = tmp_path / "data" / "gsm8k" / "1.0.0"
    assert f"tfds:gsm8k is not in {tmp_path / 'data'}" in done.stderr and f"copy {folder} from there" in done.stderr


@pytest.mark.slow
def test_where_protobuf_is_too_old(tmp_path: Path) -> None:
    """As on Colab's CPU and GPU images of 2026-08. One line says so, and what helps."""
    code = (
        "import sys\nfrom google.protobuf import runtime_version\nruntime_version.MAJOR = 5\n"
        "from para_jax.cli import main\nsys.exit(main(sys.argv[1:]))"
    )
    command = ["finetune", "--tenant", "sums=tfds:gsm8k", "--out", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "which does not load: Detected incompatible Protobuf Gencode/Runtime versions" in done.stderr
    assert "pip install 'tensorflow-metadata<1.18'" in done.stderr


def test_no_tensorflow_was_needed() -> None:
    assert "tensorflow" not in sys.modules


# Templates


@pytest.mark.parametrize("name", list(shipped()))
def test_shipped_template(name: str, tmp_path: Path) -> None:
    """On a row of the builder's own features: all its columns exist, and every class has a choice of its own."""
    features = builder_of(name, tmp_path).info.features
    template = Template.load(name)
    template.check(features)
    labels = {key: f for key, f in features.items() if isinstance(f, tfds.features.ClassLabel) and "fine" not in key}
    [(label, classes)] = labels.items() if labels else [(None, 1)]
    count = classes.num_classes if label else 1
    made = []
    for i in range(count):
        row = {key: i if key == label else example_value(feature, key) for key, feature in features.items()}
        made.append(template.row(row))
    assert all(row["prompt"].strip() and row["prompt"][-1] == ":" and row["response"].strip() for row in made)
    if label:
        assert len({row["response"] for row in made}) == count == len(made[0]["choices"])
    for row in made:
        assert row["response"] in row.get("choices", [row["response"]])
        assert not {"{", "}"} & set(row["prompt"] + row["response"])


def example_value(feature: object, name: str) -> object:
    """A value of a feature that says its name, in the types that rows have when they are read."""
    if isinstance(feature, tfds.features.Sequence):
        inner = feature.feature
        if isinstance(inner, tfds.features.FeaturesDict):
            return {key: [example_value(f, f"{name}.{key}")] for key, f in inner.items()}
        return [example_value(inner, name)]
    if isinstance(feature, tfds.features.FeaturesDict):
        return {key: example_value(f, f"{name}.{key}") for key, f in feature.items()}
    dtype = np.dtype(feature.np_dtype)
    return f"the {name}" if dtype.kind in "OSU" else dtype.type(1).item()


def test_downloads_are_of_builders_that_have_templates() -> None:
    assert {name.partition("/")[0] for name in shipped()} >= DOWNLOADS.keys()
