"""Steps of eight tenants in one fixed shape: all at once with para_jax, against eight peft runs one after the other.

    python benchmarks/finetune.py                       (the tiny backbone, then the 32M shape)
    python benchmarks/finetune.py --data A.jsonl B.jsonl ...      (tenants' files instead of drawn rows)
    python benchmarks/finetune.py --shapes tiny --steps 1 --rounds 1 --json small.json      (a smoke test)

The same rows and tokens, the same number of rows of each tenant in a step, float32, two cores, AdamW with a
gradient norm of at most 1, loss on the response only:

    para              `accumulate` and `update` of `para_jax.training.step`: every step holds all tenants' rows,
                      packed into micro-batches of one fixed shape, layers stacked; PARA, r=12
    lora, same size   peft's LoRA on PARA's sites, its r chosen for about as many parameters
    lora, r=8         peft's LoRA as peft does it by default: q_proj and v_proj
    ia3               peft's IA3 as peft does it by default: k_proj, v_proj and down_proj

A peft run is a model with one adapter and a plain loop over batches of that tenant's rows, padded to the
longest, on transformers' model. Its building and its first step are not timed; ours compiles before and is
given a step, too. So this is the speed of steps. A run also plans and compiles, and may use two shapes on a CPU.
Rows are drawn with mixed lengths, or come from the files; tokens a second count tokens that are not padding.
Before anything is timed, the losses of fresh adapters, which are the identity, are compared: they show that all
see the same tokens. Our process keeps the memory it frees, as `para-jax finetune` does; peft's does what Python
and torch do, or with --keep-memory the same as ours.

Goal: on the tiny backbone at least 1.5 times the tokens a second of each; on the 32M shape (8 layers, hidden
size 512, random weights) it is reported.
"""

from __future__ import annotations

import argparse
import random
import statistics
from pathlib import Path
from typing import Any

import common
import shapes

# Rows of a tenant: token ids of the prompt and of the response.
Row = tuple[list[int], list[int]]


def drawn_rows(tenants: int, count: int, vocabulary: int) -> list[list[Row]]:
    draw = random.Random(0)

    def ids(low: int, high: int) -> list[int]:
        return [draw.randrange(2, vocabulary) for _ in range(draw.randint(low, high))]

    return [[(ids(16, 64), ids(2, 24)) for _ in range(count)] for _ in range(tenants)]


def rows_of_files(paths: list[Path], tenants: int, count: int, longest: int) -> list[list[Row]]:
    """The first rows of each file that are short enough; fewer files than tenants serve several."""
    from transformers import AutoTokenizer

    from para_jax import BackboneConfig, read_examples, tiny_backbone_path

    tokenizer = AutoTokenizer.from_pretrained(tiny_backbone_path())
    eos = BackboneConfig.from_pretrained(tiny_backbone_path()).eos_token_ids
    found = []
    for path in paths:
        examples = [e for e in read_examples(path, tokenizer, eos) if len(e) <= longest]
        found.append([(list(e.prompt_ids), list(e.response_ids)) for e in examples])
    data = []
    for tenant in range(tenants):
        rows, start = found[tenant % len(found)], tenant // len(found) * count
        data.append([rows[(start + i) % len(rows)] for i in range(count)])
    return data


def rows_of_step(rows: list[Any], step: int, count: int) -> list[Any]:
    return [rows[(step * count + i) % len(rows)] for i in range(count)]


def para_jax_worker(folder: str, data: list[list[Row]], count: int, remat: bool) -> dict[str, Any]:
    from para_jax import keep_freed_memory

    keep_freed_memory()  # as the command line does
    compilations = common.count_compilations()
    import jax
    from steps import Steps

    from para_jax import AdapterBank, Backbone, Example, ParaConfig
    from para_jax.training.places import values_by_tenant

    backbone = Backbone.from_pretrained(folder, dtype="float32", stacked=True)
    examples = {f"tenant-{i}": [Example.of(p, r) for p, r in rows] for i, rows in enumerate(data)}
    bank = AdapterBank.create(dict.fromkeys(examples, ParaConfig(r=12)), backbone.config)
    steps = Steps(backbone, bank, examples, count, "layers" if remat else "none")

    def one(step: int) -> tuple[list[float], int]:
        """A step as the training loop takes it: the micro-batches are made here, and losses are fetched."""
        rows = {name: rows_of_step(own, step, count) for name, own in examples.items()}
        values = jax.device_get(steps.take(steps.batches(rows)))
        losses = values_by_tenant(steps.step_tenants, values)["loss"]
        return [losses[name] for name in examples], sum(len(e) for own in rows.values() for e in own)

    def run(first: int, number: int) -> tuple[float, int]:
        one(first)
        seconds, sizes = common.timed(lambda: [one(first + 1 + i)[1] for i in range(number)])
        return seconds, sum(sizes)

    def facts() -> dict[str, Any]:
        return {
            "backend": jax.default_backend(),
            "devices": [device.device_kind for device in jax.local_devices()],
            "parameters": ParaConfig(r=12).size(backbone.config),
            "backbone": backbone.config.size,
            "dtype": str(backbone.dtype),
            "micro_batch": steps.shape,
        }

    return {"run": run, "losses": lambda: one(0)[0], "facts": facts, "compilations": compilations}


