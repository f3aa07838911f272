"""What the published images hold is what pyproject.toml admits."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.images.pin import EXTRAS, PYPROJECT, canonical

FOLDER = Path(__file__).parent
PROJECT = tomllib.loads(PYPROJECT.read_text())["project"]
CORE = [Requirement(x) for x in PROJECT["dependencies"]]
EXTRA = [Requirement(x) for extra in EXTRAS for x in PROJECT["optional-dependencies"][extra]]


def held(path: Path) -> dict[str, Version]:
    """The versions in an image."""
    pins = (line.split("==") for line in path.read_text().splitlines()[1:])
    return {canonicalize_name(name): Version(version) for name, version in pins}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.txt")), ids=lambda path: path.stem)
def test_an_image_is_in_the_range(path: Path) -> None:
    heading = path.read_text().partition("\n")[0]
    [python] = re.findall(r"; Python (3\.\d+)\. Written by tests/images/pin.py\.$", heading)
    assert python in SpecifierSet(PROJECT["requires-python"])
    image = held(path)
    assert {"jax", "jaxlib"} <= image.keys()
    assert not [x for x in CORE + EXTRA if x.name in image and image[x.name] not in x.specifier]


def test_the_lowest_that_are_admitted_are_tested() -> None:
    """In the image whose tests run in .ci/run."""
    image = held(FOLDER / "colab-tpu.txt")
    lowest = {x.name: Version(next(iter(x.specifier)).version) for x in CORE}
    named = ("jax", "flax", "optax", "transformers")
    assert {name: image[name] for name in named} == {name: lowest[name] for name in named}


@pytest.mark.parametrize("name", ["ml_dtypes", "Jinja2", "importlib-resources", "a-_.b"])
def test_names(name: str) -> None:
    assert canonical(name) == canonicalize_name(name)
