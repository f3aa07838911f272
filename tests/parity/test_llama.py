"""Parity with transformers' LlamaForCausalLM in float32, on random configs, forward, prefill and decode."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from para_jax import Backbone
from para_jax.adapters.bank import Rows
from para_jax.convert.checkpoint import save_backbone

TOLERANCE = 1e-4  # of the largest logit
ROWS, TIME, STEPS = 3, 12, 3


@pytest.fixture(scope="module")
def worst(request: pytest.FixtureRequest) -> Iterator[dict[str, float]]:
    """The largest relative error of each comparison, shown when the module is done."""
    errors: dict[str, float] = {}
    yield errors
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        for name, error in errors.items():
            print(f"\nworst relative error, {name}: {error:.1e}", end="")


@dataclass(frozen=True)
class Case:
    """A random model, how its folder is written, and how it is loaded here."""

    fields: dict[str, Any]
    seed: int
    old_spelling: str | None  # the key of the scaling's name in transformers 4, or None for transformers 5
    sharded: bool
    stacked: bool


@st.composite
def cases(draw: st.DrawFn) -> Case:
    # The first of each choice is what hypothesis thinks simplest and draws most: not the trivial one.
    kv, group = draw(st.sampled_from([2, 3, 1])), draw(st.sampled_from([2, 3, 1]))
    rope = {"rope_type": draw(st.sampled_from(["llama3", "default", "linear"]))}
    if rope["rope_type"] != "default":
        rope["factor"] = draw(st.sampled_from([8.0, 3.5, 2.0]))
    if rope["rope_type"] == "llama3":
        # Wavelengths from 6 to tens of thousands of positions: some on either side of both limits.
        rope["original_max_position_embeddings"] = draw(st.sampled_from([16, 40, 500]))
        rope["low_freq_factor"] = draw(st.sampled_from([1.0, 2.0]))
        rope["high_freq_factor"] = draw(st.sampled_from([4.0, 8.0]))
    fields = {
        "vocab_size": draw(st.sampled_from([31, 64])),
        "hidden_size": kv * group * draw(st.sampled_from([6, 10])),
        "intermediate_size": draw(st.sampled_from([17, 40])),
        "num_hidden_layers": draw(st.sampled_from([2, 3, 1])),
        "num_attention_heads": kv * group,
        "num_key_value_heads": kv,
        "head_dim": draw(st.sampled_from([8, 16, 4])),
        "rms_norm_eps": draw(st.sampled_from([1e-5, 1e-6, 1e-2])),
        "tie_word_embeddings": draw(st.booleans()),
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_theta": draw(st.sampled_from([10000.0, 100.0, 500000.0])), **rope},
        "initializer_range": 0.2,
    }
    old = draw(st.sampled_from([None, "type", "rope_type"]))
    return Case(fields, draw(st.integers(0, 2**16)), old, draw(st.booleans()), draw(st.booleans()))


def make_model(case: Case) -> LlamaForCausalLM:
    torch.manual_seed(case.seed)
    model = LlamaForCausalLM(LlamaConfig(**case.fields, attn_implementation="eager")).eval()
    with torch.no_grad():
        for name, x in model.named_parameters():
            if "norm" in name:
                x.uniform_(0.5, 1.5)
    return model


def write(case: Case, model: LlamaForCausalLM, folder: Path) -> None:
    """The folder as transformers 5 writes it, or with the config.json of transformers 4."""
    model.save_pretrained(folder, **({"max_shard_size": "1KB"} if case.sharded else {}))
    assert (folder / "model.safetensors.index.json").exists() == case.sharded
    if case.old_spelling:
        config = json.loads((folder / "config.json").read_text())
        rope = config.pop("rope_parameters")
        config["torch_dtype"] = config.pop("dtype")
        config["rope_theta"] = rope.pop("rope_theta")
        kind = rope.pop("rope_type")
        config["rope_scaling"] = None if kind == "default" else {case.old_spelling: kind, **rope}
        (folder / "config.json").write_text(json.dumps(config))


def compare(worst: dict[str, float], name: str, ours: Any, theirs: torch.Tensor) -> None:
    ours, reference = np.asarray(ours), theirs.numpy()
    assert np.isfinite(ours).all()
    error = np.abs(ours - reference).max() / np.abs(reference).max()
    worst[name] = max(worst.get(name, 0.0), float(error))
    assert error < TOLERANCE, name


def positions(mask: np.ndarray) -> torch.Tensor:
    return torch.tensor(np.maximum(np.cumsum(mask, axis=1) - 1, 0))


def check_forward(
    worst: dict[str, float], model: LlamaForCausalLM, backbone: Backbone, rng: np.random.Generator
) -> None:
    """A batch with a full row, one padded on the left and one on the right."""
    tokens = rng.integers(0, backbone.config.vocab_size, (ROWS, TIME), dtype=np.int32)
    mask = np.ones((ROWS, TIME), bool)
    mask[1, : rng.integers(1, TIME)] = False
    mask[2, rng.integers(1, TIME) :] = False
    with torch.inference_mode():
        theirs = model(
            torch.tensor(tokens), attention_mask=torch.tensor(mask.astype(np.int64)), position_ids=positions(mask)
        ).logits
    ours = backbone(jnp.asarray(tokens), mask=jnp.asarray(mask))
    compare(worst, "forward", np.asarray(ours)[mask], theirs[torch.tensor(mask)])


def check_decode(
    worst: dict[str, float], model: LlamaForCausalLM, backbone: Backbone, rng: np.random.Generator
) -> None:
    """Prompts of mixed lengths, then a few tokens, against transformers' own cache."""
    tokens = rng.integers(0, backbone.config.vocab_size, (ROWS, TIME + STEPS), dtype=np.int32)
    mask = np.arange(TIME)[None] >= TIME - rng.integers(1, TIME + 1, ROWS)[:, None]
    prefill = jax.jit(partial(Backbone.prefill, rows=Rows(), length=TIME + STEPS))
    decode = jax.jit(Backbone.decode)
    logits, state = prefill(backbone, jnp.asarray(tokens[:, :TIME]), jnp.asarray(mask))
    with torch.inference_mode():
        out = model(
            torch.tensor(tokens[:, :TIME]),
            attention_mask=torch.tensor(mask.astype(np.int64)),
            position_ids=positions(mask),
            use_cache=True,
        )
        compare(worst, "prefill", logits, out.logits[:, -1])
        for column in range(TIME, TIME + STEPS):
            mask = np.concatenate([mask, np.ones((ROWS, 1), bool)], axis=1)
            logits, state = decode(backbone, jnp.asarray(tokens[:, column]), state)
            out = model(
                torch.tensor(tokens[:, column : column + 1]),
                attention_mask=torch.tensor(mask.astype(np.int64)),
                position_ids=positions(mask)[:, -1:],
                past_key_values=out.past_key_values,
                use_cache=True,
            )
            compare(worst, "decode", logits, out.logits[:, -1])


