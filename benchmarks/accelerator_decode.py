"""Decode stages of `accelerator.py`: the library's own prefill and token loop on LLaMA-2 7B's shapes, random weights.

A step's time is the difference between runs of 1 and of `1 + steps` new tokens of the same compiled program, divided by
the steps. Every row has a prompt, and with adapters a tenant, of its own.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import common
from accelerator_stages import (
    Context,
    Figures,
    backbone_shapes,
    compiled_side_by_side,
    config_of,
    drawn,
    drawn_bank,
    spread,
)


class Case(NamedTuple):
    """What is decoded: the method (bare, para, lora), rows, and tokens of each prompt."""

    method: str
    rows: int
    prompt: int = 128

    def name(self, weights: str) -> str:
        context = f", {self.prompt}-token prompts" if self.prompt != 128 else ""
        return f"{self.method}, {weights}, {self.rows} rows{context}"


class Sizes(NamedTuple):
    """Of a run of a stage."""

    shape: str
    layers: int | None
    steps: int
    repeats: int


def sizes(context: Context, layers: int | None = None) -> Sizes:
    return Sizes("small", 2, 32, 3) if context.quick else Sizes("llama2-7b", layers, 64, 5)


def apart(context: Context) -> None:
    """All layers, kept apart and unrolled."""
    whole(context, stacked=False)


def stacked(context: Context) -> None:
    """All layers, stacked and scanned."""
    whole(context, stacked=True)


def whole(context: Context, stacked: bool) -> None:
    context.jax()
    rows = (2,) if context.quick else (8, 64)
    prompt = 16 if context.quick else 128
    groups = [[Case("para", n, prompt), Case("bare", n, prompt)] for n in rows]
    decode(context, sizes(context), stacked, None, groups)


def slices(context: Context) -> None:
    """Eight layers, apart: other methods and weights, many rows, long contexts."""
    context.jax()
    few, many, short, long = (2, 4, 16, 40) if context.quick else (8, 128, 128, 2000)
    size = sizes(context, layers=8)
    methods = [Case(method, few, short) for method in ("bare", "para", "lora")]
    rest = [Case("bare", many, short), Case("para", many, short), Case("bare", few, long), Case("bare", 4 * few, long)]
    if context.quick:
        methods, rest = methods[2:], rest[2:3]
    decode(context, size, False, None, [methods])
    for quantize in ("int8", "int4"):
        decode(context, size, False, quantize, [[Case("bare", few, short)]])
    decode(context, size, False, None, [rest[:2], rest[2:]])


def decode(context: Context, size: Sizes, stacked: bool, quantize: str | None, groups: list[list[Case]]) -> None:
    """Draws a backbone and measures cases on it; those of a group are compiled side by side, and then timed."""
    weights, backbone = quantize or "bfloat16", None
    config = config_of(size.shape, size.layers)
    for cases in groups:
        running: dict[Case, Decoding] = {}
        for case in cases:
            try:
                if backbone is None:
                    backbone = drawn(backbone_shapes(config, stacked, quantize))
                running[case] = Decoding(backbone, case, size)
            except Exception as error:
                context.fail(case.name(weights), error)
        # Before any is timed: a GPU's compiler tries kernels on the device.
        compile_cases(running)
        for case in list(running):
            one = running.pop(case)  # its adapters go before the next one is timed
            context.attempt(case.name(weights), partial(one.figures, context.copy_rate(), weights))


def compile_cases(running: dict[Case, Decoding]) -> None:
    """All their programs side by side."""
    made = compiled_side_by_side({(case, name): x for case, d in running.items() for name, x in d.lowered.items()})
    for (case, name), (seconds, program) in made.items():
        one = running[case]
        one.programs[name], one.compile_s[name], one.side_by_side = program, seconds, len(made)


class Decoding:
    """The programs of one case, and what they are called with."""

    def __init__(self, backbone: Any, case: Case, size: Sizes):
        import jax
        import jax.numpy as jnp

        from para_jax.adapters.bank import batch_rows
        from para_jax.decoding import loop
        from para_jax.decoding.sampling import Sampler

        config = backbone.config
        self.backbone, self.case, self.size, self.sampler = backbone, case, size, Sampler()
        length = loop.bucket(case.prompt, config.max_position_embeddings)
        tokens = jax.random.randint(jax.random.key(2), (case.rows, length), 0, config.vocab_size, jnp.int32)
        mask = jnp.broadcast_to(jnp.arange(length) >= length - case.prompt, tokens.shape)
        self.prompts = loop.Prompts(tokens, mask)
        self.rows = adapters(config, case, batch_rows)
        room = loop.bucket(size.steps + 1, config.max_position_embeddings)
        self.columns = length + room
        self.programs: dict[str, Any] = {}
        self.compile_s: dict[str, float] = {}
        self.side_by_side = 0

        def lower() -> dict[str, Any]:
            prefill = loop.prefill.lower(backbone, self.prompts, self.rows, self.columns)
            logits, state = prefill.out_info
            run = loop.run.lower(backbone, logits, state, self.sampler, self.ending(1), self.prompts, room)
            return {"prefill": prefill, "decode": run}

        self.trace_s, self.lowered = common.timed(lower)

    def ending(self, new: int) -> Any:
        """Every row ends after so many tokens."""
        import jax.numpy as jnp

        from para_jax.decoding.batches import EOS_SLOTS
        from para_jax.decoding.loop import Ending

        return Ending(jnp.full((self.case.rows,), new, jnp.int32), jnp.full((EOS_SLOTS,), -1, jnp.int32))

    def seconds(self, new: int) -> tuple[float, float]:
        """Of the prefill, and of the loop for so many tokens. The loop writes the cache in place."""
        import jax

        ending = jax.block_until_ready(self.ending(new))
        prefill, run = self.programs["prefill"], self.programs["decode"]
        first, (logits, state) = common.timed(
            lambda: jax.block_until_ready(prefill(self.backbone, self.prompts, self.rows))
        )
        given = (self.backbone, logits, state, self.sampler, ending, self.prompts)
        del state
        then, (generated, _) = common.timed(lambda: jax.block_until_ready(run(*given)))
        if int(generated.count_b.min()) != new:
            raise RuntimeError(f"{new} tokens were wanted of every row, and there are {generated.count_b.tolist()}")
        return first, then

    def figures(self, copy_rate: float | None, weights: str) -> Figures:
        for program in self.programs.values():
            if isinstance(program, Exception):
                raise program
        steps, prefills, times = self.size.steps, [], []
        for turn in range(self.size.repeats + 1):
            first, one = self.seconds(1)
            _, many = self.seconds(1 + steps)
            if turn and many > one:
                prefills.append(first)
                times.append((many - one) / steps)
        if not times:
            raise RuntimeError(f"{steps} more steps took no more time; the machine is too busy to measure so little")
        config, rows = self.backbone.config, self.case.rows
        weight_bytes, cache_bytes = read_bytes(self.backbone), self.cache_bytes()
        step = spread(times, 1e3)
        found: Figures = {
            "step_ms": step,
            "tokens_per_s": 1e3 * rows / step["median"],
            "prefill_ms": spread(prefills, 1e3),
            "rows": rows,
            "tenants": 0 if self.case.method == "bare" else rows,
            "prompt_tokens": self.case.prompt,
            "new_tokens": steps,
            "layers": config.num_hidden_layers,
            "layers_stacked": self.backbone.stacked,
            "weights": weights,
            "weights_read_gb": weight_bytes / 1e9,
            "cache_gb": cache_bytes / 1e9,
            "trace_s": self.trace_s,
            "compile_s": self.compile_s,
            "compiled_side_by_side": self.side_by_side,
        }
        if copy_rate:
            floor, both = (1e3 * size / copy_rate for size in (weight_bytes, weight_bytes + cache_bytes))
            found |= {"weight_floor_ms": floor, "share_of_weight_floor": floor / step["median"]}
            found |= {"weight_and_cache_floor_ms": both, "share_of_weight_and_cache_floor": both / step["median"]}
        return found

    def cache_bytes(self) -> int:
        c = self.backbone.config
        heads = c.num_key_value_heads * c.head_dim * self.backbone.dtype.itemsize
        return 2 * self.case.rows * self.columns * c.num_hidden_layers * heads


def adapters(config: Any, case: Case, batch_rows: Any) -> Any:
    """The rows' adapters, gathered from a bank that goes afterwards."""
    import jax

    from para_jax import LoraConfig, ParaConfig

    if case.method == "bare":
        return batch_rows(None, None, case.rows)
    method = ParaConfig(r=12) if case.method == "para" else LoraConfig(r=16, target_modules="all-linear")
    bank = drawn_bank(config, method, case.rows)
    return jax.block_until_ready(batch_rows(bank, list(bank.names), case.rows))


def read_bytes(backbone: Any) -> float:
    """What a step reads of the weights: all but the rows of the embedding that it does not look up."""
    import jax

    def size(x: Any) -> float:
        return math.prod(x.shape) * (0.5 if x.dtype == "int4" else x.dtype.itemsize)

    looked_up = [] if backbone.config.tie_word_embeddings else jax.tree.leaves(backbone.embed)
    return sum(map(size, jax.tree.leaves(backbone))) - sum(map(size, looked_up))
