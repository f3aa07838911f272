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
# # FanLoRA: LoRA only where it matters
#
# [![Open-in-Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/para-jax/para_jax/blob/main/colab/fanlora.ipynb)
#
# **LoRA**, [low-rank adaptation](https://arxiv.org/abs/2106.09685), tunes a language model without changing its
# weights. A *module* is one weight matrix of a layer: `q_proj`, `k_proj`, `v_proj`, `o_proj`, `gate_proj`, `up_proj` or
# `down_proj`. Beside each chosen module stand two thin matrices, and what they compute is added to its output. Their
# thin side is the *rank* `r`.
#
# One model can serve many **tenants**: customers or tasks, each with an adapter of its own. Each request then reads its
# own thin matrices for every token, so the number of modules decides what LoRA costs.
#
# **FanLoRA** (["Fantastic LoRAs and Where to Find Them in Large Language Model
# Fine-tuning"](https://aclanthology.org/2024.emnlp-industry.38), EMNLP 2024) finds out once which modules matter, and
# tunes later tasks on these modules only:
#
# - (a) tune LoRA on every module, on a mixture of tasks;
# - (b) score every module on rows that were not tuned on;
# - (c) keep the most critical modules of each layer;
# - (d) tune new tasks on these.
#
# We could read the paper's abstract, but not its text, so we do not know its score. The score used here comes from
# [ALoRA](https://arxiv.org/abs/2403.16187), by the same group.
# [docs/fanlora.md](https://github.com/para-jax/para_jax/blob/main/docs/fanlora.md) lists what is the paper's and what
# is our choice.
#
# It takes about three minutes on two CPU cores with the tiny model that comes with the package. For a larger model
# choose a GPU or TPU runtime.

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
# ## Model and rows
#
# The tiny model was trained on novels and knows no task. The rows are one-sentence stories that the package makes, with
# three tasks. *mood* names the feeling and *place* copies the place; they are the mixture. *question* asks where the
# person is; it is the new task.
#
# | setting | what it is |
# |---|---|
# | `MODEL` | a folder or a name on the Hugging Face hub; empty is the tiny model |
# | `KEEP` | how many modules of each layer are kept, of seven. Fewer decode faster, and the choice matters more |
# | `OUT` | a folder for results |
#
# A folder belongs to one choice of settings. With others, `finetune` refuses to go on there and says why: choose
# another `OUT`.
#
# For tasks of your own, replace `train` and `held_out` by lists of rows `{"prompt": ..., "response": ...}`;
# [your_model](https://github.com/para-jax/para_jax/blob/main/colab/your_model.ipynb) shows how files are read.

# %%
MODEL = ""  # @param {"type": "string", "placeholder": "a folder or a name of the hub; empty: the tiny model"}
KEEP = 2  # @param {"type": "integer"}
OUT = "fanlora"  # @param {"type": "string"}

import jax

from para_jax import Backbone, encode_rows, end_tokens, load_tokenizer, quickstart_rows, tiny_backbone_path

MODEL = MODEL or tiny_backbone_path()
# Layers in one stack: tuning compiles one layer and not all of them.
backbone, tokenizer = Backbone.from_pretrained(MODEL, stacked=True), load_tokenizer(MODEL)
config = backbone.config
SMALL = config.size < 1e8
STEPS = 80 if SMALL else 300
LR = 1e-2 if SMALL else 2e-4  # a starting point: what suits a model is found by trying
R = 2 if SMALL else 8

train, held_out = quickstart_rows(seed=0, train=1500, held_out=130)
eos = end_tokens(config, tokenizer)


def encoded(rows, *tasks):
    named = [(f"{task} row {i}", row) for task in tasks for i, row in enumerate(rows[task], 1)]
    return encode_rows(named, tokenizer, eos, keep_texts=True)


for task in train:
    print(f"{task:9} {train[task][0]['prompt']!r} -> {train[task][0]['response']!r}")
print(f"{config.size / 1e6:.1f}M parameters in {config.num_hidden_layers} layers, on {jax.devices()[0].device_kind}")

# %% [markdown]
# ## (a) LoRA on every module, tuned on the mixture
#
# Each step takes 16 rows. If this cell is interrupted, run it again: it goes on where it stopped.

# %%
from para_jax import LoraConfig, Settings, finetune

everywhere = LoraConfig(r=R, lora_alpha=R, target_modules="all-linear")
mixture = finetune(
    backbone,
    {"mixture": encoded(train, "mood", "place")},
    f"{OUT}/mixture",
    methods=everywhere,
    settings=Settings(steps=STEPS, lr=LR),
    rows=16,
    resume=True,
)["mixture"]

