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
# # Three tasks on one frozen model
#
# [![Open-in-Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/para-jax/para_jax/blob/main/colab/para_finetune.ipynb)
#
# **PARA, Prompt-Aware Representation Adjustment** ([paper](https://arxiv.org/abs/2502.01033)), fine-tunes a language
# model without changing its weights. In each layer a small network, the *generator*, reads the hidden state of the
# prompt's last token and makes vectors. They scale Q, V and the feed-forward up projection for all tokens. The words
# of this notebook:
#
# - An **adapter** is what is trained: with PARA, the generators of all layers.
# - A **tenant** is a user or a task with an adapter of its own. All tenants share one frozen model.
# - The **rank** `r` is the width of a generator's middle layer; with LoRA, the rank of its matrices.
#
# The notebook tunes three tenants together, one for each of three tasks, and a fourth that learns the third task with
# LoRA. Then all four answer in one batch. You see their losses, their scores and the vectors that PARA makes, and you
# can download the adapters. "Run all" needs no input. With the small model that comes with the package it takes about
# two minutes on two CPU cores.

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
# | `MODEL` | a name on the Hugging Face hub or a folder; empty for the small model, which was trained on novels |
# | `OUT` | the folder of this run |
#
# `OUT` belongs to one model, one set of rows and one set of settings. If you change any of these, choose another
# `OUT`; otherwise the tuning cell stops and says what differs. A gated model needs a Colab secret named `HF_TOKEN`
# with your token.

# %%
MODEL = ""  # @param ["", "HuggingFaceTB/SmolLM2-135M", "Qwen/Qwen2.5-0.5B"] {"allow-input": true}
OUT = "para-finetune"  # @param {"type": "string"}

# %%
import jax

from para_jax import Backbone, BackboneConfig, auto_mesh, load_tokenizer, make_mesh, tiny_backbone_path

MODEL = MODEL or tiny_backbone_path()
config, devices = BackboneConfig.from_pretrained(MODEL), jax.devices()
small = config.size < 1e8
STEPS, LR = (120, 1e-2) if small else (300, 5e-4)  # starting points: the best values depend on the model
ROWS = 8 if jax.default_backend() == "cpu" else 16  # of each tenant in a step

# Stacked layers compile once for all layers. Several devices share the weights and the rows.
mesh = make_mesh(auto_mesh(config, len(devices)), devices) if len(devices) > 1 else None
backbone, tokenizer = Backbone.from_pretrained(MODEL, stacked=True, mesh=mesh), load_tokenizer(MODEL)
print(f"{config.size / 1e6:.1f}M parameters, {config.num_hidden_layers} layers, {backbone.dtype}")
print(f"{len(devices)} x {devices[0].device_kind}; {STEPS} steps of {ROWS} rows of each tenant")

# %% [markdown]
# ## The rows
#
# Every row has a one-sentence story as its prompt. `mood` answers with the feeling in it, `place` copies the place,
# and `question` asks where the person is. 200 stories are held out; they pair feelings with people in ways that are
# not in the training rows. To use rows of your own, open
# [your_model](https://github.com/para-jax/para_jax/blob/main/colab/your_model.ipynb).

# %%
from para_jax import encode_rows, end_tokens, quickstart_rows


def encoded(rows):
    """The tokens of each task's rows. A row's name is what an error would call it."""
    named = {task: [(f"{task} row {i}", row) for i, row in enumerate(own, 1)] for task, own in rows.items()}
    eos = end_tokens(config, tokenizer)
    return {task: encode_rows(own, tokenizer, eos, keep_texts=True) for task, own in named.items()}


train, held_out = (encoded(rows) for rows in quickstart_rows(seed=0, train=1500, held_out=200))
TASKS = list(train)
train["question-lora"], held_out["question-lora"] = train["question"], held_out["question"]
print(train["mood"][0].prompt)
for task in TASKS:
    print(f"    {task:14} {train[task][0].response}")

# %% [markdown]
# ## Will it fit a TPU?
#
# `para-jax plan` compiles the tuning step for a TPU and says how much memory it takes, without using one. It needs
# libtpu, Google's compiler for TPUs, which only TPU runtimes have; elsewhere this cell is skipped. It plans for the
# TPU of this runtime, or for a single v5e chip.
# [docs/plan.md](https://github.com/para-jax/para_jax/blob/main/docs/plan.md) says how to plan for other chips.

# %%
import importlib.util
import subprocess
import sys

CHIPS, SLICES = {"TPU v5 lite": "v5e", "TPU v6 lite": "v6e"}, {1: "1x1", 4: "2x2", 8: "2x4"}
on_tpu, longest = jax.default_backend() == "tpu", max(len(row) for rows in train.values() for row in rows)
chip, size = (CHIPS.get(devices[0].device_kind), SLICES.get(len(devices))) if on_tpu else ("v5e", "1x1")
if importlib.util.find_spec("libtpu") is None:
    print("no plan: libtpu is not installed")
