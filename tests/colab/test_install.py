"""The cell that installs para_jax, run as a notebook runs it: by real pips, in environments made for it."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import venv
import zipfile
from importlib.metadata import version
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from para_jax import probing
from tests.backbones.test_choice import check_the_stock_pair_of_colab

ROOT = Path(__file__).parents[2]
PAIR = runpy.run_path(str(ROOT / "colab" / "pair.py"))
RUNTIMES = ("COLAB_TPU_1VM", "COLAB_GPU", "TPU_ACCELERATOR_TYPE", "TPU_LIBRARY_PATH", "PYTHONPATH")


def cell(source: object) -> str:
    """The cell's text with a choice of its form."""
    return re.sub(r"(?m)^SOURCE = .*? #", f"SOURCE = {str(source)!r}  #", PAIR["install_cell"](), count=1)


class Runtime:
    """An environment of its own, in which the cell is run."""

    def __init__(self, folder: Path, others: str | None):
        """`others` is a folder whose packages are there too, as those of an image are."""
        venv.create(folder, with_pip=others is None)
        self.python = folder / "bin" / "python"
        self.own = next((folder / "lib").glob("python*")) / "site-packages"
        if others is not None:
            (self.own / "image.pth").write_text(others)

    def pip(self, *arguments: str) -> str:
        command = [self.python, "-m", "pip", "--disable-pip-version-check", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def start(self, source: object, before: str = "", **more: str) -> subprocess.Popen[str]:
        kept = {name: value for name, value in os.environ.items() if name not in RUNTIMES}
        return subprocess.Popen(
            [self.python, "-c", f"{before}\n{cell(source)}"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, env={**kept, **more}, cwd=self.own.parents[2],
        )  # fmt: skip

    def run(self, source: object, before: str = "", **more: str) -> tuple[int, str, str]:
        """The exit code, what the cell prints, and the message that it stops with."""
        process = self.start(source, before, **more)
        printed, said = process.communicate()
        assert "Traceback" not in said, said
        return process.returncode, printed, said


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of this repository."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = shutil.copytree(ROOT, folder / "copy", ignore=shutil.ignore_patterns(".*", "build", "*.egg-info", "docs"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(folder), str(copy)]
    subprocess.run(command, check=True, capture_output=True)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture
def image(tmp_path: Path) -> Runtime:
    """All that para_jax needs is there, as on Colab; what is installed goes elsewhere."""
    return Runtime(tmp_path / "image", sysconfig.get_path("purelib"))


def other(wheel: Path, folder: Path) -> Path:
    """The same version, and another file."""
    copy = Path(shutil.copy(wheel, folder / wheel.name))
    with zipfile.ZipFile(copy, "a") as file:
        file.comment = b"another one"
    return copy


SEES = re.compile(r"jax [\d.]+ sees \d+ x cpu\n$")


def test_a_wheel_is_installed_once(image: Runtime, wheel: Path, tmp_path: Path) -> None:
    """In a second "Run all" of the same notebook too, which has JAX; JAX stays as it is."""
    code, printed, said = image.run(wheel)
    assert (code, said) == (0, "") and f"{wheel} was installed\n" in printed and SEES.search(printed)
    assert "->" not in printed and (image.own / "para_jax").is_dir() and not list(image.own.glob("jax*"))
    made = (image.own / "para_jax").stat().st_ctime_ns
    code, printed, said = image.run(wheel, "import jax; jax.devices(); import para_jax")
    assert (code, said) == (0, "") and re.match(r"para-jax \S+ is ready\njax ", printed) and SEES.search(printed)
    assert (image.own / "para_jax").stat().st_ctime_ns == made
    # Another one of the same version, while this one is loaded.
    code, printed, said = image.run(other(wheel, tmp_path), "import para_jax")
    assert code == 1 and said.startswith(
        "another para_jax is already loaded; restart the session (Runtime > Restart session"
    )
    assert (image.own / "para_jax").stat().st_ctime_ns > made
    assert image.run(tmp_path / wheel.name)[0] == 0


def test_half_an_installation_is_completed(image: Runtime, wheel: Path) -> None:
    """The machine went away between para_jax and what it requires: `pip` sees to it again."""
    image.pip("install", "--quiet", "--no-deps", str(wheel))
    (metadata,) = image.own.glob("para_jax-*.dist-info/METADATA")
    text = metadata.read_text()
    metadata.write_text(
        text.replace(
            "\nRequires-Dist: ",
            "\nRequires-Dist: of-another-python; python_version < '3'\nRequires-Dist: ",
            1,
        )
    )
    assert image.run(wheel)[0] == 0
    metadata.write_text(text.replace("\nRequires-Dist: ", "\nRequires-Dist: cowsay==6.1\nRequires-Dist: ", 1))
    code, printed, said = image.run(wheel)
    assert (code, said) == (0, "") and "cowsay 6.1 is new\n" in printed and (image.own / "cowsay").is_dir()


@pytest.mark.parametrize(
    ("source", "why"),
    [
        (
            "/content/drive/MyDrive/para_jax.whl",
            "there is no /content/drive/MyDrive/para_jax.whl; upload it, or mount Drive",
        ),
        ("para-jax==99.0", "para-jax==99.0 cannot be installed beside Python 3."),
        ("para-jax==99.0", "No matching distribution found for para-jax==99.0. Choose another SOURCE or runtime"),
        ("git+file:///nowhere/at/all", "git+file:///nowhere/at/all cannot be installed beside Python 3."),
    ],
)
def test_a_source_that_is_none(source: str, why: str, image: Runtime) -> None:
    code, _, said = image.run(source)
    assert code == 1 and why in said and said.count("\n") == 1 and not (image.own / "para_jax").exists()


def test_a_wheel_for_another_python(image: Runtime, wheel: Path, tmp_path: Path) -> None:
    old = Path(shutil.copy(wheel, tmp_path / wheel.name.replace("py3-none-any", "cp39-cp39-linux_x86_64")))
    code, _, said = image.run(old)
    assert code == 1 and f"{old.name} is not a supported wheel on this platform. Choose another SOURCE" in said
    assert f"beside Python {sys.version.split()[0]}, jax " in said


def test_an_image_that_is_too_old(image: Runtime, tmp_path: Path) -> None:
    """JAX is not upgraded for para_jax's sake; what pip says and what is there is said."""
    new = empty_wheel(tmp_path, "para-jax", "9.9", "jax>=99", "numpy>=2.0")
    code, _, said = image.run(new)
    assert code == 1 and f"beside Python {sys.version.split()[0]}, jax {version('jax')}, " in said
    assert ": it needs jax>=99; " in said
    assert image.run(new)[0] == 1, "half of it is not taken for all"


PROJECT = {
    "pyproject.toml": '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
    '[project]\nname = "para-jax"\nversion = "9.9"\n',
    "setup.py": "import setuptools, time, pathlib\npathlib.Path(%r).touch()\ntime.sleep(%d)\nsetuptools.setup()\n",
}


def project(folder: Path, seconds: int = 0) -> Path:
    """An empty package of our name, whose building takes a while and leaves a mark."""
    folder.mkdir()
    for name, text in PROJECT.items():
        (folder / name).write_text(text % (str(folder / "begun"), seconds) if "%" in text else text)
    return folder


def test_a_git_address(image: Runtime, tmp_path: Path) -> None:
    folder = project(tmp_path / "project")
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "setup.py", "pyproject.toml"], [*identity, "commit", "-qm", "one"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    address = f"git+file://{folder}"
    code, printed, said = image.run(address)
    assert (code, said) == (0, "") and re.search(r"para-jax \S+ -> 9\.9\n|para-jax 9\.9 is new\n", printed)
    (folder / "begun").unlink(missing_ok=True)
    code, printed, _ = image.run(address)
    assert code == 0 and "->" not in printed and "9.9" in printed and not (folder / "begun").exists()
    # A branch is another address.
    branch = subprocess.run(["git", "branch", "--show-current"], cwd=folder, capture_output=True, text=True).stdout
    assert image.run(f"{address}@{branch.strip()}")[0] == image.run(f"{address}@{branch.strip()}")[0] == 0


def test_an_interrupted_cell(image: Runtime, tmp_path: Path) -> None:
    """pip ends what it has begun, whatever the signal's process group has in it; the cell is run again."""
    folder = project(tmp_path / "project", seconds=4)
    source = f"git+file://{folder}"
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    subprocess.run(["git", "add", "."], cwd=folder, check=True)
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "one"], cwd=folder, check=True)
    # As a notebook's kernel has it, whether or not whoever runs the tests ignores the signal.
    heard = "import os, signal; os.setsid(); signal.signal(signal.SIGINT, signal.default_int_handler)"
    process = image.start(source, heard)
    deadline = time.monotonic() + 120
    while not (folder / "begun").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    printed, said = process.communicate()
    assert "pip finishes first, then the cell stops\n" in printed and said.rstrip().endswith("KeyboardInterrupt")
    assert json.loads(next(image.own.glob("para_jax-9.9.dist-info/direct_url.json")).read_text())["vcs_info"]
    assert image.run(source)[0] == 0


