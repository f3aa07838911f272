"""Prints what fits the accelerators of Colab and Kaggle, from `para_jax.planning`.

    python docs/fits_table.py models > table.md         (the table of docs/notebooks.md)
    python docs/fits_table.py notebooks > table.md      (what the notebooks run)

Each line is compiled for chips that need not be here, which takes up to a minute of processor time. It needs libtpu
(`pip install "para-jax[tpu]"`, Linux).
"""

from __future__ import annotations

import argparse
from typing import Any

from para_jax import BackboneConfig, LoraConfig, ParaConfig, tiny_backbone_path
from para_jax.planning.job import Job
from para_jax.planning.process import plan_in_subprocess

# Of their config.json, what plans depend on.
MODELS: dict[str, dict[str, Any]] = {
    "Qwen2.5 0.5B": {
        "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
        "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True,
        "max_position_embeddings": 32768,
    },
    "Gemma 2 2B": {
        "model_type": "gemma2", "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216,
        "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
        "max_position_embeddings": 8192,
    },
    "Llama 3.1 8B": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
    },
}  # fmt: skip
METHODS = {
    "PARA": ParaConfig(r=12),
    "LoRA": LoraConfig(r=16, target_modules="all-linear"),
    "LoRA of q and v": LoraConfig(r=18),
}
COLAB, COLAB_V6E, KAGGLE = "v5e:1x1", "v6e:1x1", "v5e:2x4"
# Model, chips, weights, method, mode, rows.
LINES: list[tuple[str, str, Any, str, Any, int]] = [
    ("Qwen2.5 0.5B", COLAB, None, "PARA", "train", 8),
    ("Qwen2.5 0.5B", COLAB, None, "LoRA", "train", 8),
    ("Qwen2.5 0.5B", COLAB, None, "PARA", "decode", 128),
    ("Gemma 2 2B", COLAB, None, "PARA", "train", 8),
    ("Gemma 2 2B", COLAB, None, "PARA", "decode", 32),
    ("Llama 3.1 8B", COLAB, "int8", "PARA", "train", 8),
    ("Llama 3.1 8B", COLAB, "int4", "PARA", "train", 8),
    ("Llama 3.1 8B", COLAB, "int8", "PARA", "decode", 16),
    ("Llama 3.1 8B", COLAB, "int8", "LoRA", "decode", 16),
    ("Llama 3.1 8B", COLAB, "int4", "PARA", "decode", 32),
    ("Llama 3.1 8B", COLAB_V6E, None, "PARA", "train", 8),
    ("Llama 3.1 8B", COLAB_V6E, None, "PARA", "decode", 32),
    ("Llama 3.1 8B", KAGGLE, None, "PARA", "train", 8),
    ("Llama 3.1 8B", KAGGLE, None, "PARA", "decode", 64),
]
PROMPT, ROW, NEW = 1024, 2048, 256  # tokens
TINY = "the small model"
# What the notebooks run, with the largest model that each suggests; one method stands for all, the one that takes most.
# Notebook, model, method, mode, tenants, rows, length, new tokens.
NOTEBOOKS: list[tuple[str, str, str, Any, int, int, int, int]] = [
    ("para_finetune", TINY, "PARA", "train", 4, 16, 64, 0),
    ("para_finetune", TINY, "LoRA of q and v", "decode", 4, 200, 64, 12),
    ("para_finetune", "Qwen2.5 0.5B", "PARA", "train", 4, 16, 64, 0),
    ("para_finetune", "Qwen2.5 0.5B", "LoRA of q and v", "decode", 4, 200, 64, 12),
    ("your_model", "Qwen2.5 0.5B", "PARA", "train", 2, 8, 512, 0),
    ("your_model", "Qwen2.5 0.5B", "LoRA of q and v", "decode", 2, 100, 512, 136),
    ("many_tenants", TINY, "LoRA", "decode", 256, 256, 32, 48),
    ("many_tenants", "Qwen2.5 0.5B", "PARA", "decode", 256, 256, 32, 48),
    ("many_tenants", "Qwen2.5 0.5B", "LoRA", "decode", 64, 64, 32, 48),
    ("many_tenants", "Qwen2.5 0.5B", "LoRA", "decode", 256, 256, 32, 48),
    ("fanlora", TINY, "LoRA", "train", 5, 16, 64, 0),
    ("fanlora", TINY, "LoRA", "decode", 5, 250, 64, 12),
    ("mesh", TINY, "LoRA", "train", 2, 8, 64, 0),
    ("mesh", TINY, "LoRA", "decode", 2, 24, 64, 12),
]


def config_of(model: str) -> BackboneConfig:
    """A model by its name here."""
    return (
        BackboneConfig.from_pretrained(tiny_backbone_path()) if model == TINY else BackboneConfig.from_hf(MODELS[model])
    )


def models() -> None:
    """What fits, line by line."""
    print("| model | weights | chips | method | work | peak of a chip | fits |\n|---|---|---|---|---|---|---|")
    for model, chips, quantize, method, mode, rows in LINES:
        length, tenants = (PROMPT, rows) if mode == "decode" else (ROW, 4)
        job = Job(config_of(model), METHODS[method], mode, tenants, rows, length, NEW, quantize=quantize)
        made = plan_in_subprocess([job], chips, tries=1)
        best = made["plan"]
        work = f"decode {rows}" if mode == "decode" else "train"
        where = f"{chips}, {best['mesh']}" if chips == KAGGLE else chips
        weights, peak = quantize or "bfloat16", f"{best['peak'] / 1e9:.1f} GB"
        fits = "yes" if made["fits"] else "no"
        print(f"| {model} | {weights} | {where} | {method} | {work} | {peak} | {fits} |", flush=True)


def notebooks() -> None:
    """The programs of each notebook; those of `mesh` on Kaggle's eight chips, all others on one."""
    print("| notebook | model | method | work | v5e | v6e |\n|---|---|---|---|---|---|")
    for notebook, model, method, mode, tenants, rows, length, new_tokens in NOTEBOOKS:
        job = Job(config_of(model), METHODS[method], mode, tenants, rows, length, max(1, new_tokens))
        chips = [KAGGLE, KAGGLE.replace("v5e", "v6e")] if notebook == "mesh" else [COLAB, COLAB_V6E]
        every = [plan_in_subprocess([job], topology, tries=1) for topology in chips]
        peaks = [f"{made['plan']['peak'] / 1e6:,.0f} MB{'' if made['fits'] else ': too much'}" for made in every]
        work = f"train, {tenants} x {rows} rows of {length} tokens"
        if mode == "decode":
            work = f"decode {rows} rows, {length} + {new_tokens} tokens"
        print(f"| {notebook} | {model} | {method} | {work} | {' | '.join(peaks)} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = {"models": models, "notebooks": notebooks}
    parser.add_argument("table", choices=tables)
    tables[parser.parse_args().table]()
