"""Random models of every family, made by transformers, and what is compared with it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from para_jax import Backbone
from para_jax.adapters.rows import Rows
from para_jax.convert.checkpoint import save_backbone
from para_jax.families.kinds import PARTIAL
from para_jax.families.table import FAMILIES
from tests.helpers import NO_GROUPS, OF_SWIGLU

TOLERANCE = 1e-4  # of the largest logit
ROWS, TIME, STEPS = 3, 12, 3
Worst = dict[str, float]
# Options that are true or false, of the families that have them.
FLAGS = (
    "attention_bias", "mlp_bias", "attention_out_bias", "qkv_bias", "use_bias", "use_qk_norm", "use_qkv_bias",
    "use_parallel_residual", "qk_layernorm", "scale_attn_weights", "enable_bias", "layer_norm_elementwise_affine",
)  # fmt: skip
# Families that have no head_dim of their own, and those in which the heads make up hidden_size.
NO_HEAD_DIM = (
    "phi3", "olmo3", "granite", "qwen2_moe", "exaone4", "cohere", "cohere2", "stablelm", "apertus", "starcoder2", "phi",
    "gpt_neox", "gpt2", "opt", "nanochat",
)  # fmt: skip
MIXTURES = ("mixtral", "qwen3_moe", "qwen2_moe", "gemma4_text", "gpt_oss")
# What transformers 4 calls options of RoPE in GPT-NeoX.
OLD_NAMES = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
WHOLE_HEADS = (*NO_HEAD_DIM, "helium")


@dataclass(frozen=True)
class Case:
    """A random model, how its folder is written, and how it is loaded here.

    `old_spelling` is the key of the scaling's name in transformers 4, or None for transformers 5.
    """

    fields: dict[str, Any]
    seed: int
    old_spelling: str | None = None
    sharded: bool = False
    stacked: bool = False

    @property
    def ropes(self) -> list[dict[str, Any]]:
        rope = self.fields.get("rope_parameters", {"rope_type": ""})
        return [rope] if "rope_type" in rope else list(rope.values())

    @property
    def by_length(self) -> bool:
        """Whether frequencies depend on a row's length, which transformers takes of the batch's longest row."""
        return any(rope["rope_type"] in ("dynamic", "longrope") and "alpha" not in rope for rope in self.ropes)


# The first of each choice is what hypothesis thinks simplest and draws most: not the trivial one.
@st.composite
def ropes(draw: st.DrawFn, rotated: int, types: tuple[str, ...], thetas: tuple[float, ...]) -> dict[str, Any]:
    """RoPE of one of these types, over so many features."""
    kind = draw(st.sampled_from(types))
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": draw(st.sampled_from(thetas))}
    if kind not in ("default", "longrope"):
        rope["factor"] = draw(st.sampled_from([8.0, 3.5, 2.0]))
    if kind in ("llama3", "yarn"):
        # Wavelengths from 6 to tens of thousands of positions: some on either side of both limits.
        rope["original_max_position_embeddings"] = draw(st.sampled_from([16, 40, 500]))
    if kind == "llama3":
        rope["low_freq_factor"] = draw(st.sampled_from([1.0, 2.0]))
        rope["high_freq_factor"] = draw(st.sampled_from([4.0, 8.0]))
    if kind == "yarn":
        rope |= draw(st.sampled_from([{}, {"attention_factor": 0.7}, {"mscale": 0.8, "mscale_all_dim": 0.5}]))
        rope |= draw(st.sampled_from([{}, {"beta_fast": 4.0, "beta_slow": 0.5}, {"truncate": False}]))
    if kind == "longrope":
        few = [st.sampled_from([1.0, 1.3, 4.0])] * (rotated // 2)
        rope |= {"short_factor": list(draw(st.tuples(*few))), "long_factor": list(draw(st.tuples(*few)))}
        # Rows pass this length while they are decoded, before, or never.
        rope["original_max_position_embeddings"] = draw(st.sampled_from([13, 8, 400]))
        rope |= draw(st.sampled_from([{}, {"factor": 4.0}, {"attention_factor": 1.2}]))
    return rope


SCALED = ("llama3", "yarn", "dynamic", "longrope", "linear", "default")
THETAS = (10000.0, 100.0, 500000.0)


@st.composite
def cases(draw: st.DrawFn, family: str) -> Case:
    """A model of this family, over the options that it has."""

    def pick(*values: Any) -> Any:
        return draw(st.sampled_from(values))

    kv, group = pick(2, 3, 1), 1 if family in NO_GROUPS else pick(2, 3, 1)
    head_dim = pick(8, 16, 8 if family in PARTIAL else 4)
    layers = pick(3, 2, 4)
    fields: dict[str, Any] = {
        "vocab_size": pick(31, 64),
        # Not what the heads make together, where the family lets it be something else.
        "hidden_size": kv * group * (head_dim if family in WHOLE_HEADS else pick(6, 10)),
        "intermediate_size": pick(17, 40),
        "num_hidden_layers": layers,
        "num_attention_heads": kv * group,
        "num_key_value_heads": kv,
        "head_dim": head_dim,
        FAMILIES[family].eps: pick(1e-5, 1e-6, 1e-2),
        "tie_word_embeddings": pick(False, True),
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
    }
    types = {
        **dict.fromkeys(("phi3", "gemma3_text", "gemma4_text", "gemma4_unified_text"), ("longrope", "default")),
        # Those that have an original length.
        "ministral3": ("yarn", "llama3"),
    }.get(family, SCALED)
    share = pick(0.5, 1.0, 0.75) if family in PARTIAL else 1.0
    rope = draw(ropes(int(head_dim * share), types, THETAS))
    window = pick(3, 7, None)
    mixed = pick(tuple(["sliding_attention", "full_attention"] * 2), tuple(["full_attention", "sliding_attention"] * 2))
    made: Any = CONFIG_MAPPING[family]
    for key in FLAGS:
        if hasattr(made, key):
            fields[key] = pick(True, False)
    for key in ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling", "logit_scale"):
        if hasattr(made, key):
            fields[key] = pick(0.7, 2.5, 1.0)
    if family in ("mistral", "mixtral", "phi3", "ministral3", "starcoder2"):
        fields["sliding_window"] = window
    if family in ("olmo3", "cohere2", "exaone4", "gpt_oss"):
        fields |= {"sliding_window": window or 5, "layer_types": list(mixed[:layers])}
        if family == "exaone4" and pick(False, True):
            fields |= {"sliding_window": None, "layer_types": ["full_attention"] * layers}
    if family in ("qwen2", "qwen3", "smollm3"):
        fields |= {"use_sliding_window": pick(True, False), "sliding_window": window or 5}
    if family in ("qwen2", "qwen3"):
        options = [{"max_window_layers": 1}, {}]
        if fields["use_sliding_window"]:
            options.insert(1, {"layer_types": list(mixed[:layers])})
        fields |= pick(*options)
    if family in ("qwen3_moe", "qwen2_moe"):
        fields |= {"use_sliding_window": pick(False, True), "sliding_window": window or 5}
    if family == "smollm3":
        fields["no_rope_layers"] = list(pick((1, 0, 1, 0), (0, 1, 1, 1))[:layers])
    if family in NO_HEAD_DIM:
        del fields["head_dim"]
    if family in PARTIAL:
        rope["partial_rotary_factor"] = share
    if family == "ministral3":
        # Positions of a row are beyond none, some or many of such lengths.
        rope["original_max_position_embeddings"] = pick(4, 16, 1)
        rope["llama_4_scaling_beta"] = pick(0.3, 0.1, 0.0)
    if family == "hunyuan_v1_dense" and rope["rope_type"] == "dynamic" and pick(True, False):
        rope |= {"alpha": pick(20.0, 1000.0), "factor": 1.0}
    if family == "phi3" and rope["rope_type"] == "longrope":
        fields["original_max_position_embeddings"] = rope.pop("original_max_position_embeddings")
    if family == "gemma":
        fields["hidden_act"] = pick("gelu_pytorch_tanh", "gelu")
    elif family.startswith("gemma4"):
        types = [*mixed[: layers - 1], "full_attention"]
        fields |= {
            "hidden_activation": pick("gelu_pytorch_tanh", "silu"),
            "sliding_window": window or 5,
            "layer_types": types,
            "final_logit_softcapping": pick(3.0, None),
            "global_head_dim": pick(2 * head_dim, head_dim),
            "num_kv_shared_layers": pick(layers - 2, 0),
            "use_double_wide_mlp": pick(True, False),
            "attention_k_eq_v": pick(False, True),
            "num_global_key_value_heads": pick(1, None),
        }
        if family == "gemma4_text":
            fields |= {"hidden_size_per_layer_input": pick(8, 0), "vocab_size_per_layer_input": fields["vocab_size"]}
        if family == "gemma4_text" and pick(False, True):
            fields |= {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 9}
    elif family in ("gemma2", "gemma3_text"):
        fields |= {
            "hidden_activation": pick("gelu_pytorch_tanh", "silu"),
            "sliding_window": window or 5,
            "layer_types": list(mixed[:layers]),
            "query_pre_attn_scalar": pick(24, head_dim),
            "final_logit_softcapping": pick(3.0, None),
            # What it has of this option Gemma 3 does not look at.
            "attn_logit_softcapping": pick(1.5, None) if family == "gemma2" else None,
        }
    elif FAMILIES[family].activation:
        fields[FAMILIES[family].activation] = pick(
            *FAMILIES[family].activations, "silu", "gelu", "gelu_pytorch_tanh", "relu2"
        )
    if family == "gemma3_text":
        local = draw(ropes(head_dim, ("default", "linear"), THETAS))
        full = draw(ropes(head_dim, ("linear", "default", "yarn"), THETAS))
        full.pop("truncate", None)  # transformers looks for it where a model has one RoPE for all layers
        rope = {"sliding_attention": local, "full_attention": full}
    if family.startswith("gemma4"):
        local = draw(ropes(head_dim, ("default", "linear"), THETAS))
        full = {"rope_type": "proportional", "rope_theta": 500.0, "partial_rotary_factor": pick(0.5, 0.25, 1.0)}
        rope = {"sliding_attention": local, "full_attention": {**full, **pick({}, {"factor": 2.0})}}
    if family == "olmo3":
        full = draw(ropes(head_dim, ("linear", "default", "yarn"), THETAS))
        full.pop("truncate", None)
        rope = {"sliding_attention": draw(ropes(head_dim, ("default", "linear"), THETAS)), "full_attention": full}
    experts, chosen = pick((4, 2), (5, 3), (3, 1))
    if family in ("mixtral", "gpt_oss"):
        fields |= {"num_local_experts": experts, "num_experts_per_tok": chosen}
    if family in ("qwen3_moe", "qwen2_moe"):
        fields |= {"num_experts": experts, "num_experts_per_tok": chosen, "norm_topk_prob": pick(True, False)}
        fields["moe_intermediate_size"] = pick(9, 16)
    if family == "qwen2_moe":
        fields["shared_expert_intermediate_size"] = pick(11, 9)
    if family == "gpt_oss" and OF_SWIGLU:
        fields |= {"swiglu_limit": pick(0.5, 7.0), "swiglu_alpha": pick(1.702, 0.9)}
    if family == "nanochat":
        fields["final_logit_softcapping"] = pick(3.0, None)
    fields = {FAMILIES[family].options.get(key, key): value for key, value in fields.items() if key}
    if family in NO_GROUPS:
        del fields["num_key_value_heads"]
    if not hasattr(made, "rope_parameters"):
        return Case(fields, draw(st.integers(0, 2**16)), None, pick(False, True), pick(False, True))
    fields["rope_parameters"] = rope
    if rope.get("rope_type") == "dynamic" and "alpha" not in rope:
        fields["max_position_embeddings"] = pick(8, 13, 512)
    # These classes take RoPE of their own where there is no rope_scaling.
    none = family in ("gemma3_text", "gemma4_text", "gemma4_unified_text", "olmo3") or (
        family in ("apertus", "gpt_oss") and rope["rope_type"] == "default"
    )
    old = None if none else pick(None, "type", "rope_type")
    return Case(fields, draw(st.integers(0, 2**16)), old, pick(False, True), pick(False, True))


def simplest(family: str) -> Case:
    """A config of the family with the first of all choices, which is none of the trivial ones."""
    found: list[Case] = []

    @settings(max_examples=1, database=None, derandomize=True, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(cases(family))
    def draw(case: Case) -> None:
        found.append(case)

    draw()
    return found[0]


def plain(family: str) -> dict[str, Any]:
    """transformers' plain code: its kernels for experts want sizes that these models do not have."""
    experts = {"experts_implementation": "eager"} if family in MIXTURES else {}
    return {"attn_implementation": "eager", **experts}


