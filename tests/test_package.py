"""What importing costs, what the core runs without, and which way imports point."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import para_jax

PACKAGE = Path(para_jax.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

# What the core may use; their own requirements come with them.
CORE_REQUIREMENTS = (
    "jax", "flax", "optax", "safetensors", "numpy", "transformers",
)  # fmt: skip

# Each may import those before it and itself.
LAYERS = (
    "annotations", "errors", "compat", "hub", "checks", "mounts", "files", "locks", "machine", "progress",
    "torch_files", "compile_cache", "probing", "compiling", "memory", "quantization", "families", "parameters",
    "config", "sharding", "distributed", "adjustment", "adapters", "convert", "backbones", "data", "training",
    "importance", "decoding", "evaluation", "serving", "planning", "cli", "__main__",
)  # fmt: skip


def run(code: str, *arguments: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=PACKAGE.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# Importing


def test_import_is_light() -> None:
    loaded = run("import para_jax, sys; dir(para_jax); print(*sys.modules)").split()
    top = {name.partition(".")[0] for name in loaded}
    assert not top & {"jax", "jaxlib", "flax", "numpy", "transformers", "matplotlib", "torch", "orbax", "optax"}


def test_core_leaves_heavy_imports_to_first_use() -> None:
    code = "from para_jax import Backbone, AdapterBank, generate, load_adapter; import sys; print(*sys.modules)"
    top = {name.partition(".")[0] for name in run(code).split()}
    assert "jax" in top
    assert not top & {
        "transformers",
        "matplotlib",
        "torch",
        "orbax",
        "jinja2",
        "sacrebleu",
        "jaxtyping",
        "huggingface_hub",
    }


def test_public_names() -> None:
    for name in para_jax.__all__:
        assert getattr(para_jax, name).__name__ == name
    assert set(dir(para_jax)) == set(para_jax.__all__)
    with pytest.raises(AttributeError, match="module 'para_jax' has no attribute 'Backbones'"):
        para_jax.Backbones  # noqa: B018


# What the core runs without

CORE_ALONE = """
import sys
from importlib.metadata import PathDistribution, packages_distributions

allowed = set(sys.argv[1].split())
hidden = {
    module
    for module, distributions in packages_distributions().items()
    if not any(name.lower().replace("_", "-") in allowed for name in distributions)
}
hidden -= {"para_jax"}


class OnlyTheCore:
    \"\"\"The usual finder of modules and distributions, blind to all that the core does not require.\"\"\"

    def __init__(self, usual):
        self.usual = usual

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in hidden else self.usual.find_spec(name, path, target)

    def find_distributions(self, *context):
        found = self.usual.find_distributions(*context)
        return (x for x in found if (x.name or "").lower().replace("_", "-") in allowed)


sys.meta_path[:] = [OnlyTheCore(x) if hasattr(x, "find_distributions") else x for x in sys.meta_path]
for name in hidden & sys.modules.keys():
    del sys.modules[name]

from importlib.util import find_spec
from pathlib import Path
from para_jax import AdapterBank, Backbone, ParaConfig, generate, load_adapter, save_adapter, tiny_backbone_path
from para_jax.convert.checkpoint import save_backbone
from transformers import AutoTokenizer

assert not any(find_spec(name) for name in hidden)
folder = Path(sys.argv[2])
backbone = Backbone.from_pretrained(tiny_backbone_path())
tokenizer = AutoTokenizer.from_pretrained(tiny_backbone_path())
fresh = AdapterBank.create({"acme": ParaConfig(r=2)}, backbone.config)
save_adapter(fresh["acme"], folder / "acme", backbone.config)
bank = AdapterBank.load({"acme": folder / "acme"}, backbone.config)
texts = generate(backbone, tokenizer, ["It was", "It was"], bank=bank, tenants=["acme", None], max_new_tokens=4)
assert len(texts) == 2 and texts[0] == texts[1], texts
save_backbone(backbone, folder / "backbone")

import json
hidden_and_loaded = sorted(hidden & {x.partition(".")[0] for x in sys.modules})
print(json.dumps([sorted(hidden), hidden_and_loaded]))
"""


def closure(names: tuple[str, ...]) -> set[str]:
    """These distributions and all that they require here, without extras."""
    seen: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop().lower().replace("_", "-")
        if name in seen:
            continue
        seen.add(name)
        try:
            needed = [Requirement(text) for text in requires(name) or []]
        except PackageNotFoundError:
            continue
        waiting += [x.name for x in needed if x.marker is None or x.marker.evaluate({"extra": ""})]
    return seen


@pytest.mark.slow
def test_core_runs_without_anything_else(tmp_path: Path) -> None:
    """In an interpreter that finds nothing but the core's requirements and theirs, whatever else is installed."""
    output = run(CORE_ALONE, " ".join(closure(CORE_REQUIREMENTS)), str(tmp_path))
    hidden, loaded = json.loads(output.splitlines()[-1])
    assert {"jinja2", "matplotlib", "sacrebleu", "torch", "peft", "jaxtyping", "hypothesis", "pytest"} <= set(hidden)
    assert loaded == []


