"""PARA's adapter folder read and applied with PyTorch alone: docs/adapters.md in code, for readers elsewhere.

For models whose layers have one shape; otherwise the tensors and sizes of each stack of layers have its name.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file


def load(folder):
    """adapter_config.json and the tensors, each with the layers on its first axis."""
    folder = Path(folder)
    return json.loads((folder / "adapter_config.json").read_text()), load_file(folder / "adapter_model.safetensors")


def vectors(config, tensors, layer, hidden_td, normed_td):
    """One layer's l for each site, from the prompt's tokens at its input and behind its first norm; once a prompt."""
    w = {name: x[layer] for name, x in tensors.items()}
    x_td = (normed_td if config["read"] == "normed" else hidden_td).float()
    if config["pooling"] == "last":
        h_d = x_td[-1]
    elif config["pooling"] == "max":
        h_d = x_td.max(0).values
    else:
        mean = config["pooling"] == "mean"
        h_d = (torch.ones(len(x_td)) / len(x_td) if mean else torch.softmax(x_td @ w["query"], 0)) @ x_td
    if config["normalize"]:
        h_d = h_d * torch.rsqrt(h_d.square().mean() + 1e-6)
    z_r = h_d @ w["down"]
    if config["activation"] == "rational":
        above = sum(a * z_r**i for i, a in enumerate(w["numerator"]))
        z_r = above / (1 + sum(b * z_r ** (i + 1) for i, b in enumerate(w["denominator"])).abs())
    else:
        z_r = getattr(torch.nn.functional, config["activation"])(z_r)
    l_f = z_r @ w["up"] + w.get("bias", 0.0)
    widths = [config["base_model"]["sites"][site][1] for site in config["target_modules"]]
    return dict(zip(config["target_modules"], l_f.split(widths), strict=True))


def apply(config, l_f, y_tf, in_prompt_t):
    """A site's output y, scaled; `in_prompt_t` says which tokens are the prompt's, its last left out."""
    left = in_prompt_t[:, None] & (config["scale"] == "response")
    return torch.where(left, y_tf, (y_tf.float() * (1 + l_f)).to(y_tf.dtype))
