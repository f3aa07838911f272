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
# This notebook fine-tunes a model of yours on rows of yours, with two methods at once:
#
# - **PARA, Prompt-Aware Representation Adjustment** ([paper](https://arxiv.org/abs/2502.01033)): in each layer a small
#   network reads the hidden state of the prompt's last token and makes vectors. They scale Q, V and the feed-forward
#   up projection for all tokens.
# - **LoRA**: low-rank matrices are added to the Q and V projections. It is here for comparison.
#
# The model's weights stay as they are. What is trained is an **adapter**, one for each method. para_jax calls whoever
# has an adapter a **tenant**, because many users or tasks can share one model; here the tenants are `para` and `lora`.
# Their **rank** is the width of PARA's networks, and of LoRA's matrices.
#
# You get scores of the model before and after, answers to a question of yours, and adapters to download. Without any
# settings, "Run all" takes about two minutes on two CPU cores: it tunes a small model that comes with the package and
# was trained on novels, to turn a sentence into a question. `The captain returns to the bank now.` becomes
# `Where is the captain?`

# %% cellView="form"
# @title Install para_jax
# Where to install from: a name on PyPI, a git address, or the path of a wheel (uploaded, or on a mounted Drive).
SOURCE = "para-jax"  # @param ["para-jax", "git+https://github.com/para-jax/para_jax"] {"allow-input": true}

# This cell is the same in every notebook (colab/pair.py writes it from colab/install.py). It installs what is missing
# and leaves the runtime's packages as they are, with one exception: on a TPU whose JAX cannot compile Pallas kernels it
# upgrades jax, jaxlib, libtpu and flax. It never changes numpy.
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
    """The machine's accelerator: "tpu", "gpu" or "" for none.

    Colab's environment variables name the runtime even if the device is not visible.

    >>> accelerator() in ("tpu", "gpu", "")
    True
    """
    if os.environ.get("COLAB_TPU_1VM") or os.environ.get("TPU_ACCELERATOR_TYPE", "").startswith(("v", "tpu")):
        return "tpu"
    if os.environ.get("COLAB_GPU", "0") not in ("", "0") or nvidia_driver():
        return "gpu"
    return "tpu" if glob("/dev/accel*") or glob("/dev/vfio/[0-9]*") else ""


def cuda_extra(driver: str) -> str:
    """The extra of para-jax with CUDA libraries that the driver supports. CUDA 13 needs driver 580.

    >>> cuda_extra("550.54.15"), cuda_extra("580.65.06")
    ('cuda12', 'cuda13')
    """
    return "cuda13" if int(driver.partition(".")[0] or 0) >= 580 else "cuda12"


def installed(name: str) -> str:
    """The version of a package, or "" if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def nvidia_driver() -> str:
    """The version of NVIDIA's driver, or "" if there is no NVIDIA GPU."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.partition("\n")[0].strip() if done.returncode == 0 else ""


def unseen(kind: str) -> str:
    """Why JAX does not see an accelerator of this kind; "" if it does, or if `kind` is "".

    This starts JAX, which takes the devices.
    """
    import jax

    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign, assignment]
    logging.getLogger("jax").addHandler(handler)
    try:
        if kind in ("", jax.default_backend()):
            return ""
    except RuntimeError as error:  # JAX_PLATFORMS names a platform that does not start
        return str(error).partition("\n")[0]
    finally:
        logging.getLogger("jax").removeHandler(handler)
    if platforms := jax.config.values["jax_platforms"]:
        return f"JAX_PLATFORMS={platforms} leaves it out"
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
        return f"jax-cuda13-plugin needs NVIDIA's driver 580 or later, but the driver is {driver or 'missing'}"
    for record in records:
        if record.levelno >= logging.WARNING:
            return str(record.exc_info[1] if record.exc_info else record.getMessage()).partition("\n")[0]
    return "its plugin did not start; see JAX's log for the reason"


UPGRADE = ("jax==0.10.2", "jaxlib==0.10.2", "libtpu==0.0.42.1", "flax==0.12.8")
PLUGINS = ("jax-cuda12-plugin", "jax-cuda13-plugin")
KEPT = ("jax", "jaxlib", "libtpu", "flax", "numpy", *PLUGINS)  # only UPGRADE changes them
RESTART = "restart the session (Runtime > Restart session; on Kaggle Run > Restart), then run this cell again"
# Compiles the smallest kernel for a TPU. It needs no TPU, and does not occupy one that is here.
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
    """Ends this cell and stops "Run all", with a message instead of a traceback."""


