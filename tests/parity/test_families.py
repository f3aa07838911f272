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


@pytest.fixture(scope="module")
def worst(request: pytest.FixtureRequest) -> Iterator[dict[str, models.Worst]]:
    """The largest relative error of each comparison by family, shown as a table when the module is done."""
    errors: dict[str, models.Worst] = {family: {} for family in FAMILIES}
    yield errors
    kinds = ("forward", "prefill", "decode")
    examples = request.config.getoption("parity_examples")
    lines = [
        f"| family | configs | {' | '.join(kinds)} |",
        "|---|---|" + "---|" * len(kinds),
        *(
            f"| {family} | {examples} | {' | '.join(f'{found[kind]:.1e}' for kind in kinds)} |"
            for family, found in errors.items()
            if len(found) == len(kinds)
        ),
    ]
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("", *lines, sep="\n")
    if path := request.config.getoption("parity_table"):
        head = (
            "# Does it compute what transformers computes?\n\nYes, up to rounding in float32. The table has the "
            "largest error of a logit, relative to the largest logit, over random configs of each family (heads, head "
            "size, biases, norms, windows, RoPE and its scalings, soft-capping, tied heads, experts), with prompts of "
            f"mixed lengths padded on either side. The tests allow {models.TOLERANCE:.0e}. Every config was also "
            "converted from Hugging Face's format and back, and all tensors came back bit for bit.\n\n"
        )
        Path(path).write_text(head + "\n".join(lines) + "\n\nWritten by tests/parity/test_families.py.\n")


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