def peft_worker(
    folder: str, data: list[list[Row]], count: int, threads: int, para: int, keep_memory: bool
) -> dict[str, Any]:
    import copy

    import torch
    from peft import IA3Config, LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    if keep_memory:
        from para_jax import keep_freed_memory

        keep_freed_memory()
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def lora(r: int, *sites: str) -> Any:
        return LoraConfig(r=r, lora_alpha=2 * r, target_modules=list(sites), task_type="CAUSAL_LM")

    def size(config: Any) -> int:
        model = get_peft_model(copy.deepcopy(base), config)
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    sites = ("q_proj", "v_proj", "up_proj")
    methods = {
        "lora, same size": lora(max(1, round(para / size(lora(1, *sites)))), *sites),
        "lora, r=8": lora(8, "q_proj", "v_proj"),
        "ia3": IA3Config(task_type="CAUSAL_LM"),
    }

    def batch(rows: list[Row]) -> dict[str, Any]:
        longest = max(len(p) + len(r) for p, r in rows)
        ids, labels = (
            torch.zeros(len(rows), longest, dtype=torch.long),
            torch.full((len(rows), longest), -100),
        )
        mask = torch.zeros_like(ids)
        for i, (p, r) in enumerate(rows):
            ids[i, : len(p) + len(r)] = torch.tensor(p + r)
            labels[i, len(p) : len(p) + len(r)] = torch.tensor(r)
            mask[i, : len(p) + len(r)] = 1
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def tenant(method: str, rows: list[Row]) -> Any:
        """A run of its own: a model with a fresh adapter, and its steps."""
        model: Any = get_peft_model(copy.deepcopy(base), methods[method]).train()
        weights = [p for p in model.parameters() if p.requires_grad]
        adamw = torch.optim.AdamW(weights, lr=1e-3, weight_decay=0.0, fused=True)

        def one(step: int) -> float:
            loss = model(**batch(rows_of_step(rows, step, count)), use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            adamw.step()
            adamw.zero_grad()
            return loss.item()

        return one

    def run(method: str, first: int, steps: int) -> tuple[float, int]:
        """All tenants, one after the other."""
        seconds = tokens = 0
        for rows in data:
            one = tenant(method, rows)
            one(first)
            seconds += common.timed(lambda one=one: [one(first + 1 + i) for i in range(steps)])[0]
            for i in range(steps):
                tokens += sum(len(p) + len(r) for p, r in rows_of_step(rows, first + 1 + i, count))
        return seconds, tokens

    def facts() -> dict[str, Any]:
        return {name: {"r": getattr(c, "r", None), "parameters": size(c)} for name, c in methods.items()}

    def losses(method: str) -> list[float]:
        return [tenant(method, rows)(0) for rows in data]

    return {"run": run, "facts": facts, "losses": losses}


def measure(args: argparse.Namespace, folder: str, vocabulary: int) -> dict[str, Any]:
    """One backbone: every system's tokens a second, and ours over theirs."""
    count = args.rows * (args.steps + 1)
    if args.data:
        data = rows_of_files(args.data, args.tenants, count, longest=256)
    else:
        data = drawn_rows(args.tenants, count, vocabulary)
    ours = common.Worker(args.threads, para_jax_worker, folder, data, args.rows, args.remat)
    facts = ours.ask("facts")
    given = (folder, data, args.rows, args.threads, facts["parameters"], args.keep_memory)
    theirs = common.Worker(args.threads, peft_worker, *given)
    methods = theirs.ask("facts")

    losses = ours.ask("losses")
    pairs = [pair for name in methods for pair in zip(losses, theirs.ask("losses", name), strict=True)]
    worst = max(abs(a - b) / abs(b) for a, b in pairs)
    if worst > 1e-4:
        raise SystemExit(f"the losses of fresh adapters differ by {worst:.1e} of themselves: not the same tokens")
    ours.ask("run", 0, args.steps)
    compiled = ours.ask("compilations")

    rates: dict[str, list[float]] = {"para": [], **{name: [] for name in methods}}
    step_seconds: dict[str, list[float]] = {name: [] for name in rates}
    for _ in range(args.rounds):
        for name in rates:
            asked = ("run", 0, args.steps) if name == "para" else ("run", name, 0, args.steps)
            seconds, tokens = (ours if name == "para" else theirs).ask(*asked)
            rates[name].append(tokens / seconds)
            step_seconds[name].append(seconds / args.steps)
    compiled = ours.ask("compilations") - compiled
    ours.close(), theirs.close()

    systems = {
        name: {
            **(methods.get(name) or {"r": 12, "parameters": facts["parameters"]}),
            "tokens_per_second": common.spread(rates[name]),
            "step_seconds": common.spread(step_seconds[name]),
            "para_over_this": common.ratio(rates["para"], rates[name]),
        }
        for name in rates
    }
    common.print_table(
        f"{facts['backbone'] / 1e6:.1f}M parameters, {facts['dtype']}; {args.tenants} tenants, {args.rows} "
        f"rows each in a step, {args.steps} steps in one fixed shape ({facts['micro_batch']} tokens); "
        f"{args.rounds} rounds: median (min..max)",
        ("", "r", "parameters each", "s a step of all", "tokens/s", "para / this"),
        [
            (name, s["r"] or "-", f"{s['parameters']:,}", common.shown(s["step_seconds"]),
             common.shown(s["tokens_per_second"], 0), common.shown(s["para_over_this"]))
            for name, s in systems.items()
        ],
    )  # fmt: skip
    lengths = [len(p) + len(r) for tenant in data for p, r in tenant]
    row_tokens = {"least": min(lengths), "mean": statistics.mean(lengths), "most": max(lengths)}
    return {
        **facts,
        "row_tokens": row_tokens,
        "systems": systems,
        "largest_loss_difference": worst,
        "compilations_after_first_round": compiled,
    }


def main() -> None:
    parser = common.parser(__doc__, rounds=5)
    parser.add_argument("--shapes", nargs="+", choices=("tiny", *shapes.SHAPES), default=["tiny", "32m"])
    parser.add_argument("--tenants", type=int, default=8)
    parser.add_argument("--rows", type=int, default=4, help="of each tenant in a step")
    parser.add_argument("--steps", type=int, default=4, help="timed steps of a run")
    parser.add_argument("--threads", type=int, default=2, help="cores that a system may use")
    parser.add_argument("--data", type=Path, nargs="+", help=".jsonl files to use as tenants")
    parser.add_argument("--remat", action="store_true", help="recompute activations in our step")
    parser.add_argument("--keep-memory", action="store_true", help="let peft's process keep freed memory as ours does")
    args = parser.parse_args()
    environment = common.environment()

    results = {}
    with common.temporary_folder() as root:
        for shape in args.shapes:
            if shape == "tiny":
                from para_jax import BackboneConfig, tiny_backbone_path

                folder = tiny_backbone_path()
                vocabulary = BackboneConfig.from_pretrained(folder).vocab_size
            else:
                folder, vocabulary = str(root / shape), shapes.SHAPES[shape]["vocab_size"]
                writer = common.Worker(args.threads, shapes.writing)
                writer.ask("write", folder, shape)
                writer.close()
            results[shape] = measure(args, folder, vocabulary)

    goals = []
    for shape, result in results.items():
        for name, system in result["systems"].items():
            if shape == "tiny" and name != "para":
                what = f"tokens/s on {shape}, para / {name}"
                goals.append(common.goal(what, system["para_over_this"], at_least=1.5))
        compiled = result["compilations_after_first_round"]
        goals.append(common.goal(f"compilations after the first round on {shape}", compiled, at_most=0))
    common.print_goals(goals)
    environment |= {key: results[args.shapes[0]][key] for key in ("backend", "devices")}
    options = {k: getattr(args, k) for k in ("tenants", "rows", "steps", "rounds", "threads", "remat", "keep_memory")}
    options["data"] = [f"{path.parent.name}/{path.name}" for path in args.data] if args.data else "drawn"
    report = {"environment": environment, **options, "results": results, "goals": goals}
    common.write_json(args.json, "finetune", report)


if __name__ == "__main__":
    main()
