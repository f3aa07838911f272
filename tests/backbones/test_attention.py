"""Every way to attend against the textbook's, and TPU kernels compiled for TPUs that are not here."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from para_jax import Backbone, BackboneConfig
from para_jax.backbones import attention as plain
from para_jax.backbones.attention import Seen, attention
from para_jax.backbones.kernels import fused, prompt_attention, splash
from para_jax.sharding import make_mesh
from tests.helpers import family_backbone, family_fields

B, K, G, HD = 3, 2, 2, 16


def drawn(t: int, seed: int = 0) -> tuple[list[jax.Array], np.ndarray]:
    """q, k, v, and which columns hold tokens: a full row, one flush right, one flush left."""
    rng = np.random.default_rng(seed)
    arrays = [rng.normal(size=(B, *shape, HD)).astype(np.float32) for shape in ((t, K, G), (K, t), (K, t))]
    valid = np.ones((B, t), bool)
    valid[1, : t // 3], valid[2, t // 2 :] = False, False
    return [jnp.asarray(x) for x in arrays], valid


# The sinks of all heads: above most scores, below, and so far above that all that is seen counts for nothing.
SINKS = np.array([[1.5, -2.0], [0.0, 90.0]], np.float32)


def textbook(q, k, v, valid, window, scale, softcap, sinks=None) -> np.ndarray:
    """A loop over rows, heads and queries, float64."""
    b, t, kh, g, hd = q.shape
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros((b, t, kh, g, hd))
    for row, head, group, at in np.ndindex(b, kh, g, t):
        first = 0 if window is None else max(0, at - window + 1)
        keys = [s for s in range(first, at + 1) if valid[row, s]]
        if not keys:
            continue
        score = k[row, head, keys] @ q[row, at, head, group] * scale
        score = score if softcap is None else softcap * np.tanh(score / softcap)
        most = score.max() if sinks is None else max(score.max(), sinks[head, group])
        weight = np.exp(score - most)
        total = weight.sum() + (0 if sinks is None else np.exp(sinks[head, group] - most))
        out[row, at, head, group] = weight / total @ v[row, head, keys]
    return out.reshape(b, t, -1)


# The window, the limit of scores, and the sinks.
CASES = [(None, None, None), (5, None, None), (None, 1.5, None), (9, 0.7, SINKS), (5, None, SINKS)]
# Of a kernel that is interpreted, with neither and with all; with --whole all.
SLOW_CASES = [pytest.param(*case, marks=pytest.mark.whole if i in (1, 2, 4) else ()) for i, case in enumerate(CASES)]


def as_array(sinks: np.ndarray | None) -> jax.Array | None:
    return None if sinks is None else jnp.asarray(sinks)


def close(ours: jax.Array, expected: np.ndarray, valid: np.ndarray) -> None:
    """At tokens; what padding gets nothing reads."""
    assert np.isfinite(np.asarray(ours)).all()
    assert np.abs(np.asarray(ours) - expected)[valid].max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize(("window", "softcap", "sinks"), CASES)
@pytest.mark.parametrize("block", [512, 8])
def test_plain(window, softcap, sinks, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one block, and as several of which the last is not full."""
    monkeypatch.setattr(plain, "BLOCK", block)
    (q, k, v), valid = drawn(19)
    ours = attention(q, k, v, Seen(jnp.asarray(valid), jnp.arange(19), window), 0.3, softcap, as_array(sinks))
    close(ours, textbook(q, k, v, valid, window, 0.3, softcap, sinks), valid)


def test_long_rows_do_not_hold_their_scores() -> None:
    """Neither forward nor backward: the temporary memory of four times the length is about four times, not sixteen."""

    def memory(t: int) -> int:
        (q, k, v), valid = drawn(t)
        seen = Seen(jnp.asarray(valid), jnp.arange(t))
        loss = jax.grad(lambda q: jnp.sum(attention(q, k, v, seen, 0.3)))
        return jax.jit(loss).lower(q).compile().memory_analysis().temp_size_in_bytes

    short, long = memory(2048), memory(8192)
    assert long < 6 * short
    assert long < 4 * B * K * G * 8192 * 8192 / 4


