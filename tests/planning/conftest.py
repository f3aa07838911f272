"""Plans are read from what the compiler makes with all its optimizations."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def _optimized(optimized: None) -> None:
    pass