# Who writes

WRITING = {
    "write_text", "write_bytes", "save_file", "save_pretrained", "tofile", "fsync", "truncate", "flock", "rename",
    "renames", "link", "symlink", "unlink", "hardlink_to", "symlink_to", "touch", "copyfile", "copytree", "move",
    "rmtree", "makedirs",
}  # fmt: skip
# What writes besides files.py: locks, JAX's compiled programs, and a tokenizer of transformers, which writes itself.
ELSEWHERE = {("locks.py", "flock"), ("locks.py", "truncate"), ("locks.py", "unlink"), ("compile_cache.py", "unlink"),
             ("convert/checkpoint.py", "save_pretrained"), ("cli/common.py", "open")}  # fmt: skip


def writes(path: Path) -> Iterator[str]:
    """The names of functions of other packages that a file calls to change files."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        modes = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        if name in WRITING and isinstance(node.func, ast.Attribute):
            yield name
        elif name == "replace" and getattr(getattr(node.func, "value", None), "id", "") == "os":
            yield "os.replace"
        elif name == "open" and any(set(mode) <= set("rwaxbt+") and set(mode) & set("wax+") for mode in modes):
            yield name


def test_files_are_written_in_one_place() -> None:
    found = {(path.relative_to(PACKAGE).as_posix(), name) for path in MODULES for name in writes(path)}
    assert {(path, name) for path, name in found if path != "files.py"} == ELSEWHERE


# Which way imports point


def name_of(path: Path) -> str:
    """A file's module."""
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


FILES = {name_of(path): path for path in MODULES if path != PACKAGE / "__init__.py"}


def imported(tree: ast.AST) -> Iterator[str]:
    """The modules of the package that are imported anywhere in a piece of code."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are written in full"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.partition(".")[0] == "para_jax":
                name = para_jax._PUBLIC.get(name.removeprefix("para_jax."), name)
                yield name if name in FILES else name.rpartition(".")[0]


TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}
IMPORTS = {name: {other for other in imported(tree) if other not in (name, "para_jax")} for name, tree in TREES.items()}


def test_imports_point_upward() -> None:
    """A file imports from the layers before its own, to name a type or inside a function, too."""
    for name, others in IMPORTS.items():
        own = LAYERS.index(name.split(".")[1])
        below = {other for other in others if LAYERS.index(other.split(".")[1]) > own}
        assert not below, f"{name} imports {below}, which builds on it"


def test_imports_make_no_circle() -> None:
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"a circle: {' -> '.join((*path[path.index(name) :], name))}"
        if name not in done:
            for other in IMPORTS[name]:
                visit(other, (*path, name))
            done.add(name)

    for name in IMPORTS:
        visit(name, ())


def loaded(name: str) -> set[str]:
    """The heavy packages that come with a module."""
    if name not in _LOADED:
        top = ast.Module([node for node in TREES[name].body if isinstance(node, ast.Import | ast.ImportFrom)], [])
        own = {alias.name for node in top.body if isinstance(node, ast.Import) for alias in node.names}
        own |= {node.module or "" for node in top.body if isinstance(node, ast.ImportFrom)}
        _LOADED[name] = {x for x in (package.partition(".")[0] for package in own) if x in HEAVY}
        _LOADED[name] |= {x for other in imported(top) if other in FILES for x in loaded(other)}
    return _LOADED[name]


HEAVY = {"jax", "flax", "numpy", "optax", "transformers", "ml_dtypes"}
_LOADED: dict[str, set[str]] = {}


def test_only_heavy_modules_are_imported_inside_functions() -> None:
    """And only by a module that is light itself, so that `para-jax --help` is quick."""
    for name, tree in TREES.items():
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                for other in imported(function):
                    heavy = other == "para_jax" or (loaded(other) and not loaded(name))
                    assert heavy, f"{name}: {function.name} imports {other}; do so at the top of the file"


# What other folders import


def test_what_other_folders_import_is_there() -> None:
    """Recipes, benchmarks and notebooks are not all run by the tests."""
    missing = []
    for folder in ("train", "benchmarks", "colab", "docs"):
        for path in sorted((PACKAGE.parent / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "para_jax":
                    module = importlib.import_module(node.module or "")
                    for name in (alias.name for alias in node.names):
                        if not hasattr(module, name) and f"{node.module}.{name}" not in FILES:
                            missing.append(f"{path.name}: {node.module}.{name}")
    assert not missing
