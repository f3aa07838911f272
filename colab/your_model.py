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

# %% cellView="form"
# @title Install para_jax
# The package index's name of it, a git address, or a wheel's path: one that was uploaded, or is on a mounted Drive.
SOURCE = "para-jax"  # @param ["para-jax", "git+https://github.com/para-jax/para_jax"] {"allow-input": true}

# This cell is the same in every notebook: colab/pair.py makes it from colab/install.py. The runtime keeps its packages;
# only where a TPU's JAX compiles no kernels is it upgraded, to versions that keep numpy.
import importlib
import json
import logging
import os
import subprocess
import sys
import tempfile
from glob import glob
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, distribution, distributions, requires, version
from pathlib import Path


def accelerator() -> str:
    """The accelerator that a machine has, or that its notebook was opened with: "tpu", "gpu" or none, "".

    Colab says which of its runtimes this is, even where the device itself cannot be seen.

    >>> accelerator() in ("tpu", "gpu", "")
    True
    """
    if os.environ.get("COLAB_TPU_1VM") or os.environ.get("TPU_ACCELERATOR_TYPE", "").startswith(("v", "tpu")):
        return "tpu"
    if os.environ.get("COLAB_GPU", "0") not in ("", "0") or nvidia_driver():
        return "gpu"
    return "tpu" if glob("/dev/accel*") or glob("/dev/vfio/[0-9]*") else ""


def cuda_extra(driver: str) -> str:
    """The extra of para-jax with the CUDA libraries that a driver can run: those of CUDA 13 need driver 580.

    >>> cuda_extra("550.54.15"), cuda_extra("580.65.06")
    ('cuda12', 'cuda13')
    """
    return "cuda13" if int(driver.partition(".")[0] or 0) >= 580 else "cuda12"


def installed(name: str) -> str:
    """The version of a package; none, "", if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def nvidia_driver() -> str:
    """The version of NVIDIA's driver; none, "", where there is no such GPU."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.partition("\n")[0].strip() if done.returncode == 0 else ""


def unseen(kind: str) -> str:
    """Why JAX does not see an accelerator of this kind; nothing, "", if it does, or if none is there.

    JAX starts here, and takes its devices.
    """
    import jax

    said: list[logging.LogRecord] = []
    listening = logging.Handler()
    listening.emit = said.append  # type: ignore[method-assign, assignment]
    logging.getLogger("jax").addHandler(listening)
    try:
        if kind in ("", jax.default_backend()):
            return ""
    except RuntimeError as error:  # JAX_PLATFORMS names what does not start
        return str(error).partition("\n")[0]
    finally:
        logging.getLogger("jax").removeHandler(listening)
    if asked := jax.config.values["jax_platforms"]:
        return f"JAX_PLATFORMS={asked} leaves it out"
    try:
        jax.devices({"gpu": "cuda"}.get(kind, kind))
    except RuntimeError as error:
        if "failed to initialize" in str(error):
            return str(error).partition("\n")[0]
    plugins = {"tpu": ("libtpu",), "gpu": ("jax-cuda12-plugin", "jax-cuda13-plugin")}[kind]
    if not any(map(installed, plugins)):
        return f"{' or '.join(plugins)} is not installed"
    driver = nvidia_driver()
    if kind == "gpu" and installed("jax-cuda13-plugin") and cuda_extra(driver) == "cuda12":
        return f"jax-cuda13-plugin needs NVIDIA's driver 580 or later, and there is {driver or 'none'}"
    for record in said:
        if record.levelno >= logging.WARNING:
            return str(record.exc_info[1] if record.exc_info else record.getMessage()).partition("\n")[0]
    return "its plugin did not start; what JAX said when it started tells why"


UPGRADE = ("jax==0.10.2", "jaxlib==0.10.2", "libtpu==0.0.42.1", "flax==0.12.8")
PLUGINS = ("jax-cuda12-plugin", "jax-cuda13-plugin")
KEPT = ("jax", "jaxlib", "libtpu", "flax", "numpy", *PLUGINS)  # nothing but UPGRADE changes them
RESTART = "restart the session (Runtime > Restart session; on Kaggle Run > Restart), then run this cell again"
# The smallest kernel, compiled for a TPU that need not be there: the one that is here is not taken.
KERNEL = """
try:
    import jax
    from jax.experimental import pallas, topologies
    where = dict(platform="tpu", topology_name="v5e:1x1", chips_per_host_bounds=(1, 1, 1))
    chip = jax.sharding.SingleDeviceSharding(topologies.get_topology_desc(**where).devices[0])
    x = jax.ShapeDtypeStruct((8, 128), "float32", sharding=chip)
    copy = pallas.pallas_call(lambda x, y: y.__setitem__(..., x[...]), jax.ShapeDtypeStruct(x.shape, x.dtype))
    jax.jit(copy).lower(x).compile()
except Exception as error:
    print(str(error).partition(chr(10))[0] or type(error).__name__)
"""
AHEAD = {
    "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_LOG_DIR": "disabled",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}  # fmt: skip


class Stopped(SystemExit):
    """Ends this cell, and what would run behind it, with a message in place of a traceback."""


def refused():
    """What the compiler for TPUs says to a kernel; nothing, "", if it compiles."""
    done = subprocess.run([sys.executable, "-c", KERNEL], capture_output=True, text=True, env={**os.environ, **AHEAD})
    ended = f"the compiler ended with code {done.returncode}" if done.returncode else ""
    return ended or (done.stdout.strip().splitlines() or [""])[-1]


