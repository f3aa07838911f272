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
# # One model on eight devices
#
# [![Open-in-Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/para-jax/para_jax/blob/main/colab/mesh.ipynb)
#
# A model that does not fit on one chip is split over several. A **mesh** says how: it arranges the devices along named
# axes, and each axis splits something else. This notebook
#
# 1. puts a model on several meshes, and says what each device holds;
# 2. tunes two adapters on one mesh, stops in the middle, and goes on **on another mesh**;
# 3. decodes with both adapters in one batch, on a third mesh;
# 4. plans: asks the compiler what a device needs, and compares with what the devices here hold;
# 5. counts the bytes that move between devices, which decides which mesh suits tuning and which suits decoding.
#
# The two adapters belong to two **tenants**, customers or tasks that share the model. One adapter is of the method
# **PARA**, [Prompt-Aware Representation Adjustment](https://arxiv.org/abs/2502.01033): a small network in each layer
# reads the prompt once and makes vectors that scale the outputs of the layer's projections. The other is
# [LoRA](https://arxiv.org/abs/2106.09685): two thin matrices beside each chosen weight matrix, whose result is added.
# The *rank* `r` is the inner width of PARA's network and the thin side of LoRA's matrices. There is one of each to show
# that both methods share a run and a batch.
#
# **Eight devices.** Kaggle's *TPU VM v5e-8* has eight chips: choose it under Settings, Accelerator, and switch Internet
# on, or attach a wheel of para_jax as a dataset and give its path below. Anywhere else, eight simulated CPU devices
# take their place. They run the same programs with the same communication, but share one processor, so they are slower
# than one device.
#
# It takes about three minutes on two CPU cores with the tiny model that comes with the package.

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
# | setting | what it is |
# |---|---|
# | `MODEL` | a folder or a name on the Hugging Face hub; empty is the tiny model |
# | `OUT` | a folder for the runs, of one model: with another, `finetune` refuses to go on there |
# | `COMPARE` | also run on one device and compare. Switch it off for a model that does not fit on one device |
#
# Run all twice, and the tuning runs are found finished: nothing is stopped or resumed the second time.
#
# JAX has started its devices in the cell above. To simulate eight, they are cleared and JAX starts again on the CPU.

# %%
MODEL = ""  # @param {"type": "string", "placeholder": "a folder or a name of the hub; empty: the tiny model"}
OUT = "mesh"  # @param {"type": "string"}
COMPARE = True  # @param {"type": "boolean"}

import jax
from jax.extend.backend import clear_backends

if len(jax.devices()) != 8:
    print(f"this notebook needs eight devices, and here is {len(jax.devices())} x {jax.devices()[0].device_kind}.")
    print("It simulates eight on the CPU; an accelerator that is here is not used.")
    clear_backends()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
devices = jax.devices()
SIMULATED = devices[0].platform == "cpu"
print(f"{len(devices)} x {devices[0].device_kind}{', simulated' if SIMULATED else ''}")

# %%
from para_jax import (
    Backbone,
    BackboneConfig,
    auto_mesh,
    compute_dtype,
    host_memory,
    load_tokenizer,
    make_mesh,
    tiny_backbone_path,
)

MODEL = MODEL or tiny_backbone_path()
config, tokenizer, dtype = BackboneConfig.from_pretrained(MODEL), load_tokenizer(MODEL), compute_dtype("auto")
whole = config.size * dtype.itemsize
print(f"{config.size / 1e6:,.1f}M weights in {config.num_hidden_layers} layers: {whole / 1e6:,.2f} MB in {dtype}")
print(f"attention has {config.num_attention_heads} query heads and {config.num_key_value_heads} key/value heads")
memory = (devices[0].memory_stats() or {}).get("bytes_limit") or host_memory()["memory_available"]
if COMPARE and memory and whole > 0.4 * memory:
    print(f"one device has {memory / 1e9:.1f} GB, which is too little for a comparison with one device: it is left out")
    COMPARE = False

# %% [markdown]
# ## What each device holds
#
# Three axes have names, and `fsdp=4,tensor=2` is a mesh of 4 x 2 devices:
#
# | axis | rows of a batch | weights | what it costs |
# |---|---|---|---|
# | `data` | split | a full copy on every device | memory |
# | `fsdp` | split | split; a layer's weights are gathered when it runs | weights move |
# | `tensor` | not split | split by heads and inner features | hidden states move: partial sums are all-reduced |
#
# Devices that differ along `data` or `fsdp` have other rows; devices that differ only along `tensor` work on the same
# rows. `auto_mesh` chooses a mesh for tuning and one for decoding; a third here uses all three axes. `from_pretrained`
# reads each device's part from the file, and no device ever holds more.


