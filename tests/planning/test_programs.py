"""That the programs of a plan are those that run: the same arguments, placed alike, and their bytes counted by hand."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from para_jax import AdapterBank, Backbone, ParaConfig, ParaJaxError
from para_jax.data.examples import Example
from para_jax.data.packing import Shape
from para_jax.decoding import generate as generating
from para_jax.planning import programs
from para_jax.planning.flops import flops
from para_jax.planning.job import Job
from para_jax.sharding import make_mesh
from para_jax.training import loop
from para_jax.training import programs as compiled
from para_jax.training.finetune import finetune
from para_jax.training.places import Schedule
from para_jax.training.settings import Settings
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
    return Backbone(
        SMALL, jax.random.key(0), "float32", stacked=True, attention="plain", mesh=programs.mesh_or_none(mesh)
    )


@pytest.mark.parametrize("tenants", [2, 3, 8])
@pytest.mark.parametrize("sizes", ["data=1", "data=2,fsdp=2,tensor=2", "fsdp=4"])
def test_a_steps_programs_are_those_of_the_loop(sizes: str, tenants: int, tmp_path, monkeypatch) -> None:
    """Tenants whole on every device, and spread; on one device and on meshes."""
    count = int(np.prod([int(part.partition("=")[2]) for part in sizes.split(",")]))
    mesh = make_mesh(sizes, jax.devices()[:count])
    job = Job(
        SMALL, PARA, tenants=tenants, rows=5, length=100, micro_batch_tokens=256, remat="products", dtype="float32"
    )
    row = Example.of((1,) * 50, (1,) * 50)
    monkeypatch.setattr(loop, "Programs", caught)
    # This machine's CPU stands for a GPU, and has other shapes.
    of_gpus = SimpleNamespace(of=partial(compiled.Device.of, backend="gpu"))
    monkeypatch.setattr(compiled, "Device", of_gpus)
    examples = dict.fromkeys(job.names, [row] * 8)
    with pytest.raises(Called) as stopped:
        finetune(
            backbone_on(mesh),
            examples,
            tmp_path / "run",
            methods=PARA,
            rows=5,
            micro_batch_tokens=256,
            remat="products",
            show=lambda line: None,
        )
    ((theirs,), _) = stopped.value.args
    ours = programs.training_parts(job, mesh)
    step_tenants = step_tenants_of(theirs)
    batches = list(theirs.layout.batches(step_tenants, dict.fromkeys(job.names, [row] * 5), theirs.shapes))
    assert programs.planned_step(job, mesh).micro_batches == len(batches)
    assert ours.calls().keys() == theirs.calls().keys()
    for name in ("micro-batch 0", "update"):
        mine, real = ours.calls()[name], theirs.calls()[name]
        assert mine.func == real.func and mine.keywords == real.keywords
        for argument, their_argument in zip(mine.args, real.args, strict=True):
            if not isinstance(argument, Backbone):  # this one is not placed as one that is loaded
                assert shapes(argument) == shapes(their_argument)


def step_tenants_of(parts: Any) -> Any:
    """The tenants of the first step."""
    names = [name for group in parts.state.bank.groups for name in group.names if name is not None]
    bank, settings = parts.state.bank, dict.fromkeys(names, Settings())
    return Schedule(bank, settings, parts.layout).step_tenants(dict.fromkeys(names, 0), ())


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
    job = Job(config, PARA, tenants=3, rows=8, length=128, micro_batch_tokens=512, dtype="float32")
    micro_batch, update = programs.compile_job(job, mesh)
    d, f, layers, v, kv, q = 32, 48, 2, 64, 2 * 8, 4 * 8
    weights = (2 * v * d + layers * (d * (q + 2 * kv) + q * d + 3 * d * f)) // 4  # over fsdp and tensor
    norms = (2 * layers + 1) * d
    adapters = 3 * layers * (d * 3 + 3 * (q + kv + f))  # 3 tenants of r = 3, down and up, whole on every device
    sums = adapters  # of the device's own rows
    # A device has two rows of each tenant, three at once: tokens, three numbers of each sequence, the tenant's place.
    rows = 3 * (128 + 3 + 1)
    targets = 3 * 256  # a place, a token and a tenant of each
    assert programs.planned_step(job, mesh) == programs.Step(Shape(3, 128, 1, 256), 4, 2)
    fixed = micro_batch.arguments - 4 * (weights + norms + adapters + sums + rows + targets)
    assert 0 <= fixed < 512, "counts, settings, steps, slots"
    assert 4 * sums <= micro_batch.aliased < 4 * sums + 64 and micro_batch.outputs < 64, "sums grow in place"
    assert 4 * 2 * adapters <= micro_batch.held < 4 * 2 * adapters + 64, "moments wait for the update"
    state = 3 * adapters  # and their two moments
    assert 0 <= update.arguments - 4 * (state + sums) < 512
    assert update.aliased >= 4 * (state + sums) and update.outputs < 256, "all is changed in place"
    assert update.held == 4 * (weights + norms)


def test_flops() -> None:
    """Two for each weight and token, forward, and backward to the tokens; most of it once more with remat."""
    mesh = make_mesh({}, jax.devices()[:1])
    counts = {}
    for remat in ("none", "products", "layers"):
        job = Job(SMALL, PARA, rows=2, length=128, remat=remat, dtype="float32")
        parts = programs.training_parts(job, mesh)
        counts[remat] = flops(parts.calls()["micro-batch 0"]().jaxpr)
    assert parts.shapes == [Shape(2, 128, 1, 128)]
    tokens, d, f, layers, v = 2 * 128, 32, 48, 2, 61
    weights = layers * (d * (32 + 2 * 16) + 32 * d + 3 * d * f)
    head = 2 * 2 * (tokens // 2) * d * v  # of the responses, forward and backward
    scores = layers * 2 * 2 * tokens * 128 * 32  # both products of attention
    plain = 2 * 2 * tokens * weights + head + 3 * scores
    assert plain <= counts["none"] < 1.2 * plain, "and PARA's own products"
    # What attention makes is not made again for its own sake, and down_proj's output is needed by nobody.
    again = counts["layers"] - counts["none"]
    assert 0.6 * 2 * tokens * weights < again <= 2 * tokens * weights + 2 * scores
    assert 0 < counts["products"] - counts["none"] < 1.2 * scores, "attention, and PARA's own small products"


def test_sizes_that_do_not_fit() -> None:
    mesh = make_mesh("fsdp=4", jax.devices()[:4])
    for job, message in (
        (Job(SMALL, PARA, "decode", rows=3, length=8, new_tokens=8), "3 rows cannot be sharded over data x fsdp = 4"),
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
        ({"micro_batch_tokens": 0}, "micro_batch_tokens must be a whole number from 1 to 2147483647, not 0"),
    ):
        with pytest.raises(ParaJaxError, match=message):
            Job(SMALL, PARA, **{"length": 16, **fields})