elif not (chip and size):
    print(f"no plan: this cell does not know {len(devices)} x {devices[0].device_kind}; see the page above")
else:
    job = ["--model", MODEL, "--topology", f"{chip}:{size}", "--tenants", len(train), "--rows", ROWS]
    command = [sys.executable, "-m", "para_jax", "plan", *map(str, job), "--length", str(longest)]
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stdout.partition("\n")[0].rpartition(": ")[2] or done.stderr)

# %% [markdown]
# ## Tuning
#
# Each step takes rows of all four tenants through the frozen model. Every tenant has its own loss, its own gradient
# clipping and its own learning rate, and so learns what it would learn alone. LoRA gets the rank at which it has as
# many parameters as PARA. If you interrupt this cell, run it again: it continues where it stopped.

# %%
from IPython.display import Image

from para_jax import LoraConfig, ParaConfig, Settings, finetune

para = ParaConfig(r=12)
rank = round(para.size(config) / LoraConfig(r=1).size(config))
configs = {**dict.fromkeys(TASKS, para), "question-lora": LoraConfig(r=rank, lora_alpha=2 * rank)}
for name, method in configs.items():
    print(f"{name:14} {method.method}, r={method.r}: {method.size(config):,} parameters")
settings = Settings(steps=STEPS, lr=LR)
bank = finetune(backbone, train, OUT, methods=configs, settings=settings, rows=ROWS, resume=True)

# %% [markdown]
# **The losses.** All of them should fall and then level off; `mood`, the hardest task, stays highest. They start at
# different heights because the tasks' answers differ. The two `question` tenants have the same rows, but each takes
# them in an order of its own, so their first losses differ a little.

# %%
Image(f"{OUT}/loss.png")

# %% [markdown]
# ## All of them in one batch
#
# Every row of this batch has its own tenant, or none: then the model answers as it was before tuning. Adapters are
# arguments of the compiled program, so other tenants need no new compilation.

# %%
from para_jax import complete

askers, stories = [None, *configs], range(4)
batch = [(held_out[asker or TASKS[0]][i], asker) for i in stories for asker in askers]
prompts, tenants = [row.prompt for row, _ in batch], [asker for _, asker in batch]
answers = complete(backbone, tokenizer, prompts, bank=bank, tenants=tenants, max_new_tokens=12)
for (row, asker), answer in zip(batch, answers, strict=True):
    text = answer.text.strip()
    if asker is None:
        print(f"\n{row.prompt}")
    wrong = "" if asker is None or text == row.response else f"    (expected: {row.response})"
    print(f"    {asker or '(bare model)':14} {text}{wrong}")

# %% [markdown]
# How many answers to 100 held-out stories of each task are right, word for word? On the small model, expect nearly all
# of `place` and `question`, and about three in four of `mood`: it has to know which of four feelings each of 32 words
# means (guessing gives 25%). Do not rank PARA and LoRA by this: it is one run with one learning rate.
# [docs/study.md](https://github.com/para-jax/para_jax/blob/main/docs/study.md) compares the methods.

# %%
from para_jax import evaluate

some = {name: rows[:100] for name, rows in held_out.items()}
scores = evaluate(backbone, tokenizer, some, bank, max_new_tokens=12, batch_size=200)
for name, of in scores.items():
    print(f"{name:14} {of['exact_match']:.0%}")

# %% [markdown]
# ## The vectors
#
# PARA turns a projection's output $y$ into $(1 + \ell)\,y$. The next cell collects the vectors $\ell$ that the
# generators make for the 200 held-out stories. The model's forward pass returns them beside the hidden states.

# %%
import matplotlib.pyplot as plt
import numpy as np


@jax.jit
def adjustments(backbone, tokens, mask, adapters):
    return backbone.forward(tokens, mask_bt=mask, prompt_mask_bt=mask, rows=adapters)[1]


def vectors(tenant, rows):
    """For each projection an array (layers, prompts, features)."""
    tokens = np.zeros((len(rows), max(len(row.prompt_ids) for row in rows)), np.int32)
    mask = np.zeros(tokens.shape, bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row.prompt_ids)], mask[i, : len(row.prompt_ids)] = row.prompt_ids, True
    (made,) = adjustments(backbone, tokens, mask, bank.rows([tenant], repeats=len(rows)))
    return {site: np.asarray(made.offsets[site], np.float32) for site in para.target_modules}


made = {task: vectors(task, held_out[task]) for task in TASKS}
COLORS = dict(zip(configs, ("C0", "C1", "C2", "C3"), strict=True))  # those of the losses

