"""Compares PARA, LoRA, (IA)3 and FanLoRA at equal numbers of parameters, and PARA's open choices with each other.

    python train/study.py --data FOLDER --out study
    python train/study.py --data FOLDER --out study --part ablation

FOLDER/TASK holds train.jsonl, test.jsonl and perhaps dev.jsonl, rows as `para-jax finetune` takes them. Tasks whose
responses are a few labels, or whose rows have choices, are scored by the likelihood of the choices; those with
references by corpus BLEU; the others by exact match.

Every method has a grid of learning rates. All of them are tuned at once, as tenants of one multi-tenant step; on dev
each task chooses its rate; then all seeds with that rate are tuned at once, from first weights and orders of rows
that the sweep has not seen. An adapter is kept as it was where its loss on dev was lowest, and the kept ones meet the
test rows once, at the end. The ablation runs each variant of PARA in the same way.

OUT/study.json is written after every part; the same command goes on where it was stopped. Then table.md, ablation.md
and the pictures are drawn from it, and `--part report` draws them again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from study_data import Task, mixture, read_task
from study_report import write_report
from study_systems import GRIDS, METHODS, System, matched, method_systems, variant_systems, variants
from study_tune import Run, Tuned, speed, tune

from para_jax import (
    AdapterBank,
    Backbone,
    FanLoraConfig,
    LoraConfig,
    MethodConfig,
    ParaJaxError,
    default_stacked,
    evaluate,
    importance_scores,
    keep_freed_memory,
    keep_number,
    load_tokenizer,
    plot_importance,
    tiny_backbone_path,
)
from para_jax.cli.common import pairs
from para_jax.errors import unknown
from para_jax.files import write_json
from para_jax.progress import duration

TASKS = ("sst2", "trec", "subj", "copa", "e2e", "scan")
ABLATION_TASKS = ("trec", "subj")


class Part(NamedTuple):
    """What is computed and recorded at once; `work` in tokens to tune on."""

    key: str
    work: float
    run: Callable[[], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Study:
    """All that parts read, and the results that they add to. `backbone` is tuned with, `scorer` answers."""

    args: argparse.Namespace
    backbone: Backbone
    scorer: Backbone
    tokenizer: Any
    tasks: Mapping[str, Task]
    results: dict[str, Any]

    @property
    def done(self) -> dict[str, Any]:
        return self.results["parts"]


def systems(study: Study) -> list[System]:
    """What is compared."""
    args, shape = study.args, study.backbone.config
    if args.part == "ablation":
        return variant_systems(args.variants or tuple(variants()), args.r[0], shape, args.grids)
    return method_systems(args.methods, args.r, shape, args.grids, partial(fanlora_config, study))


def plan(study: Study) -> Iterator[Part]:
    """Every part, in order."""
    args, everything = study.args, study.tasks
    if args.part == "study":
        together = "+".join(everything)
        yield Part(f"bare/{together}", 0, partial(score_bare, study))
        if "fanlora" in args.methods:
            both = mixture(list(everything.values()))
            work = work_of(study, {"mixture": both}, len(args.grids["lora"])) * args.mixture_steps / args.steps
            yield Part(f"fanlora/{together}", work, partial(importance_part, study, both))
    for system in systems(study):
        key, swept = (f"{system.part}/{system.label}/{kind}/{'+'.join(everything)}" for kind in ("seeds", "sweep"))
        if len(system.grid) > 1:
            yield Part(swept, work_of(study, everything, len(system.grid)), partial(sweep, study, system))
        yield Part(key, work_of(study, everything, args.seeds), partial(seeds, study, system, swept))
    if args.part == "study":
        yield Part(f"speed/{','.join(args.methods)}", 0, partial(speed_part, study))


def work_of(study: Study, tasks: Mapping[str, Task], copies: int) -> float:
    mean = sum(np.mean([len(e) for e in task.train]) for task in tasks.values())
    return float(copies * mean * study.args.rows * study.args.steps)


def tuned(study: Study, config: MethodConfig, runs: list[Run], tasks: Mapping[str, Task], **options: Any) -> Tuned:
    args = study.args
    options = {"steps": args.steps, "rows": args.rows, "every": args.every, "show": show} | options
    return tune(study.backbone, config, runs, tasks, **options)


def sweep(study: Study, system: System) -> dict[str, Any]:
    """Every learning rate of the grid on every task, with seed 0."""
    runs = [Run(task, lr, 0) for task in study.tasks for lr in system.grid]
    result = tuned(study, system.config(), runs, study.tasks)
    return {"runs": list(result.runs.values()), "training_tokens_per_second": result.tokens_per_second}


def best_rates(study: Study, system: System, sweep_key: str) -> dict[str, float]:
    """The learning rate of each task whose kept adapter had the lowest loss on dev."""
    if len(system.grid) == 1:
        return dict.fromkeys(study.tasks, system.grid[0])
    runs = sorted(study.done[sweep_key]["runs"], key=lambda run: -run["dev_loss"])
    return {run["task"]: run["lr"] for run in runs}


def seeds(study: Study, system: System, sweep_key: str) -> dict[str, Any]:
    """Every seed of every task with its best learning rate; the kept adapters answer the test rows."""
    rates, config, tasks = best_rates(study, system, sweep_key), system.config(), study.tasks
    runs = [Run(task, rates[task], seed) for task in tasks for seed in range(1, study.args.seeds + 1)]
    result = tuned(study, config, runs, tasks)
    scores = scored(study, {name: tasks[run["task"]] for name, run in result.runs.items()}, result.bank)
    return {
        "runs": [{**run, "scores": scores[name]} for name, run in result.runs.items()],
        "training_tokens_per_second": result.tokens_per_second,
        "system": system.described(config, study.backbone.config),
    }


def scored(study: Study, tenants: Mapping[str, Task], bank: AdapterBank | None) -> dict[str, dict[str, float]]:
    """The scores of each tenant on its task's test rows."""
    began = shown = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal shown
        if time.monotonic() - shown > 5 and done:
            shown = time.monotonic()
            show(f"test {done}/{total}  {duration((shown - began) / done * (total - done))} left")

    found = evaluate(
        study.scorer, study.tokenizer, {name: task.test for name, task in tenants.items()}, bank,
        max_new_tokens={name: task.max_new_tokens for name, task in tenants.items()},
        batch_size=study.args.batch_size, progress=progress,
    )  # fmt: skip
    return {name: {k: v for k, v in scores.items() if k != "predictions"} for name, scores in found.items()}


