"""Plans of published models, from the compiler for TPUs, and the search for a mesh."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import pytest

from para_jax import BackboneConfig, ParaConfig, ParaJaxError
from para_jax.planning import plan as planning
from para_jax.planning import process
from para_jax.planning.chips import CHIPS, Topology, parse_topology
from para_jax.planning.job import Job
from para_jax.planning.process import plan_in_subprocess
from para_jax.planning.programs import planned_step
from para_jax.planning.search import candidates, mesh_name, remedies
from para_jax.planning.topology import check_jax
from para_jax.sharding import make_mesh
from tests.helpers import SMALL

PARA = ParaConfig(r=12)
LLAMA_2_7B = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
}
LLAMA_3_8B = {
    **LLAMA_2_7B,
    "vocab_size": 128256,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}
LLAMA_3_70B = {
    **LLAMA_3_8B,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
MIXTRAL = {
    **LLAMA_3_8B,
    "model_type": "mixtral",
    "vocab_size": 32000,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32768,
}


def job(model: dict[str, Any], mode: str, **fields: Any) -> Job:
    return Job(BackboneConfig.from_hf(model), PARA, mode, **fields)


def test_llama_2_7b_is_tuned_on_one_v5e_chip() -> None:
    """In bfloat16, 8 rows of 512 tokens a step, one at a time, recomputing layers: no need for few bits."""
    check_llama_2_7b(512, 13.8e9, 15.5e9)


@pytest.mark.whole
def test_llama_2_7b_is_tuned_on_one_v5e_chip_on_long_rows() -> None:
    check_llama_2_7b(2048, 14.5e9, 15.5e9)


def check_llama_2_7b(length: int, least: float, most: float) -> None:
    made = plan_in_subprocess([job(LLAMA_2_7B, "train", rows=8, length=length, micro_batch_tokens=length)], "v5e:1x1")
    assert made["fits"]
    micro_batch, update = made["plan"]["programs"]
    weights, adapters = 2 * 6_738_415_616, 4 * 8_945_664
    # Weights of two bytes, and adapters and the sums of their gradients of four; batches are small. Two moments wait.
    assert abs(micro_batch["arguments"] - (weights + 2 * adapters)) < 1e6
    assert abs(micro_batch["held"] - 2 * adapters) < 1e3
    assert least < micro_batch["peak"] + micro_batch["held"] < most < made["hbm"]
    assert abs(micro_batch["aliased"] - adapters) < 1e3 and micro_batch["outputs"] < 1e4, "sums grow in place"
    # The update needs no weights, which wait; state and sums are changed in place.
    assert update["held"] == weights and abs(update["arguments"] - 4 * adapters) < 1e6
    assert update["arguments"] - update["aliased"] < 1e4 and update["temporaries"] < 4 * adapters
    assert micro_batch["collectives"] == update["collectives"] == {}
    assert micro_batch["time"]["bound"] == "compute" and update["time"]["bound"] == "memory"
    step = made["plan"]["step"]
    assert (step["micro_batches"], step["rows"], step["length"]) == (8, 1, length)
    assert step["seconds"] == 8 * micro_batch["time"]["seconds"] + update["time"]["seconds"]
    assert made["plan"]["tokens_per_second"] == 8 * length / step["seconds"]


@pytest.mark.whole
def test_llama_3_8b_decodes_in_int8_on_one_v5e_chip() -> None:
    """8 rows of 8 tenants, 1024 tokens of prompt and 256 new ones; the two programs and the bank beside them."""
    made = plan_in_subprocess([job(LLAMA_3_8B, "decode", tenants=8, rows=8, length=1024, quantize="int8")], "v5e:1x1")
    assert made["fits"]
    prefill, decode = made["plan"]["programs"]
    cache = 2 * 8 * 1280 * 32 * 8 * 128 * 2
    assert cache < decode["aliased"] < cache + 20e6, "keys, values and Adjustments are updated in place"
    assert decode["temporaries"] < 0.05 * cache, "there is no second one"
    assert decode["time"]["bound"] == "memory" and prefill["time"]["bound"] == "compute"
    assert prefill["peak"] + prefill["held"] < 13e9


@pytest.mark.whole
def test_llama_3_70b_is_tuned_on_16_v5e_chips() -> None:
    """In bfloat16 on v5e:4x4, a quarter of the v5e:8x8 that one might think of: 16 rows of 2048 tokens a step."""
    made = plan_in_subprocess([job(LLAMA_3_70B, "train", rows=16)], "v5e:4x4", "fsdp=16")
    assert made["fits"]
    assert 14e9 < made["plan"]["peak"] < 15.5e9
    # Weights are gathered for forward, again, and backward, and nothing but weights is.
    sent = sum(of["bytes"] for of in made["plan"]["programs"][0]["collectives"].values())
    assert sent < 3 * 2 * 70.6e9


@pytest.mark.parametrize("chip", ["v5e:1x1", pytest.param("v6e:1x1", marks=pytest.mark.whole)])
def test_a_decode_step_copies_no_weight(chip: str) -> None:
    """Nor does it write one widened, nor the cache again; and the weights are in memory once. Layers of Llama 2 7B."""
    model = {**LLAMA_2_7B, "num_hidden_layers": 4, "vocab_size": 4096}
    jobs = [
        job(model, "decode", tenants=8, rows=8, length=128, new_tokens=128, quantize=name)
        for name in (None, "int8", "int4")
    ]
    made = plan_in_subprocess(jobs, chip)
    plans = {plan["quantize"]: plan for plan in (made["plan"], *made["others"])}
    assert {*plans} == {None, "int8", "int4"}
    cache = 2 * 8 * 256 * 4 * 32 * 128 * 2
    for name, plan in plans.items():
        decode = plan["programs"][1]
        assert decode["written"] == 0, name
        layer = 4096 * (4 * 4096 + 3 * 11008)
        assert decode["temporaries"] < layer / 2, name
        assert cache < decode["aliased"] < cache + 20e6, "keys, values and Adjustments are updated in place"
        assert decode["time"]["bound"] == "memory", name


@pytest.mark.whole
def test_llama_3_70b_decodes_in_int8_on_64_v5e_chips() -> None:
    """Split over the heads, 16 rows a step, whose adapters are whole on the first chip beside its part."""
    made = plan_in_subprocess(
        [job(LLAMA_3_70B, "decode", rows=16, length=1024, quantize="int8")], "v5e:8x8", "data=8,tensor=8"
    )
    assert made["fits"]
    decode = made["plan"]["programs"][1]
    # Two sums of activations a layer, and no weight is moved.
    assert set(decode["collectives"]) == {"all-reduce"}
    assert 160 <= decode["collectives"]["all-reduce"]["count"] < 170
    assert decode["temporaries"] < 0.2 * decode["aliased"], "there is no second cache"


@pytest.mark.whole
def test_mixtral_is_tuned_on_16_v5e_chips() -> None:
    """Each chip has its rows' tokens and no others, and half of every expert, gathered a layer at a time."""
    made = plan_in_subprocess([job(MIXTRAL, "train", rows=16)], "v5e:4x4", "fsdp=8,tensor=2")
    assert made["fits"]
    assert made["plan"]["peak"] < 11.5e9
    # Half of the weights forward, and once more for the layer that is made again and goes backward.
    assert made["plan"]["programs"][0]["collectives"]["all-gather"]["bytes"] < 2 * 46.7e9


