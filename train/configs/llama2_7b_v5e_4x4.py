"""LLaMA-2 7B on the 16 chips of a TPU v5e:4x4, bfloat16, weights and rows split over all of them.

    gcloud compute tpus tpu-vm ssh NAME --worker=all --command="\
      python train/finetune.py llama2_7b_v5e_4x4 --several-hosts --out /mnt/runs/llama-7b --resume"

OUT has to be a folder that all hosts reach. Each chip keeps 0.84 GB of weights.

Time and score: not measured. No TPU has run this yet. `para-jax plan` estimates, for rows that are all full, 3.8 GB
of each chip's 16.9 and 1.4 s a step, 47 minutes for 2,000.
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
    mesh="fsdp=16",
    topology="v5e:4x4",
    batch_size=128,
)