def score_bare(study: Study) -> dict[str, Any]:
    """The backbone without adapters."""
    return {"scores": scored(study, study.tasks, None)}


def importance_part(study: Study, both: Task) -> dict[str, Any]:
    """FanLoRA's first two steps: LoRA on every linear module, tuned on the mixture, and its modules' scores."""
    args = study.args
    runs = [Run("mixture", lr, 0) for lr in args.grids["lora"]]
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    result = tuned(study, config, runs, {"mixture": both}, steps=args.mixture_steps)
    best = min(result.runs, key=lambda name: result.runs[name]["dev_loss"])
    scores = importance_scores("ablation", study.backbone, result.bank[best], both.dev, show=show)
    return {
        "runs": list(result.runs.values()),
        "rows": both.facts["used"],
        "sites": list(study.backbone.config.linear_sites),
        "scores": scores.tolist(),
    }


def fanlora_config(study: Study, budget: int) -> MethodConfig:
    """FanLoRA's third step: the highest modules of each layer, at the rank that makes the size."""
    shape = study.backbone.config
    scores = np.array(study.done[f"fanlora/{'+'.join(study.tasks)}"]["scores"])
    kept = keep_number(scores, shape, study.args.keep)
    title = f"importance of each module; the {study.args.keep} kept in each layer are framed"
    plot_importance(scores, kept, shape, study.args.out / "importance.png", title)
    return matched("fanlora", budget, shape, target_modules=FanLoraConfig.of(kept, shape).target_modules)


def speed_part(study: Study) -> dict[str, Any]:
    """Training and decoding of all methods in turn, on rows of the first task."""
    configs: dict[str, MethodConfig | None] = {"bare": None}
    configs |= {system.label: system.config() for system in systems(study)}
    first = next(iter(study.tasks.values())).train
    given = (study.backbone, study.scorer, study.tokenizer, configs, first)
    return {"speed": speed(*given, rows=study.args.rows, show=show)}


def show(line: str) -> None:
    print(line, flush=True)


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with a folder for each task")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, or to go on in")
    parser.add_argument("--part", choices=("study", "ablation", "report"), default="study")
    parser.add_argument("--model", help="backbone (default: the tiny one that ships)")
    parser.add_argument("--dtype", default="auto", help="of the backbone while tuning; scores are made with auto")
    parser.add_argument(
        "--tasks", nargs="+", help=f"default: {', '.join(TASKS)}; ablation: {', '.join(ABLATION_TASKS)}"
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="default: all")
    parser.add_argument("--variants", nargs="+", choices=variants(), metavar="NAME", help="of the ablation")
    parser.add_argument(
        "--r", nargs="+", type=int, default=[12], help="of PARA: its sizes are the budgets (default: 12)"
    )
    parser.add_argument(
        "--lr",
        action="append",
        default=[],
        metavar="METHOD=A,B,C",
        help="another grid of learning rates for a method or `ablation`; with one rate, no sweep; repeat",
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of the best rate (default: 3)")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rows", type=int, default=8, help="of each run in a step (default: 8)")
    parser.add_argument("--every", type=int, default=50, help="steps between losses on dev (default: 50)")
    parser.add_argument("--dev-rows", type=int, default=64)
    parser.add_argument("--test-rows", type=int, default=500)
    parser.add_argument("--max-length", type=int, default=384, help="tokens of a row that is tuned on (default: 384)")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="the most of an answer (default: 256)")
    parser.add_argument("--mixture-steps", type=int, default=600, help="of the LoRA that FanLoRA scores (default: 600)")
    parser.add_argument("--keep", type=int, default=2, help="modules of each layer that FanLoRA keeps (default: 2)")
    parser.add_argument("--batch-size", type=int, default=64, help="rows that are scored together (default: 64)")
    return parser


