"""Every family's adapters against peft: logits and gradients of a LoRA and of an (IA)3 adapter, float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from para_jax import AdapterBank, Backbone, BackboneConfig, load_adapter
from para_jax.adapters.adapter import Adapter
from para_jax.adapters.fused import as_transformers
from para_jax.adapters.peft import in_peft
from para_jax.adapters.targets import peft_path
from para_jax.families.table import FAMILIES
from tests.helpers import families
from tests.parity import models

# The installed peft calls this of the installed transformers.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TOKENS = np.random.default_rng(0).integers(0, 31, (2, 9))
FUSED = {"phi3": {"lora": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
                  "ia3": (["qkv_proj", "gate_up_proj", "down_proj"], ["down_proj"])},
         "glm4": {"lora": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"],
                  "ia3": (["k_proj", "v_proj", "gate_up_proj", "down_proj"], ["down_proj"])}}  # fmt: skip
# Experts are no linear modules.
EXPERTS = {"lora": ["q_proj", "k_proj", "v_proj", "o_proj"], "ia3": (["k_proj", "v_proj"], [])}
USUAL = {"lora": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
         "ia3": (["k_proj", "v_proj", "down_proj"], ["down_proj"])}  # fmt: skip
UNGATED = {"lora": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"], "ia3": USUAL["ia3"]}
OWN = {
    **FUSED, "mixtral": EXPERTS, "qwen3_moe": EXPERTS, "gpt_oss": EXPERTS, "arcee": UNGATED, "apertus": UNGATED,
    "starcoder2": {"lora": ["q_proj", "k_proj", "v_proj", "o_proj", "c_fc", "c_proj"],
                   "ia3": (["k_proj", "v_proj", "c_fc", "c_proj"], ["c_proj"])},
    "phi": {"lora": ["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"],
            "ia3": (["k_proj", "v_proj", "dense", "fc2"], ["fc2"])},
    "gpt_neox": {"lora": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
                 "ia3": (["query_key_value", "dense_4h_to_h"], ["dense_4h_to_h"])},
    "gpt2": {"lora": ["c_attn", "c_proj", "c_fc"], "ia3": (["c_attn", "mlp.c_proj"], ["mlp.c_proj"])},
    "opt": {"lora": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
            "ia3": (["k_proj", "v_proj", "fc2"], ["fc2"])},
    "nanochat": {"lora": ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"],
                 "ia3": (["k_proj", "v_proj", "fc2"], ["fc2"])},
}  # fmt: skip


def peft_config(family: str, method: str) -> Any:
    targets: dict[str, Any] = OWN.get(family, USUAL)
    usual: dict[str, Any] = {"task_type": "CAUSAL_LM", "fan_in_fan_out": FAMILIES[family].names.transposed}
    if method == "lora":
        return peft.LoraConfig(**usual, r=3, lora_alpha=5, target_modules=targets["lora"])
    modules, feedforward = targets["ia3"]
    return peft.IA3Config(**usual, target_modules=modules, feedforward_modules=feedforward)


def joined(gradient: dict[str, np.ndarray], shape: BackboneConfig) -> dict[str, np.ndarray]:
    """Gradients of the sites as those of transformers' modules, where several share one A."""
    view, found = as_transformers(shape), {}
    if view is None:
        return gradient
    for layer in range(shape.num_hidden_layers):
        for module, parts in view.parts.items():
            for kind in ("lora_A.weight", "lora_B.weight", "ia3_l"):
                names = [f"{peft_path(layer, part, shape)}.{kind}" for part in parts]
                if names[0] in gradient:
                    own, at = [gradient[name] for name in names], f"{peft_path(layer, module, view)}.{kind}"
                    if kind == "lora_A.weight" or len(own) == 1:
                        found[at] = np.sum(own, axis=0)
                    else:
                        order = np.argsort(np.concatenate([*view.rows(module).values()]))
                        found[at] = np.concatenate(own)[order]
    return found


# A LoRA adapter for all, and (IA)3's for one of each kind of decoder.
CASES = [
    pytest.param(family, method, marks=of_family.marks if method == "ia3" else (), id=f"{family}-{method}")
    for family, of_family in zip(FAMILIES, families(), strict=True)
    for method in ("lora", "ia3")
]


@pytest.mark.parametrize(("family", "method"), CASES)
def test_logits_and_gradients(family: str, method: str, tmp_path: Path) -> None:
    case = models.simplest(family)
    base = models.make_model(case, family)
    base.save_pretrained(tmp_path / "base")
    backbone = Backbone.from_pretrained(tmp_path / "base", dtype="float32", stacked=method == "lora")

    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base", **models.plain(family)),
        peft_config(family, method),
    ).eval()
    for name, weight in model.named_parameters():
        if "lora_" in name or "ia3_" in name:
            torch.nn.init.normal_(weight, mean=float("ia3_" in name), std=0.3)
    model.save_pretrained(tmp_path / "adapter")
    tokens = torch.from_numpy(TOKENS)
    theirs = model(tokens).logits
    loss = torch.nn.functional.cross_entropy(theirs[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    expected = {
        name.replace(".default", ""): weight.grad.numpy()
        for name, weight in model.named_parameters()
        if weight.grad is not None and ("lora_" in name or "ia3_" in name)
    }

    adapter = load_adapter(tmp_path / "adapter", backbone.config)
    rows = AdapterBank.stack({"a": adapter}, backbone.config).rows(["a", "a"])

    def loss_of(layers: Any) -> tuple[jax.Array, jax.Array]:
        gathered = jax.tree.map(lambda x: jnp.broadcast_to(x, (2, *x.shape)), layers)
        ids, everything = jnp.asarray(TOKENS, jnp.int32), jnp.ones(TOKENS.shape, bool)
        own = type(rows)(rows.weights, (gathered,), rows.rates)
        hidden, _, _ = backbone.forward(ids, everything, everything, own)
        logits = backbone.logits(hidden)
        log_p = jax.nn.log_softmax(logits[:, :-1])
        return -jnp.mean(jnp.take_along_axis(log_p, ids[:, 1:, None], axis=-1)), logits

    gradient, logits = jax.jit(jax.grad(loss_of, has_aux=True))(adapter.layers)
    worst: models.Worst = {}
    models.compare(worst, "logits", logits, theirs.detach())
    ours = joined(in_peft(Adapter(adapter.config, gradient), backbone.config)[1], backbone.config)
    assert {f"base_model.model.{n.removeprefix('base_model.model.')}" for n in expected} == ours.keys()
    largest = max(np.abs(x).max() for x in expected.values())
    assert largest > 1e-3
    for name, x in expected.items():
        assert np.abs(ours[name] - x).max() < models.TOLERANCE * largest, name
