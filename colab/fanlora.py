# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   accelerator: TPU
# ---

# %% [markdown]
# # FanLoRA: LoRA where it matters
#
# [![Open-in-Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/para-jax/para_jax/blob/main/colab/fanlora.ipynb)
#
# LoRA adds a low-rank pair of matrices to linear modules of a frozen model. Which modules? All of them is the safe
# choice, but every pair is read again for every token that is decoded, and every tenant has its own. FanLoRA (Tian et
# al., EMNLP 2024) finds out once which modules matter, and later tasks tune only those:
#
# - (a) tune LoRA on **every** linear module, on a mixture of tasks;
# - (b) score every module of every layer: how much worse is the adapter without it?
# - (c) keep the most critical modules of each layer;
# - (d) tune a **new task** with this setting.
#
# The paper's own score could not be read, so the score here is that of ALoRA, by the same group;
# [docs/fanlora.md](https://github.com/para-jax/para_jax/blob/main/docs/fanlora.md) says what is the paper's and what is
# a choice of ours. At the end the setting is compared with LoRA everywhere, and with as many modules chosen at random.
#
# On a CPU with two cores and the tiny model that ships with the package this takes about three minutes.

# %%
# @title Install para_jax

# %% [markdown]
# ## Model and rows
#
# The rows are made by the package: one-sentence stories and three tasks. *mood* names the feeling and *place* copies
# the place; both are the mixture. *question* turns the story into a question, and is the new task.

# %%
MODEL = ""  # @param {"type": "string", "placeholder": "a folder or a name of the hub; empty: the tiny model"}
KEEP = 2  # @param {"type": "integer"}
OUT = "fanlora"  # @param {"type": "string"}

import jax

from para_jax import Backbone, encode_rows, end_tokens, load_tokenizer, tiny_backbone_path
from para_jax.data.quickstart import quickstart_rows
from para_jax.memory import keep_freed_memory

keep_freed_memory()
MODEL = MODEL or tiny_backbone_path()
backbone, tokenizer = Backbone.from_pretrained(MODEL, stacked=True), load_tokenizer(MODEL)
config = backbone.config
SMALL = config.size < 1e8
STEPS = 120 if SMALL else 300
LR = 1e-2 if SMALL else 2e-4  # a starting point: what suits a model is found by trying
R = 4

train, held_out = quickstart_rows(seed=0, train=1500, held_out=120)
eos = end_tokens(config, tokenizer)


def encoded(rows, *tasks):
    named = [(f"{task} row {i}", row) for task in tasks for i, row in enumerate(rows[task], 1)]
    return encode_rows(named, tokenizer, eos, keep_texts=True)


for task in train:
    print(f"{task:9} {train[task][0]['prompt']!r} -> {train[task][0]['response']!r}")
print(f"{config.size / 1e6:.1f}M parameters in {config.num_hidden_layers} layers, on {jax.devices()[0].device_kind}")

# %% [markdown]
# ## (a) LoRA on every linear module, tuned on the mixture
#
# If this cell is interrupted, running it again goes on where it stopped.

# %%
from para_jax import AdapterBank, LoraConfig, Settings, finetune

everywhere = LoraConfig(r=R, lora_alpha=R, target_modules="all-linear")
mixture = finetune(
    backbone,
    AdapterBank.create({"mixture": everywhere}, config, seed=0),
    {"mixture": encoded(train, "mood", "place")},
    {"mixture": Settings.checked(steps=STEPS, lr=LR)},
    f"{OUT}/mixture",
    rows=16,
    resume=True,
)["mixture"]

# %% [markdown]
# ## (b) Every module scored
#
# The score is an ablation. S(M) is the negative loss of the adapter with all its modules M on rows that it was not
# tuned on. The importance of module m is S(M) - S(M without m) + S(only m): what is lost without it, and how far it
# comes alone. That is two forward passes for each module; sixteen such variants run as one pass.

# %%
from para_jax.importance.scores import importance

scores = importance("ablation", backbone, mixture, [*encoded(held_out, "mood", "place")][::4], show=print)

# %% [markdown]
# ## (c) The most critical modules of each layer
#
# Colour is importance, the numbers are nats a response token, and what is kept has a frame. S(only m) is a negative
# loss, so that all numbers may be negative; what counts is the order within a layer.

# %%
from IPython.display import Image

from para_jax import FanLoraConfig
from para_jax.importance.select import keep_number, plot_importance

