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
# # Your model, your rows
#
# [![Open-in-Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/para-jax/para_jax/blob/main/colab/your_model.ipynb)
#
# This notebook tunes an adapter for a checkpoint of yours on rows of yours:
#
# 1. the checkpoint is a folder, also one on Drive, or a name on the Hugging Face hub;
# 2. the rows are a JSONL or CSV file, or a data set of the hub;
# 3. held-out rows are scored before and after, against the bare model;
# 4. you chat with the tuned model;
# 5. you download the adapter;
# 6. the same is done with LoRA, and opened with Hugging Face's `peft` where it is installed.
#
# As it is, it runs without any file of yours: a tiny model and rows that come with the package. "Run all" waits for
# nobody; uploads and Drive are switches that are off. With the tiny model on two CPU cores it takes about three
# minutes.

# %% [markdown]
# ## Settings
#
# | setting | what it takes |
# |---|---|
# | `MODEL` | a folder with `config.json` and `*.safetensors`, or a name on the hub; empty for the tiny model |
# | `ROWS` | `rows.jsonl`, `rows.csv`, `hf:OWNER/NAME` of the hub; empty for rows that ship with the package |
# | `TEMPLATE` | for other columns than `prompt` and `response`: one that ships, such as `squad`, or a JSON file |
# | `DRIVE` | mount Google Drive, so that `MODEL`, `ROWS` and `OUT` may be paths under `/content/drive/MyDrive` |
# | `UPLOAD` | choose a file of rows on your computer |
#
# A row is `{"prompt": ..., "response": ...}`, or a chat, `{"messages": [...]}`. For a gated model, visit its page on
# the hub, accept its terms, and put a token into a Colab secret named `HF_TOKEN`.

# %%
MODEL = ""  # @param ["", "Qwen/Qwen2.5-0.5B-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"] {"allow-input": true}
ROWS = ""  # @param {"type": "string"}
TEMPLATE = ""  # @param {"type": "string"}
OUT = "your-model"  # @param {"type": "string"}
DRIVE = False  # @param {"type": "boolean"}
UPLOAD = False  # @param {"type": "boolean"}
QUANTIZE = "none"  # @param ["none", "int8", "int4"]
STEPS = 0  # @param {"type": "integer"}
MAX_LENGTH = 512  # @param {"type": "integer"}

# %%
if DRIVE:
    from google.colab import drive

    drive.mount("/content/drive")
if UPLOAD:
    from google.colab import files

    ROWS = next(iter(files.upload()))

# %% [markdown]
# ## The model
#
# Only its `config.json` is read at first. It says whether the model fits this device, before anything large is
# downloaded.

# %%
import random
from pathlib import Path

import jax

from para_jax import (
    AdapterBank,
    Backbone,
    BackboneConfig,
    LoraConfig,
    ParaConfig,
    Settings,
    complete,
    encode_rows,
    end_tokens,
    evaluate,
    finetune,
    load_tokenizer,
    read_rows,
    tiny_backbone_path,
)

MODEL = MODEL or tiny_backbone_path()
config, device = BackboneConfig.from_pretrained(MODEL), jax.devices()[0]
memory = (device.memory_stats() or {}).get("bytes_limit")
BYTES = {"none": 4 if device.platform == "cpu" else 2, "int8": 1, "int4": 0.5}
weights = {name: config.size * size for name, size in BYTES.items()}
print(f"{config.family}, {config.size / 1e6:,.0f}M parameters, on {device.device_kind}")
for name, size in weights.items():
    room = "" if memory is None else f" of {memory / 1e9:.1f} GB" + (", too much" if size > 0.8 * memory else "")
    print(f"  quantize={name}: weights of at most {size / 1e9:.2f} GB{room}")
if memory is not None and weights[QUANTIZE] > 0.8 * memory:
    raise SystemExit("This model does not fit. Choose a smaller one, or set QUANTIZE to what the list above says fits.")

# %%
quantize = None if QUANTIZE == "none" else QUANTIZE
backbone = Backbone.from_pretrained(MODEL, stacked=True, quantize=quantize)
tokenizer = load_tokenizer(MODEL)
small = config.size < 1e8
STEPS = STEPS or (100 if small else 200)

# %% [markdown]
# ## The rows
#
# What is malformed, too long, or has a key that nobody reads is an error that names the file and the line. A tenth of
# the rows, 200 at the most, is held out. They are never learnt from.

# %%
if ROWS:
    rows = read_rows(ROWS, TEMPLATE or None)
else:
    from para_jax.data.quickstart import quickstart_rows

    rows = [(f"row {i}", row) for i, row in enumerate(quickstart_rows(train=1500)[0]["question"], 1)]
