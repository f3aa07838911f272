"""Layers kept apart and unrolled, against stacked and scanned ones: decode step, forward pass, compilation.

    python benchmarks/layers.py
    python benchmarks/layers.py --shape small --steps 8 --rounds 2 --json small.json      (a smoke test)
    python benchmarks/layers.py --shape llama2-7b --dtype bfloat16 --threads 0            (GPU)

`Backbone(stacked=False)` holds a list of layers that a program runs one after the other; `stacked=True` holds
each weight of all layers in one array that a program scans. The weights are random. Both live in one process
and take turns. The default of the library follows this table: unrolled on CPU, stacked elsewhere.
"""

from __future__ import annotations

from typing import Any

import common
import shapes

FORMS = {"unrolled": False, "stacked": True}


def layers_worker(shape: str, dtype: str, rows: int, length: int, steps: int) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    from para_jax.adapters.rows import Rows

    tokens_bt = jnp.asarray(jax.random.randint(jax.random.key(1), (rows, length), 0, 500, jnp.int32))
    mask_bt = jnp.ones((rows, length), bool)

    def forward(backbone: Any) -> Any:
        return backbone(tokens_bt)

    def start(backbone: Any) -> Any:
        return backbone.prefill(tokens_bt, mask_bt, Rows(), length + steps)

    def decode(backbone: Any, token_b: Any, state: Any) -> Any:
        def step(_: Any, carry: Any) -> Any:
            logits_bv, state = backbone.decode(*carry)
            return jnp.argmax(logits_bv, axis=1).astype(jnp.int32), state

        # As in `generate`, the state is given up and comes back: keys and values are written in place.
        return jax.lax.fori_loop(0, steps, step, (token_b, state))

    programs: dict[Any, Any] = {}
    compilation: dict[str, dict[str, float]] = {}
    for form, stacked in FORMS.items():
        backbone = shapes.random_backbone(shape, dtype, stacked)
        begin = jax.jit(start)
        logits_bv, state = begin(backbone)
        given = (backbone, jnp.argmax(logits_bv, axis=1).astype(jnp.int32), state)
        lowered_forward = jax.jit(forward).lower(backbone)
        lowered_decode = jax.jit(decode, donate_argnums=2).lower(*given)
        forward_s, run_forward = common.timed(lowered_forward.compile)
        decode_s, run_decode = common.timed(lowered_decode.compile)
        compilation[form] = {"forward": forward_s, "decode": decode_s}
        programs[form] = (backbone, begin, run_forward, run_decode)

    def run(form: str) -> dict[str, float]:
        backbone, begin, run_forward, run_decode = programs[form]
        forward_s, _ = common.timed(lambda: run_forward(backbone).block_until_ready())
        logits_bv, state = jax.block_until_ready(begin(backbone))
        token_b = jnp.argmax(logits_bv, axis=1).astype(jnp.int32)
        decode_s, _ = common.timed(lambda: jax.block_until_ready(run_decode(backbone, token_b, state)))
        return {"forward_ms": 1e3 * forward_s, "step_ms": 1e3 * decode_s / steps}

    def facts() -> dict[str, Any]:
        return {
            "backend": jax.default_backend(),
            "devices": [device.device_kind for device in jax.local_devices()],
            "dtype": str(programs["stacked"][0].dtype),
            "parameters": programs["stacked"][0].config.size,
            "compile_seconds": compilation,
        }

    return {"run": run, "facts": facts}


def main() -> None:
    parser = common.parser(__doc__, rounds=7)
    parser.add_argument("--shape", choices=shapes.SHAPES, default="100m")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=32, help="tokens of a row in the forward pass")
    parser.add_argument("--steps", type=int, default=64, help="decode steps after it")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=2, help="cores; 0: all")
    args = parser.parse_args()

    sizes = (args.shape, args.dtype, args.rows, args.length, args.steps)
    worker = common.Worker(args.threads, layers_worker, *sizes)
    facts = worker.ask("facts")
    environment = common.environment(facts["backend"], facts["devices"])
    for form in FORMS:
        worker.ask("run", form)
    runs: dict[str, list[dict[str, float]]] = {form: [] for form in FORMS}
    for _ in range(args.rounds):
        for form in FORMS:
            runs[form].append(worker.ask("run", form))
    worker.close()

    results = {
        form: {key: common.spread(run[key] for run in rounds) for key in ("step_ms", "forward_ms")}
        for form, rounds in runs.items()
    }
    compiled = facts["compile_seconds"]
    common.print_table(
        f"{facts['parameters'] / 1e6:.1f}M parameters, {facts['dtype']}, {facts['backend']}; {args.rows} "
        f"rows of {args.length} tokens, {args.steps} decode steps; {args.rounds} rounds: median (min..max)",
        ("", "decode step ms", "forward ms", "compile decode s", "compile forward s"),
        [
            (form, common.shown(r["step_ms"], 2), common.shown(r["forward_ms"], 1),
             common.shown(compiled[form]["decode"], 1), common.shown(compiled[form]["forward"], 1))
            for form, r in results.items()
        ],
    )  # fmt: skip
    quotients = {
        key: common.ratio(results["stacked"][key]["rounds"], results["unrolled"][key]["rounds"])
        for key in ("step_ms", "forward_ms")
    }
    rows = [(key.removesuffix("_ms"), common.shown(value)) for key, value in quotients.items()]
    common.print_table("time of stacked / unrolled", ("", "ratio"), rows)
    options = {k: getattr(args, k) for k in ("shape", "rows", "length", "steps", "threads", "rounds")}
    measured = {"results": results, "stacked_over_unrolled": quotients}
    common.write_json(args.json, "layers", {"environment": environment, **options, **facts, **measured})


if __name__ == "__main__":
    main()