# %% [markdown]
# ## (b) Every module scored
#
# The score switches modules off. S is the negative loss of the adapter on held-out rows, so more is better. The
# importance of a module m adds two answers:
#
#     S(all modules) - S(all without m)      how much worse does it get without m?
#     S(only m)                              how good is m alone?
#
# That is two variants of the adapter for each module, and one with all of them. They are evaluated 16 at a time. S(only
# m) is a negative number that can outweigh the first part, so importance is mostly negative: only differences between
# modules count.
#
# The rows are scored in two halves. Where both halves choose the same modules, the choice does not hang on a few rows.

# %%
from para_jax import importance_scores

halves = []
for start in (0, 1):
    rows = {task: held_out[task][start:30:2] for task in ("mood", "place")}
    halves.append(importance_scores("ablation", backbone, mixture, encoded(rows, "mood", "place")))
scores = sum(halves) / 2  # (layers, modules)

# %% [markdown]
# ## (c) The most critical modules of each layer
#
# All adapters of this comparison get about as many parameters as LoRA on every module has at rank `R`: with fewer
# modules the rank is higher. The setting is a small file, `fanlora.json`, which later tasks of the same model load.

# %%
from para_jax import FanLoraConfig, keep_number, plot_importance

BUDGET = everywhere.size(config)


def setting(kept):
    """LoRA on these modules of each layer, at the rank that comes nearest to the budget."""
    r = max(1, round(BUDGET / FanLoraConfig.of(kept, config, r=1).size(config)))
    return FanLoraConfig.of(kept, config, r=r, lora_alpha=r)


kept = keep_number(scores, config, KEEP)
setting(kept).save(f"{OUT}/fanlora.json", overwrite=True)
for layer, sites in enumerate(kept):
    print(f"layer {layer}: {', '.join(sites)}")
agreed = sum(a == b for a, b in zip(*(keep_number(half, config, KEEP) for half in halves), strict=True))
print(f"in {agreed} of {len(kept)} layers both halves of the rows choose the same modules")

# %% [markdown]
# Modules are compared within their layer. So the picture shows how far each lies above the least important module of
# its layer, in nats (the unit of the loss) per response token. Kept modules have a frame.

# %%
from IPython.display import Image

above = scores - scores.min(axis=1, keepdims=True)
label = "nats above the layer's least"
plot_importance(above, kept, config, f"{OUT}/importance.png", "importance on mood and place; framed: kept", label)
Image(f"{OUT}/importance.png")

# %% [markdown]
# ## (d) The new task
#
# Five adapters learn *question*, each independent of the others, in one run: the same rows, the same steps, the same
# learning rate, and nearly the same number of parameters.
#
# | adapter | modules of each layer |
# |---|---|
# | everywhere | all, at a low rank |
# | critical | the most critical: FanLoRA |
# | least critical | those with the lowest scores |
# | random-0, random-1 | drawn at random |
#
# Scoring saw no row of *question*. The stories that it saw are not used for the test below either.

# %%
methods = {
    "everywhere": everywhere,
    "critical": FanLoraConfig.load(f"{OUT}/fanlora.json"),
    "least critical": setting(keep_number(-scores, config, KEEP)),
}
for seed in range(2):
    drawn = importance_scores("random", backbone, mixture, seed=seed)
    methods[f"random-{seed}"] = setting(keep_number(drawn, config, KEEP))
for name, method in methods.items():
    print(f"{name:14} rank {method.r:2}, {method.size(config):,} parameters")
bank = finetune(
    backbone,
    dict.fromkeys(methods, encoded(train, "question")),
    f"{OUT}/question",
    methods=methods,
    settings=Settings(steps=STEPS, lr=LR),
    rows=8,
    resume=True,
)

# %% [markdown]
# The loss of each step, and its mean over ten neighbouring steps (the heavy line). Lower is better; a line that falls
# earlier learns with fewer rows.

# %%
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

COLOURS = dict(zip(("untuned", *methods), ("0.6", "C1", "C0", "C3", "C2", "C4"), strict=True))
lines = [json.loads(line) for line in Path(OUT, "question", "metrics.jsonl").read_text().splitlines()]
figure, axes = plt.subplots(figsize=(9, 3.6), layout="constrained")
for name in methods:
    loss, width = np.array([line["loss"][name] for line in lines]), 10
    axes.plot(np.arange(1, len(loss) + 1), loss, color=COLOURS[name], alpha=0.2, linewidth=1)
    mean = np.convolve(loss, np.ones(width) / width, "valid")
    axes.plot(np.arange(len(mean)) + (width + 1) / 2, mean, color=COLOURS[name], linewidth=2, label=name)
axes.set(title="tuning on question", xlabel="step", ylabel="loss, nats per response token", ylim=(0, None))
axes.spines[["top", "right"]].set_visible(False)
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# ## How many answers are right?
#
# An answer is right if it is the expected question, word for word. The words of these stories were tuned on, but not in
# these combinations. The model without an adapter is asked too.

