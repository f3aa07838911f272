"""Prints a table of what fits the accelerators of Colab and Kaggle, from `para_jax.planning`.

    python docs/fits_table.py > table.md

Each line is compiled for chips that need not be here, which takes about a minute of processor time. It needs libtpu
(`pip install "para-jax[tpu]"`, Linux).
"""

from __future__ import annotations

from typing import Any

from para_jax import BackboneConfig, LoraConfig, ParaConfig
from para_jax.planning.job import Job
from para_jax.planning.process import plan_aside

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
METHODS = {"PARA": ParaConfig(r=12), "LoRA": LoraConfig(r=16, target_modules="all-linear")}
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
    ("Llama 3.1 8B", COLAB, "int4", "PARA", "decode", 32),
    ("Llama 3.1 8B", COLAB, "int8", "LoRA", "decode", 16),
    ("Llama 3.1 8B", COLAB_V6E, None, "PARA", "train", 8),
    ("Llama 3.1 8B", COLAB_V6E, None, "PARA", "decode", 32),
    ("Llama 3.1 8B", KAGGLE, None, "PARA", "train", 8),
    ("Llama 3.1 8B", KAGGLE, None, "PARA", "decode", 64),
]
PROMPT, ROW = 1024, 2048  # tokens


def main() -> None:
    print("| model | weights | chips | what | peak of a chip | fits |\n|---|---|---|---|---|---|")
    for model, chips, quantize, method, mode, rows in LINES:
        length = PROMPT if mode == "decode" else ROW
        tenants = rows if mode == "decode" else 4
        config = BackboneConfig.from_hf(MODELS[model])
        job = Job(config, METHODS[method], mode, tenants=tenants, rows=rows, length=length, quantize=quantize)
        made = plan_aside([job], chips, tries=1)
        best = made["plan"]
        what = (
            f"decoding {rows} rows of {tenants} tenants, {PROMPT} tokens and 256 new ones, {method}"
            if mode == "decode"
            else f"a step of {rows} rows of {ROW} tokens of each of {tenants} tenants, {method}"
        )
        where = f"{chips}, {best['mesh']}" if chips == KAGGLE else chips
        weights, fits = quantize or "bfloat16", "yes" if made["fits"] else "no"
        print(f"| {model} | {weights} | {where} | {what} | {best['peak'] / 1e9:.1f} GB | {fits} |", flush=True)


if __name__ == "__main__":
    main()