def check_round_trip(model: LlamaForCausalLM, backbone: Backbone, folder: Path) -> None:
    """What is written here has the tensors that were read, and transformers takes it for the same model."""
    save_backbone(backbone, folder)
    expected = {name: x for name, x in model.state_dict().items() if not (name == "lm_head.weight" and tied(model))}
    written = load_file(folder / "model.safetensors")
    assert written.keys() == expected.keys()
    for name, x in expected.items():
        assert torch.equal(written[name], x), name
    again = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    tokens = torch.arange(10)[None] % model.config.vocab_size
    with torch.inference_mode():
        assert torch.equal(again(tokens).logits, model(tokens).logits)


def tied(model: LlamaForCausalLM) -> bool:
    return model.config.tie_word_embeddings


def check(case: Case, worst: dict[str, float], folder: Path) -> None:
    model = make_model(case)
    write(case, model, folder / "theirs")
    backbone = Backbone.from_pretrained(folder / "theirs", dtype="float32", stacked=case.stacked)
    rng = np.random.default_rng(case.seed)
    check_forward(worst, model, backbone, rng)
    check_decode(worst, model, backbone, rng)
    check_round_trip(model, backbone, folder / "ours")


# No shrinking: a step of it costs several compilations.
few = settings(
    max_examples=8,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)


