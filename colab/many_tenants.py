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
#   accelerator: GPU
# ---

# %% [markdown]
# # What a tenant costs
#
# [![Open-in-Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/para-jax/para_jax/blob/main/colab/many_tenants.ipynb)
#
# Many customers share one frozen language model. Each has an adapter, and all of them are answered in one batch. What
# does that cost, beside the bare model?
#
# - **PARA** reads an adapter once, at the prompt, and makes three vectors a layer of it. Each later token is scaled
#   by these vectors.
# - **LoRA** reads the pair of low-rank matrices of every module again at every token.
#
# This notebook measures both on the device that it runs on: the time of a decode step, and the memory, for 1 to 256
# tenants in a batch (64 on a CPU). Every row of a batch has a tenant of its own.
#
# On two CPU cores, with the tiny model that comes with the package, it takes about three minutes.

# %% [markdown]
# ## Settings

# %%
import time

import jax
import matplotlib.pyplot as plt
import numpy as np

from para_jax import (
    AdapterBank,
    Backbone,
    BackboneConfig,
    LoraConfig,
    ParaConfig,
    complete,
    load_tokenizer,
    tiny_backbone_path,
)

MODEL = ""  # @param ["", "Qwen/Qwen2.5-0.5B", "HuggingFaceTB/SmolLM2-135M"] {"allow-input": true}
TENANTS = ""  # @param {"type": "string", "placeholder": "1, 8, 64, 256"}

MODEL = MODEL or tiny_backbone_path()
config, device = BackboneConfig.from_pretrained(MODEL), jax.devices()[0]
TENANTS = TENANTS or ("1, 8, 64" if device.platform == "cpu" else "1, 8, 64, 256")
TENANTS = [int(n) for n in TENANTS.split(",")]
print(f"{config.size / 1e6:.0f}M parameters, {config.num_hidden_layers} layers, on {device.device_kind}")

# %% [markdown]
# An adapter of either method for this model. The ranks are those that their papers use. `para-jax methods` prints
# such a table for any model.

# %%
METHODS = {"PARA r=12": ParaConfig(r=12), "LoRA r=16": LoraConfig(r=16, target_modules="all-linear")}
for name, method in METHODS.items():
    size = method.size(config)
    print(f"{name}: {size:,} parameters, {size / config.size:.2%} of the model's; {4 * size / 1e6:.1f} MB in float32")

# %% [markdown]
# ## The tenants
#
# One bank holds all adapters, stacked. They are fresh here, which changes no time: an adapter's numbers are read
# whatever they are.
#
# `mixed` has both kinds in one batch, and rows with no adapter at all. Each kind is computed for its own rows.

# %%
backbone, tokenizer = Backbone.from_pretrained(MODEL), load_tokenizer(MODEL)
most = max(TENANTS)
names = {kind: [f"{kind}, tenant {i}" for i in range(most)] for kind in METHODS}
banks = {kind: AdapterBank.create(dict.fromkeys(of, METHODS[kind]), config) for kind, of in names.items()}


