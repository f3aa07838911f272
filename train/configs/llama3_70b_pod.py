"""Llama 3 70B on the 64 chips of a TPU v5e:8x8, bfloat16.

    gcloud compute tpus tpu-vm ssh NAME --worker=all --command="\
      python train/finetune.py llama3_70b_pod --several-hosts --out /mnt/runs/llama-70b --resume"

OUT has to be a folder that all hosts reach. Each chip keeps 2.2 GB of weights.

Time and score: not measured. No TPU has run this yet. `para-jax plan` estimates, for rows that are all full, 11.7 GB
of each chip's 16.9 and 3.9 s a step, two hours and ten minutes for 2,000.
"""

from configs import Recipe
from configs._paper import TENANTS
from para_jax import Settings

recipe = Recipe(
    model="meta-llama/Meta-Llama-3-70B",
    tenants=TENANTS,
    settings=Settings(steps=2000, lr=1e-4, eval_every=200, patience=5),
    rows=16,
    max_length=1024,
    mesh="fsdp=16,tensor=4",
    topology="v5e:8x8",
    checkpoint_every=200,
    batch_size=128,
)