@pytest.mark.parametrize("window", [None, 5])
def test_fused(window: int | None) -> None:
    """The call that is cuDNN's on a GPU, computed by XLA."""
    (q, k, v), valid = drawn(19)
    seen = Seen(jnp.asarray(valid), jnp.arange(19), window)
    close(fused(q, k, v, seen, 0.3, "xla"), textbook(q, k, v, valid, window, 0.3, None), valid)


@pytest.mark.parametrize(("window", "softcap", "sinks"), SLOW_CASES)
def test_splash_interpreted(window, softcap, sinks) -> None:
    (q, k, v), valid = drawn(150)
    seen = Seen(jnp.asarray(valid), jnp.arange(150), window)

    def loss(attend, q, k, v):
        out = attend(q, k, v, seen, 0.3, softcap, as_array(sinks))
        return jnp.sum(jnp.where(valid[..., None], jnp.sin(3 * out), 0)), out

    (ours, theirs) = (
        jax.jit(jax.value_and_grad(partial(loss, attend), argnums=(0, 1, 2), has_aux=True))(q, k, v)
        for attend in (splash, attention)
    )
    close(ours[0][1], np.asarray(theirs[0][1]), valid)
    for x, y in zip(ours[1], theirs[1], strict=True):
        assert np.abs(x - y).max() < 1e-4 * np.abs(y).max()


def test_split_over_a_mesh() -> None:
    """Rows over fsdp and heads over tensor, forward and backward; three rows, which do not divide, stay whole."""
    mesh = make_mesh("fsdp=4,tensor=2")
    for rows in (4, 3):
        (q, k, v), valid = drawn(40)
        q, k, v, valid = (jnp.concatenate([jnp.asarray(x)] * 2)[:rows] for x in (q, k, v, valid))
        seen = Seen(valid, jnp.arange(40), 9)

        def loss(kernel, mesh, q, k, v, seen=seen, valid=valid, rows=rows):
            out = prompt_attention(kernel, q, k, v, seen, 0.3, None, mesh, as_array(SINKS if rows == 4 else None))
            return jnp.sum(jnp.where(valid[..., None], jnp.sin(3 * out), 0))

        ours, theirs = (
            jax.jit(jax.value_and_grad(partial(loss, *how), argnums=(0, 1, 2)))(q, k, v)
            for how in (("splash", mesh), ("plain", None))
        )
        np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-4)
        for x, y in zip(ours[1], theirs[1], strict=True):
            assert np.abs(x - y).max() < 1e-4 * np.abs(y).max()


@pytest.mark.parametrize("stacked", [pytest.param(False, marks=pytest.mark.whole), True])
@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_a_backbone_that_uses_it(family: str, stacked: bool) -> None:
    """Prefill and decode of a model with windows in some layers, and soft-capping or sinks."""
    backbones = [
        Backbone(BackboneConfig.from_hf(family_fields(family)), jax.random.key(0), "float32", stacked, None, kernel)
        for kernel in ("splash", "plain")
    ]
    weights = jax.tree.leaves(family_backbone(family, stacked=stacked))
    backbones = [jax.tree.unflatten(jax.tree.structure(b), weights) for b in backbones]
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 62, (2, 9), dtype=np.int32))
    mask = jnp.asarray(np.arange(9)[None] >= np.array([[0], [4]]))
    ours, theirs = (np.asarray(b(tokens, mask=mask)) for b in backbones)
    assert np.abs(ours - theirs)[np.asarray(mask)].max() < 1e-5 * np.abs(theirs).max()


