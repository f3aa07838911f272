"""Small random backbones and adapters. Identity-initialised adapters prove nothing, so these are never fresh."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import jax
import numpy as np
import pytest
from transformers import CONFIG_MAPPING

from para_jax import BiasConfig, IA3Config, LoraConfig, ParaConfig
from para_jax.adapters.adapter import Adapter, abstract_layers, in_stack, named_leaves
from para_jax.adapters.bank import AdapterBank
from para_jax.adapters.method import MethodConfig
from para_jax.backbones.decoder import Backbone
from para_jax.config import BackboneConfig
from para_jax.data.examples import Example
from para_jax.data.packing import Shape
from para_jax.families.table import FAMILIES
from para_jax.training.places import TenantLayout, values_by_tenant
from para_jax.training.state import Sums, TrainState
from para_jax.training.step import accumulate, update

SMALL = BackboneConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    tie_word_embeddings=True,
    max_position_embeddings=128,
    eos_token_ids=(0,),
)

# Every method, each at settings that its neighbours do not have.
METHODS: dict[str, MethodConfig] = {
    "para": ParaConfig(r=3),
    "response": ParaConfig(r=2, pooling="mean", read="normed", scale="response"),
    "lora": LoraConfig(r=2, target_modules="all-linear"),
    "patterned": LoraConfig(
        r=4,
        lora_alpha=2,
        target_modules=("q_proj", "o_proj", "layers.1.mlp.down_proj"),
        rank_pattern={"layers.0.self_attn.q_proj": 1},
        alpha_pattern={"o_proj": 1},
        use_rslora=True,
    ),
    "ia3": IA3Config(),
    "group": IA3Config(target_modules=("q_proj", "k_proj", "up_proj"), feedforward_modules=()),
    "bias": BiasConfig(),
}


# Backbones and adapters are never changed, so that tests share them. NumPy draws them: a program that did would take
# seconds to compile.
@cache
def random_backbone(seed: int = 0, stacked: bool = False, **overrides) -> Backbone:
    """A small backbone whose weights are large enough for its logits to differ a lot from token to token."""
    return drawn(dataclasses.replace(SMALL, **overrides), seed, stacked, spread=0.0)


def drawn(config: BackboneConfig, seed: int, stacked: bool, spread: float) -> Backbone:
    """Weights from N(0, 0.2), norms and biases `spread` around their fresh values; the same with layers stacked."""
    shapes = jax.eval_shape(lambda: Backbone(config, jax.random.key(0), "float32", stacked))

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        normal = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(shape, np.float32)
        if "norm" in name or name.endswith("_scale"):
            return np.float32(1.0 - config.norm_offset) + np.float32(spread) * normal
        return np.float32(spread if "bias" in name else 0.2) * normal

    def whole(name: str, shape: tuple[int, ...]) -> np.ndarray:
        first, _, rest = name.partition(".")
        if stacked and first == "blocks":
            stack = next(s for s in config.stacks if not s.name or rest.startswith(f"{s.name}."))
            own = rest.removeprefix(f"{stack.name}.")
            return np.stack([draw(f"blocks.{i}.{own}", shape[1:]) for i in stack.layers])
        return draw(name, shape)

    leaves = [jax.device_put(whole(name, x.shape)) for name, x in named_leaves(shapes).items()]
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


# An option from transformers 5.19 on.
OF_SWIGLU: dict[str, Any] = {"swiglu_limit": 1.0} if hasattr(CONFIG_MAPPING["gpt_oss"], "swiglu_limit") else {}
# What a family has beyond Llama's options, at settings that differ from layer to layer where it can.
FAMILY_OPTIONS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 4},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "qwen3": {},
    "gemma": {},
    "gemma2": {"sliding_window": 4, "final_logit_softcapping": 4.0, "attn_logit_softcapping": 2.0},
    "gemma3_text": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {"partial_rotary_factor": 0.5, "sliding_window": 4},
    "smollm3": {"no_rope_layers": [1, 0]},
    "olmo2": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True},
    "olmo3": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "granite": {"embedding_multiplier": 3.0, "attention_multiplier": 0.5, "residual_multiplier": 0.6,
                "logits_scaling": 0.5},
    "glm4": {},
    "qwen2_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
                  "shared_expert_intermediate_size": 16},
    "seed_oss": {"attention_out_bias": True, "mlp_bias": True},
    "arcee": {"mlp_bias": True},
    "ministral3": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2,
                                       "llama_4_scaling_beta": 0.3, "rope_theta": 10000.0}},
    "exaone4": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "ernie4_5": {"use_bias": True},
    "hunyuan_v1_dense": {"attention_bias": True},
    "helium": {},
    "cohere": {"use_qk_norm": True, "logit_scale": 2.0},
    "cohere2": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"], "logit_scale": 2.0},
    "stablelm": {"use_qkv_bias": True, "qk_layernorm": True, "partial_rotary_factor": 0.5},
    "apertus": {},
    "starcoder2": {"sliding_window": 4, "tie_word_embeddings": False},
    "phi": {"partial_rotary_factor": 0.5, "qk_layernorm": True},
    "gemma4_text": {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2,
                    "sliding_window": 4, "head_dim": 4, "global_head_dim": 8, "attention_k_eq_v": True,
                    "num_key_value_heads": 4, "num_global_key_value_heads": 2, "num_kv_shared_layers": 2,
                    "use_double_wide_mlp": True,
                    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 62,
                    "final_logit_softcapping": 4.0},
    "gpt_neox": {"rotary_pct": 0.5},
    "gpt2": {},
    "opt": {},
    "nanochat": {"final_logit_softcapping": 4.0},
    # At the limit of published models no number of so small a one is clamped.
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4, **OF_SWIGLU},
}  # fmt: skip
FAMILY_OPTIONS["gemma4_unified_text"] = {
    key: value for key, value in FAMILY_OPTIONS["gemma4_text"].items() if "per_layer" not in key
}
NO_HEAD_DIM = (
    "phi3", "olmo3", "granite", "qwen2_moe", "exaone4", "cohere", "stablelm", "apertus", "starcoder2", "phi",
    "gpt_neox", "gpt2", "opt", "nanochat",
)  # fmt: skip
NO_GROUPS = ("gpt_neox", "gpt2", "opt")  # of queries that share keys and values
# Methods that every family takes: experts have no low-rank pairs and no biases, and no input of their last projection
# to scale.
FAMILY_METHODS: dict[str, MethodConfig] = {
    "para": METHODS["para"],
    "response": METHODS["response"],
    "lora": METHODS["lora"],
    "group": METHODS["group"],
    "bias": METHODS["bias"],
}


# These have every kind of part that a family has, which tests/laws/test_families.py checks.
SOME_FAMILIES = (
    "gemma2", "olmo2", "mixtral", "granite", "qwen2_moe", "ministral3", "cohere", "phi", "gpt_neox", "gpt2", "nanochat",
    "gemma4_text", "gpt_oss",
)  # fmt: skip


def families(fast: Sequence[str] = SOME_FAMILIES) -> list[Any]:
    """For `parametrize`: `SOME_FAMILIES`, of which those outside of `fast` are slow; with --whole all families."""

    def marks(family: str) -> Any:
        return pytest.mark.whole if family not in SOME_FAMILIES else () if family in fast else pytest.mark.slow

    return [pytest.param(family, marks=marks(family)) for family in FAMILIES]


def family_fields(family: str) -> dict[str, Any]:
    """The config.json of a small model of this family."""
    sizes = {
        "vocab_size": 62, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "eos_token_id": 0,
    }  # fmt: skip
    if family in NO_HEAD_DIM:
        del sizes["head_dim"]
    if family in NO_GROUPS:
        del sizes["num_key_value_heads"]
    names, options = FAMILIES[family].options, FAMILY_OPTIONS[family]
    theta = {"rope_theta": 10000.0} if hasattr(CONFIG_MAPPING[family], "rope_parameters") else {}
    return {"model_type": family, **{names.get(key, key): x for key, x in sizes.items()}, **theta, **options}


@cache
def family_backbone(family: str, seed: int = 0, stacked: bool = False) -> Backbone:
    """A small backbone of this family, with all weights random and large enough for logits to differ."""
    return drawn(BackboneConfig.from_hf(family_fields(family)), seed, stacked, spread=0.2)


@cache
def random_adapter(config: MethodConfig, shape: BackboneConfig, seed: int, scale: float = 0.5) -> Adapter:
    """An adapter with every weight drawn from N(0, scale), far from the identity.

    A low-rank pair that is wider than its layer's own rank is zero there, as it is in a fresh adapter.
    """
    layers = abstract_layers(config, shape)
    tensors = named_leaves(layers)
    rng = np.random.default_rng(seed + 1)
    drawn = []
    for name, x in tensors.items():
        one = np.float32(scale) * rng.standard_normal(x.shape, np.float32)
        *at, half, site = ("", *name.split("."))
        if half in ("down", "up"):
            stack = next(stack for stack in shape.stacks if stack.name == ".".join(at[1:]))
            modules = in_stack(layers, stack.name).modules
            ranks = np.array([dict(modules[i])[site].rank if site in dict(modules[i]) else 0 for i in stack.layers])
            rank_axis = 1 if half == "down" else 2
            inside = np.arange(x.shape[rank_axis])[None] < ranks[:, None]
            one = np.where(np.expand_dims(inside, 3 - rank_axis), one, 0)
        drawn.append(jax.device_put(one.astype(np.float32)))
    return Adapter(config, jax.tree.unflatten(jax.tree.structure(layers), drawn))


def random_bank(
    configs: dict[str, MethodConfig], shape: BackboneConfig, seed: int = 0, scale: float = 0.5
) -> AdapterBank:
    """Random adapters under these names; a tenant's weights depend on its place in the dict."""
    adapters = {name: random_adapter(c, shape, seed + 10 * i, scale) for i, (name, c) in enumerate(configs.items())}
    return AdapterBank.stack(adapters, shape)


def take_step(
    backbone: Backbone,
    state: TrainState,
    sums: Sums,
    rules: Any,
    layout: TenantLayout,
    shapes: Sequence[Shape],
    step_tenants: Sequence[Sequence[str | None]],
    rows: Mapping[str, Sequence[Example]],
    seed: int = 0,
) -> tuple[TrainState, Sums, dict[str, dict[str, float]]]:
    """One step of fine-tuning on these rows; returns the state, the sums, and what there is to report."""
    slots, shards = layout.slots(state.bank, step_tenants), layout.shards
    for _, batch in layout.batches(step_tenants, rows, shapes):
        sums = accumulate(backbone, state.bank, state.taken, rules, sums, batch, slots, shards=shards, seed=seed)
    state, sums, said = update(state, rules, sums, slots, shards=shards, mesh=layout.mesh)
    return state, sums, values_by_tenant(step_tenants, jax.device_get(said))
