"""The notebooks: both halves of a pair say the same, and they run from the first cell to the last."""

import ast
import base64
import json
import re
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

from para_jax import BackboneConfig, FanLoraConfig, tiny_backbone_path
from tests.conftest import QUICK

COLAB = Path(__file__).parents[2] / "colab"
PAIR = runpy.run_path(str(COLAB / "pair.py"))
NOTEBOOKS = [path.stem for path in PAIR["sources"]()]


def test_the_pairs_are_known():
    assert "para_finetune" in NOTEBOOKS
    assert sorted(path.stem for path in COLAB.glob("*.ipynb")) == NOTEBOOKS, "each has its .py"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_both_halves_say_the_same(name):
    text, paired = (COLAB / f"{name}.py").read_text(), (COLAB / f"{name}.ipynb").read_text()
    assert paired == PAIR["notebook"](text, paired), "run python colab/pair.py"
    again = jupytext.writes(jupytext.reads(paired, fmt="ipynb"), fmt="py:percent")
    assert again.partition("\n# %%")[2] == text.partition("\n# %%")[2], "the .ipynb gives the .py back"
    nbformat.validate(nbformat.reads(paired, as_version=4))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_badge_opens_this_notebook(name):
    text = (COLAB / f"{name}.py").read_text()
    here = f"https://colab.research.google.com/github/{PAIR['OWN']}/blob/main/colab/{name}.ipynb"
    assert f"]({here})" in text and PAIR["completed"](text) == text, "run python colab/pair.py"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_first_cell_installs_para_jax(name):
    """The same in every notebook, once, before anything imports JAX; Colab shows its form and hides its text."""
    codes = [c for c in nbformat.read(COLAB / f"{name}.ipynb", as_version=4).cells if c.cell_type == "code"]
    assert codes[0].source == PAIR["install_cell"]() and codes[0].metadata["cellView"] == "form"
    assert not any(PAIR["INSTALL"] in cell.source for cell in codes[1:])
    nodes = ast.parse(codes[0].source).body
    modules = [node.names[0].name for node in nodes if isinstance(node, ast.Import)]
    modules += [str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)]
    assert {module.partition(".")[0] for module in modules} - {"jax"} <= sys.stdlib_module_names


def test_the_address_stands_in_one_place():
    """In pyproject.toml, and in what is made from it."""
    root = COLAB.parent
    folders = [root, *(root / name for name in ("para_jax", "colab", "docs", "tests", "train", "benchmarks"))]
    files = [path for folder in folders for path in (folder.iterdir() if folder is root else folder.rglob("*"))]
    texts = (path for path in files if path.suffix in {".py", ".md", ".toml", ".ipynb", ".json"})
    made = {COLAB / f"{name}{end}" for name in NOTEBOOKS for end in (".py", ".ipynb")}
    assert {path for path in texts if PAIR["OWN"] in path.read_text()} == made | {root / "pyproject.toml"}


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_its_pictures_can_be_read_without_running(name):
    """They were made by a run of these very cells, and are small."""
    cells = [c for c in nbformat.read(COLAB / f"{name}.ipynb", as_version=4).cells if c.cell_type == "code"]
    assert pictures(cells) and all(len(picture) < 100_000 for picture in pictures(cells))
    assert not any("figure," in c.source or "Image(" in c.source for c in cells if not pictures([c]))
    assert not any(output.output_type == "error" for cell in cells for output in cell.outputs)


def test_outputs_stay_with_their_cells():
    """A run keeps what cells print and draw; afterwards a cell keeps it until its source changes."""
    head, print_, draw = "# %% [markdown]\n# A title.\n\n", "# %%\nprint(2 + 2)\n\n", "# %%\n3 * 3\n"
    ran = PAIR["executed"](PAIR["notebook"](head + print_ + draw))
    assert PAIR["notebook"](head + print_ + draw, ran) == ran
    changed = PAIR["notebook"](head.replace("A", "Another") + "# %%\nx = 1\n\n" + print_ + draw.replace("9", "8"), ran)
    _, new, kept, also = nbformat.reads(changed, as_version=4).cells
    assert new.outputs == [] and kept.outputs[0].text == "4\n" and also.outputs[0].data == {"text/plain": "9"}
    one = nbformat.reads(PAIR["notebook"](print_.replace("2 +", "3 +"), ran), as_version=4).cells[0]
    assert one.outputs == [], "its source is another"


def pictures(cells: list[nbformat.NotebookNode]) -> list[bytes]:
    """What these cells drew."""
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    return [base64.b64decode(o.data["image/png"]) for o in outputs if "image/png" in o.get("data", {})]


def with_settings(notebook: nbformat.NotebookNode, settings: dict[str, str]) -> nbformat.NotebookNode:
    """The notebook of somebody who wrote other values where these names are set first."""
    for setting, value in settings.items():
        line = re.compile(rf"(?m)^{re.escape(setting)} = [^#\n]*")
        cell = next(c for c in notebook.cells if c.cell_type == "code" and line.search(c.source))
        cell.source = line.sub(f"{setting} = {value}  ", cell.source, count=1)
    return notebook


def ran(name: str, folder: Path, monkeypatch, long: bool = False, **settings: str) -> tuple[list[bytes], str]:
    """The pictures of a notebook that ran from top to bottom, and what it printed.

    `long`: its programs run longer than they take to compile.
    """
    if long:
        monkeypatch.setenv(QUICK, "0")
    monkeypatch.delenv("MPLBACKEND", raising=False)  # pictures go into the notebook
    notebook = with_settings(nbformat.read(COLAB / f"{name}.ipynb", as_version=4), settings)
    NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    drawn = pictures(notebook.cells)
    assert all(p.startswith(b"\x89PNG") and len(p) > 5_000 for p in drawn)
    return drawn, "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stdout")