COMPILE = """
import jax, jax.numpy as jnp, sys
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec as P, SingleDeviceSharding
from para_jax.backbones.attention import Seen
from para_jax.backbones.kernels import prompt_attention, splash
from para_jax.sharding import make_mesh

kind = sys.argv[1]
device = topologies.get_topology_desc(platform="tpu", topology_name=f"{kind}:2x2").devices[0]
here = SingleDeviceSharding(device)
def shaped(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=here)
b, t, k, g, hd = 2, 1100, 2, 4, 64
def loss(window, softcap, q, keys, values, valid):
    sinks = jnp.zeros((k, g), q.dtype) if window else None
    seen = Seen(valid, jnp.arange(t), window)
    return jnp.sum(splash(q, keys, values, seen, 0.125, softcap, sinks).astype(jnp.float32))
for window, softcap in ((300, 50.0), *(((None, None), (300, None)) if "whole" in sys.argv else ())):
    step = jax.jit(jax.value_and_grad(lambda *x: loss(window, softcap, *x), argnums=(0, 1, 2)))
    arguments = shaped(b, t, k, g, hd), shaped(b, k, t, hd), shaped(b, k, t, hd), shaped(b, t, dtype=bool)
    compiled = step.lower(*arguments).compile()
    text = compiled.as_text()
    assert text.count("tpu_custom_call") >= 3, "forward and both halves of the backward pass are the kernel"
mesh = make_mesh("fsdp=2,tensor=2", topologies.get_topology_desc(platform="tpu", topology_name=f"{kind}:2x2").devices)
def split(*shape, spec, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
def loss(q, keys, values, valid):
    seen = Seen(valid, jnp.arange(t))
    mixed = prompt_attention("splash", q, keys, values, seen, 0.125, None, mesh, jnp.zeros((k, g), q.dtype))
    return jnp.sum(mixed.astype(jnp.float32))
heads = P("fsdp", "tensor")
text = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).lower(
    split(b, t, k, g, hd, spec=P("fsdp", None, "tensor")), split(b, k, t, hd, spec=heads),
    split(b, k, t, hd, spec=heads), split(b, t, spec=P("fsdp"), dtype=bool),
).compile().as_text()
assert text.count("tpu_custom_call") >= 3
assert "all-gather" not in text and "all-to-all" not in text, "each device attends with its own rows and heads"
print("compiled for", device.device_kind)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["v5e", pytest.param("v6e", marks=pytest.mark.whole)])
def test_the_kernel_compiles_for_tpus(kind: str, request: pytest.FixtureRequest) -> None:
    """With no TPU here: for real chips, forward and backward."""
    more = ["whole"] if request.config.getoption("whole") else []
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8" if kind == "v5e" else "v6e-8",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    done = subprocess.run([sys.executable, "-c", COMPILE, kind, *more], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "compiled for TPU" in done.stdout


def packed_case(t: int) -> tuple[list[jax.Array], np.ndarray, np.ndarray]:
    """Rows of one, two and five sequences, with padding behind them."""
    arrays, _ = drawn(t)
    segment = np.zeros((B, t), np.int32)
    segment[1, t // 3 :] = 1
    segment[2] = np.minimum(np.arange(t) // (t // 5), 4)
    valid = np.ones((B, t), bool)
    valid[1:, -2:] = False
    return arrays, valid, segment


@pytest.mark.parametrize(
    ("way", "window", "softcap", "sinks"),
    [("plain", *CASES[0]), ("plain", *CASES[3]), ("blocks", *CASES[1]), ("blocks", *CASES[2]), ("fused", *CASES[0]),
     ("fused", *CASES[1]), ("splash", *CASES[0]), ("splash", *CASES[3])],
)  # fmt: skip
def test_packed_sequences_do_not_see_each_other(way, window, softcap, sinks, monkeypatch) -> None:
    """Each sequence of a row is what it is in a row of its own."""
    t = 150 if way == "splash" else 23
    if way == "blocks":
        monkeypatch.setattr(plain, "BLOCK", 8)
    (q, k, v), valid, segment = packed_case(t)
    seen = Seen(jnp.asarray(valid), jnp.arange(t), window, jnp.asarray(segment))
    parts = {"softcap": softcap, "sinks_kg": as_array(sinks)}
    attend = {"fused": partial(fused, implementation="xla"), "splash": partial(splash, **parts)}
    attend |= dict.fromkeys(("plain", "blocks"), partial(attention, **parts))
    ours = np.asarray(attend[way](q, k, v, seen, 0.3))
    for number in range(5):
        own = valid & (segment == number)
        expected = textbook(q, k, v, own, window, 0.3, softcap, sinks)
        if own.any():
            assert np.abs(ours - expected)[own].max() < 1e-5 * np.abs(expected).max()