kept = keep_number(scores, config, KEEP)
critical = FanLoraConfig.of(kept, config, r=R, lora_alpha=R)
critical.save(f"{OUT}/fanlora.json", overwrite=True)
plot_importance(scores, kept, config, f"{OUT}/importance.png", "importance on mood and place; framed: kept")
for layer, sites in enumerate(kept):
    print(f"layer {layer}: {', '.join(sites)}")
print(f"{critical.size(config):,} parameters; LoRA on every module has {everywhere.size(config):,}")
Image(f"{OUT}/importance.png")

# %% [markdown]
# ## (d) The new task
#
# Five tenants learn *question* in the same steps, each as if it were alone: LoRA everywhere, the critical modules, and
# three settings with as many modules of each layer, but drawn at random. Nothing of *question* was used to choose the
# modules.

# %%
methods = {"everywhere": everywhere, "critical": critical}
for seed in range(3):
    drawn = keep_number(importance("random", backbone, mixture, seed=seed), config, KEEP)
    methods[f"random-{seed}"] = FanLoraConfig.of(drawn, config, r=R, lora_alpha=R)
bank = finetune(
    backbone,
    AdapterBank.create(methods, config, seed=0),
    dict.fromkeys(methods, encoded(train, "question")),
    dict.fromkeys(methods, Settings.checked(steps=STEPS // 2, lr=LR)),
    f"{OUT}/question",
    rows=8,
    resume=True,
)

# %%
Image(f"{OUT}/question/loss.png")

# %% [markdown]
# How many questions about held-out stories are exactly right? The words of these stories were never combined so in
# tuning. A CPU decodes faster with the layers apart, so there the model is read once more.

# %%
from para_jax import evaluate
from para_jax.backbones.options import default_stacked

decoder = backbone if default_stacked() else Backbone.from_pretrained(MODEL)
tests = dict.fromkeys(methods, encoded(held_out, "question")[:80])
results = evaluate(decoder, tokenizer, tests, bank, max_new_tokens=12, batch_size=200)
for name, method in methods.items():
    print(f"{name:11} {results[name]['exact_match']:.0%} exact, {method.size(config):,} parameters")

# %%
import matplotlib.pyplot as plt

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3), sharey=True, layout="constrained")
colors = ["C0" if name == "everywhere" else "C1" if name == "critical" else "0.7" for name in methods]
bars = left.barh(list(methods), [100 * results[name]["exact_match"] for name in methods], color=colors)
left.bar_label(bars, fmt="%.0f %%", padding=3)
left.set(title="exact on 80 held-out rows", xlim=(0, 118), xticks=[])
bars = right.barh(list(methods), [method.size(config) / 1e3 for method in methods.values()], color=colors)
right.bar_label(bars, fmt="%.1f k", padding=3)
right.set(title="parameters, read again for every token", xticks=[])
right.margins(x=0.18)
left.invert_yaxis()
for axes in (left, right):
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.tick_params(length=0)
plt.show()

# %% [markdown]
# **What this can show.** That the four steps run, what they cost, and which modules this tiny model used for these
# tasks. **What it cannot show** is that the critical modules are better than random ones: there is one seed of tuning,
# 80 rows (where a difference of ten points may be luck), a model of four layers, and three tasks of one kind. The three
# random settings say how much luck there is in a choice; look whether *critical* lies outside of them before you
# believe in it. For a claim, tune with several seeds on your own tasks, and search the learning rate of each method.
# [docs/study.md](https://github.com/para-jax/para_jax/blob/main/docs/study.md) compares the methods so.
#
# ## The adapter in PEFT
#
# What was tuned is LoRA with modules of its own in each layer, which PEFT can say too: its folder lists the full path
# of every module.

# %%
import importlib.util
import json
from pathlib import Path

folder = Path(OUT, "question", "critical")
saved = json.loads((folder / "adapter_config.json").read_text())
print(saved["peft_type"], "r =", saved["r"], *sorted(saved["target_modules"]), sep="\n  ")

story = held_out["question"][0]["prompt"]
ours = results["critical"]["predictions"][0]["prediction"]
print(f"\n{story}\n  para_jax: {ours}")
if importlib.util.find_spec("peft") and importlib.util.find_spec("torch"):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(MODEL), folder)
    prompt = tokenizer(story, return_tensors="pt")
    tokens = theirs.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    print(f"  peft:     {tokenizer.decode(tokens, skip_special_tokens=True).strip()}")
else:
    print("  peft is not installed here: pip install peft torch")