# %% [markdown]
# **How large they are.** Solid lines: the part of $\ell$ that is the same for all stories. Dashed lines: the part that
# differs from story to story. Both are root mean squares over the features. Most of $\ell$ is the same for all
# stories. Values of 5 to 10 are large: they scale features several times over, or flip their signs. There is no dashed
# line in layer 0, because the generator reads the last token, a full stop in every story, which has not seen the other
# tokens there. With `ParaConfig(pooling="mean")` it would read all of them.

# %%
figure, panels = plt.subplots(1, len(para.target_modules), figsize=(12, 3.6), sharey=True, layout="constrained")
for axes, site in zip(panels, para.target_modules, strict=True):
    for task in TASKS:
        same = np.sqrt(np.mean(made[task][site].mean(axis=1) ** 2, axis=1))
        varied = np.sqrt(np.mean(made[task][site].var(axis=1), axis=1))
        varied[varied < 1e-3 * same] = np.nan  # rounding
        axes.plot(same, "o-", color=COLORS[task], label=f"{task}: same for all")
        axes.plot(varied, "o--", color=COLORS[task], label=f"{task}: differs", markerfacecolor="white")
    axes.set(title=site, xlabel="layer", yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.spines[["top", "right"]].set_visible(False)
panels[0].set_ylabel(r"root mean square of $\ell$")
figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
plt.show()

# %% [markdown]
# **What they know of the prompt.** Each dot is one story. It shows the last layer's vectors in the two directions in
# which they differ most; the axes say how much of their variance each direction has. On the left, every task has a
# region of its own. The other panels have one task each, coloured by the right answer. `question` separates the three
# tenses that it asks in, and `mood` separates its feelings in part. `place` only copies a word: its vectors differ in
# one direction, where some places lie apart and most mix.

# %%
PALETTE = plt.get_cmap("Dark2").colors  # for answers: none of the tenants' colours


def plane(x):
    """Rows of x in the two directions in which they differ most, and the share of each in their variance."""
    u, s, _ = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)
    return u[:, :2] * s[:2], s[:2] ** 2 / np.sum(s**2)


def draw(axes, title, dots, shares, labels, colors):
    """Dots with these labels; those without a colour are grey."""
    others = ~np.isin(labels, list(colors))
    axes.scatter(*dots[others].T, s=8, color="0.8", label="others" if others.any() else None)
    for label, color in colors.items():
        axes.scatter(*dots[labels == label].T, s=14, alpha=0.75, label=label, color=color)
    axes.set(title=title, xlabel=f"direction 1 ({shares[0]:.1%})", ylabel=f"direction 2 ({shares[1]:.1%})")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.2))


last = {task: np.concatenate([made[task][site][-1] for site in para.target_modules], axis=1) for task in TASKS}
figure, (left, *panels) = plt.subplots(1, 1 + len(TASKS), figsize=(15, 4), layout="constrained")
labels = np.repeat(TASKS, [len(last[task]) for task in TASKS])
draw(left, "all tasks", *plane(np.concatenate(list(last.values()))), labels, {t: COLORS[t] for t in TASKS})
for axes, task in zip(panels, TASKS, strict=True):
    words = [row.response.split() for row in held_out[task]]
    kinds = np.array([" ".join(w[:2]) if task == "question" else w[-1] for w in words])
    often, counts = np.unique(kinds, return_counts=True)
    often = sorted(often[np.argsort(-counts)[:4]])
    draw(axes, task, *plane(last[task]), kinds, dict(zip(often, PALETTE, strict=False)))
plt.show()

# %% [markdown]
# ## Keep the adapters
#
# `OUT` has a folder for each tenant, and `report.html` with the losses, speed and memory of the run. Hugging Face's
# PEFT opens LoRA's folder: `PeftModel.from_pretrained(model, "para-finetune/question-lora")`. PEFT cannot load PARA
# adapters; para_jax loads both. The next cell reads all four again, checks that they answer as before, and packs them
# into one file. In Colab, download it in the Files panel on the left, or copy it to a mounted Drive.

# %%
import shutil
from pathlib import Path

from para_jax import AdapterBank

folders = {name: Path(OUT, name) for name in configs}
again = complete(
    backbone, tokenizer, prompts, bank=AdapterBank.load(folders, config), tenants=tenants, max_new_tokens=12
)
assert [answer.text for answer in again] == [answer.text for answer in answers]
for name, folder in folders.items():
    print(f"{folder}: {sum(file.stat().st_size for file in folder.iterdir()) / 1e3:.0f} kB")
    shutil.copytree(folder, Path(f"{OUT}-adapters", name), dirs_exist_ok=True)
print(f"{Path(shutil.make_archive(f'{OUT}-adapters', 'zip', f'{OUT}-adapters')).name} has all of them")

# %% [markdown]
# On another machine, unpack the file and name the model (leave out `--model` for the small one):
#
# ```bash
# para-jax generate --model MODEL --adapters para-finetune-adapters --tenant mood --prompt "The sad clerk went home."
# ```