# %%
def text_of(sizes):
    return ",".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1)


FOR_TUNING, FOR_DECODING = text_of(auto_mesh(config, 8)), text_of(auto_mesh(config, 8, tuning=False))
ALL_AXES = "data=2,fsdp=2,tensor=2" if config.num_key_value_heads % 2 == 0 else "data=2,fsdp=4"
print(f"auto_mesh: {FOR_TUNING} for tuning, {FOR_DECODING} for decoding\n")
held = {}
for text in dict.fromkeys((FOR_TUNING, ALL_AXES, FOR_DECODING)):
    # Layers in one stack: tuning compiles one layer and not all of them.
    split = Backbone.from_pretrained(MODEL, stacked=True, mesh=make_mesh(text))
    held[text] = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(split))
    print(f"{text:24} {held[text] / 1e6:8.2f} MB of weights on each device, {held[text] / whole:.1%} of the model")

# %% [markdown]
# A weight is split over `fsdp` times `tensor` devices, so the share is one over their product. It can be a little more,
# because small weights such as norms are on every device. Adapters and their optimizer state are small: in this run
# they are either whole on every device or each tenant is on devices of its own, whatever leaves fewer places empty
# ([docs/finetuning.md](https://github.com/para-jax/para_jax/blob/main/docs/finetuning.md#meshes)).
#
# ## Tuning
#
# The rows are one-sentence stories that the package makes. The tenant *place* learns to answer with the place,
# *question* to ask where the person is. Each step takes eight rows of each tenant. For rows of your own, make `rows` of
# a file, as [your_model](https://github.com/para-jax/para_jax/blob/main/colab/your_model.ipynb) does.

# %%
from para_jax import LoraConfig, ParaConfig, Settings, finetune, quickstart_rows

rows, held_out = quickstart_rows(seed=0, train=600, held_out=16)
methods = {"place": ParaConfig(r=12), "question": LoraConfig(r=8)}
tenants = {name: rows[name] for name in methods}
STEPS = 40
settings = Settings(steps=STEPS, lr=1e-2 if config.size < 1e8 else 5e-4)
given = {"methods": methods, "settings": settings, "tokenizer": tokenizer, "rows": 8, "resume": True}

if COMPARE:
    alone = Backbone.from_pretrained(MODEL, stacked=True)
    finetune(alone, tenants, f"{OUT}/alone", **given)

# %% [markdown]
# ## The same on a mesh, stopped, and resumed on another
#
# The first half runs on the mesh with all three axes. In the middle the notebook sends itself Ctrl-C, as if somebody
# pressed the stop button: `finetune` saves the step that it is working on and ends. The second half runs on the mesh
# that `auto_mesh` chose, from the checkpoint of the first. Rows come in the same order as without the stop.
#
# Simulated devices take turns on the same processor, and a mesh cuts the few rows of this example into smaller pieces
# with more padding. So there are fewer tokens per second than on one device. Real devices work at the same time.

# %%
import signal


def press_stop(line):
    """`finetune` calls this with the metrics of each step."""
    if line["step"] == STEPS // 2:
        signal.raise_signal(signal.SIGINT)


split = Backbone.from_pretrained(MODEL, stacked=True, mesh=make_mesh(ALL_AXES))
half = STEPS // 2 + 1  # the step that Ctrl-C lets end, unless it comes later
try:
    finetune(split, tenants, f"{OUT}/split", loggers=[press_stop], **given)
except KeyboardInterrupt as stopped:
    half = stopped.step
    print(f"stopped and saved after step {half}; the next cell goes on from there")

# %%
split = Backbone.from_pretrained(MODEL, stacked=True, mesh=make_mesh(FOR_TUNING))
bank = finetune(split, tenants, f"{OUT}/split", **given)

# %% [markdown]
# Both runs wrote the loss of each step to `metrics.jsonl`. Left: the thin line, on the meshes, should lie on the pale
# one, on one device; the dotted line is where the mesh changed. Right: a mesh adds numbers in another order, which
# changes their last digits, and each update carries that on. So a difference may grow with the steps, and should stay
# far below a hundredth. A step without any difference has no point.

# %%
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np


def losses(run, name):
    lines = [json.loads(line) for line in Path(OUT, run, "metrics.jsonl").read_text().splitlines()]
    return np.array([line["loss"][name] for line in lines])