def make_model(case: Case, family: str) -> Any:
    """transformers' model, in which no weight is what it would be at the start."""
    torch.manual_seed(case.seed)
    config = AutoConfig.for_model(family, **json.loads(json.dumps(case.fields)), pad_token_id=0)
    model = AutoModelForCausalLM.from_config(config, **plain(family)).eval()
    saved = model.state_dict()
    with torch.no_grad():
        for name, x in saved.items():
            if "norm" in name or ".ln_" in name or name.endswith(("scale", "layer_scalar")):
                x.add_(torch.empty_like(x).uniform_(-0.5, 0.5))
            elif name.endswith(("bias", "sinks")) or any(part in name for part in ("act_fn", "gate.weight", "experts")):
                x.normal_(0, 0.3)
    return model


def write(case: Case, model: Any, folder: Path) -> None:
    """The folder as transformers 5 writes it, or with the config.json of transformers 4."""
    model.save_pretrained(folder, **({"max_shard_size": "1KB"} if case.sharded else {}))
    assert (folder / "model.safetensors.index.json").exists() == case.sharded
    if case.old_spelling:
        config = json.loads((folder / "config.json").read_text())
        rope = config.pop("rope_parameters")
        config["torch_dtype"] = config.pop("dtype")
        old = OLD_NAMES if config["model_type"] == "gpt_neox" else {}
        for key in ("rope_theta", "partial_rotary_factor"):
            if key in rope:
                config[old.get(key, key)] = rope.pop(key)
        kind = rope.pop("rope_type")
        config["rope_scaling"] = None if kind == "default" else {case.old_spelling: kind, **rope}
        (folder / "config.json").write_text(json.dumps(config))


