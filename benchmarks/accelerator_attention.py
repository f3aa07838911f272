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
from accelerator_stages import Context, Figures, repeated, spread

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
    for case in cases_of(context.quick):
        try:
            inputs, expected = prepared(case)
        except Exception as error:
            context.fail(f"{case.name}, plain", error)
            continue
        for kernel in ("plain", *kernels):
            run = kernel_of(kernel, case, backend)
            name = {"cudnn": "cudnn's call through XLA", "splash": "splash, interpreted"}.get(kernel, kernel)
            name = kernel if backend != "cpu" else name
            context.attempt(f"{case.name}, {name}", partial(figures, case, run, inputs, expected, context.quick))


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


def both_ways(run: Callable[..., Any], case: Case) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The forward pass, and the forward pass with the gradients of q, k and v, compiled. Padding counts for nothing."""

    def forward(q: Any, k: Any, v: Any) -> Any:
        seen = seen_of(case)
        return jnp.where(seen.valid_bs[..., None], run(q, k, v, seen), 0)

    def gradient(q: Any, k: Any, v: Any, given: Any) -> Any:
        return jax.vjp(forward, q, k, v)[1](given)

    return jax.jit(forward), jax.jit(gradient)


def prepared(case: Case) -> tuple[tuple[Any, ...], list[Any]]:
    """Random q, k, v and gradient of the output, bfloat16; and output and gradients in float32."""
    b, t, k, g, hd = case.b, case.t, case.k, case.g, case.hd
    sizes = [(b, t, k, g, hd), (b, k, t, hd), (b, k, t, hd), (b, t, k * g * hd)]
    inputs = tuple(jax.random.normal(jax.random.key(i), size, jnp.bfloat16) for i, size in enumerate(sizes))
    forward, gradient = both_ways(kernel_of("plain", case, ""), case)
    exact = [x.astype(jnp.float32) for x in inputs]
    with jax.default_matmul_precision("highest"):
        return inputs, jax.block_until_ready([forward(*exact[:3]), *gradient(*exact)])


def figures(case: Case, run: Callable[..., Any], inputs: tuple[Any, ...], expected: list[Any], quick: bool) -> Figures:
    forward, gradient = both_ways(run, case)
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
