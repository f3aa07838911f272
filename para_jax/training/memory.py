"""What to do when a step does not fit into memory."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import jax

from para_jax.backbones.decoder import Backbone
from para_jax.backbones.options import Remat
from para_jax.errors import ParaJaxError
from para_jax.training.places import Layout


@contextmanager
def explained(
    backbone: Backbone, layout: Layout, homes: Sequence[Sequence[str | None]], remat: Remat
) -> Iterator[None]:
    """Turns running out of memory into a ParaJaxError with the figure and the cheapest remedies."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        text = str(error)
        if "RESOURCE_EXHAUSTED" not in text and "out of memory" not in text.lower():
            raise
        figure = re.search(r"[\d.]+\s?[KMGT]i?B?(?:ytes)?\b|\d{6,} bytes", text)
        asked = f" ({figure.group()} were asked for)" if figure else ""
        tenants = max(len(home) for home in homes)
        remedies = [
            "" if remat == "layers" else "--remat layers, which keeps only what enters a layer",
            f"--micro-batches {2 * layout.micro_batches}, which halves what is in flight at once"
            if layout.repeats % 2 == 0
            else "",
            f"--tenants-per-step {max(1, tenants // 2) * layout.shards}" if tenants > 1 else "",
            "" if backbone.quantize else "--quantize int8, which halves the backbone's weights",
            "a mesh with more of fsdp, over which weights are split",
            "--max-length, if a few rows are much longer than the others",
        ]
        ways = "; ".join([way for way in remedies if way][:3])
        raise ParaJaxError(f"a step does not fit into the device's memory{asked}; try {ways}") from error
