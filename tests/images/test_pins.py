"""What the published images hold is what pyproject.toml admits."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from tests.images.pin import EXTRAS, PYPROJECT, canonical

IMAGES = sorted(Path(__file__).parent.glob("*.txt"))
PROJECT = tomllib.loads(PYPROJECT.read_text())["project"]


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.stem)
def test_an_image_is_in_the_range(path: Path) -> None:
    heading, *lines = path.read_text().splitlines()
    [python] = re.findall(r"; Python (3\.\d+)\. Written by tests/images/pin.py\.$", heading)
    assert python in SpecifierSet(PROJECT["requires-python"])
    held = {canonicalize_name(line.partition("==")[0]): line.partition("==")[2] for line in lines}
    wanted = [*PROJECT["dependencies"], *(x for extra in EXTRAS for x in PROJECT["optional-dependencies"][extra])]
    requirements = [Requirement(x) for x in wanted]
    assert {"jax", "jaxlib"} <= held.keys()
    assert [x for x in requirements if (at := held.get(canonicalize_name(x.name))) and at not in x.specifier] == []


def test_the_oldest_that_is_admitted_is_tested() -> None:
    """The image whose tests run has the lowest version of what differs between versions."""
    lines = (Path(__file__).parent / "colab-tpu.txt").read_text().splitlines()
    oldest = [x.replace(">=", "==") for x in PROJECT["dependencies"] if x.partition(">=")[0] in ("jax", "flax", "optax")]
    assert set(oldest) <= set(lines)


@pytest.mark.parametrize("name", ["ml_dtypes", "Jinja2", "importlib-resources", "a-_.b"])
def test_names(name: str) -> None:
    assert canonical(name) == canonicalize_name(name)
