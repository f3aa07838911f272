"""A decode step of every method, each row with a tenant of its own, beside the bare backbone's.

    python benchmarks/methods.py
    python benchmarks/methods.py --shape small --rows 4 --new 8 --rounds 1 --json small.json      (a smoke test)
    python benchmarks/methods.py --shape llama2-7b --dtype bfloat16 --rows 8 32 128 --threads 0   (a GPU)

Batches of 8 and of 32 rows with 32 prompt tokens are continued by 64 (shape "100m" of decode.py, float32, two
cores). All tenants of a batch are different, all adapters random:

    bare            no adapter
    ia3             k, v and the input of down_proj
    para            r=12 on q, v and up
    fanlora         LoRA r=16 on two modules of each layer
    lora r=8 ...    LoRA on every linear projection

Runs take turns in interleaved rounds, three times in each, of which the median counts; each is repeated with one new
token, and a step is the difference divided by the tokens between. Goal: PARA at most 1.03 of bare. What LoRA costs is
reported as it is.

The second table times three forms of the low-rank product itself, for every projection of the backbone: the
rows' own copies (what para_jax does), a gather from the bank in every step, and the pairs of all different
tenants side by side in one wide product in which each row keeps its own part, when all rows have different
tenants and when four rows share one.
"""

from __future__ import annotations

import argparse
import random
import statistics
from functools import partial
from typing import Any

import common
import shapes


def methods(config: Any) -> dict[str, Any]:
    from para_jax import IA3Config, LoraConfig, ParaConfig

    draw = random.Random(0)
    kept = tuple(
        f"layers.{layer}.{config.sites[site].path}"
        for layer in range(config.num_hidden_layers)
        for site in sorted(draw.sample(list(config.sites), 2))
    )
    loras = {f"lora r={r}": LoraConfig(r=r, target_modules="all-linear") for r in (8, 16, 64)}
    fanlora = LoraConfig(r=16, target_modules=kept)
    return {"bare": None, "ia3": IA3Config(), "para": ParaConfig(r=12), "fanlora": fanlora, **loras}


def worker(shape: str, dtype: str, stacked: bool | None, rows: int) -> dict[str, Any]:
    compilations = common.count_compilations()
    import jax
    from transformers import AutoTokenizer

    from para_jax import complete, tiny_backbone_path

    backbone = shapes.random_backbone(shape, dtype, stacked)
    tokenizer = AutoTokenizer.from_pretrained(tiny_backbone_path())
    configs = methods(backbone.config)
    banks: dict[str, Any] = {}

    def run(name: str, prompts: list[list[int]], new: int) -> float:
        if name not in banks:
            bank = configs[name] and shapes.random_bank(backbone.config, configs[name], rows, scale=0.02)
            banks[name] = {"bank": bank, "tenants": list(bank.names)} if bank else {}
        go = partial(complete, backbone, tokenizer, prompts, max_new_tokens=new, eos_token_id=(), **banks[name])
        return common.timed(go)[0]

    def facts() -> dict[str, Any]:
        return {
            "backend": jax.default_backend(),
            "devices": [device.device_kind for device in jax.local_devices()],
            "parameters": backbone.config.size,
            "dtype": str(backbone.dtype),
            "adapter_parameters": {n: c.size(backbone.config) if c else 0 for n, c in configs.items()},
        }

    return {"run": run, "facts": facts, "compilations": compilations}


def forms_worker(shape: str, dtype: str) -> dict[str, Any]:
    """The low-rank products of a step, without the rest of it."""
    import jax
    import jax.numpy as jnp

    config = shapes.config_of(shape)
    kind = jnp.dtype(dtype)
    sites = [site for _ in range(config.num_hidden_layers) for site in config.sites.values()]
    made: dict[str, Any] = {}

    def make(rows: int, tenants: int, r: int) -> None:
        """Pairs of every site for each tenant, and each row's tenant."""
        key = jax.random.key(0)
        made["slot"] = jnp.arange(rows) % tenants
        made["pairs"] = [
            (
                jax.random.normal(key, (tenants, r, s.inputs), kind),
                jax.random.normal(key, (tenants, s.outputs, r), kind),
            )
            for s in sites
        ]
        made["own"] = [(down[made["slot"]], up[made["slot"]]) for down, up in made["pairs"]]
        made["x"] = jax.random.normal(key, (rows, 1, max(s.inputs for s in sites)), kind)

    def apart(x: Any, down: Any, up: Any) -> Any:
        thin = jnp.einsum("bti,bri->btr", x, down, preferred_element_type=jnp.float32).astype(x.dtype)
        return jnp.einsum("btr,bor->bto", thin, up, preferred_element_type=jnp.float32)

    def gathered(slot: Any, x: Any, down: Any, up: Any) -> Any:
        return apart(x, down[slot], up[slot])

    def wide(slot: Any, x: Any, down: Any, up: Any) -> Any:
        tenants, r, inputs = down.shape
        thin = jnp.einsum("bti,ri->btr", x, down.reshape(-1, inputs), preferred_element_type=jnp.float32)
        own = slot[:, None] == jnp.arange(tenants)[None]
        thin = jnp.where(own[..., None], thin.reshape(-1, tenants, r), 0).reshape(x.shape[0], 1, -1).astype(x.dtype)
        beside = up.transpose(1, 0, 2).reshape(up.shape[1], -1)
        return jnp.einsum("btr,or->bto", thin, beside, preferred_element_type=jnp.float32)

    @partial(jax.jit, static_argnums=0)
    def step(form: str, slot: Any, x: Any, pairs: Any) -> Any:
        apply = {"copies": apart, "gather": partial(gathered, slot), "wide": partial(wide, slot)}[form]
        change = jnp.zeros((), jnp.float32)
        for down, up in pairs:
            # Every product waits for the one before, as in a model.
            change = jnp.mean(apply(x[..., : down.shape[-1]] + change.astype(x.dtype), down, up)) * 1e-3
        return change

    def run(form: str, times: int = 5) -> float:
        pairs = made["own"] if form == "copies" else made["pairs"]

        def go() -> Any:
            return jax.block_until_ready(step(form, made["slot"], made["x"], pairs))

        go()
        return statistics.median(common.timed(go)[0] for _ in range(times))

    return {"make": make, "run": run}


