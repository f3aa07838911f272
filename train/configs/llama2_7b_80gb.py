"""LLaMA-2 7B on one GPU of 80 GB, bfloat16: the model and the tasks of the paper.

    huggingface-cli login   # the model asks for its licence
    pip install 'para-jax[cuda13,data]'
    python train/finetune.py llama2_7b_80gb --out runs/llama-7b

13.5 GB of weights; three tenants of 8.9M parameters each with their moments take 0.3 GB.

Time and score: not measured. No GPU has run this yet. `para-jax plan` estimates, for rows that are all full, 65 GB
(with the temporaries of a CPU's program, which are more) and 3.2 s a step on an H100, an hour and three quarters for
2,000.
"""

from configs import Recipe
from configs._paper import TENANTS
from para_jax import Settings

recipe = Recipe(
    model="meta-llama/Llama-2-7b-hf",
    tenants=TENANTS,
    settings=Settings(steps=2000, lr=1e-4, eval_every=200, patience=5),
    rows=16,
    max_length=1024,
    micro_batch_tokens=24_576,  # half of a step whose rows are all full
    topology="gpu:h100x1",
)
