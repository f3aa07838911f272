"""The report of a run: report.json for programs, and report.html, one self-contained file, for people."""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from para_jax.adapters.bank import AdapterBank
from para_jax.backbones.decoder import Backbone
from para_jax.files import write_text
from para_jax.progress import duration
from para_jax.training.folder import PLOT, REPORT, REPORT_PAGE
from para_jax.training.metrics import Progress
from para_jax.training.settings import Settings

if TYPE_CHECKING:
    from para_jax.training.watch import DevStatus

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 64rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem } img { max-width: 100% }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #ddd }
th { border-bottom: 2px solid #888; font-weight: 600 } th:first-child, td:first-child { text-align: left }
.bad { color: #b00020 }
"""


def write_report(
    out: Path,
    lines: Sequence[Mapping[str, Any]],
    backbone: Backbone,
    bank: AdapterBank,
    settings: Mapping[str, Settings],
    dev: Mapping[str, DevStatus],
    steps_taken: Mapping[str, int],
    failed: Mapping[str, int],
    progress: Progress,
) -> None:
    """Writes both files into a run's folder, which already has loss.png. Existing files are replaced.

    Args:
      dev: the evaluations of the tenants with dev rows.
      failed: the run's step at which a tenant's gradient was NaN or infinite, or 0.
    """
    configs = {name: group.config for group in bank.groups for name in group.names}
    rate = progress.tokens / progress.seconds if progress.steps else None
    report = {
        "steps": lines[-1]["step"] if lines else 0,
        "tokens": sum(line["tokens"] for line in lines),
        # Of the last process of the run, without its first step, which compiles.
        "throughput": {
            "steps": progress.steps,
            "seconds": round(progress.seconds, 3),
            "tokens_per_second": None if rate is None else round(rate, 1),
        },
        "backbone": {
            "parameters": backbone.config.size,
            "dtype": str(backbone.dtype),
            "quantize": backbone.quantize,
            "mesh": None if backbone.mesh is None else dict(backbone.mesh.shape),
        },
        "memory": {
            "devices": [
                {
                    "device": str(d),
                    "kind": d.device_kind,
                    "peak_bytes": (d.memory_stats() or {}).get("peak_bytes_in_use"),
                }
                for d in jax.local_devices()
            ],
            "host_peak_bytes": host_peak(),
        },
        "tenants": {
            name: {
                "method": configs[name].method,
                "parameters": configs[name].size(backbone.config),
                **progress_of(name, lines, settings[name], dev.get(name), steps_taken[name], failed[name]),
            }
            for name in settings
        },
    }
    picture = out / PLOT
    write_text(out / REPORT, json.dumps(report, indent=1) + "\n")
    write_text(out / REPORT_PAGE, page(report, out.name, picture.read_bytes() if picture.is_file() else b""))


def _device(device: jax.Device) -> dict[str, Any]:
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
    return {"device": str(device), "kind": device.device_kind, "peak_bytes": peak}


def host_peak() -> int | None:
    """The peak resident memory of this process in bytes; None if the system does not report it.

    >>> host_peak() > 2**20
    True
    """
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def progress_of(
    name: str,
    lines: Sequence[Mapping[str, Any]],
    settings: Settings,
    dev: DevStatus | None,
    steps_taken: int,
    failed: int,
) -> dict[str, Any]:
    """One tenant's steps, losses and state. NaN and infinite losses are None, as in metrics.jsonl."""
    losses = [line["loss"][name] for line in lines if name in line["loss"]]
    if failed:
        state = f"failed at step {failed}"
    elif dev is not None and dev.stopped:
        state = "stopped early"
    else:
        state = "done" if steps_taken >= settings.steps else "interrupted"
    evaluated = dev is not None and dev.step > 0
    return {
        "steps": steps_taken,
        "steps_planned": settings.steps,
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "best_dev_loss": dev.loss if dev is not None and evaluated else None,
        "best_dev_step": dev.step if dev is not None and evaluated else None,
        "state": state,
    }


def page(report: Mapping[str, Any], title: str, picture: bytes) -> str:
    rate, memory, backbone = report["throughput"], report["memory"], report["backbone"]
    speed = "not measured: this process took at most one step"
    if rate["tokens_per_second"] is not None:
        speed = f"{rate['tokens_per_second']:,.0f} tokens/s over {rate['steps']:,} steps, {duration(rate['seconds'])}"
    mesh = backbone["mesh"] and ", ".join(f"{axis}={size}" for axis, size in backbone["mesh"].items())
    facts = [
        ("steps", f"{report['steps']:,}"),
        ("tokens", f"{report['tokens']:,}"),
        ("throughput", speed),
        ("backbone", f"{backbone['parameters']:,} parameters, {backbone['quantize'] or backbone['dtype']}, frozen"),
        ("mesh", mesh or "one device"),
    ]
    measured = [d for d in memory["devices"] if d["peak_bytes"] is not None]
    facts += [(f"peak memory of {d['device']}, {d['kind']}", _gib(d["peak_bytes"])) for d in measured]
    if not measured:
        facts.append(("peak memory of the process", _gib(memory["host_peak_bytes"])))

    header = ("tenant", "method", "parameters", "steps", "first loss", "last loss", "best dev loss", "at step", "state")
    rows = [
        (
            name, t["method"], f"{t['parameters']:,}", f"{t['steps']:,} of {t['steps_planned']:,}",
            _loss(t["first_loss"]), _loss(t["last_loss"]), _loss(t["best_dev_loss"]), t["best_dev_step"] or "",
            t["state"],
        )
        for name, t in report["tenants"].items()
    ]  # fmt: skip
    image = base64.b64encode(picture).decode()
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            f"<title>{escape(title)}: fine-tuning report</title><style>{STYLE}</style></head><body>",
            f"<h1>{escape(title)}: {len(rows)} tenant{'s' * (len(rows) != 1)} tuned on one backbone</h1>",
            '<table id="run">',
            *(f"<tr><td>{escape(what)}</td><td>{escape(value)}</td></tr>" for what, value in facts),
            f'</table><h2>Loss</h2><p><img alt="loss of every tenant by step" src="data:image/png;base64,{image}"></p>'
            if picture
            else "</table>",
            '<h2>Tenants</h2><table id="tenants"><thead>',
            _row("th", header),
            "</thead><tbody>",
            *(_row("td", row, bad=row[-1].startswith("failed")) for row in rows),
            "</tbody></table></body></html>\n",
        ]
    )


def _row(cell: str, values: Sequence[Any], bad: bool = False) -> str:
    style = ' class="bad"' if bad else ""
    return f"<tr{style}>{''.join(f'<{cell}>{escape(str(value))}</{cell}>' for value in values)}</tr>"


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _gib(size: int | None) -> str:
    return "not known" if size is None else f"{size / 2**30:.2f} GiB"
