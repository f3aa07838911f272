"""The stages of `accelerator.py`, and what a stage's process needs: a place for its figures, timing, random weights."""

from __future__ import annotations

import importlib
import json
import math
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import common
import shapes

Figures = dict[str, Any]
ERROR_LINES = 12  # of a failure go into the report
LARGE = 2**27  # arrays with more elements are drawn by their first axis


@dataclass(frozen=True)
class Stage:
    """One process of the benchmark.

    Attributes:
      name: as in the report.
      function: MODULE:FUNCTION, which takes a Context.
      seconds: its time limit.
      least: it is skipped if fewer seconds are left.
      title: for the table.
      own_environment: whether it runs in the caller's environment, without what is set for the other stages.
    """

    name: str
    function: str
    seconds: float
    least: float
    title: str
    own_environment: bool = False


# The most important ones come first: what does not fit into the time is at the end.
STAGES = (
    Stage("device_rates", "accelerator_device:rates", 60, 5, "rates of the device"),
    Stage("quickstart", "accelerator_device:quickstart", 60, 20, "para-jax quickstart, from start to exit", True),
    Stage("decode", "accelerator_decode:apart", 110, 25, "decode, LLaMA-2 7B, layers apart"),
    Stage("train", "accelerator_train:measure", 130, 30, "a training step of 4 x 2048 tokens, LLaMA-2 7B"),
    Stage("train_peft", "accelerator_peft:measure", 75, 25, "the same step in peft: LoRA r=16 on q, v"),
    Stage("slice_of_8_layers", "accelerator_decode:slices", 90, 25, "decode, 8 of LLaMA-2 7B's layers"),
    Stage("attention_kernels", "accelerator_attention:measure", 60, 20, "attention kernels against plain attention"),
    Stage("decode_stacked", "accelerator_decode:stacked", 90, 25, "decode, LLaMA-2 7B, layers stacked and scanned"),
)


class Skip(Exception):
    """A stage that does not apply here; the message says why."""


@dataclass
class Context:
    """What a stage is given, and where its figures go: a file of JSON lines, which outlives the process."""

    file: Path
    quick: bool
    seconds: float
    known: Figures = field(default_factory=dict)
    failures: int = 0
    successes: int = 0

    def jax(self) -> Any:
        """JAX, which takes the device's memory when it is first used. Reports the device."""
        import jax

        device = jax.local_devices()[0]
        memory = (device.memory_stats() or {}).get("bytes_limit")
        found = {
            "name": device.device_kind,
            "kind": jax.default_backend(),
            "platform_version": device.client.platform_version.strip(),
            "memory_limit_gb": memory and memory / 1e9,
        }
        self._write({"device": found})
        return jax

    def add(self, name: str, figures: Figures) -> None:
        """Reports figures under a name that is new in this stage."""
        self._write({"name": name, "figures": figures})
        self.successes += 1

    def attempt(self, name: str, measure: Callable[[], Figures]) -> None:
        """Reports what `measure` finds, or the end of its error; the stage goes on."""
        try:
            self.add(name, measure())
        except Exception as error:
            self.fail(name, error)

    def fail(self, name: str, error: BaseException) -> None:
        """Reports the end of an error in place of figures."""
        traceback.print_exception(error)
        error_lines = last_lines(f"{type(error).__name__}: {error}")
        self._write({"name": name, "figures": {"error": error_lines}})
        self.failures += 1

    def _write(self, line: Figures) -> None:
        with self.file.open("a") as file:
            print(json.dumps(line), file=file, flush=True)

    def copy_rate(self) -> float | None:
        """Bytes a second, as the first stage measured it."""
        return self.known.get("copy_bytes_per_s")


def last_lines(text: str, most: int = ERROR_LINES) -> list[str]:
    return [line[:300] for line in text.strip().splitlines()[-most:]]


def run_stage(stage: Stage, context: Context) -> int:
    """Runs a stage in this process and returns its exit code."""
    module, _, function = stage.function.partition(":")
    try:
        getattr(importlib.import_module(module), function)(context)
    except Skip as why:
        context._write({"skipped": str(why)})
    return 1 if context.failures and not context.successes else 0