@pytest.mark.slow
def test_para_finetune(tmp_path, monkeypatch):
    # A plan that CPUs compile in a third of the time.
    pictures, text = ran("para_finetune", tmp_path, monkeypatch, long=True, **{"chip, size": '"gpu", "h100x1"'})
    assert len(pictures) == 3
    assert "no plan: libtpu" in text if find_spec("libtpu") is None else "fits gpu:h100x1" in text
    accuracy = {line.split()[0]: int(line.split()[1][:-1]) for line in text.splitlines() if line.endswith("%")}
    assert set(accuracy) == {"mood", "place", "question", "question-lora"}
    assert accuracy["place"] > 80 and accuracy["question"] > 80 and min(accuracy.values()) > 45
    first = text.partition("The vexed maid runs to the prison at this moment.")[2].splitlines()[1:6]
    assert [line.split()[0] for line in first] == ["(bare", "mood", "place", "question", "question-lora"]
    assert len({line[19:] for line in first}) >= 4, "tenants answer differently"

    lora = json.loads((tmp_path / "para-finetune-adapters" / "question-lora" / "adapter_config.json").read_text())
    assert lora["peft_type"] == "LORA" and (tmp_path / "para-finetune-adapters.zip").is_file()
    report = json.loads((tmp_path / "para-finetune" / "report.json").read_text())
    assert {tenant["state"] for tenant in report["tenants"].values()} == {"done"}


@pytest.mark.slow
def test_your_model(tmp_path, monkeypatch):
    pictures, text = ran("your_model", tmp_path, monkeypatch, long=True)
    assert len(pictures) == 2
    exact = {line.split()[0]: float(line.split()[3][:-2]) for line in text.splitlines() if " exact match " in line}
    assert exact["bare"] < 5 and exact["para"] > 80 and exact["lora"] > 80, exact
    asked = dict(line.split(maxsplit=1) for line in text.splitlines() if line.startswith(("para  ", "lora  ")))
    assert asked["para"] == asked["lora"] == "Where is the maid?", "a question is asked as the rows are written"
    assert {"your-model-para.zip", "your-model-lora.zip"} <= {path.name for path in tmp_path.iterdir()}
    difference = float(text.partition("largest difference of logits: ")[2].partition(",")[0])
    assert difference < 1e-4, "peft computes the same"


@pytest.mark.slow
def test_many_tenants(tmp_path, monkeypatch):
    """With fewer tenants, shorter answers and one round that counts: its times are not looked at."""
    small = {"TENANTS": '"1, 8"', "NEW": "8", "ROUNDS, SECONDS": "1, 0"}
    pictures, text = ran("many_tenants", tmp_path, monkeypatch, **small)
    assert len(pictures) == 3
    steps = [line for line in text.splitlines() if " rows, ms a step: bare model " in line]
    assert [line.split()[0] for line in steps] == ["1", "8"]
    assert ["mixed" in line for line in steps] == [False, True]
    in_use = {line[:18].strip(): float(line.split()[-2]) for line in text.splitlines() if line.endswith(" MB")}
    assert in_use["PARA"] < in_use["LoRA, PARA's size"] / 10 < in_use["LoRA, all modules"] / 20
    assert "turn 1: 0 programs compiled" in text and "turn 2: 0 programs compiled" in text


@pytest.mark.slow
def test_fanlora(tmp_path, monkeypatch):
    rows = {"train, held_out": "quickstart_rows(seed=0, train=1500, held_out=60)"}
    drawn, text = ran("fanlora", tmp_path, monkeypatch, long=True, **rows)
    assert len(drawn) == 3
    exact = {line[:14].strip(): int(line[14:].split("%")[0]) for line in text.splitlines() if "% exact" in line}
    assert list(exact) == ["untuned", "everywhere", "critical", "least critical", "random-0", "random-1"]
    assert exact["untuned"] < 5 and exact["everywhere"] > 80 and exact["critical"] > exact["least critical"]
    config = BackboneConfig.from_pretrained(tiny_backbone_path())
    kept = FanLoraConfig.load(tmp_path / "fanlora" / "fanlora.json")
    assert [len(sites) for sites in kept.kept(config)] == [2] * 4
    sizes = [int(line.split()[-2].replace(",", "")) for line in text.splitlines() if line[14:].startswith(" rank ")]
    assert len(sizes) == 5 and max(sizes) < 1.15 * min(sizes), "as many parameters as modules allow"
    ours, theirs = (
        [line.split(":")[1].strip() for line in text.splitlines() if line.startswith(f"  {who}:")]
        for who in ("para_jax", "peft")
    )
    assert ours == theirs and len(ours) == 3 and ours[0].startswith("Where ")


@pytest.mark.slow
def test_mesh(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_NUM_CPU_DEVICES", raising=False)
    small = {"STEPS": "12", "TOPOLOGY": '"gpu:h100x8"'}  # four plans, which CPUs compile in a third of the time
    drawn, text = ran("mesh", tmp_path, monkeypatch, **small)
    assert len(drawn) == 2 and "needs eight devices, and here is 1 x cpu" in text and "8 x cpu, simulated" in text
    assert "stopped and saved after step" in text and "resuming after step" in text and "no plan" not in text
    assert float(text.partition("largest relative difference of a loss: ")[2].split()[0]) < 1e-2
    assert "24 of 24 answers are, letter for letter, those of one device" in text
    table = [line.split() for line in text.partition("peak of tuning")[2].splitlines()[1:3]]
    assert [row[0] for row in table] == ["fsdp=8", "data=4,tensor=2"]
    for _, planned, held, tuning, decoding in table:
        assert float(planned) == float(held) < min(float(tuning), float(decoding))