@pytest.mark.whole
def test_mixtral_decodes_in_int8_on_8_v5e_chips() -> None:
    """A layer's experts are turned and widened for their product, and only a layer's."""
    of = job(MIXTRAL, "decode", tenants=8, rows=32, length=1024, quantize="int8")
    made = plan_in_subprocess([of], "v5e:2x4", "tensor=8")
    assert made["plan"]["peak"] < 11.5e9
    decode = made["plan"]["programs"][1]
    assert set(decode["collectives"]) == {"all-reduce"}
    layer = 8 * 3 * 4096 * 14336 / 8
    assert decode["temporaries"] < 6 * layer < 0.2 * 32 * layer


SMALL_MIXTRAL = {**MIXTRAL, "hidden_size": 1024, "intermediate_size": 3584, "num_attention_heads": 8,
                 "num_key_value_heads": 2, "num_hidden_layers": 4, "vocab_size": 4096}  # fmt: skip


def test_experts_are_gathered_a_layer_at_a_time_on_8_v5e_chips() -> None:
    """Each chip has its rows' tokens and no others, and half of every expert: a small Mixtral."""
    of = job(SMALL_MIXTRAL, "train", rows=8, length=256)
    made = plan_in_subprocess([of], "v5e:2x4", "fsdp=4,tensor=2")
    micro_batch = made["plan"]["programs"][0]
    # Half of the weights forward, and once more for the layer that is made again and goes backward.
    assert 0 < micro_batch["collectives"]["all-gather"]["bytes"] < 2 * of.config.size
    # Not those of all layers, which are half of two bytes a weight, at a time.
    assert micro_batch["temporaries"] < of.config.size / 2


def test_meshes_of_a_search() -> None:
    """All that divide the backbone and the rows, the likeliest first."""
    devices = jax.devices()
    found = candidates([Job(SMALL, PARA, rows=4, length=16)], devices, CHIPS["v5e"])
    names = [one.name for one in found]
    # 2 key/value heads allow no more than two parts.
    of_four = {"data=4,tensor=2", "data=2,fsdp=2,tensor=2", "fsdp=4,tensor=2"}
    assert set(names) == {*of_four, "data=8", "data=4,fsdp=2", "data=2,fsdp=4", "fsdp=8"}
    assert [one.guess for one in found] == sorted(one.guess for one in found)
    # Rows that cannot be sharded are a mesh's reason, while decoding.
    with pytest.raises(ParaJaxError, match=r"no mesh of 8 devices fits; data=8: 1 rows cannot be sharded"):
        candidates([Job(SMALL, PARA, "decode", rows=1, length=16, new_tokens=16)], devices, CHIPS["v5e"])


