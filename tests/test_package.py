"""What importing costs, what the core runs without, and which way imports point."""

from __future__ import annotations

import ast
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
    "jax", "flax", "optax", "orbax-checkpoint", "safetensors", "numpy", "transformers",
)  # fmt: skip

# Each may import those before it and itself.
LAYERS = (
    "errors", "compat", "checks", "files", "progress", "torch_files", "compile_cache", "compiling", "memory",
    "adjustment", "sharding", "distributed", "adapters", "backbones", "convert", "data", "training", "importance",
    "decoding", "evaluation", "serving", "planning", "cli", "__main__",
)  # fmt: skip
# Imports that point the other way, inside a function of a class that a newcomer calls first.
EXCEPTIONS = {
    ("sharding.py", "backbones"),  # names a type
    ("backbones/decoder.py", "convert"),  # Backbone.from_pretrained reads files
    ("backbones/config.py", "convert"),  # so does BackboneConfig, whose size is that of its files' tensors
}


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


def test_every_module_can_be_the_first_to_be_imported() -> None:
    code = """
import importlib, sys
for name in sys.argv[1:]:
    for loaded in [x for x in sys.modules if x.partition(".")[0] == "para_jax"]:
        del sys.modules[loaded]
    importlib.import_module(name)
"""
    names = [".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in MODULES]
    run(code, *(name.removesuffix(".__init__") for name in names if not name.endswith("__main__")))


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


# Which way imports point


def imported(path: Path) -> Iterator[str]:
    """The modules of the package that a file imports anywhere in it, in full."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are written in full"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.partition(".")[0] == "para_jax":
                public = name.removeprefix("para_jax.")
                yield para_jax._PUBLIC.get(public, name)


def test_imports_point_upward() -> None:
    """A file imports from the layers before its own; the exceptions are all there is, and all of them are used."""
    pointing_down = set()
    for path in MODULES:
        relative = path.relative_to(PACKAGE)
        if relative == Path("__init__.py"):
            continue  # names everything, imports nothing until it is used
        own = LAYERS.index(relative.parts[0].removesuffix(".py"))
        for name in imported(path):
            layer = name.split(".")[1] if "." in name else ""
            if layer in LAYERS:
                if LAYERS.index(layer) > own:
                    pointing_down.add((relative.as_posix(), layer))
            else:
                assert layer in {"", "__version__", "tiny_backbone_path"}, f"{relative} imports {name}"
    assert pointing_down == EXCEPTIONS