def refused():
    """Why the TPU compiler refuses a kernel; "" if it compiles."""
    done = subprocess.run([sys.executable, "-c", KERNEL], capture_output=True, text=True, env={**os.environ, **AHEAD})
    ended = f"the compiler ended with code {done.returncode}" if done.returncode else ""
    return ended or (done.stdout.strip().splitlines() or [""])[-1]


def pip(*arguments, kept=KEPT):
    """Installs with pip, without changing the packages in `kept`. Returns pip's error; "" if it succeeds."""
    with tempfile.TemporaryDirectory() as folder:
        pins, log = Path(folder, "pins"), Path(folder, "log")
        pins.write_text("".join(f"{name}=={installed(name)}\n" for name in kept if installed(name)))
        options = ["--quiet", "--no-input", "--disable-pip-version-check", "--retries", "1", "--constraint", str(pins)]
        command = [sys.executable, "-m", "pip", "install", *options, *arguments]
        with log.open("w") as output:
            # In a session of its own, so that interrupting the cell does not leave a package half installed.
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
            try:
                process.wait()
            except KeyboardInterrupt:
                print("pip finishes first, then the cell stops")
                process.wait()
                raise
        importlib.invalidate_caches()
        lines = log.read_text(errors="replace").splitlines()
        errors = [line.removeprefix("ERROR: ").rstrip(".") for line in lines if line.startswith("ERROR: ")]
        return "; ".join(errors or lines[-3:] or ["pip failed"]) if process.returncode else ""


def current():
    """Whether para_jax is already installed from SOURCE, in the version that SOURCE names."""
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
    """The requirements of para_jax that are missing or too old."""
    from pip._vendor.packaging.requirements import Requirement

    for one in map(Requirement, requires("para-jax") or ()):
        if one.marker is None or one.marker.evaluate({"extra": ""}):
            have = installed(one.name)
            if not have or not one.specifier.contains(have, prereleases=True):
                yield f"{one.name}{one.specifier}"


def install(kind):
    """Installs what is missing for this kind of accelerator. Raises Stopped if it cannot."""
    if SOURCE.endswith(".whl") and not Path(SOURCE).is_file():
        raise Stopped(f"there is no {SOURCE}; upload it, or mount Drive if it is there (google.colab.drive.mount)")
    # A session in which the upgrade failed does not try again.
    trouble = refused() if kind == "tpu" and not globals().get("gone_on") else ""
    extra = f"[{cuda_extra(nvidia_driver())}]" if kind == "gpu" and not any(map(installed, PLUGINS)) else ""
    if (trouble or extra) and "jax" in sys.modules:
        why = f"it cannot compile kernels: {trouble}" if trouble else "it has no CUDA plugin"
        raise Stopped(f"JAX has to be changed ({why}), but it is already loaded. Nothing was changed; {RESTART}")
    if trouble:
        print(f"jax {installed('jax')} with libtpu {installed('libtpu')} cannot compile kernels: {trouble}")
        if failed := pip(*UPGRADE, kept=("numpy",)) or refused():
            globals()["gone_on"] = True
            print(f"{', '.join(UPGRADE)} could not be installed: {failed}. Attention runs without its kernel: slower")
    fresh = not current()
    failed = pip("--force-reinstall", "--no-deps", SOURCE) if fresh else ""
    needs = [] if failed else [*unmet()]
    if extra or needs:
        failed = failed or pip(f"para-jax{extra}")
    if failed:
        python, having = sys.version.partition(" ")[0], {name: installed(name) for name in KEPT if installed(name)}
        beside = ", ".join([f"Python {python}", *map(" ".join, having.items())])
        failed = f"it needs {', '.join(needs)}; {failed}" if needs else failed
        raise Stopped(f"{SOURCE} cannot be installed beside {beside}: {failed}. Choose another SOURCE or runtime")
    if fresh:
        print(f"{SOURCE} was installed")
    if fresh and "para_jax" in sys.modules:
        raise Stopped(f"another para_jax is already loaded; {RESTART}")