def empty_wheel(folder: Path, name: str, version: str, *requires: str) -> Path:
    """A wheel with nothing in it but what it requires."""
    file_name, info = name.replace("-", "_"), f"{name.replace('-', '_')}-{version}.dist-info"
    texts = {
        "METADATA": "".join(
            [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", *(f"Requires-Dist: {r}\n" for r in requires)]
        ),
        "WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(folder / f"{file_name}-{version}-py3-none-any.whl", "w") as file:
        for part, text in texts.items():
            file.writestr(f"{info}/{part}", text)
        file.writestr(f"{info}/RECORD", "".join(f"{info}/{part},,\n" for part in (*texts, "RECORD")))
    return Path(str(file.filename))


@pytest.mark.parametrize(
    ("driver", "extra"), [pytest.param("550.54.15", "cuda12", marks=pytest.mark.whole), ("580.65.06", "cuda13")]
)
def test_a_gpu_without_a_plugin(driver: str, extra: str, image: Runtime, wheel: Path, tmp_path: Path) -> None:
    """It gets the plugin of the driver's CUDA for the JAX that is there, from an index of empty plugins."""
    jax = version("jax")
    for cuda in ("cuda12", "cuda13"):
        for number in (jax, "99.0"):
            empty_wheel(tmp_path, f"jax-{cuda}-plugin", number)
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\necho {driver}\n")
    tool.chmod(0o755)
    runtime = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}
    code, printed, said = image.run(wheel, "import jax", **runtime)
    assert code == 1 and said.startswith("JAX has to be changed (it has no CUDA plugin), but it is already loaded. Not")
    assert [path.name for path in image.own.iterdir()] == ["image.pth"] and not printed
    code, printed, said = image.run(wheel, **runtime)
    assert f"jax-{extra}-plugin {jax} is new\n" in printed and "->" not in printed
    assert code == 1 and said.startswith("this is a GPU runtime, but JAX sees only the CPU because ")
    assert sorted(path.name for path in image.own.glob("jax*")) == [f"jax_{extra}_plugin-{jax}.dist-info"]
    # What is there is enough, whatever the driver is said to be.
    assert "is new" not in image.run(wheel, **runtime)[1]


TPU = {
    "COLAB_TPU_1VM": "1", "TPU_ACCELERATOR_TYPE": "v5e-1", "TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "",
    "TPU_WORKER_HOSTNAMES": "localhost", "TPU_LOG_DIR": "disabled", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}  # fmt: skip
REFUSED = (
    "jax 0.7.2 with libtpu 0.0.21.1 cannot compile kernels: INTERNAL: Failed to deserialize the Mosaic module: "
    "INTERNAL: Unsupported version: expected <= 7 but got 8\n"
)
UNSEEN = "this is a TPU runtime, but JAX sees only the CPU because Backend 'tpu' failed to initialize: "
UPGRADED = {"jax": "0.10.2", "jaxlib": "0.10.2", "libtpu": "0.0.42.1", "flax": "0.12.8"}


def test_a_tpu_image_whose_kernels_do_not_compile(tmp_path: Path) -> None:
    """Colab's versions: refused while JAX is loaded, without a network left as they are, and else upgraded, once."""
    runtime = Runtime(tmp_path / "image", None)
    runtime.pip("install", "jax==0.7.2", "jaxlib==0.7.2", "libtpu==0.0.21.1", "flax==0.11.2", "numpy==2.3.2")

    def packages() -> dict[str, str]:
        return dict(line.split("==") for line in runtime.pip("list", "--format=freeze").split())

    check_the_stock_pair_of_colab(runtime.python, tmp_path)
    stock, ours = packages(), empty_wheel(tmp_path, "para-jax", "0.1.0", "jax>=0.7.2", "flax>=0.11.2", "numpy>=2.0")
    code, printed, said = runtime.run(ours, "import jax", **TPU)
    assert (
        code == 1
        and "it is already loaded. Nothing was changed; restart the session (Runtime > Restart session; " in said
    )
    assert packages() == stock
    code, printed, said = runtime.run(ours, **TPU, PIP_NO_INDEX="1", PIP_FIND_LINKS="")
    assert code == 1 and said.splitlines()[-1].startswith(UNSEEN)
    assert printed.startswith(
        f"{REFUSED}jax==0.10.2, jaxlib==0.10.2, libtpu==0.0.42.1, flax==0.12.8 could not be installed: Could not"
    )
    assert "Attention runs without its kernel: slower\n" in printed
    assert printed.endswith(f"{ours} was installed\npara-jax 0.1.0 is new\npara-jax 0.1.0 is ready\n")
    assert packages() == {**stock, "para-jax": "0.1.0"}
    # "Run all" once more in the session that went on without, and has JAX.
    code, printed, said = runtime.run(ours, "import jax; gone_on = True", **TPU, PIP_NO_INDEX="1")
    assert printed == "para-jax 0.1.0 is ready\n" and said.splitlines()[-1].startswith(UNSEEN)
    code, printed, said = runtime.run(ours, **TPU)
    assert code == 1 and said.splitlines()[-1].startswith(UNSEEN)
    assert (
        printed.startswith(REFUSED) and "could not be installed" not in printed and "jax 0.7.2 -> 0.10.2\n" in printed
    )
    assert packages() == {**stock, "para-jax": "0.1.0", **UPGRADED}
    code, printed, _ = runtime.run(ours, **TPU)
    assert code == 1 and printed == "para-jax 0.1.0 is ready\n"
    # What an upgrade leaves that was cut off, with its machine.
    runtime.pip("uninstall", "--yes", "jaxlib")
    assert "jaxlib 0.10.2 is new\n" in runtime.run(ours, **TPU)[1]
    assert packages() == {**stock, "para-jax": "0.1.0", **UPGRADED}


def test_a_message_ends_the_run(tmp_path: Path) -> None:
    """In a notebook: what would run behind the cell does not."""
    cells = [nbformat.v4.new_code_cell(cell("no.whl")), nbformat.v4.new_code_cell("print('ran on')")]
    notebook = nbformat.v4.new_notebook(cells=cells)
    with pytest.raises(CellExecutionError, match=r"there is no no\.whl"):
        NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert not notebook.cells[1].outputs


def test_the_upgrade_is_the_one_that_errors_name() -> None:
    pins = dict(pin.split("==") for pin in re.findall(r'"([a-z]+==[\d.]+)"', PAIR["install_cell"]()))
    assert list(pins) == ["jax", "jaxlib", "libtpu", "flax"] and pins["jax"] == pins["jaxlib"]
    assert any(f"jax {pins['jax']} with libtpu {pins['libtpu']} " in remedy for _, remedy in probing.REMEDIES)
