"""Tables and pictures of the study's results, a function of study.json alone."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from para_jax.files import write_text
from para_jax.training.metrics import save_figure

Results = Mapping[str, Any]
NAMES = {"choice_accuracy": "accuracy", "bleu": "BLEU", "exact_match": "exact match"}


def summary(results: Results, part: str) -> dict[str, dict[str, Any]]:
    """For each system of a part ("study" or "ablation") its size, and by task what its seeds scored."""
    found: dict[str, dict[str, Any]] = {}
    for key, record in results["parts"].items():
        if not key.startswith(f"{part}/") or "/seeds/" not in key:
            continue
        system = record["system"]
        row = found.setdefault(system["label"], {**system, "tasks": {}})
        for run in record["runs"]:
            task = row["tasks"].setdefault(run["task"], {"scores": [], "lr": run["lr"], "kept_steps": []})
            task["scores"].append(run["scores"][results["tasks"][run["task"]]["score"]])
            task["kept_steps"].append(run["kept_step"])
    for row in found.values():
        for task in row["tasks"].values():
            scores = task["scores"]
            task["mean"] = statistics.fmean(scores)
            task["spread"] = statistics.stdev(scores) if len(scores) > 1 else 0.0
            # A best rate at the end of its grid might not be the best there is.
            task["edge"] = len(row["grid"]) > 1 and task["lr"] in (min(row["grid"]), max(row["grid"]))
    return found


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, *rows)]
    lines.insert(1, "|" + "---|" * len(header))
    return "\n".join(lines) + "\n"


def number(value: float, score: str) -> str:
    return f"{value:.1f}" if score == "bleu" else f"{value:.3f}"


def cell(task: Mapping[str, Any] | None, score: str) -> str:
    return "" if task is None else f"{number(task['mean'], score)} ± {number(task['spread'], score)}"


def speeds(results: Results) -> dict[str, Any]:
    """The last measurement of all methods in turn."""
    found: dict[str, Any] = {}
    for key, record in results["parts"].items():
        if key.startswith("speed/"):
            found = record["speed"]
    return found


def bare_scores(results: Results) -> dict[str, Mapping[str, float]]:
    return {
        task: scores
        for key, record in results["parts"].items()
        if key.startswith("bare/")
        for task, scores in record["scores"].items()
    }


def study_table(results: Results) -> str:
    """A row a method: size, the mean and the standard deviation of every task's score, tokens a second."""
    rows = summary(results, "study")
    scores = {t: facts["score"] for t, facts in results["tasks"].items() if any(t in r["tasks"] for r in rows.values())}
    speed, bare = speeds(results), bare_scores(results)

    def rates(label: str) -> list[str]:
        return [
            f"{speed[label][k]['median']:,.0f}" if k in speed.get(label, {}) else "" for k in ("training", "decode")
        ]

    table = [
        [label, f"{row['parameters']:,}", *(cell(row["tasks"].get(t), s) for t, s in scores.items()), *rates(label)]
        for label, row in rows.items()
    ]
    majority = [results["tasks"][t]["majority"] for t in scores]
    if bare:
        table.append(
            ["bare", "0", *(number(bare[t][s], s) if t in bare else "" for t, s in scores.items()), *rates("bare")]
        )
    table.append(["most frequent label", "", *("" if m is None else f"{m:.3f}" for m in majority), "", ""])
    titles = [f"{task} ({NAMES[score]})" for task, score in scores.items()]
    text = markdown(["method", "parameters", *titles, "training tokens/s", "decode tokens/s"], table)

    def chosen(task: Mapping[str, Any] | None) -> str:
        if task is None:
            return ""
        return f"{task['lr']:g}{'*' if task['edge'] else ''} ({', '.join(map(str, task['kept_steps']))})"

    rates_rows = [[label, *(chosen(row["tasks"].get(t)) for t in scores)] for label, row in rows.items()]
    settings = results["settings"]
    return (
        f"{settings['seeds']} seeds, {settings['steps']} steps of {settings['rows']} rows, losses on "
        f"{settings['dev_rows']} dev rows every {settings['every']} steps; mean ± standard deviation over "
        f"seeds on up to {settings['test_rows']} test rows\n\n{text}\n"
        "Learning rates that dev chose (* at the end of the grid), and the steps that each seed's adapter is of\n\n"
        + markdown(["method", *scores], rates_rows)
    )


def ablation_table(results: Results) -> str:
    """A row a variant of PARA: size, every task's score, and the mean of its differences from the defaults."""
    rows = summary(results, "ablation")
    tasks = list(dict.fromkeys(task for row in rows.values() for task in row["tasks"]))
    scores = {task: results["tasks"][task]["score"] for task in tasks}
    table = []
    for label, row in rows.items():
        change = differences(rows, label)
        shown = "" if change is None else f"{change:+.3f}"
        cells = [cell(row["tasks"].get(task), score) for task, score in scores.items()]
        table.append([label, f"{row['parameters']:,}", *cells, shown])
    titles = [f"{task} ({NAMES[score]})" for task, score in scores.items()]
    return markdown(["variant", "parameters", *titles, "mean difference"], table)