def pip(*arguments, kept=KEPT):
    """Installs with pip, which leaves some packages as they are. Returns what it says if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        pins, log = Path(folder, "pins"), Path(folder, "log")
        pins.write_text("".join(f"{name}=={installed(name)}\n" for name in kept if installed(name)))
        options = ["--quiet", "--no-input", "--disable-pip-version-check", "--retries", "1", "--constraint", str(pins)]
        command = [sys.executable, "-m", "pip", "install", *options, *arguments]
        with log.open("w") as output:
            # In a session of its own: interrupting the cell leaves no half package.
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
            try:
                process.wait()
            except KeyboardInterrupt:
                print("pip ends what it has begun, then the cell stops")
                process.wait()
                raise
        importlib.invalidate_caches()
        lines = log.read_text(errors="replace").splitlines()
        errors = [line.removeprefix("ERROR: ").rstrip(".") for line in lines if line.startswith("ERROR: ")]
        return "; ".join(errors or lines[-3:] or ["pip failed"]) if process.returncode else ""


def current():
    """Whether para_jax is installed from SOURCE already; of the package index, in the version that SOURCE names."""
    try:
        found = distribution("para-jax")
    except PackageNotFoundError:
        return False
    came = json.loads(found.read_text("direct_url.json") or "{}")
    if SOURCE.startswith("git+"):
        revision = came.get("vcs_info", {}).get("requested_revision")
        address = f"git+{came.get('url')}" + (f"@{revision}" if revision else "")
        return address == SOURCE
    if SOURCE.endswith(".whl"):
        digest = sha256(Path(SOURCE).read_bytes()).hexdigest()
        return came.get("archive_info", {}).get("hashes") == {"sha256": digest}
    return "==" not in SOURCE or SOURCE.endswith(f"=={found.version}")


def unmet():
    """What para_jax requires that is missing, or too old."""
    from pip._vendor.packaging.requirements import Requirement

    for one in map(Requirement, requires("para-jax") or ()):
        if one.marker is None or one.marker.evaluate({"extra": ""}):
            have = installed(one.name)
            if not have or not one.specifier.contains(have, prereleases=True):
                yield f"{one.name}{one.specifier}"


def install(kind):
    """Installs what is missing for an accelerator of this kind. Raises Stopped if it cannot."""
    if SOURCE.endswith(".whl") and not Path(SOURCE).is_file():
        raise Stopped(f"there is no {SOURCE}; upload it, or mount Drive if it is there (google.colab.drive.mount)")
    # A session that could not have the upgrade goes on without, however often its cells are run.
    trouble = refused() if kind == "tpu" and not globals().get("gone_on") else ""
    extra = f"[{cuda_extra(nvidia_driver())}]" if kind == "gpu" and not any(map(installed, PLUGINS)) else ""
    if (trouble or extra) and "jax" in sys.modules:
        why = f"it compiles no kernels ({trouble})" if trouble else "it has no CUDA plugin"
        raise Stopped(f"JAX has to be changed ({why}), and it is loaded; nothing was changed. So {RESTART}")
    if trouble:
        print(f"jax {installed('jax')} with libtpu {installed('libtpu')} compiles no kernels: {trouble}")
        if failed := pip(*UPGRADE, kept=("numpy",)) or refused():
            globals()["gone_on"] = True
            print(f"{', '.join(UPGRADE)} would, but: {failed}. Attention goes on without its kernel, which is slower")
    fresh = not current()
    failed = pip("--force-reinstall", "--no-deps", SOURCE) if fresh else ""
    needs = [] if failed else [*unmet()]
    if extra or needs:
        failed = failed or pip(f"para-jax{extra}")
    if failed:
        python, having = sys.version.partition(" ")[0], {name: installed(name) for name in KEPT if installed(name)}
        beside = ", ".join([f"Python {python}", *map(" ".join, having.items())])
        failed = f"it needs {', '.join(needs)}; {failed}" if needs else failed
        raise Stopped(f"{SOURCE} cannot be installed beside {beside}: {failed}. Choose another SOURCE, or runtime")
    if fresh:
        print(f"{SOURCE} was installed")
    if fresh and "para_jax" in sys.modules:
        raise Stopped(f"another para_jax is loaded. So {RESTART}")


def versions():
    return {found.metadata["Name"]: found.version for found in reversed([*distributions()])}


kind, before = accelerator(), versions()
install(kind)
changed = {name: new for name, new in versions().items() if before.get(name) != new}
for name, new in sorted(changed.items()):
    print(f"{name} {before[name]} -> {new}" if name in before else f"{name} {new} is new")
print(f"para-jax {installed('para-jax')} is ready")
if loaded := [name for name in changed if name in before and name.replace("-", "_") in sys.modules]:
    raise Stopped(f"{', '.join(loaded)} was loaded before it was changed. So {RESTART}")
if why := unseen(kind):
    raise Stopped(
        f"this is a {kind.upper()} runtime, but JAX sees only the CPU because {why}. If another notebook or process "
        f"has the {kind.upper()}, end it; then {RESTART}. `!para-jax env` prints what a report of the problem needs"
    )
import jax

print(f"jax {jax.__version__} sees {jax.device_count()} x {jax.devices()[0].device_kind}")

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
