"""That the programs of a plan are those that run: the same arguments, placed alike, and their bytes counted by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from para_jax import AdapterBank, Backbone, ParaConfig, ParaJaxError
from para_jax.data.examples import Example
from para_jax.decoding import generate as generating
from para_jax.planning import programs
from para_jax.planning.flops import flops
from para_jax.planning.job import Job
from para_jax.sharding import make_mesh
from para_jax.training import loop as training
from para_jax.training.optimizer import Settings
from tests.helpers import SMALL

PARA = ParaConfig(r=3)


class Called(Exception):
    """Ends a run at the call that it was started for."""


def caught(*arguments: Any, **options: Any) -> None:
    raise Called(arguments, options)


def shapes(tree: Any) -> list[Any]:
    """Shapes and dtypes, and where the leaves lie if that is given; and the tree's form, with all that is static."""
    leaves = [(np.shape(x), np.dtype(x.dtype), spec_of(x)) for x in jax.tree.leaves(tree)]
    return [*leaves, jax.tree.structure(tree)]


def spec_of(x: Any) -> Any:
    """Its placement on a mesh, without the axes that are whole; None for what has none, as what lies on the host."""
    where = getattr(x, "sharding", None)
    if not isinstance(where, jax.sharding.NamedSharding) or where.mesh.size == 1:
        return None
    axes = [tuple(a for a in (axis if isinstance(axis, tuple) else (axis,)) if a) for axis in where.spec]
    split = [tuple(a for a in axis if where.mesh.shape[a] > 1) for axis in axes]
    while split and not split[-1]:
        split.pop()
    return tuple(split)


def backbone_on(mesh: Any) -> Backbone:
    return Backbone(SMALL, jax.random.key(0), "float32", stacked=True, attention="plain", mesh=programs.own_mesh(mesh))


@pytest.mark.parametrize("tenants", [2, 3, 8])
@pytest.mark.parametrize("sizes", ["data=1", "data=2,fsdp=2,tensor=2", "fsdp=4"])
def test_the_step_is_called_as_the_loop_calls_it(sizes: str, tenants: int, tmp_path, monkeypatch) -> None:
    """Tenants whole on every device, and spread; on one device and on meshes."""
    count = int(np.prod([int(part.partition("=")[2]) for part in sizes.split(",")]))
    mesh = make_mesh(sizes, jax.devices()[:count])
    job = Job(SMALL, PARA, tenants=tenants, rows=8, length=32, micro_batches=2, remat="products", dtype="float32")
    row = Example.of((1,) * 16, (1,) * 16)
    monkeypatch.setattr(training, "train_step", caught)
    examples, settings = dict.fromkeys(job.names, [row] * 8), dict.fromkeys(job.names, Settings())
    bank = AdapterBank.create(dict.fromkeys(job.names, PARA), SMALL)
    with pytest.raises(Called) as stopped:
        training.finetune(
            backbone_on(mesh),
            bank,
            examples,
            settings,
            tmp_path / "run",
            rows=8,
            micro_batches=2,
            remat="products",
            show=lambda line: None,
        )
    (_, *theirs), their_options = stopped.value.args
    (_, *ours), options = programs.training_arguments(job, mesh)
    assert options == their_options
    for mine, real in zip(ours, theirs, strict=True):
        assert shapes(mine) == shapes(real)


def test_decoding_is_called_as_generate_calls_it(tiny, monkeypatch) -> None:
    backbone, tokenizer = tiny
    names = ["tenant-0", "tenant-1"]
    bank = AdapterBank.create(dict.fromkeys(names, PARA), backbone.config)
    monkeypatch.setattr(generating.loop, "prefill", caught)
    options: dict[str, Any] = {"bank": bank, "tenants": [*names, names[0]], "max_new_tokens": 20}
    with pytest.raises(Called) as stopped:
        generating.complete(backbone, tokenizer, [[5] * 40] * 3, **options)
    (_, *theirs), _ = stopped.value.args
    monkeypatch.undo()

    given: list[Any] = []

    def compiled(name: str, traced: Any, arguments: Any, *_: Any, **__: Any) -> tuple[Any, None]:
        given.append(arguments)
        return None, None

    monkeypatch.setattr(programs, "compiled", compiled)
    job = Job(backbone.config, PARA, "decode", tenants=2, rows=3, length=40, new_tokens=20, dtype="float32")
    programs.compile_job(job, make_mesh({}, jax.devices()[:1]))
    ((_, *ours),) = given
    length = theirs.pop()
    assert shapes(ours) == shapes(theirs)
    assert length == 48 + 24, "buckets"