def versions():
    return {found.metadata["Name"]: found.version for found in reversed([*distributions()])}


kind, before = accelerator(), versions()
install(kind)
changed = {name: new for name, new in versions().items() if before.get(name) != new}
for name, new in sorted(changed.items()):
    print(f"{name} {before[name]} -> {new}" if name in before else f"{name} {new} is new")
print(f"para-jax {installed('para-jax')} is ready")
if loaded := [name for name in changed if name in before and name.replace("-", "_") in sys.modules]:
    raise Stopped(f"{', '.join(loaded)} was loaded before it was changed; {RESTART}")
if why := unseen(kind):
    raise Stopped(
        f"this is a {kind.upper()} runtime, but JAX sees only the CPU because {why}. If another notebook or process "
        f"has the {kind.upper()}, end it; then {RESTART}. To report the problem, add what `!para-jax env` prints"
    )
import jax

print(f"jax {jax.__version__} sees {jax.device_count()} x {jax.devices()[0].device_kind}")

# %% [markdown]
# ## Settings
#
# | setting | what it takes |
# |---|---|
# | `MODEL` | a name on the Hugging Face hub, or a folder with `config.json` and the weights; empty: the small model |
# | `ROWS` | `rows.jsonl`, `rows.csv`, or a data set of the hub, `hf:OWNER/NAME`; empty: the task above |
# | `TEMPLATE` | only for rows with other columns: how to make a prompt and a response of them (below) |
# | `OUT` | the folder of this run |
# | `DRIVE` | mount Google Drive; then `MODEL`, `ROWS` and `OUT` may be paths in `/content/drive/MyDrive` |
# | `UPLOAD`, `DOWNLOAD` | upload a file of rows from your computer; download the adapters at the end |
# | `QUANTIZE` | `int8` or `int4` makes the frozen model smaller in memory |
# | `STEPS` | 0: two passes over the rows, but 100 to 1000 steps; with the small model 100 |
# | `LR` | the learning rate; 0: 1e-3, with the small model 1e-2 |
# | `RANK` | PARA's rank; LoRA gets the rank at which it has as many parameters |
# | `MAX_LENGTH` | the most tokens of a prompt with its response |
#
# **Rows.** A row is `{"prompt": "...", "response": "..."}`, or a chat, `{"messages": [...]}`, which the model's chat
# template writes. A prompt goes to the model as it is, without the chat template. In JSONL and CSV files, any other
# column is an error. Of a data set of the hub the split `train` is taken, or the one you name: `hf:OWNER/NAME:SPLIT`.
# `TEMPLATE` is the name of a template that comes with the package, such as `squad`
# ([all of them](https://github.com/para-jax/para_jax/blob/main/docs/data.md)), or a JSON file like
# `{"prompt": "{{title}}\nSection:", "response": "{{label}}"}`.
#
# **Running again.** If the tuning was interrupted, run the cells again: it continues. If the runtime was lost, this
# needs an `OUT` on Drive. `OUT` belongs to one model, one set of rows and one set of settings. If you change any of
# these, choose another `OUT`; otherwise the tuning cell stops and says what differs.
#
# **Gated models.** Accept the terms on the model's page, and put your token into a Colab secret named `HF_TOKEN`.

# %%
MODEL = ""  # @param ["", "HuggingFaceTB/SmolLM2-135M-Instruct", "Qwen/Qwen2.5-0.5B-Instruct"] {"allow-input": true}
ROWS = ""  # @param {"type": "string"}
TEMPLATE = ""  # @param {"type": "string"}
OUT = "your-model"  # @param {"type": "string"}
DRIVE = False  # @param {"type": "boolean"}
UPLOAD = False  # @param {"type": "boolean"}
DOWNLOAD = False  # @param {"type": "boolean"}
QUANTIZE = "none"  # @param ["none", "int8", "int4"]
STEPS = 0  # @param {"type": "integer"}
LR = 0.0  # @param {"type": "number"}
RANK = 12  # @param {"type": "integer"}
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
# First the size, from `config.json` alone: nothing large is downloaded if the weights take more than 70% of the
# device's memory. The rest is for tuning and answering. If that runs out of memory, the error says what helps.

# %%
import jax

from para_jax import Backbone, BackboneConfig, load_tokenizer, tiny_backbone_path