# %%
from para_jax import complete, default_stacked, evaluate

# For decoding, a CPU and a GPU want each layer's weights apart. A TPU takes the stack as it is.
decoder = backbone if default_stacked() else Backbone.from_pretrained(MODEL)
test = encoded({"question": held_out["question"][30:]}, "question")
results = evaluate(decoder, tokenizer, {"untuned": test}, None, max_new_tokens=12, batch_size=len(test))
results |= evaluate(decoder, tokenizer, dict.fromkeys(methods, test), bank, max_new_tokens=12, batch_size=250)
right = {name: results[name]["exact_match"] for name in COLOURS}
for name, share in right.items():
    print(f"{name:14} {share:.0%} exact")
print(f"\n{test[0].prompt}\n  {'expected':14} {test[0].response}")
for name in COLOURS:
    print(f"  {name:14} {results[name]['predictions'][0]['prediction'].strip()}")

# %% [markdown]
# ## What decoding costs
#
# Fewer modules mean fewer matmuls for each token: that is FanLoRA's reason. Here 32 rows, each with its own copy of the
# adapter, get 32 new tokens. The time includes the prompt and no compiling; it is the best of five rounds. All settings
# with `KEEP` modules cost alike, so *critical* stands for them.

# %%
import time

timed, given = ("untuned", "everywhere", "critical"), {"max_new_tokens": 32, "eos_token_id": ()}
seconds = {name: [] for name in timed}
for _ in range(6):
    for name in timed:
        began = time.perf_counter()
        tenants = [None if name == "untuned" else name] * 32
        complete(decoder, tokenizer, [test[0].prompt] * 32, bank=bank, tenants=tenants, **given)
        seconds[name].append(time.perf_counter() - began)
step_ms = {name: 1e3 * min(times[1:]) / 32 for name, times in seconds.items()}  # the first round compiles

figure, panels = plt.subplots(1, 3, figsize=(12, 2.8), sharey=True, layout="constrained")
names, colours = list(COLOURS), list(COLOURS.values())
share = [100 * right[name] for name in names]
size = [methods[name].size(config) / 1e3 if name in methods else 0 for name in names]
cost = [step_ms.get(name, 0) for name in names]
titles = (f"exact answers to {len(test)} held-out rows", "adapter parameters, thousands", "ms per new token, 32 rows")
for axes, values, title, form in zip(
    panels, (share, size, cost), titles, ("{:.0f} %", "{:.1f}", "{:.2f}"), strict=True
):
    bars = axes.barh(names, values, color=colours)
    absent = "like critical" if axes is panels[2] else form.format(0)
    axes.bar_label(bars, [form.format(x) if x else absent for x in values], padding=3)
    axes.set(title=title, xticks=[])
    axes.margins(x=0.2)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.tick_params(length=0)
panels[0].invert_yaxis()
plt.show()

# %% [markdown]
# Read the first panel like this. *least critical* below the others: the score finds modules that are of little use.
# *critical* among the *random* ones: it does not find better ones than luck does, on this task. *everywhere* ahead:
# with so few parameters, many modules at a low rank learn faster than few at a high rank. The third panel is what one
# pays for it at every token.
#
# **What this shows:** that the four steps run, what they cost, and which modules one tiny model used for these tasks.
# **What it does not show:** how the methods rank on other models. It is one seed, a hundred rows (a difference of ten
# points may be luck), four layers if the model is the tiny one, one learning rate for all, and three tasks of one kind.
# For a claim, tune with several seeds on your own tasks and choose each method's learning rate.
# [docs/study.md](https://github.com/para-jax/para_jax/blob/main/docs/study.md) does so for six tasks: at equal size
# FanLoRA's scores were within the noise of LoRA's on each task, and it decoded faster.
#
# ## The adapter in PEFT
#
# What was tuned is LoRA with modules of its own in each layer. Hugging Face's PEFT opens its folder, which lists each
# module's path from `layers` on. Are the answers the same?

# %%
import importlib.util

folder = Path(OUT, "question", "critical")
saved = json.loads((folder / "adapter_config.json").read_text())
print(f"{saved['peft_type']}, r={saved['r']}", *sorted(saved["target_modules"]), sep="\n  ")

if importlib.util.find_spec("peft") and importlib.util.find_spec("torch"):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(MODEL), folder)
    for example, ours in list(zip(test, results["critical"]["predictions"], strict=True))[:3]:
        prompt = tokenizer(example.prompt, return_tensors="pt")
        tokens = theirs.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        answer = tokenizer.decode(tokens, skip_special_tokens=True).strip()
        print(f"\n{example.prompt}\n  expected: {example.response}")
        print(f"  para_jax: {ours['prediction'].strip()}\n  peft:     {answer}")
else:
    print("\npeft is not installed here: pip install peft torch")