SETTINGS = ("r", "seeds", "steps", "rows", "every", "dev_rows", "test_rows", "max_length", "max_new_tokens",
            "mixture_steps", "keep", "dtype", "model")  # fmt: skip


def opened(args: argparse.Namespace) -> dict[str, Any]:
    """The results so far. Raises ParaJaxError if they were made with other settings."""
    used = ("ablation",) if args.part == "ablation" else ("lora", *args.methods)
    settings = {name: getattr(args, name) for name in SETTINGS}
    settings |= {f"lr of {name}": list(args.grids[name]) for name in used}
    if (args.out / "study.json").exists():
        results = json.loads((args.out / "study.json").read_text())
    else:
        about = {"jax": jax.__version__, "backend": jax.default_backend(), "python": platform.python_version()}
        results = {"settings": {}, "environment": about, "tasks": {}, "parts": {}}
    for name, value in settings.items():
        before = results["settings"].setdefault(name, value)
        if before != value:
            raise ParaJaxError(f"{args.out}/study.json was made with {name}={before!r}; choose another --out")
    return results


def main(argv: list[str] | None = None) -> None:
    args = options().parse_args(argv)
    given = {name: tuple(map(float, rates.split(","))) for name, rates in pairs(args.lr, "--lr").items()}
    for name in given:
        if name not in GRIDS:
            raise unknown("method in --lr", name, GRIDS)
    args.grids = GRIDS | given
    path = args.out / "study.json"
    if args.part == "report":
        write_report(json.loads(path.read_text()), args.out)
        return
    if args.data is None:
        raise ParaJaxError("--data is missing: the folder with a folder for each task")
    args.tasks = args.tasks or (ABLATION_TASKS if args.part == "ablation" else TASKS)
    results = opened(args)

    keep_freed_memory()
    model = args.model or tiny_backbone_path()
    # Stacked layers for tuning, of which one is compiled; for scoring what decodes fastest, on a CPU layers apart.
    backbone = Backbone.from_pretrained(model, dtype=args.dtype, stacked=True)
    scorer = backbone if args.dtype == "auto" and default_stacked() else Backbone.from_pretrained(model)
    tokenizer = load_tokenizer(model)
    results["backbone"] = {"name": Path(model).name, "parameters": backbone.config.size}
    length = min(args.max_length, backbone.config.max_position_embeddings)
    tasks = {}
    for name in args.tasks:
        tasks[name] = read_task(args.data / name, tokenizer, backbone, dev_rows=args.dev_rows,
                                test_rows=args.test_rows, length=length, new_tokens=args.max_new_tokens)  # fmt: skip
        if results["tasks"].setdefault(name, tasks[name].facts) != tasks[name].facts:
            raise ParaJaxError(f"the rows of {name} are not those of {path}; choose another --out")

    study = Study(args, backbone, scorer, tokenizer, tasks, results)
    parts = list(plan(study))
    for number, part in enumerate(parts, 1):
        if part.key in study.done:
            continue
        done = [p for p in parts if p.key in study.done and p.work]
        left = sum(p.work for p in parts if p.key not in study.done)
        rate = sum(study.done[p.key]["seconds"] for p in done) / sum(p.work for p in done) if done else None
        show(f"[{number}/{len(parts)}] {part.key}" + (f"  about {duration(rate * left)} left" if rate and left else ""))
        began = time.monotonic()
        result = part.run()
        study.done[part.key] = {**result, "seconds": round(time.monotonic() - began, 1)}
        write_json(path, results)
        write_report(results, args.out)
        if number % 4 == 0:
            # Every program holds memory maps, of which Linux gives a process 65,530.
            jax.clear_caches()
    show(f"{len(parts)} parts are in {path}")


if __name__ == "__main__":
    try:
        main()
    except ParaJaxError as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on with the part that was cut off") from None