MODEL = MODEL or tiny_backbone_path()
config, device = BackboneConfig.from_pretrained(MODEL), jax.devices()[0]
memory = (device.memory_stats() or {}).get("bytes_limit")
small = config.size < 1e8


def weight_bytes(quantize):
    model = jax.eval_shape(lambda: Backbone(config, jax.random.key(0), quantize=quantize, attention="plain"))
    return sum(x.size * (0.5 if x.dtype == "int4" else x.dtype.itemsize) for x in jax.tree.leaves(model))


print(f"{config.family}, {config.size / 1e6:,.0f}M parameters, on {device.device_kind}")
sizes = {"none": weight_bytes(None), "int8": weight_bytes("int8"), "int4": weight_bytes("int4")}
for name, size in sizes.items():
    room = "" if memory is None else f" of {memory / 1e6:,.0f} MB" + (": too much" if size > 0.7 * memory else "")
    print(f"  QUANTIZE={name}: {size / 1e6:,.0f} MB of weights{room}")
if memory is not None and sizes[QUANTIZE] > 0.7 * memory:
    raise SystemExit("This model does not fit. Choose a smaller one, or a QUANTIZE that fits.")

# %%
backbone = Backbone.from_pretrained(MODEL, stacked=True, quantize=None if QUANTIZE == "none" else QUANTIZE)
tokenizer = load_tokenizer(MODEL)

# %% [markdown]
# ## The rows
#
# A malformed row is an error that names the file and the line. Prompts that are too long are cut at their beginning. A
# tenth of the rows, at most 100, is held out: it is not trained on, and is used for the scores.

# %%
import random

from para_jax import encode_rows, end_tokens, quickstart_rows, read_rows

if ROWS:
    rows = read_rows(ROWS, TEMPLATE or None)
else:
    rows = [(f"row {i}", row) for i, row in enumerate(quickstart_rows(train=1500)[0]["question"], 1)]
