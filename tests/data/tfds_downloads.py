"""Small downloads of TFDS's data sets in the form of the originals, where its download manager looks for them."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path

SUPER_GLUE = "https://dl.fbaipublicfiles.com/glue/superglue/data/v2"
GLUE = "https://dl.fbaipublicfiles.com/glue/data"
SQUAD = "https://rajpurkar.github.io/SQuAD-explorer/dataset"
GSM8K = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data"
TREC = "http://cogcomp.org/Data/QA/QC"


def jsonl(*rows: Mapping) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def unlabelled(rows: list[dict]) -> list[dict]:
    """As benchmarks give their test rows away."""
    return [{key: value for key, value in row.items() if key != "label"} for row in rows]


BOOLQ = [
    {"question": f"is {n} an even number", "passage": f"«{n}» is {'' if n % 2 == 0 else 'not '}even.", "idx": n}
    | {"label": n % 2 == 0}
    for n in range(10)
]
COPA = [
    {"premise": "The ice melted.", "choice1": "It was warm.", "choice2": "It was dark.", "question": "cause", "idx": 0}
    | {"label": 0},
    {"premise": "It rained.", "choice1": "We stayed dry.", "choice2": "We got wet.", "question": "effect", "idx": 1}
    | {"label": 1},
]


def squad(version: str) -> str:
    """A paragraph with a question of two answers and, in version 2, one that has none."""
    answers = [{"text": "The cat", "answer_start": 0}, {"text": "cat", "answer_start": 4}]
    asked = [{"id": "a", "question": "Who slept?", "answers": [*answers, answers[0]]}]
    if version == "v2.0":
        asked[0]["is_impossible"] = False
        asked.append({"id": "b", "question": "Who ran?", "answers": [], "is_impossible": True, "plausible_answers": []})
    paragraph = {"context": "The cat slept.", "qas": asked}
    return json.dumps({"version": version, "data": [{"title": "Cats", "paragraphs": [paragraph]}]})


# Data set -> URL -> what is there: a text, or the files of an archive.
DOWNLOADS: dict[str, dict[str, str | dict[str, str]]] = {
    "super_glue": {
        f"{SUPER_GLUE}/{task}.zip": {
            f"{task}/train.jsonl": jsonl(*rows),
            f"{task}/val.jsonl": jsonl(*rows[:2]),
            f"{task}/test.jsonl": jsonl(*unlabelled(rows)),
        }
        for task, rows in (("BoolQ", BOOLQ), ("COPA", COPA))
    },
    "glue": {
        f"{GLUE}/SST-2.zip": {
            "SST-2/train.tsv": "sentence\tlabel\na fine film \t1\na dull film \t0\n",
            "SST-2/dev.tsv": "sentence\tlabel\nfine acting \t1\n",
            "SST-2/test.tsv": "index\tsentence\n0\tuncharted ground\n",
        }
    },
    "squad": {f"{SQUAD}/{part}-{v}.json": squad(v) for part in ("train", "dev") for v in ("v1.1", "v2.0")},
    "gsm8k": {
        f"{GSM8K}/{part}.jsonl": jsonl({"question": "What is 2 + 2?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"})
        for part in ("train", "test", "train_socratic", "test_socratic")
    },
    "trec": {
        f"{TREC}/train_5500.label": "NUM:date When did it rain ?\nHUM:ind Who slept ?\n",
        f"{TREC}/TREC_10.label": "LOC:city Where is the cat ?\n",
    },
}


def place_downloads(data_dir: Path) -> None:
    """Writes all of them under the names that TFDS would have given them, as if it had downloaded them before."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download import checksums, resource

    known = checksums.get_all_url_infos()
    for dataset, urls in DOWNLOADS.items():
        registered = known | (tfds.builder_cls(dataset).url_infos or {})
        folder = data_dir / "downloads" / dataset
        folder.mkdir(parents=True)
        for url, content in urls.items():
            # A file is named by the checksum of the original where that is registered, and is not checked again.
            path = folder / resource.get_dl_fname(url, registered[url].checksum if url in registered else None)
            if isinstance(content, str):
                path.write_text(content, encoding="utf-8")
            else:
                with zipfile.ZipFile(path, "w") as archive:
                    for name, text in content.items():
                        archive.writestr(name, text)
            found = {"size": path.stat().st_size, "checksum": hashlib.sha256(path.read_bytes()).hexdigest()}
            info = {"urls": [url], "original_fname": path.name, "url_info": found | {"filename": path.name}}
            path.with_name(path.name + ".INFO").write_text(json.dumps(info))
