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
# On a CPU with two cores and the tiny model that ships with the package this takes about two minutes.

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

scores = importance("ablation", backbone, mixture, [*encoded(held_out, "mood", "place")][::4])

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
# modules. There are half as many steps, so that not all of them get everything right.

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
# random settings say how much luck there is in a choice. On a CPU *critical* lay among them (44 % against 29, 49 and 55
# %), and LoRA everywhere, which has more than twice the parameters, was far ahead after as many steps. For a claim,
# tune with several seeds on your own tasks, and search the learning rate of each method.
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
print(f"{saved['peft_type']}, r={saved['r']}", *sorted(saved["target_modules"]), sep="\n  ")

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