def asked(kind, rows):
    """The bank and each row's tenant."""
    if kind == "bare":
        return None, [None] * rows
    if kind != "mixed":
        return banks[kind], names[kind][:rows]
    third = -(-rows // 3)
    chosen = [of[:third] for of in names.values()]
    configs = {name: METHODS[kind] for kind, of in zip(METHODS, chosen, strict=True) for name in of}
    rows_of = [name for both in zip(*chosen, [None] * third, strict=True) for name in both]
    return AdapterBank.create(configs, config), rows_of[:rows]


# %% [markdown]
# ## Time
#
# A step's time is the difference between answers of 48 and of 34 tokens, over the 14 steps between: prompts are not
# in it, nor is compiling. The median of five is drawn, and the range of all five. A CPU with other work to do is not
# a quiet place to measure; look at the range before at the line.

# %%
FEW, MANY = 34, 48  # one program decodes both
PROMPT = "It was a dark night, and the captain of the ship had not slept for"


def step_ms(kind, rows, repeats=5):
    """Milliseconds of a decode step, several times."""
    bank, tenants = asked(kind, rows)

    def seconds(tokens):
        began = time.perf_counter()
        found = complete(
            backbone, tokenizer, [PROMPT] * rows, bank=bank, tenants=tenants, max_new_tokens=tokens, eos_token_id=()
        )
        assert all(len(one.tokens) == tokens for one in found)
        return time.perf_counter() - began

    seconds(MANY), seconds(FEW)  # compiles
    return [1e3 * (seconds(MANY) - seconds(FEW)) / (MANY - FEW) for _ in range(repeats)]


KINDS = ("bare", *METHODS, "mixed")
measured = {}
for rows in TENANTS:
    for kind in KINDS:
        measured[kind, rows] = step_ms(kind, rows)
    print(f"{rows:4} rows: " + ", ".join(f"{kind} {np.median(measured[kind, rows]):.2f} ms" for kind in KINDS))

# %%
COLOURS = dict(zip(KINDS, ("black", "C0", "C1", "C2"), strict=True))
figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
for kind in KINDS:
    times = np.array([measured[kind, rows] for rows in TENANTS])
    middle = np.median(times, axis=1)
    style = {"color": COLOURS[kind], "marker": "o", "label": kind}
    left.plot(TENANTS, middle, **style)
    left.fill_between(TENANTS, times.min(axis=1), times.max(axis=1), color=COLOURS[kind], alpha=0.12)
    bare = np.median([measured["bare", rows] for rows in TENANTS], axis=1)
    right.plot(TENANTS, middle / bare, **style)
left.set(title="A decode step", ylabel="milliseconds", yscale="log")
right.set(title="... over the bare model's", ylabel="ratio of medians")
for axes in (left, right):
    axes.set_xscale("log", base=2)
    axes.set(xlabel="tenants in the batch, one row each", xticks=TENANTS, xticklabels=TENANTS)
    axes.spines[["top", "right"]].set_visible(False)
left.legend(frameon=False)
plt.show()

# %% [markdown]
# PARA's line lies on the bare model's: a step reads a few vectors a row, beside all of the model's weights. LoRA's
# rises, because each row reads matrices of its own. The larger the model, the more its own weights hide what a few
# rows of LoRA cost; the more rows, the less they do.
#
# ## Tokens a second
#
# The same figures as the papers show them: what a device answers in a second.

# %%
figure, axes = plt.subplots(figsize=(9, 3.8), layout="constrained")
for i, kind in enumerate(KINDS):
    rates = [1e3 * rows / np.median(measured[kind, rows]) for rows in TENANTS]
    bars = axes.bar(np.arange(len(TENANTS)) + (i - 1.5) * 0.2, rates, 0.19, color=COLOURS[kind], label=kind)
    axes.bar_label(bars, [f"{rate:,.0f}" for rate in rates], fontsize=7, rotation=45, padding=2)
axes.set(xticks=range(len(TENANTS)), xticklabels=TENANTS, xlabel="tenants in the batch", ylabel="tokens a second")
axes.set(yscale="log", title="Decoding, all rows together")
axes.margins(y=0.18)
axes.spines[["top", "right"]].set_visible(False)
axes.legend(frameon=False, loc="upper left")
plt.show()

# %% [markdown]
# ## Memory
#
# A tenant is stored in the bank, and while one of its requests is answered there is a second thing: what was made of
# the adapter for this request. For PARA these are the vectors; for LoRA, its matrices once more, in the dtype of
# computation. The model's weights and the cache of keys and values are the same for all.


# %%
def megabytes(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree)) / 1e6


def in_flight(kind):
    """Megabytes of one request's prepared adapter, from shapes alone."""
    rows = banks[kind].rows(names[kind][:1])
    tokens = jax.ShapeDtypeStruct((1, 16), np.int32)
    mask = jax.ShapeDtypeStruct((1, 16), np.bool_)
    state = jax.eval_shape(lambda b, t, m, r: b.prefill(t, m, r, 16)[1], backbone, tokens, mask, rows)
    return sum(np.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state.adjustments)) / 1e6


stored = {kind: megabytes(banks[kind]) / most for kind in METHODS}
flying = {kind: in_flight(kind) for kind in METHODS}
weights = megabytes(backbone)
print(f"the model: {weights:,.1f} MB")
for kind in METHODS:
    print(f"{kind}: a tenant stored {stored[kind]:.3f} MB, a request in flight {flying[kind]:.4f} MB")

# %%
figure, axes = plt.subplots(figsize=(9, 3.6), layout="constrained")
for kind in METHODS:
    axes.plot(TENANTS, [n * stored[kind] for n in TENANTS], color=COLOURS[kind], label=f"{kind}, stored")
    axes.plot(
        TENANTS,
        [n * flying[kind] for n in TENANTS],
        color=COLOURS[kind],
        marker="o",
        ls="--",
        label=f"{kind}, in flight",
    )
axes.axhline(weights, color="black", linewidth=1)
axes.annotate("the model's weights", (TENANTS[0], weights), va="bottom", fontsize=9)
axes.set_xscale("log", base=2)
axes.set(
    yscale="log", xlabel="tenants", xticks=TENANTS, xticklabels=TENANTS, ylabel="MB", title="Memory of all tenants"
)
axes.spines[["top", "right"]].set_visible(False)
axes.legend(frameon=False, fontsize=9)
plt.show()

# %% [markdown]
# ## A new tenant costs no compilation
#
# Programs depend on how many rows there are and how long their prompts may be, not on who asks. So another tenant of
# the same kind, never seen before, is answered by the program that is there.

# %%
compiled = []
jax.monitoring.register_event_duration_secs_listener(
    lambda name, seconds, **_: (
        compiled.append(seconds) if name == "/jax/core/compile/backend_compile_duration" else None
    )
)
rows = TENANTS[1]
for turn in range(2):
    some = AdapterBank.create({f"customer {turn}.{i}": METHODS["PARA r=12"] for i in range(rows)}, config, seed=turn)
    compiled.clear()
    complete(backbone, tokenizer, [PROMPT] * rows, bank=some, tenants=list(some.names), max_new_tokens=FEW)
    print(f"{rows} new tenants, turn {turn + 1}: {len(compiled)} programs compiled")

# %% [markdown]
# The first turn may compile what takes rows out of a bank of this size; the second compiles nothing.