@few
@given(case=cases())
def test_random_configs(case: Case, worst: dict[str, float], tmp_path_factory: pytest.TempPathFactory) -> None:
    check(case, worst, tmp_path_factory.mktemp("llama"))


@pytest.mark.slow
@settings(few, max_examples=40)
@given(case=cases())
def test_many_random_configs(case: Case, worst: dict[str, float], tmp_path_factory: pytest.TempPathFactory) -> None:
    check(case, worst, tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def bf16_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rope = {"rope_theta": 10000.0, "rope_type": "default"}
    fields = {
        "vocab_size": 50,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": rope,
        "initializer_range": 0.2,
    }
    model = make_model(Case(fields, seed=0, old_spelling=None, sharded=False, stacked=False))
    folder = tmp_path_factory.mktemp("bf16") / "theirs"
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("stacked", [False, True])
def test_bf16_checkpoint_in_float32(bf16_folder: Path, worst: dict[str, float], stacked: bool) -> None:
    """Cast on load, it computes what transformers computes in float32 with the same weights."""
    model = LlamaForCausalLM.from_pretrained(bf16_folder, dtype=torch.float32).eval()
    backbone = Backbone.from_pretrained(bf16_folder, dtype="float32", stacked=stacked)
    assert {x.dtype for x in jax.tree.leaves(backbone)} == {jnp.dtype("float32")}
    check_forward(worst, model, backbone, np.random.default_rng(0))


@pytest.mark.parametrize("stacked", [False, True])
def test_bf16_checkpoint_in_bf16(bf16_folder: Path, tmp_path: Path, stacked: bool) -> None:
    """Its bits survive, and rounding costs no more than it costs transformers."""
    backbone = Backbone.from_pretrained(bf16_folder, dtype="bfloat16", stacked=stacked)
    assert {x.dtype for x in jax.tree.leaves(backbone)} == {jnp.dtype("bfloat16")}
    save_backbone(backbone, tmp_path / "ours")
    before, after = load_file(bf16_folder / "model.safetensors"), load_file(tmp_path / "ours" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(after[name].dtype == torch.bfloat16 and torch.equal(after[name], x) for name, x in before.items())

    tokens = np.random.default_rng(0).integers(0, 50, (4, TIME), dtype=np.int32)
    exact, rounded = (LlamaForCausalLM.from_pretrained(bf16_folder, dtype=d) for d in (torch.float32, torch.bfloat16))
    with torch.inference_mode():
        reference = exact(torch.tensor(tokens)).logits.numpy()
        theirs = rounded(torch.tensor(tokens)).logits.float().numpy()
    ours = backbone(jnp.asarray(tokens))
    assert ours.dtype == jnp.float32
    assert np.sqrt(np.mean((np.asarray(ours) - reference) ** 2)) < 1.1 * np.sqrt(np.mean((theirs - reference) ** 2))


def test_float32_checkpoint_cast_to_bf16_as_torch_casts(tmp_path: Path) -> None:
    """Rounded to the nearest, ties to even."""
    case = Case({"vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1,
                 "num_attention_heads": 4, "initializer_range": 0.2}, 1, None, False, False)  # fmt: skip
    model = make_model(case)
    model.save_pretrained(tmp_path / "theirs")
    save_backbone(Backbone.from_pretrained(tmp_path / "theirs", dtype="bfloat16"), tmp_path / "ours")
    written = load_file(tmp_path / "ours" / "model.safetensors")
    assert all(torch.equal(written[name], x.to(torch.bfloat16)) for name, x in model.state_dict().items())