def test_devices_without_rows_count() -> None:
    """A full row on each of four devices, and none on four more: these cost what the others do."""
    job = Job(SMALL, PARA, rows=4, length=128)
    cost = {name: planned_step(job, make_mesh(name, jax.devices())) for name in ("data=8", "data=4,tensor=2")}
    assert {name: (step.micro_batches, step.slots) for name, step in cost.items()} == {
        "data=8": (1, 8 * 128),
        "data=4,tensor=2": (1, 4 * 128),
    }


def eight(hbm: int) -> Topology:
    """The 8 CPUs that are here, with so much memory, as they stand for GPUs."""
    return Topology("gpu:h100x8", replace(CHIPS["h100"], hbm=hbm), (8,))


def test_the_best_of_meshes_and_batches() -> None:
    jobs = [Job(SMALL, PARA, "decode", rows=rows, length=16, new_tokens=16, dtype="float32") for rows in (4, 8)]
    lines: list[str] = []
    made = planning.plan(jobs, eight(10**9), tries=2, show=lines.append)
    assert made["fits"] and made["estimated"] and made["remedies"] == []
    assert len(lines) == 2 and all(line.startswith("compiling for ") for line in lines)
    (other,) = made["others"]
    assert made["plan"]["tokens_per_second"] > other["tokens_per_second"]
    assert (made["plan"]["mesh"], made["plan"]["rows"]) != (other["mesh"], other["rows"])


def test_what_to_change_is_what_suffices() -> None:
    """Each change is compiled, and those that do not suffice are not offered."""
    tight = Job(SMALL, PARA, "decode", rows=8, length=96, new_tokens=32, dtype="float32")
    whole = planning.plan([tight], eight(10**9), "data=2,fsdp=2,tensor=2")["plan"]["peak"]
    made = planning.plan([tight], eight(whole - 1), "data=2,fsdp=2,tensor=2", tries=2)
    assert not made["fits"] and made["plan"]["peak"] == whole and made["plan"]["tokens_per_second"] is None
    changes = {way["change"]: way["peak"] for way in made["remedies"]}
    assert "--rows 4" in changes and all(peak < whole for peak in changes.values())


def test_weights_that_are_too_large_are_not_compiled() -> None:
    lines: list[str] = []
    job = Job(SMALL, PARA, rows=4, length=16, dtype="float32")
    made = planning.plan([job], eight(1000), show=lines.append)
    assert not made["fits"] and made["remedies"] == [] and lines == []
    best = min([made["plan"], *made["others"]], key=lambda one: one["weights"])
    assert made["plan"] is best and best["programs"] == [] and best["peak"] == best["weights"] > 1000


def test_smaller_micro_batches() -> None:
    """What a step that does not fit is offered: half of the micro-batch, and the smallest."""
    big = Job(SMALL, PARA, rows=8, length=128, dtype="float32")
    mesh = make_mesh({}, jax.devices()[:1])
    offered = dict(remedies(big, mesh, jax.devices()[:1], CHIPS["v5e"]))
    assert {text: planned_step(one.job, mesh).micro_batches for text, one in offered.items() if "micro" in text} == {
        "--micro-batch-tokens 512": 2,
        "--micro-batch-tokens 128": 8,
    }


def test_mesh_names() -> None:
    devices = jax.devices()
    assert mesh_name(make_mesh("fsdp=4,tensor=2", devices)) == "fsdp=4,tensor=2"
    assert mesh_name(make_mesh({}, devices[:1])) == "data=1"


def test_a_jax_that_compiles_for_no_tpu_that_is_not_here(monkeypatch) -> None:
    """jax 0.7.2 crashes when it has compiled such a program; GPUs are planned on CPUs."""
    monkeypatch.setattr(jax, "__version_info__", (0, 7, 2))
    with pytest.raises(ParaJaxError, match=r"cannot compile for TPUs without having them; jax 0\.8 and later can"):
        planning.plan([Job(SMALL, PARA, length=16)], parse_topology("v5e:1x1"))
    check_jax(parse_topology("gpu:h100x8"))


def test_a_compiler_that_breaks_down(monkeypatch) -> None:
    job = Job(BackboneConfig.from_hf(LLAMA_2_7B), PARA)
    monkeypatch.setattr(process, "environment", lambda topology: {"PYTHONHOME": "/nonsense"})
    with pytest.raises(
        ParaJaxError,
        match=r"the compiler ended with code 1 and no plan; its last output:(.|\n)*No module named 'encodings'",
    ):
        plan_in_subprocess([job], "gpu:h100x1")
    # What Python raises there is raised here.
    monkeypatch.setattr(process, "environment", lambda topology: {"JAX_PLATFORMS": "nonsense"})
    with pytest.raises(RuntimeError, match=r"Unable to initialize backend 'nonsense'"):
        plan_in_subprocess([job], "gpu:h100x1")
