"""Settings of every test: nothing is promoted silently, warnings are errors (pyproject.toml), no network."""

import gc
import os
import resource
import shutil
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from packaging.version import Version

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the compiler for TPUs would look for one
# torch's models here are tiny: a second thread only waits, above all beside another worker.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What is compiled is kept for this process and those it starts; compiling is most of the tests' time. Not for others
# beside it: JAX does not keep them from reading half of a program.
PROGRAMS = tempfile.mkdtemp(prefix="para-jax-tests-")
os.environ["JAX_COMPILATION_CACHE_DIR"] = PROGRAMS
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
# Nor is much optimized, here and in the processes that tests start: LLVM's passes are half of all compiling.
QUICK = "JAX_DISABLE_MOST_OPTIMIZATIONS"
os.environ[QUICK] = "1"
jaxlib_version, flags = Version(version("jaxlib")), ""
# XLA's older way to make the code of a fusion compiles in a third of the time. Workers are told what --optimize says.
OPTIMIZE = "PARA_JAX_TESTS_OPTIMIZE"
if os.environ.setdefault(OPTIMIZE, str(int("--optimize" in sys.argv))) == "0" and jaxlib_version < Version("0.11"):
    flags += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
if jaxlib_version < Version("0.8"):  # it cannot multiply bfloat16 on processors with AMX; cli/faults.py tells users
    flags += " --xla_cpu_max_isa=AVX512"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "").removesuffix(flags) + flags

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)  # for meshes; all else runs on the first
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--whole", action="store_true", help="also the tests marked `whole`, of which others are a selection"
    )
    parser.addoption("--parity-examples", type=int, default=1, help="random configs of each family in tests/parity")
    parser.addoption("--optimize", action="store_true", help="compile all programs as users have them: slower")
    parser.addoption("--kills", type=int, default=3, help="how often tests/laws/test_resumed.py kills a run")
    parser.addoption("--every-mesh", action="store_true", help="all of tests/laws/test_sharded_training.py")
    parser.addoption("--kills-json", help="a file for what it saw")
    parser.addoption("--parity-table", help="Markdown file for the worst errors of tests/parity/test_families.py")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("optimize"):
        optimize(True)


def pytest_unconfigure() -> None:
    shutil.rmtree(PROGRAMS, ignore_errors=True)


# Whole models of every family, whole runs and compilers for TPUs: minutes each folder.
SLOW = ("colab", "importance", "laws", "parity", "planning", "train")
# Those with the longest files.
FIRST = ("colab", "planning", "laws", "parity", "benchmarks", "cli", "backbones", "train")


def folder_of(item: pytest.Item) -> str:
    """The folder of tests/ that a test is in; "", if it is in none."""
    here = Path(__file__).parent
    return item.path.relative_to(here).parts[0] if here in item.path.parents else ""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks slow folders. Folders with long files go first, so that no worker is left with one at the end."""
    for item in items:
        if folder_of(item) in SLOW:
            item.add_marker(pytest.mark.slow)
    if not config.getoption("whole"):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("whole")])
        items[:] = [item for item in items if not item.get_closest_marker("whole")]
    items.sort(key=lambda item: FIRST.index(folder_of(item)) if folder_of(item) in FIRST else len(FIRST))


def pytest_collection_finish() -> None:
    """What is there by now stays: jax, torch, transformers and the tests need not be looked through for garbage."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000)


@pytest.fixture(autouse=True, scope="module")
def _programs():
    """Lets a module's compiled programs go. Each holds memory maps, of which Linux gives a process 65,530: with all the
    suite's programs at once, the compiler crashes."""
    yield
    jax.clear_caches()


@pytest.fixture
def few_programs():
    """The same after each test, for modules whose programs are many or large."""
    yield
    jax.clear_caches()


@pytest.fixture
def full_disk():
    """No file of this process gets larger than 1000 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def optimize(all_of_it: bool) -> None:
    """Whether programs of this process, and of those it starts, are compiled as users have them."""
    jax.config.update(QUICK.lower(), not all_of_it)
    os.environ[QUICK] = "0" if all_of_it else "1"


@pytest.fixture(scope="module")
def optimized(request: pytest.FixtureRequest):
    """For modules that look at what a compiler makes, or that run a program longer than it takes to compile."""
    optimize(True)
    yield
    optimize(request.config.getoption("optimize"))


@pytest.fixture(scope="session")
def tiny():
    """The backbone that ships with the package, and its tokenizer."""
    from transformers import AutoTokenizer

    from para_jax import Backbone, tiny_backbone_path

    return Backbone.from_pretrained(tiny_backbone_path()), AutoTokenizer.from_pretrained(tiny_backbone_path())
