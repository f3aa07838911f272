"""The peer's stage of `accelerator.py`: a step of peft's LoRA r=16 on q_proj and v_proj, with torch's sdpa, bfloat16.

The rows are those of the training stage's one tenant. The model is made from its config, with random weights.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import shapes
from accelerator_stages import Context, Figures, Skip, rate, spread

NO_LOSS = -100  # torch's label for a token that has no loss
DEPTHS = (1.0, 0.75, 0.5, 0.25)  # of the model, tried until one fits


def measure(context: Context) -> None:
    try:
        import peft  # noqa: F401
        import torch
    except ImportError as error:
        raise Skip(f"{error.name} is not installed") from None
    kind, sees = context.known.get("device_kind"), "gpu" if torch.cuda.is_available() else "cpu"
    if sees != (kind or "gpu"):
        raise Skip(f"JAX ran on {kind or 'no known device'}, and torch sees a {sees}")
    # What keeps least first, so that an out-of-memory comes last.
    for checkpointing in (True, False):
        name = f"1 tenant, {'with' if checkpointing else 'without'} gradient checkpointing"
        context.attempt(name, partial(figures, context.quick, checkpointing, "cuda" if sees == "gpu" else "cpu"))


def figures(quick: bool, checkpointing: bool, device: str) -> Figures:
    """At full depth, or with as many layers as fit."""
    import torch

    layers = shapes.SHAPES["small" if quick else "llama2-7b"]["num_hidden_layers"]
    for depth in DEPTHS:
        try:
            return at_depth(quick, checkpointing, device, max(1, int(layers * depth)))
        except torch.cuda.OutOfMemoryError as error:
            last = str(error)
        torch.cuda.empty_cache()
    raise RuntimeError(f"no depth fits: {last}")


def at_depth(quick: bool, checkpointing: bool, device: str, layers: int) -> Figures:
    import torch

    sizes = shapes.SHAPES["small" if quick else "llama2-7b"]
    rows, length, response = (4, 64, 16) if quick else (4, 2048, 256)
    warm_up, repeats = (1, 2) if quick else (2, 5)
    model = make(sizes, layers, checkpointing, device)
    weights = [p for p in model.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(weights, lr=1e-3, weight_decay=0.0)
    ids = torch.randint(0, sizes["vocab_size"], (rows, length), device=device)
    labels = ids.clone()
    labels[:, :-response] = NO_LOSS

    def step() -> float:
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        adamw.step(), adamw.zero_grad()
        return loss.item()  # waits for the device

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    losses = [step() for _ in range(warm_up)]
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return {
        "tokens_per_s": rate(rows * length, seconds),
        "step_s": spread(seconds),
        "peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None,
        "tokens_a_step": rows * length,
        "response_tokens_a_step": rows * response,
        "row_tokens": length,
        "method": "lora r=16 on q_proj, v_proj",
        "gradient_checkpointing": checkpointing,
        "attention": "sdpa",
        "layers": layers,
        "layers_of_the_model": sizes["num_hidden_layers"],
        "first_loss": losses[0],
    }


def make(sizes: dict[str, Any], layers: int, checkpointing: bool, device: str) -> Any:
    """A bfloat16 Llama with random weights, made where it runs, and fresh LoRA in it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig

    heads = sizes["num_attention_heads"]
    config = LlamaConfig(**{**sizes, "num_hidden_layers": layers, "num_key_value_heads": heads})
    with torch.device(device):
        base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    if checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    lora = LoraConfig(r=16, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return get_peft_model(base, lora).to(device).train()
