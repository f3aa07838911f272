"""Decoding: our bare backbone, PARA with eight tenants, transformers, and peft's mixed batch, side by side.

    python benchmarks/decode.py
    python benchmarks/decode.py --shape small --new 16 --rounds 1 --json small.json      (a smoke test)
    python benchmarks/decode.py --shape llama2-7b --dtype bfloat16 --rows 32 --prompt 128 --threads 0

The last one wants a GPU with 20 GB or more. The shape "100m" is a Llama of 97.5M parameters (12 layers,
hidden size 768, 12 heads, feed-forward 2048, vocabulary 8192, untied head) with random float32 weights,
written once as a Hugging Face folder that every system loads. Eight rows of 32 prompt tokens are continued
greedily by exactly 64 tokens on two cores:

    bare          `para_jax.complete` without adapters
    para          the same with eight different PARA tenants (r=12, random weights)
    transformers  its own `generate`, with its defaults
    peft          `generate` with `adapter_names`, eight different LoRA adapters (r=16, all linear layers)

Systems run in processes of their own, one at a time, in interleaved rounds with other prompts and other
tenants in each. Every run is repeated with one new token, which separates prefill from the decode steps: a
step is the difference divided by the tokens between. Within a round our two take turns three times and the
median counts, since they are compared to the percent. Shapes other than 100m are measured without torch
unless --systems says so.

Goals: a PARA step at most 1.03 of a bare one; PARA at least 2.7 times peft's tokens/s; bare at least 1.5
times those of transformers, with the same tokens; nothing compiled after the first batch, whatever tenants
and prompts come.

What a step cannot do without is reading the weights and the cache once. The last table has the bytes, the
rate at which wide products of as many rows read theirs here, and the time of the model's products alone, in a
chain.
"""

from __future__ import annotations

import argparse
import random
import statistics
from functools import partial
from typing import Any

import common
import least_work
import shapes

OURS, TORCH = ("bare", "para"), ("transformers", "peft")
Tokens = list[list[int]]
TURNS = {"bare": 3, "para": 3, "transformers": 1, "peft": 1}


def para_jax_worker(
    shape: str, folder: str | None, dtype: str, stacked: bool | None, rows: int, prompt: int, new: int
) -> dict[str, Any]:
    compilations = common.count_compilations()
    import jax
    from transformers import AutoTokenizer

    from para_jax import Backbone, ParaConfig, complete, tiny_backbone_path
    from para_jax.decoding.loop import bucket

    if folder is None:
        backbone = shapes.random_backbone(shape, dtype, stacked)
    else:
        backbone = Backbone.from_pretrained(folder, dtype=dtype, stacked=stacked)
    bank = shapes.random_bank(backbone.config, ParaConfig(r=12), 2 * rows)
    # Texts are not looked at; a tokenizer gives none for ids beyond its vocabulary.
    tokenizer = AutoTokenizer.from_pretrained(tiny_backbone_path())

    def run(tenants: list[str | None] | None, prompts: Tokens, new: int) -> tuple[float, Tokens]:
        adapters = {} if tenants is None else {"bank": bank, "tenants": tenants}
        go = partial(complete, backbone, tokenizer, prompts, max_new_tokens=new, eos_token_id=(), **adapters)
        seconds, completions = common.timed(go)
        return seconds, [c.tokens for c in completions]

    def facts() -> dict[str, Any]:
        c, size = backbone.config, backbone.dtype.itemsize
        columns = bucket(prompt, c.max_position_embeddings) + bucket(new, c.max_position_embeddings)
        kv = c.num_hidden_layers * c.num_key_value_heads * c.head_dim * size
        weights = sum(x.nbytes for x in jax.tree.leaves(backbone))
        memory = jax.local_devices()[0].memory_stats() or {}
        return {
            "backend": jax.default_backend(),
            "devices": [device.device_kind for device in jax.local_devices()],
            "parameters": c.size,
            "dtype": str(backbone.dtype),
            "layers": "stacked" if backbone.stacked else "unrolled",
            # Of an embedding that is not the head too, a step reads the rows of its tokens only.
            "weight_bytes": weights - (0 if c.tie_word_embeddings else c.vocab_size * c.hidden_size * size),
            "cache_bytes": 2 * rows * columns * kv,
            "device_peak_bytes": memory.get("peak_bytes_in_use"),
        }

    return {
        "run": run,
        "facts": facts,
        "compilations": compilations,
        "products": least_work.products_program(backbone, rows),
        "read_rate": least_work.wide_program(backbone, rows),
    }