def compare(worst: Worst, name: str, ours: Any, theirs: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    ours, reference = np.asarray(ours), theirs.numpy()
    assert ours.shape == reference.shape
    assert np.isfinite(ours).all()
    error = np.abs(ours - reference).max() / np.abs(reference).max()
    worst[name] = max(worst.get(name, 0.0), float(error))
    assert error < tolerance, name


def positions(mask: np.ndarray) -> torch.Tensor:
    return torch.tensor(np.maximum(np.cumsum(mask, axis=1) - 1, 0))


def check_forward(
    worst: Worst, model: Any, backbone: Backbone, rng: np.random.Generator, same_length: bool = False
) -> None:
    """A batch with a full row, one padded on the left and one on the right."""
    tokens = rng.integers(0, backbone.config.vocab_size, (ROWS, TIME), dtype=np.int32)
    mask = np.ones((ROWS, TIME), bool)
    if not same_length:
        mask[1, : rng.integers(1, TIME)] = False
        mask[2, rng.integers(1, TIME) :] = False
    with torch.inference_mode():
        theirs = model(
            torch.tensor(tokens), attention_mask=torch.tensor(mask.astype(np.int64)), position_ids=positions(mask)
        ).logits
    ours = backbone(jnp.asarray(tokens), mask=jnp.asarray(mask))
    compare(worst, "forward", np.asarray(ours)[mask], theirs[torch.tensor(mask)])


def check_decode(
    worst: Worst, model: Any, backbone: Backbone, rng: np.random.Generator, same_length: bool = False
) -> None:
    """Prompts of mixed lengths, then a few tokens, against transformers' own cache."""
    tokens = rng.integers(0, backbone.config.vocab_size, (ROWS, TIME + STEPS), dtype=np.int32)
    least = np.zeros((ROWS, 1), int) if same_length else TIME - rng.integers(1, TIME + 1, ROWS)[:, None]
    mask = np.arange(TIME)[None] >= least
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
            cache = next(name for name in ("cache", "past_key_values") if name in out)  # by transformers' version
            out = model(
                torch.tensor(tokens[:, column : column + 1]),
                attention_mask=torch.tensor(mask.astype(np.int64)),
                position_ids=positions(mask)[:, -1:],
                use_cache=True,
                **{cache: out[cache]},
            )
            compare(worst, "decode", logits, out.logits[:, -1])


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's safetensors files."""
    return {name: x for path in sorted(folder.glob("*.safetensors")) for name, x in load_file(path).items()}


def check_round_trip(family: str, backbone: Backbone, theirs: Path, ours: Path) -> None:
    """What is written here has the tensors that were read, and transformers takes it for the same model."""
    save_backbone(backbone, ours)
    expected, written = tensors_in(theirs), tensors_in(ours)
    assert written.keys() == expected.keys()
    for name, x in expected.items():
        assert torch.equal(written[name], x), name
    # Both read anew: a model of dynamic RoPE remembers the longest row it has seen.
    before, after = (AutoModelForCausalLM.from_pretrained(f, **plain(family)).eval() for f in (theirs, ours))
    tokens = torch.arange(10)[None] % backbone.config.vocab_size
    with torch.inference_mode():
        assert torch.equal(before(tokens).logits, after(tokens).logits)


def check(case: Case, family: str, worst: Worst, folder: Path) -> None:
    """Everything that is compared of one random model."""
    model = make_model(case, family)
    write(case, model, folder / "theirs")
    backbone = Backbone.from_pretrained(folder / "theirs", dtype="float32", stacked=case.stacked)
    rng = np.random.default_rng(case.seed)
    check_forward(worst, model, backbone, rng, case.by_length)
    check_decode(worst, model, backbone, rng, case.by_length)
    check_round_trip(family, backbone, folder / "theirs", folder / "ours")