def measure(args: argparse.Namespace, engine: common.Worker, names: list[str], rows: int) -> dict[str, Any]:
    vocabulary, draw = shapes.SHAPES[args.shape]["vocab_size"], random.Random(0)
    steps: dict[str, list[float]] = {name: [] for name in names}
    compiled = 0
    for number in range(args.rounds + 1):
        prompts = [[draw.randrange(vocabulary) for _ in range(args.prompt)] for _ in range(rows)]
        before = engine.ask("compilations")
        spent: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(3):
            # Methods take turns within a round too: what slows the machine for a second meets all of them.
            for name in names:
                engine.ask("run", name, prompts, 1)  # what another method left in the caches goes
                short, long = (engine.ask("run", name, prompts, new) for new in (1, args.new))
                spent[name].append((long - short) / (args.new - 1))
        if number:
            compiled += engine.ask("compilations") - before
            for name in names:
                steps[name].append(statistics.median(spent[name]))
    return {
        "step_ms": {name: common.spread(1e3 * s for s in values) for name, values in steps.items()},
        "over_bare": {name: common.ratio(values, steps["bare"]) for name, values in steps.items()},
        "compilations_after_first_round": compiled,
    }


def main() -> None:
    parser = common.parser(__doc__, rounds=5)
    parser.add_argument("--shape", choices=shapes.SHAPES, default="100m")
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--prompt", type=int, default=32, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens that each row is continued by")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="float32")
    parser.add_argument("--layers", choices=("auto", "stacked", "unrolled"), default="auto")
    parser.add_argument("--threads", type=int, default=2, help="cores to use; 0: all")
    parser.add_argument("--skip", nargs="*", default=[], help="methods to leave out, where memory is short")
    args = parser.parse_args()

    stacked = {"auto": None, "stacked": True, "unrolled": False}[args.layers]
    results = {}
    for number, rows in enumerate(args.rows):
        engine = common.Worker(args.threads, worker, args.shape, args.dtype, stacked, rows)
        if not number:
            facts = engine.ask("facts")
            environment = common.environment(facts["backend"], facts["devices"])
            names = [name for name in facts["adapter_parameters"] if name not in args.skip]
        results[rows] = measure(args, engine, names, rows)
        engine.close()
    for rows, result in results.items():
        common.print_table(
            f"{facts['parameters'] / 1e6:.1f}M parameters, {facts['dtype']}; {rows} rows of {rows} tenants, "
            f"{args.prompt} prompt and {args.new} new tokens; {args.rounds} rounds, median (min..max)",
            ("", "parameters each", "step ms", "over bare", "tokens/s"),
            [
                (name, f"{facts['adapter_parameters'][name]:,}", common.shown(result["step_ms"][name]),
                 common.shown(result["over_bare"][name], 3),
                 common.shown(1e3 * rows / result["step_ms"][name]["median"], 0))
                for name in names
            ],
        )  # fmt: skip

    forms: list[dict[str, Any]] = []
    low_rank = common.Worker(args.threads, forms_worker, args.shape, facts["dtype"])
    for rows in args.rows:
        for r in (8, 16, 64):
            for tenants in (rows, max(1, rows // 4)):
                low_rank.ask("make", rows, tenants, r)
                times = {form: 1e3 * low_rank.ask("run", form) for form in ("copies", "gather", "wide")}
                forms.append({"rows": rows, "tenants": tenants, "r": r, "ms": times})
    low_rank.close()
    common.print_table(
        "the low-rank products of a step, ms",
        ("rows", "tenants", "r", "own copies", "gather in the step", "side by side"),
        [(f["rows"], f["tenants"], f["r"], *(common.shown(ms) for ms in f["ms"].values())) for f in forms],
    )

    goals = []
    for rows, result in results.items():
        goals.append(common.goal(f"step at {rows} rows, para / bare", result["over_bare"]["para"], at_most=1.03))
        compiled = result["compilations_after_first_round"]
        goals.append(common.goal(f"compilations after the first round, {rows} rows", compiled, at_most=0))
    common.print_goals(goals)
    options = {k: getattr(args, k) for k in ("shape", "prompt", "new", "threads", "rounds")}
    report = {"environment": environment, **options, **facts, "results": results, "forms": forms, "goals": goals}
    common.write_json(args.json, "methods", report)


if __name__ == "__main__":
    main()