random.Random(0).shuffle(rows)
held = max(1, min(200, len(rows) // 10))
length = min(MAX_LENGTH, config.max_position_embeddings)
eos = end_tokens(config, tokenizer)
test = encode_rows(rows[:held], tokenizer, eos, length, truncate=True, keep_texts=True)
train = encode_rows(rows[held:], tokenizer, eos, length, truncate=True)
print(f"{len(train):,} examples to learn from, {len(test)} held out; the longest has {max(map(len, train))} tokens")
print(f"{test[0].prompt[-300:]!r} -> {test[0].response[:200]!r}")

# %% [markdown]
# ## Tuning
#
# The model's weights stay as they are. Two adapters learn from the same rows in the same steps, one by PARA and one
# by LoRA. If this cell is interrupted, run it again: it goes on where it stopped. After a runtime was lost, `OUT` on
# Drive has what is needed to go on.

# %%
configs = {"para": ParaConfig(r=12), "lora": LoraConfig(r=8)}
for name, method in configs.items():
    print(f"{name}: {method.size(config):,} parameters")
bank = finetune(
    backbone,
    AdapterBank.create(configs, config),
    dict.fromkeys(configs, train),
    {name: Settings.checked(steps=STEPS, lr=1e-2 if small else 1e-3) for name in configs},
    OUT,
    rows=min(8, len(train)),
    checkpoint_every=50,
    resume=True,
)

# %%
from IPython.display import Image

Image(f"{OUT}/loss.png")

# %% [markdown]
# ## Before and after
#
# The held-out rows, answered by the bare model, and with each adapter. Exact match counts answers that are the
# response, word for word; F1 gives credit for words in common, which suits longer answers.

# %%
NEW = max(8, min(128, 8 + max(len(e.response_ids) for e in test)))
some = test[:100]
decoder = backbone if jax.default_backend() == "tpu" else Backbone.from_pretrained(MODEL, quantize=quantize)
before = evaluate(decoder, tokenizer, {"bare": some}, None, max_new_tokens=NEW)
after = evaluate(decoder, tokenizer, dict.fromkeys(configs, some), bank, max_new_tokens=NEW)
scores = {**before, **after}
for name, of in scores.items():
    print(f"{name:5} exact match {of['exact_match']:.0%}, F1 {of['token_f1']:.2f}")

# %%
import matplotlib.pyplot as plt
import numpy as np

figure, axes = plt.subplots(figsize=(6.5, 3.4), layout="constrained")
for i, (key, label) in enumerate({"exact_match": "exact match", "token_f1": "F1 of words"}.items()):
    bars = axes.bar(np.arange(len(scores)) + 0.4 * i - 0.2, [of[key] for of in scores.values()], 0.38, label=label)
    axes.bar_label(bars, fmt="%.2f", fontsize=9)
axes.set(xticks=range(len(scores)), xticklabels=scores, ylim=(0, 1.12), title=f"{len(some)} held-out rows")
axes.spines[["top", "right"]].set_visible(False)
axes.legend(frameon=False, loc="upper left")
plt.show()

# %%
for i in range(min(3, len(some))):
    print(f"\n{some[i].prompt[-300:]}\n  expected: {some[i].response[:200]!r}")
    for name, of in scores.items():
        print(f"  {name:8}: {of['predictions'][i]['prediction'][:200]!r}")

# %% [markdown]
# ## Chat
#
# Set `ASK` to a question of yours and run this cell. A model with a chat template gets it as a chat, others as plain
# text.

# %%
ASK = "The vexed maid runs to the prison at this moment."  # @param {"type": "string"}


def answer(text, tenant):
    """The answer with an adapter, or with None the bare model's."""
    if tokenizer.chat_template is not None:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
        text = tokenizer(text, add_special_tokens=False)["input_ids"]
    return complete(decoder, tokenizer, [text], bank=bank, tenants=[tenant], max_new_tokens=64)[0].text.strip()


for tenant in (None, *configs):
    print(f"{tenant or 'bare':5} {answer(ASK, tenant)}")

# %% [markdown]
# ## Download
#
# `OUT` has a folder for each adapter: LoRA's opens in `peft`, and both open in para_jax
# (`para_jax.load_adapter`, `para-jax generate --adapters`).

# %%
import json
import shutil

for name in configs:
    folder = Path(OUT, name)
    kind = json.loads((folder / "adapter_config.json").read_text())["peft_type"]
    print(f"{folder}: {kind}, {sum(f.stat().st_size for f in folder.iterdir()) / 1e3:.0f} kB")
    packed = shutil.make_archive(f"{OUT}-{name}", "zip", folder)
    if UPLOAD:  # somebody is there
        files.download(packed)

# %% [markdown]
# ## The same adapter in peft
#
# Where torch and peft are installed, as on Colab, the LoRA adapter opens there and gives the same logits.

# %%
from importlib.util import find_spec

if find_spec("torch") is None or find_spec("peft") is None:
    print("torch or peft is not installed here: pip install torch peft")
elif not small:
    print("skipped: a second copy of a large model would not fit beside the first")
else:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ids = tokenizer(ASK)["input_ids"]
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32"), f"{OUT}/lora")
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor([ids])).logits[0].numpy()
    plain = Backbone.from_pretrained(MODEL, dtype="float32")
    found = plain(np.array([ids], np.int32), bank=bank, tenants=["lora"])[0]
    difference, largest = np.abs(np.asarray(found) - expected).max(), np.abs(expected).max()
    print(f"largest difference of logits: {difference:.1e}, where the largest is {largest:.1f}")