def torch_worker(folder: str, adapters: int, threads: int) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if adapters:
        from peft import LoraConfig, get_peft_model

        # Without random weights LoRA starts as the identity; it would be as slow.
        lora = LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(model, lora, adapter_name="tenant-0")
        for i in range(1, adapters):
            model.add_adapter(f"tenant-{i}", lora)
        model.eval()

    def run(tenants: list[str | None] | None, prompts: Tokens, new: int) -> tuple[float, Tokens]:
        ids = torch.tensor(prompts)
        options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        if tenants is not None:
            options["adapter_names"] = tenants
        go = partial(model.generate, input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        with torch.inference_mode():
            seconds, out = common.timed(go)
        return seconds, out[:, ids.shape[1] :].tolist()

    return {"run": run}


def measure(args: argparse.Namespace, workers: dict[str, common.Worker]) -> dict[str, Any]:
    """The rounds: for each system and number of new tokens, seconds; and what is compared besides time."""
    vocabulary = shapes.SHAPES[args.shape]["vocab_size"]
    engine, draw = workers["bare"], random.Random(0)
    bank = [f"tenant-{i}" for i in range(2 * args.rows)]

    def batch() -> tuple[list[list[int]], dict[str, Any]]:
        prompts = [[draw.randrange(vocabulary) for _ in range(args.prompt)] for _ in range(args.rows)]
        some, mixed = draw.sample(bank, args.rows), draw.sample(bank[: args.rows], args.rows)
        return prompts, {"bare": None, "para": some, "transformers": None, "peft": mixed}

    prompts, tenants = batch()
    for name, worker in workers.items():
        for new in (1, args.new):
            worker.ask("run", tenants[name], prompts, new)
    engine.ask("products"), engine.ask("read_rate")
    compiled = engine.ask("compilations")

    seconds: dict[str, dict[int, list[float]]] = {name: {1: [], args.new: []} for name in workers}
    found: dict[str, list[float]] = {"products": [], "read_rate": []}
    same = changed = 0
    for _ in range(args.rounds):
        prompts, tenants = batch()
        times: dict[Any, list[float]] = {(name, new): [] for name in workers for new in (1, args.new)}
        tokens: dict[str, list[list[int]]] = {}
        for turn in range(max(TURNS.values())):
            for name in (n for n in workers if turn < TURNS[n]):
                for new in (1, args.new):
                    spent, tokens[name] = workers[name].ask("run", tenants[name], prompts, new)
                    if any(len(row) != new for row in tokens[name]):
                        raise SystemExit(f"{name} gave a row of other than {new} tokens")
                    times[name, new].append(spent)
        for (name, new), spent in times.items():
            seconds[name][new].append(statistics.median(spent))
        for what, values in found.items():
            values.append(engine.ask(what))
        changed += sum(a != b for a, b in zip(tokens["bare"], tokens["para"], strict=True))
        if "transformers" in workers:
            same += sum(a == b for a, b in zip(tokens["bare"], tokens["transformers"], strict=True))
        # Not timed: other lengths in the same bucket, a tenant twice, and rows without one.
        shorter = [prompt[i % 4 :] for i, prompt in enumerate(prompts)]
        others = [None if i % 3 == 1 else bank[i // 2] for i in range(args.rows)]
        engine.ask("run", others, shorter, args.new)
    return {
        "seconds": seconds,
        "products": common.spread(found["products"]),
        "read_rate": common.spread(found["read_rate"]),
        "rows_compared": args.rounds * args.rows,
        "rows_changed_by_para": changed,
        "rows_same_as_transformers": same if "transformers" in workers else None,
        "compilations_after_first_batch": engine.ask("compilations") - compiled,
    }


def report(args: argparse.Namespace, facts: dict[str, Any], measured: dict[str, Any]) -> dict[str, Any]:
    """The tables, and their content."""
    systems: dict[str, Any] = {}
    steps, rates = {}, {}
    for name, by_new in measured["seconds"].items():
        first, whole = by_new[1], by_new[args.new]
        steps[name] = [(b - a) / (args.new - 1) for a, b in zip(first, whole, strict=True)]
        rates[name] = [args.rows * args.new / s for s in whole]
        systems[name] = {
            "seconds": common.spread(whole),
            "tokens_per_second": common.spread(rates[name]),
            "first_token_ms": common.spread(1e3 * s for s in first),
            "step_ms": common.spread(1e3 * s for s in steps[name]),
        }
    common.print_table(
        f"{facts['parameters'] / 1e6:.1f}M parameters, {facts['dtype']}, {facts['layers']}; {args.rows} "
        f"rows, {args.prompt} prompt and {args.new} new tokens; {args.rounds} rounds, median (min..max)",
        ("", "seconds", "tokens/s", "first token ms", "step ms"),
        [(name, *(common.shown(s[k], 2 if k == "seconds" else 1) for k in s)) for name, s in systems.items()],
    )
    goals = [common.goal("step, para / bare", common.ratio(steps["para"], steps["bare"]), at_most=1.03)]
    if "peft" in rates:
        quotient = common.ratio(rates["para"], rates["peft"])
        goals.append(common.goal("tokens/s, para / peft", quotient, at_least=2.7))
    if "transformers" in rates:
        quotient = common.ratio(rates["bare"], rates["transformers"])
        goals.append(common.goal("tokens/s, bare / transformers", quotient, at_least=1.5))
        same = measured["rows_same_as_transformers"] / measured["rows_compared"]
        goals.append(common.goal("rows with transformers' tokens, share", same, at_least=1))
    changed = measured["rows_changed_by_para"] / measured["rows_compared"]
    goals.append(common.goal("rows that PARA changes, share", changed, at_least=1))
    compiled = measured["compilations_after_first_batch"]
    goals.append(common.goal("compilations after the first batch", compiled, at_most=0))
    common.print_goals(goals)

    needed = facts["weight_bytes"] + facts["cache_bytes"]
    rate, step = measured["read_rate"]["median"], systems["bare"]["step_ms"]["median"]
    least = {
        "weight_megabytes": facts["weight_bytes"] / 1e6,
        "cache_megabytes": facts["cache_bytes"] / 1e6,
        "read_gigabytes_per_second": rate / 1e9,
        "read_once_ms": 1e3 * needed / rate,
        "products_ms": 1e3 * measured["products"]["median"],
        "step_ms": step,
        "step_gigabytes_per_second": needed / 1e6 / step,
    }
    common.print_table(
        "the least work of a step",
        ("", ""),
        [
            ("weights, MB", common.shown(least["weight_megabytes"], 1)),
            ("keys and values, MB", common.shown(least["cache_megabytes"], 1)),
            ("wide products read, GB/s", common.shown(least["read_gigabytes_per_second"], 1)),
            ("everything read once at that rate, ms", common.shown(least["read_once_ms"])),
            ("the model's products alone, ms", common.shown(least["products_ms"])),
            ("a bare step, ms", common.shown(step)),
            ("a bare step reads, GB/s", common.shown(least["step_gigabytes_per_second"], 1)),
        ],
    )
    return {"systems": systems, "goals": goals, "least_work": least}


def main() -> None:
    parser = common.parser(__doc__, rounds=5)
    parser.add_argument("--shape", choices=shapes.SHAPES, default="100m")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=32, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens that each row is continued by")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="float32")
    parser.add_argument("--layers", choices=("auto", "stacked", "unrolled"), default="auto")
    parser.add_argument("--threads", type=int, default=2, help="cores that a system may use; 0: all")
    parser.add_argument("--systems", nargs="*", choices=TORCH, help="which to compare with (default: both for 100m)")
    args = parser.parse_args()
    others = args.systems
    if others is None:
        others = TORCH if args.shape in ("100m", "small") else ()

    with common.temporary_folder() as root:
        folder = str(root / "checkpoint") if others else None
        if folder:
            writer = common.Worker(args.threads, shapes.writing)
            writer.ask("write", folder, args.shape)
            writer.close()
        stacked = {"auto": None, "stacked": True, "unrolled": False}[args.layers]
        ours = (args.shape, folder, args.dtype, stacked, args.rows, args.prompt, args.new)
        engine = common.Worker(args.threads, para_jax_worker, *ours)
        facts = engine.ask("facts")
        environment = common.environment(facts["backend"], facts["devices"])
        workers = {name: engine for name in OURS}
        for name in others:
            adapters = args.rows if name == "peft" else 0
            workers[name] = common.Worker(args.threads, torch_worker, folder, adapters, args.threads)
        measured = measure(args, workers)
        facts = engine.ask("facts")
        for worker in dict.fromkeys(workers.values()):
            worker.close()
    options = {k: getattr(args, k) for k in ("shape", "rows", "prompt", "new", "threads", "rounds")}
    result = report(args, facts, measured)
    common.write_json(args.json, "decode", {"environment": environment, **options, **facts, **measured, **result})
    if measured["rows_same_as_transformers"] not in (None, measured["rows_compared"]):
        raise SystemExit("our backbone and transformers gave different tokens")


if __name__ == "__main__":
    main()