random.Random(0).shuffle(rows)
held = max(1, min(100, len(rows) // 10))
length, eos = min(MAX_LENGTH, config.max_position_embeddings), end_tokens(config, tokenizer)
test = encode_rows(rows[:held], tokenizer, eos, length, truncate=True, keep_texts=True)
train = encode_rows(rows[held:], tokenizer, eos, length, truncate=True)
print(f"{len(train):,} examples to train on, {len(test)} held out; the longest has {max(map(len, train))} tokens")
print(f"{test[0].prompt[-300:]!r} -> {test[0].response[:200]!r}")

# %% [markdown]
# ## Tuning
#
# A step takes rows for both adapters through the model. They learn from the same rows, each in an order of its own,
# and do not influence each other.

# %%
from IPython.display import Image

from para_jax import LoraConfig, ParaConfig, Settings, finetune

batch = min(8, len(train))  # rows of each adapter in a step
steps = STEPS or (100 if small else max(100, min(1000, 2 * len(train) // batch)))
rate = LR or (1e-2 if small else 1e-3)
para = ParaConfig(r=RANK)
rank = max(1, round(para.size(config) / LoraConfig(r=1).size(config)))
configs = {"para": para, "lora": LoraConfig(r=rank, lora_alpha=2 * rank)}
for name, method in configs.items():
    print(f"{name}: r={method.r}, {method.size(config):,} parameters")
print(f"{steps} steps of {batch} rows: {steps * batch / len(train):.1f} passes over the rows")
settings, data = Settings(steps=steps, lr=rate), dict.fromkeys(configs, train)
bank = finetune(backbone, data, OUT, methods=configs, settings=settings, rows=batch, checkpoint_every=50, resume=True)

# %% [markdown]
# Both losses should fall and then level off. If they do not fall, try another `LR`; if they rise or jump, a smaller
# one.

# %%
Image(f"{OUT}/loss.png")

# %% [markdown]
# ## Before and after
#
# The held-out rows, answered by the model as it was (`bare`) and with each adapter. *Exact match* counts answers that
# are the response, word for word. *F1* compares the words of both, which suits longer answers. Do not rank the two
# methods by this: it is one run with one learning rate.

# %%
import matplotlib.pyplot as plt
import numpy as np

from para_jax import evaluate

most = max(8, min(128, 8 + max(len(row.response_ids) for row in test)))  # tokens of an answer
scores = evaluate(backbone, tokenizer, {"bare": test}, None, max_new_tokens=most)
scores |= evaluate(backbone, tokenizer, dict.fromkeys(configs, test), bank, max_new_tokens=most)
figure, axes = plt.subplots(figsize=(6.5, 3.4), layout="constrained")
for i, (name, color) in enumerate({"bare": "0.6", "para": "C0", "lora": "C1"}.items()):
    shares = [100 * scores[name]["exact_match"], 100 * scores[name]["token_f1"]]
    print(f"{name:5} exact match {shares[0]:.1f}%, F1 {shares[1]:.1f}%")
    axes.bar_label(axes.bar(np.arange(2) + 0.27 * (i - 1), shares, 0.25, label=name, color=color), fmt="%.0f")
axes.set(xticks=[0, 1], xticklabels=["exact match", "F1 of words"], ylabel=f"score on {len(test)} held-out rows (%)")
axes.set_ylim(0, 115)
axes.spines[["top", "right"]].set_visible(False)
figure.legend(frameon=False, loc="outside right upper")
plt.show()

# %%
for i in range(min(3, len(test))):
    print(f"\n{test[i].prompt[-300:]}\n  expected: {test[i].response[:200]!r}")
    for name, of in scores.items():
        print(f"  {name:8}: {of['predictions'][i]['prediction'][:200]!r}")

# %% [markdown]
# ## Ask it
#
# Set `ASK` and run this cell. The text becomes a prompt in the way the rows did: as it is, or through the chat template
# if your rows are chats, with the system message of the first row. An adapter answers well only what looks like its
# rows. Every question stands alone; earlier ones are not remembered.

# %%
from para_jax import complete

ASK = "The vexed maid runs to the prison at this moment."  # @param {"type": "string"}

like = rows[0][1]
row = {"prompt": ASK, "system": like.get("system")}
if chat := like.get("messages"):
    system = [message for message in chat[:1] if message["role"] == "system"]
    row = {"messages": [*system, {"role": "user", "content": ASK}], "system": like.get("system")}
(asked,) = encode_rows([("ASK", row)], tokenizer, eos, need_response=False)
tenants = [None, *configs]
prompts = [asked.prompt_ids.tolist()] * len(tenants)
answers = complete(backbone, tokenizer, prompts, bank=bank, tenants=tenants, max_new_tokens=most)
for tenant, answer in zip(tenants, answers, strict=True):
    print(f"{tenant or 'bare':5} {answer.text.strip()}")

# %% [markdown]
# ## Keep the adapters
#
# `OUT` has a folder for each adapter, and this cell packs each into a file. In Colab, set `DOWNLOAD`, or download them
# in the Files panel on the left. para_jax reads both (`para_jax.load_adapter`, `para-jax generate --adapters`), and
# Hugging Face's PEFT reads LoRA's.

# %%
import shutil
from pathlib import Path

for name in configs:
    folder = Path(OUT, name)
    print(f"{folder}: {sum(file.stat().st_size for file in folder.iterdir()) / 1e3:.0f} kB")
    packed = shutil.make_archive(f"{OUT}-{name}", "zip", folder)
    if DOWNLOAD:
        from google.colab import files

        files.download(packed)

# %% [markdown]
# ## The same adapter in PEFT
#
# If torch and peft are installed, as on Colab, the LoRA adapter is opened there, and its logits are compared with ours
# in float32. Models from 1B parameters are left out: this takes two copies of the model in float32.

# %%
from importlib.util import find_spec

if find_spec("torch") is None or find_spec("peft") is None:
    print("not compared: torch or peft is not installed")
elif config.size >= 1e9:
    print("not compared: the model is too large")
else:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ids = np.array([asked.prompt_ids])
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32"), f"{OUT}/lora")
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor(ids, dtype=torch.int64)).logits[0].numpy()
    with jax.default_matmul_precision("float32"):
        found = Backbone.from_pretrained(MODEL, dtype="float32")(ids, bank=bank, tenants=["lora"])[0]
    difference, largest = np.abs(np.asarray(found) - expected).max(), np.abs(expected).max()
    print(f"largest difference of logits: {difference:.1e}, where the largest is {largest:.1f}")
