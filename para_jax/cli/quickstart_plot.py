"""The quickstart's plot: losses, and exact match before and after tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from para_jax.training.metrics import save_figure


def plot(lines: list[dict[str, Any]], report: dict[str, Any], path: Path) -> None:
    """Losses of all tenants on the left, exact match before and after on the right."""
    from matplotlib.figure import Figure

    names = list(report["exact_match"])
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in names:
        left.plot([line["step"] for line in lines], [line["loss"][name] for line in lines], label=name)
    left.set(
        xlabel="step",
        ylabel="loss (nats a response token)",
        title="three tenants tuned in one step",
        ylim=(0, None),
    )
    left.legend(frameon=False)
    for i, when in enumerate(("before", "after")):
        at = [j + (i - 0.5) * 0.35 for j in range(len(names))]
        values = [report["exact_match"][name][when] for name in names]
        bars = right.bar(at, values, width=0.33, color=("0.75", "C0")[i], label=when)
        right.bar_label(bars, [f"{v:.2f}" for v in values])
    right.set_xticks(range(len(names)), names)
    right.set(ylabel="exact match on held-out prompts", title="the same backbone, before and after", ylim=(0, 1.25))
    right.legend(frameon=False, loc="upper left", ncols=2)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)
