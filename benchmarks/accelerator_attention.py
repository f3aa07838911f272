"""The last of `accelerator.py`'s measurements: the device's attention kernel against plain attention.

Errors are the largest absolute difference from plain attention in float32, over the largest value there; plain
attention in bfloat16 is measured too, and says what rounding alone does. What padding gets is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from accelerator_stages import Context, Figures, compiled_side_by_side, repeated, spread

EXACT = "plain, float32"
CLOSE = 0.02  # two or three units in bfloat16's last place


class Case(NamedTuple):
    """Rows of t tokens, k key/value heads of g query heads each, heads of hd features; what a query may see."""

    name: str
    b: int
    t: int
    k: int
    g: int
    hd: int
    window: int | None = None
    packed: bool = False


def cases_of(quick: bool) -> list[Case]:
    if quick:
        return [Case("window", 1, 128, 1, 2, 16, 48), Case("packed", 1, 128, 1, 2, 16, packed=True)]
    return [
        Case("causal", 4, 2048, 32, 1, 128),
        Case("packed", 4, 2048, 32, 1, 128, packed=True),
        Case("window of 512", 4, 2048, 32, 1, 128, 512),
        Case("packed, window of 512", 4, 2048, 32, 1, 128, 512, True),
        Case("causal, 8 key/value heads", 4, 2048, 8, 4, 128),
    ]


def measure(context: Context) -> None:
    context.jax()
    backend = jax.default_backend()
    kernels = {"gpu": ["cudnn"], "tpu": ["splash"]}.get(backend, ["splash", "cudnn"])
    programs: dict[Any, Any] = {}
    for case in cases_of(context.quick):
        for kernel in (EXACT, "plain", *kernels):
            try:
                programs |= {(case, kernel, n): x for n, x in enumerate(lowered(kernel, case, backend))}
            except Exception as error:
                context.fail(name_of(case, kernel, backend), error)
    # Side by side, before any is timed: compiling takes longer than all else.
    made = {key: program for key, (_, program) in compiled_side_by_side(programs).items()}
    for case in cases_of(context.quick):
        inputs = inputs_of(case)
        expected: list[Any] = []
        for kernel in (EXACT, "plain", *kernels):
            if (case, kernel, 0) not in made:
                continue
            both = [made.pop((case, kernel, n)) for n in range(2)]
            name = name_of(case, kernel, backend)
            if failed := next((x for x in both if isinstance(x, Exception)), None):
                context.fail(name, failed)
            elif kernel == EXACT:
                exact = [x.astype(jnp.float32) for x in inputs]
                expected = jax.block_until_ready([both[0](*exact[:3]), *both[1](*exact)])
            elif expected:
                context.attempt(name, partial(figures, case, both, inputs, expected, context.quick))


def name_of(case: Case, kernel: str, backend: str) -> str:
    on_cpu = {"cudnn": "cudnn's call through XLA", "splash": "splash, interpreted"}
    return f"{case.name}, {on_cpu.get(kernel, kernel) if backend == 'cpu' else kernel}"


def kernel_of(kernel: str, case: Case, backend: str) -> Callable[..., Any]:
    """The call of a kernel; what cuDNN would compute is left to XLA on a CPU."""
    from para_jax.backbones import kernels

    scale = case.hd**-0.5
    if kernel == "cudnn" and backend == "cpu":
        return lambda q, k, v, seen: kernels.fused(q, k, v, seen, scale, "xla")
    return lambda q, k, v, seen: kernels.prompt_attention(kernel, q, k, v, seen, scale)


def seen_of(case: Case) -> Any:
    """Packed rows have four sequences of different lengths, and padding behind them."""
    from para_jax.backbones.attention import Seen

    column_t = jnp.arange(case.t)
    valid_bs = jnp.ones((case.b, case.t), bool)
    if not case.packed:
        return Seen(valid_bs, column_t, case.window)
    ends = jnp.array([case.t // 8, case.t * 3 // 8, case.t * 5 // 8, case.t - case.t // 16])
    segment_bt = jnp.broadcast_to(jnp.sum(column_t[:, None] >= ends, axis=1, dtype=jnp.int32), valid_bs.shape)
    return Seen(segment_bt < len(ends), column_t, case.window, segment_bt)


def lowered(kernel: str, case: Case, backend: str) -> tuple[Any, Any]:
    """The forward pass, and the forward pass with the gradients of q, k and v. Padding counts for nothing."""
    run = kernel_of("plain" if kernel == EXACT else kernel, case, backend)
    dtype = jnp.float32 if kernel == EXACT else jnp.bfloat16

    def forward(q: Any, k: Any, v: Any) -> Any:
        seen = seen_of(case)
        return jnp.where(seen.valid_bs[..., None], run(q, k, v, seen), 0)

    def gradient(q: Any, k: Any, v: Any, given: Any) -> Any:
        return jax.vjp(forward, q, k, v)[1](given)

    shapes = [jax.ShapeDtypeStruct(size, dtype) for size in sizes_of(case)]
    with jax.default_matmul_precision("highest" if kernel == EXACT else "default"):
        return jax.jit(forward).lower(*shapes[:3]), jax.jit(gradient).lower(*shapes)


def sizes_of(case: Case) -> list[tuple[int, ...]]:
    """Of q, k, v and the gradient of the output."""
    b, t, k, g, hd = case.b, case.t, case.k, case.g, case.hd
    return [(b, t, k, g, hd), (b, k, t, hd), (b, k, t, hd), (b, t, k * g * hd)]


def inputs_of(case: Case) -> tuple[Any, ...]:
    """Random, bfloat16."""
    return tuple(jax.random.normal(jax.random.key(i), size, jnp.bfloat16) for i, size in enumerate(sizes_of(case)))


def figures(case: Case, both: list[Any], inputs: tuple[Any, ...], expected: list[Any], quick: bool) -> Figures:
    forward, gradient = both
    found = [forward(*inputs[:3]), *gradient(*inputs)]
    out, *of_inputs = (error(x, y) for x, y in zip(found, expected, strict=True))
    if not all(map(math.isfinite, (out, *of_inputs))):
        raise RuntimeError("the kernel gives NaN or infinite numbers")
    repeats = 2 if quick else 9
    return {
        "forward_error_over_largest": out,
        "gradient_error_over_largest": max(of_inputs),
        "equal_within_2_percent": max(out, *of_inputs) < CLOSE,
        "forward_ms": spread(repeated(lambda: forward(*inputs[:3]), repeats), 1e3),
        "forward_and_backward_ms": spread(repeated(lambda: gradient(*inputs), repeats), 1e3),
        "rows_tokens_kv_heads_groups_features": [case.b, case.t, case.k, case.g, case.hd],
    }


@jax.jit
def _error(x: Any, y: Any) -> Any:
    return jnp.max(jnp.abs(x.astype(jnp.float32) - y)) / jnp.max(jnp.abs(y))


def error(x: Any, y: Any) -> float:
    """The largest difference over the largest value."""
    return float(_error(x, y))
