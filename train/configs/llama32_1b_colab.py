"""Llama 3.2 1B on the one chip of a Colab TPU (v5e-1 or v6e-1), bfloat16.

    huggingface-cli login   # the model asks for its licence
    pip install 'para-jax[tpu,data]'
    python train/finetune.py llama32_1b_colab --out runs/llama-1b

2.5 GB of weights; for Gemma 2B, whose vocabulary of 256,000 costs more, pass --model google/gemma-2b.

Time and score: not measured. No TPU has run this yet. `para-jax plan` estimates, for rows that are all full, 5.4 GB of
a v5e chip's 16.9 and 0.7 s a step (12 minutes for 1,000), and 0.15 s on a v6e; for Gemma 2B, 9.0 GB and
1.3 s on a v5e.
"""

from configs import Recipe
from configs._paper import TENANTS
from para_jax import Settings

recipe = Recipe(
    model="meta-llama/Llama-3.2-1B",
    tenants=TENANTS,
    settings=Settings(steps=1000, lr=5e-4, eval_every=200, patience=3),
    rows=8,
    max_length=512,
    topology="v5e:1x1",
)
