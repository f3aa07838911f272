"""Parity with transformers in float32, for every family on random configs: forward, prefill, decode, and back out.

    python -m pytest tests/parity/test_families.py --parity-examples 40 --parity-table docs/parity.md

is the longer run, whose table is docs/parity.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

from para_jax.families.table import FAMILIES
from tests.parity import models

KINDS = ("forward", "prefill", "decode")
PAGE = """
# Does para_jax compute the same logits as transformers?

In the families of the table, yes, up to rounding: with small random models in float32, no logit differs by more than
{largest:.0e} of the largest logit. The tests compare every family of [families.md](families.md) in this way, and fail
above {tolerance:.0e}; the table has the families that were measured when this page was last written.

{table}

Each family has {configs} models with random weights and a random config: number and size of heads, biases, norms,
windows, RoPE and its scalings, soft-capping, an output layer tied to the embedding or not, experts. A cell is the
largest error over these models, where an error is the largest absolute difference of two logits over the largest
absolute logit that they are compared with.

- **forward**: one pass over a batch with a full row, a row padded on the left and a row padded on the right.
- **prefill**: the logits after prompts of mixed lengths, padded on the left.
- **decode**: the logits of each of the {steps} next tokens, with the key-value caches of both libraries.

Every model was also saved by para_jax: all tensors came back bit for bit, and transformers computed the same logits
from the saved folder, bit for bit.

This command writes the page:

    python -m pytest tests/parity/test_families.py --parity-examples {configs} --parity-table docs/parity.md
"""


def table(errors: dict[str, models.Worst]) -> str:
    """A row for each family that was compared in full."""
    rows = [
        f"| {family} | {' | '.join(f'{found[kind]:.1e}' for kind in KINDS)} |"
        for family, found in errors.items()
        if len(found) == len(KINDS)
    ]
    return "\n".join([f"| family | {' | '.join(KINDS)} |", "|---|" + "---|" * len(KINDS), *rows])


def page(errors: dict[str, models.Worst], configs: int) -> str:
    """docs/parity.md."""
    largest = max((error for found in errors.values() for error in found.values()), default=0.0)
    numbers = {"largest": largest, "tolerance": models.TOLERANCE, "steps": models.STEPS, "configs": configs}
    return PAGE.lstrip().format(table=table(errors), **numbers)


@pytest.fixture(scope="module")
def worst(request: pytest.FixtureRequest) -> Iterator[dict[str, models.Worst]]:
    """The largest relative error of each comparison by family, shown as a table when the module is done."""
    errors: dict[str, models.Worst] = {family: {} for family in FAMILIES}
    yield errors
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("", table(errors), sep="\n")
    if path := request.config.getoption("parity_table"):
        Path(path).write_text(page(errors, request.config.getoption("parity_examples")))


@pytest.mark.parametrize("family", FAMILIES)
def test_random_configs(
    family: str,
    worst: dict[str, models.Worst],
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Beside the simplest config, which tests/parity/test_adapters.py has."""
    simplest = models.simplest(family)

    # No shrinking: a step of it costs several compilations.
    @seed(0)
    @settings(
        max_examples=1 + request.config.getoption("parity_examples"),
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(case=models.cases(family))
    def run(case: models.Case) -> None:
        if case == simplest:
            return
        models.check(case, family, worst[family], tmp_path_factory.mktemp(family))
        jax.clear_caches()  # tests/conftest.py says why

    run()