def differences(rows: Mapping[str, Any], label: str) -> float | None:
    """How far a variant is above the defaults, as a mean over the tasks that both were tuned on."""
    default = rows.get("default", {"tasks": {}})["tasks"]
    both = [task for task in rows[label]["tasks"] if task in default]
    if label == "default" or not both:
        return None
    return statistics.fmean(rows[label]["tasks"][task]["mean"] - default[task]["mean"] for task in both)


def beside(rows: Mapping[str, Any]) -> tuple[dict[str, float], dict[float, str]]:
    """Where each method stands on an axis of sizes, and what to write there.

    Methods of nearly one size would hide each other: they stand side by side around it, in the order of the table.
    """
    sizes = {label: row["parameters"] for label, row in rows.items()}
    places: dict[str, float] = {}
    ticks: dict[float, str] = {}
    while left := [label for label in sizes if label not in places]:
        least = min(sizes[label] for label in left)
        near = [label for label in left if sizes[label] < 1.25 * least]
        middle = statistics.median(sizes[label] for label in near)
        places |= {label: middle * 1.15 ** (i - (len(near) - 1) / 2) for i, label in enumerate(near)}
        ends = sorted({f"{sizes[label] / 1e3:.3g}" for label in near}, key=float)
        ticks[middle] = f"{ends[0]}k" if len(ends) == 1 else f"{ends[0]} to {ends[-1]}k"
    return places, ticks


def plot_scores(results: Results, path: Path) -> None:
    """Score against parameters, a panel a task; bars are one standard deviation over seeds."""
    from matplotlib.figure import Figure

    rows = summary(results, "study")
    tasks = [task for task in results["tasks"] if any(task in row["tasks"] for row in rows.values())]
    columns = min(3, len(tasks))
    lines = -(-len(tasks) // columns)
    figure = Figure(figsize=(1 + 3.4 * columns, 0.8 + 2.8 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).reshape(-1)
    bare, (places, ticks) = bare_scores(results), beside(rows)
    for axes, task in zip(panels, tasks, strict=False):
        facts = results["tasks"][task]
        if facts["majority"] is not None:
            axes.axhline(facts["majority"], color="0.6", linewidth=1, linestyle="--", label="most frequent label")
        if task in bare:
            axes.axhline(bare[task][facts["score"]], color="0.6", linewidth=1, linestyle=":", label="bare backbone")
        for i, (label, row) in enumerate(rows.items()):
            if task in row["tasks"]:
                x, cells = places[label], row["tasks"][task]
                axes.errorbar(x, cells["mean"], cells["spread"], color=f"C{i % 10}", marker="o", capsize=3, label=label)
                axes.plot([x] * len(cells["scores"]), cells["scores"], ".", color=f"C{i % 10}", alpha=0.4, markersize=4)
        axes.set(xscale="log", title=task, ylabel=NAMES[facts["score"]], xlabel="parameters")
        axes.set_xlim(min(places.values()) / 1.5, max(places.values()) * 1.5)
        axes.set_xticks(list(ticks), list(ticks.values()))
        axes.set_xticks([], minor=True)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[len(tasks) :]:
        axes.set_visible(False)
    handles = {label: h for axes in panels for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False)
    save_figure(figure, path)


def plot_ablation(results: Results, path: Path) -> None:
    """Every seed of every variant as a dot, the mean as a bar, a panel a task; the line is the defaults' mean."""
    from matplotlib.figure import Figure

    rows = summary(results, "ablation")
    tasks = list(dict.fromkeys(task for row in rows.values() for task in row["tasks"]))
    labels = list(rows)
    figure = Figure(figsize=(2.4 + 3.2 * len(tasks), 1.2 + 0.26 * len(labels)), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False, sharey=True)[0], tasks, strict=True):
        if task in rows.get("default", {"tasks": {}})["tasks"]:
            axes.axvline(rows["default"]["tasks"][task]["mean"], color="0.7", linewidth=1)
        for y, label in enumerate(labels):
            if task in rows[label]["tasks"]:
                cells = rows[label]["tasks"][task]
                axes.plot(cells["scores"], [y] * len(cells["scores"]), "o", color="C0", alpha=0.4, markersize=5)
                axes.plot(cells["mean"], y, "|", color="C0", markersize=14, markeredgewidth=2)
        axes.set(title=task, xlabel=NAMES[results["tasks"][task]["score"]])
        axes.set_yticks(range(len(labels)), labels)
        axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    save_figure(figure, path)


def write_report(results: Results, out: Path) -> None:
    """table.md and scores.png of the study, ablation.md and ablation.png of the ablation, as far as they are."""
    if summary(results, "study"):
        write_text(out / "table.md", study_table(results))
        plot_scores(results, out / "scores.png")
    if summary(results, "ablation"):
        write_text(out / "ablation.md", ablation_table(results))
        plot_ablation(results, out / "ablation.png")