steps = np.arange(1, STEPS + 1)
figure, (left, right) = plt.subplots(1, 2, figsize=(12, 3.6), layout="constrained")
worst = 0.0
for i, name in enumerate(methods):
    several = losses("split", name)
    if COMPARE:
        one = losses("alone", name)
        apart = abs(several - one) / one
        left.plot(steps, one, color=f"C{i}", alpha=0.3, linewidth=7, label=f"{name}, one device")
        right.semilogy(steps, np.where(apart > 0, apart, np.nan), color=f"C{i}", marker=".", label=name)
        worst = max(worst, float(np.max(apart)))
    left.plot(steps, several, color=f"C{i}", linewidth=1.5, label=f"{name}, eight devices")
left.set(title="loss", xlabel="step", ylabel="nats per response token", ylim=(0, None))
right.set(title="difference between eight devices and one", xlabel="step", ylabel="difference / loss")
for axes in (left, right) if COMPARE else (left,):
    axes.axvline(half + 0.5, color="0.6", linestyle=":")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
left.text(half, 0.1, f"{ALL_AXES} ", ha="right", fontsize=8)
left.text(half + 1, 0.1, f" {FOR_TUNING}", fontsize=8)
right.set_visible(COMPARE)
plt.show()
if COMPARE:
    print(f"largest relative difference of a loss: {worst:.1e}")

# %% [markdown]
# ## Decoding
#
# One batch holds rows of both tenants, and rows without an adapter. Groups of devices have different rows of it. After
# so few steps not every answer is right; the expected one is printed beside it.

# %%
from para_jax import complete

decoder = Backbone.from_pretrained(MODEL, mesh=make_mesh(FOR_DECODING))
askers = [None, *methods]
batch = [(i, asker) for i in range(8) for asker in askers]
prompts, tenants = [held_out["place"][i]["prompt"] for i, _ in batch], [asker for _, asker in batch]
answers = complete(decoder, tokenizer, prompts, bank=bank, tenants=tenants, max_new_tokens=12)
print(f"{len(batch)} rows on {FOR_DECODING}")
for (i, asker), prompt, answer in list(zip(batch, prompts, answers, strict=True))[:6]:
    if asker is None:
        print(f"\n{prompt}")
    expected = f"   (expected: {held_out[asker][i]['response']})" if asker else ""
    print(f"    {asker or 'no adapter':12} {answer.text.strip()}{expected}")

if COMPARE:
    same = complete(Backbone.from_pretrained(MODEL), tokenizer, prompts, bank=bank, tenants=tenants, max_new_tokens=12)
    equal = sum(a.text == b.text for a, b in zip(answers, same, strict=True))
    print(f"\n{equal} of {len(batch)} answers are, letter for letter, those of one device")

# %% [markdown]
# ## Plan and measured
#
# `para-jax plan` compiles the programs for chips that need not be here, and reads from the compiler what a device
# needs. It uses neither the devices nor the weights of this notebook. With the package libtpu (`pip install
# "para-jax[tpu]"`) the plan is for eight v5e chips. Without it, the plan is for eight H100 GPUs and the programs are
# compiled for a CPU: the sizes of weights are exact then, and the rest is an estimate.
#
# - Tuning: 2 tenants x 8 rows x 32 tokens = 512 tokens in a step.
# - Decoding: 24 rows in all, with prompts of 32 tokens. A step makes one new token for each row.

# %%
import importlib.util
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

TOPOLOGY = "v5e:2x4" if importlib.util.find_spec("libtpu") else "gpu:h100x8"
MESHES = list(dict.fromkeys((FOR_TUNING, FOR_DECODING)))
Path(OUT, "plans").mkdir(exist_ok=True)
common = ["--model", MODEL, "--topology", TOPOLOGY, "--dtype", str(dtype), "--tenants", "2"]
ways = {"train": ["--rows", "8", "--length", "32"], "decode": ["--rows", "24", "--length", "32", "--new-tokens", "16"]}


def plan(job):
    """The plan of a mode and a mesh; None, and what was said, if there is none."""
    mode, mesh = job
    file = Path(OUT, "plans", f"{mode}-{mesh}.json")
    file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "para_jax", "plan", *common, "--mode", mode, "--mesh", mesh, *ways[mode]]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([*command, "--json", str(file)], env=environment, capture_output=True, text=True)
    made = json.loads(file.read_text()).get("plan") if file.exists() else None
    if made is None:
        print(f"no plan of {mode} on {mesh}: {(done.stderr.strip() or done.stdout.strip()).splitlines()[-1]}")
    return made