def test_bytes_of_arguments() -> None:
    """On each of 8 devices, float32: what is split eight ways, over fsdp, over tensor, and what is whole."""
    mesh = make_mesh("data=2,fsdp=2,tensor=2", jax.devices())
    config = replace(SMALL, tie_word_embeddings=False, vocab_size=64)
    (program,) = programs.compile_job(Job(config, PARA, tenants=3, rows=4, length=32, dtype="float32"), mesh)
    d, f, layers, v, kv, q = 32, 48, 2, 64, 2 * 8, 4 * 8
    weights = (2 * v * d + layers * (d * (q + 2 * kv) + q * d + 3 * d * f)) // 4  # over fsdp and tensor
    norms = (2 * layers + 1) * d
    adapters = 3 * layers * (d * 3 + 3 * (q + kv + f))  # 3 tenants of r = 3, down and up, whole on every device
    state = 3 * adapters  # and their two moments
    rows = 3 * 4 // 4 * (32 + 2)  # tokens, length, prompt length of a device's own rows
    fixed = program.arguments - 4 * (weights + norms + state + rows)
    # The 16 targets of each of the group's 3 rows (a place, a token and a tenant), and counts, settings, steps, slots.
    assert 4 * 3 * 3 * 16 <= fixed < 4 * 3 * 3 * 16 + 512
    assert program.aliased >= 4 * state and program.outputs < 1024, "the state is updated in place"


def test_flops() -> None:
    """Two for each weight and token, forward, and backward to the tokens; most of it once more with remat."""
    mesh = make_mesh({}, jax.devices()[:1])
    counts = {}
    for remat in ("none", "products", "layers"):
        job = Job(SMALL, PARA, rows=2, length=64, remat=remat, dtype="float32")
        given, options = programs.training_arguments(job, mesh)
        counts[remat] = flops(programs.train_step.trace(*given, **options).jaxpr)
    tokens, d, f, layers, v = 2 * 64, 32, 48, 2, 61
    weights = layers * (d * (32 + 2 * 16) + 32 * d + 3 * d * f)
    head = 2 * 2 * (tokens // 2) * d * v  # of the responses, forward and backward
    scores = layers * 2 * 2 * tokens * 64 * 32  # both products of attention
    plain = 2 * 2 * tokens * weights + head + 3 * scores
    assert plain <= counts["none"] < 1.2 * plain, "and PARA's own products"
    # What attention makes is not made again for its own sake, and down_proj's output is needed by nobody.
    again = counts["layers"] - counts["none"]
    assert 0.6 * 2 * tokens * weights < again <= 2 * tokens * weights + 2 * scores
    assert 0 < counts["products"] - counts["none"] < 1.2 * scores, "attention, and PARA's own small products"


def test_sizes_that_do_not_fit() -> None:
    mesh = make_mesh("fsdp=4", jax.devices()[:4])
    for job, message in (
        (Job(SMALL, PARA, rows=3, length=8), r"3 rows of a micro-batch do not divide .* = 4; choose 4 rows"),
        (Job(SMALL, PARA, "decode", rows=3, length=8, new_tokens=8), "3 rows cannot be spread over data x fsdp = 4"),
        (Job(replace(SMALL, hidden_size=30), PARA, rows=4, length=8), "fsdp=4 does not divide the backbone's 30"),
    ):
        with pytest.raises(ParaJaxError, match=message):
            programs.check(job, mesh)


def test_jobs_that_are_refused() -> None:
    for fields, message in (
        ({"mode": "serve"}, "unknown mode 'serve'"),
        ({"quantize": "int9"}, "unknown quantize 'int9'; did you mean 'int8'"),
        ({"remat": "all"}, "unknown remat 'all'"),
        ({"rows": 0}, "rows must be at least 1, not 0"),
        ({"length": 1}, "length must be at least 2, not 1"),
        ({"length": 4096}, "rows of 4096 tokens exceed the backbone's context of 128"),
        ({"rows": 4, "micro_batches": 3}, "4 rows cannot be split into 3 equal micro-batches"),
    ):
        with pytest.raises(ParaJaxError, match=message):
            Job(SMALL, PARA, **{"length": 16, **fields})