def repeated(call: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of each call, results included; one call before them is not counted."""
    import jax

    jax.block_until_ready(call())
    return [common.timed(lambda: jax.block_until_ready(call()))[0] for _ in range(repeats)]


def spread(seconds: list[float], scale: float = 1.0) -> Figures:
    """Median, lowest and highest."""
    return {key: value for key, value in common.spread(scale * s for s in seconds).items() if key != "rounds"}


def rate(work: float, seconds: list[float]) -> Figures:
    """The spread of work per second."""
    return spread([work / s for s in seconds])


def config_of(shape: str, layers: int | None = None) -> Any:
    """The config of a shape of `shapes.py`, with so many layers."""
    config = shapes.config_of(shape)
    return config if layers is None else replace(config, num_hidden_layers=layers)


def backbone_shapes(config: Any, stacked: bool, quantize: str | None = None) -> Any:
    """A bfloat16 backbone with shapes in place of arrays."""
    import jax

    from para_jax import Backbone

    make = partial(Backbone, config, dtype="bfloat16", stacked=stacked, quantize=quantize)
    return jax.eval_shape(make, jax.random.key(0))


def drawn(tree: Any, scale: float = 0.02, seed: int = 0) -> Any:
    """Arrays on the device for a tree of shapes: norms one, quantized weights and all others random.

    There is one small program for each shape, which compiles in a second, where one for a whole 7B model takes long
    and holds more than the weights.
    """
    import jax
    import jax.numpy as jnp

    @partial(jax.jit, static_argnums=(1, 2))
    def draw(key: Any, shape: tuple[int, ...], dtype: Any) -> Any:
        if math.prod(shape) > LARGE and len(shape) > 2:
            return jax.lax.map(lambda k: one(k, shape[1:], dtype), jax.random.split(key, shape[0]))
        return one(key, shape, dtype)

    def one(key: Any, shape: tuple[int, ...], dtype: Any) -> Any:
        if jnp.issubdtype(dtype, jnp.integer):
            return jax.random.randint(key, shape, -7, 8, jnp.int8).astype(dtype)
        return jax.random.normal(key, shape, dtype) * jnp.asarray(scale, dtype)

    def leaf(number: int, path: Any, x: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
        if name.endswith("norm"):
            return jnp.ones(x.shape, x.dtype)
        if name.endswith("_scale"):
            return jnp.full(x.shape, 0.005, x.dtype)
        return draw(jax.random.fold_in(jax.random.key(seed), number), x.shape, x.dtype)

    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    return jax.block_until_ready(jax.tree.unflatten(structure, [leaf(i, *x) for i, x in enumerate(leaves)]))


def drawn_bank(config: Any, method: Any, tenants: int) -> Any:
    """Random adapters named tenant-0, tenant-1, ..., made on the device."""
    import jax

    from para_jax import AdapterBank
    from para_jax.adapters.adapter import abstract_layers
    from para_jax.adapters.bank import Group

    layers = abstract_layers(method, config)
    stack = jax.tree.map(lambda x: jax.ShapeDtypeStruct((tenants, *x.shape), x.dtype), layers)
    names = tuple(f"tenant-{i}" for i in range(tenants))
    return AdapterBank(config, (Group(method, names, drawn(stack, seed=1)),))


def compiled_side_by_side(lowered: dict[Any, Any]) -> dict[Any, tuple[float, Any]]:
    """Compiles lowered programs in threads: each one's seconds beside the others, and the program or its exception."""
    from concurrent.futures import ThreadPoolExecutor

    def compiled(one: Any) -> Any:
        try:
            return one.compile()
        except Exception as error:
            return error

    with ThreadPoolExecutor(max(1, len(lowered))) as threads:
        made = threads.map(lambda one: common.timed(lambda: compiled(one)), lowered.values())
        return dict(zip(lowered, made, strict=True))