jobs = [(mode, mesh) for mode in ways for mesh in MESHES]
with ThreadPoolExecutor(2) as pool:
    plans = {job: made for job, made in zip(jobs, pool.map(plan, jobs), strict=True) if made}
print(f"MB of a device, planned for {TOPOLOGY}; held: the weights on a device of this notebook")
print(f"{'':24} {'weights: plan':>14} {'held':>8} {'peak of tuning':>16} {'of decoding':>12}")
for mesh in MESHES:
    if {("train", mesh), ("decode", mesh)} <= set(plans):
        tuning, decoding = plans["train", mesh], plans["decode", mesh]
        figures = [x / 1e6 for x in (tuning["weights"], held[mesh], tuning["peak"], decoding["peak"])]
        print("{:24} {:14.2f} {:8.2f} {:16.2f} {:12.2f}".format(mesh, *figures))
if (said := devices[0].memory_stats()) and "peak_bytes_in_use" in said:
    print(f"the first device had at most {said['peak_bytes_in_use'] / 1e6:.2f} MB in use, in all of this notebook")
else:
    print("these devices do not say what their peak was; TPUs and GPUs do")

# %% [markdown]
# The first two columns should agree. The *peak* also has adapters, optimizer state, activations and the cache of keys
# and values.
#
# ## Which mesh for what
#
# A plan lists the bytes that each device sends to others. For tuning the picture counts one micro-batch, which holds
# the rows of this step, and the update of the adapters; for decoding it counts one step. Both panels have the same
# scale; shorter is better.


# %%
def sent(mode, mesh, update=True):
    """Megabytes that a device sends, and NaN where there is no plan."""
    if (mode, mesh) not in plans:
        return float("nan")
    names = {"decode"} if mode == "decode" else {"micro_batch", "update"} if update else {"micro_batch"}
    programs = [program for program in plans[mode, mesh]["programs"] if program["name"] in names]
    return sum(of["bytes"] for program in programs for of in program["collectives"].values()) / 1e6


figure, panels = plt.subplots(1, 2, figsize=(11, 2.4), sharex=True, sharey=True, layout="constrained")
for axes, mode, title in zip(panels, ways, ("a tuning step of 512 tokens", "a decode step of 24 rows"), strict=True):
    values = [sent(mode, mesh) for mesh in MESHES]
    bars = axes.barh(MESHES, np.nan_to_num(values), color=["C2", "C4"])
    axes.bar_label(bars, ["no plan" if np.isnan(x) else f"{x:,.3g} MB" for x in values], padding=4)
    axes.set(title=title, xticks=[], xlabel="sent by a device")
    axes.margins(x=0.2)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.tick_params(length=0)
panels[0].invert_yaxis()
plt.show()

fsdp = auto_mesh(config, 8)["fsdp"]
gathered = config.size * (fsdp - 1) / fsdp / 1e6
print(f"To gather all weights once, a device sends {fsdp - 1}/{fsdp} of {config.size / 1e6:,.1f}M numbers:")
print(f"{2 * gathered:,.1f} MB if a number moves as two bytes, {4 * gathered:,.1f} MB as four.")
if FOR_DECODING != FOR_TUNING and (per_step := sent("train", FOR_DECODING, update=False)) > 0:
    tokens = 512 * sent("train", FOR_TUNING, update=False) / per_step
    print(f"With more than about {tokens:,.0f} tokens in a micro-batch, {FOR_TUNING} sends less than {FOR_DECODING}.")

# %% [markdown]
# How to read the bars:
#
# - **`fsdp` in decoding** gathers every weight once in each step. A TPU multiplies float32 weights as bfloat16 by
#   default, so the compiler sends two bytes for each number.
# - **`fsdp` in tuning** gathers every layer twice, for the forward and for the backward pass, so it sends about twice
#   as much. This does not depend on how many rows there are. The update adds the adapters' gradients.
# - **`tensor`** adds up hidden states, twice a layer in each pass. That grows with the number of tokens: next to
#   nothing for a decode step with one token a row, and more than `fsdp` from the number of tokens on that is printed
#   above (a linear estimate from the plans).
#
# So **decoding** wants `tensor`, as far as there are key/value heads to split, and `data` for the rest. **Tuning**
# usually has thousands of tokens in a step and wants `fsdp`, which also leaves the smallest part of the weights on each
# device. `auto_mesh` chooses this way. A small step, like the one here, is the exception: it sends less with `tensor`.
#
# These are bytes in compiled programs. No time was measured on TPUs, and the speed of simulated devices says nothing.
