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
# A model that does not fit one chip is split over several. This notebook splits one over eight, as Kaggle's TPU v5e-8
# has them. Where there are fewer, eight simulated CPU devices take their place: the same programs with the same
# collectives, only no faster. It
#
# 1. puts a model on a mesh, and says what each device holds;
# 2. tunes two tenants on it, stops in the middle, goes on **on another mesh**, and compares the losses with those of
#    one device;
# 3. decodes both tenants in one batch on a third mesh;
# 4. plans: what the compiler says a device needs, beside what the devices hold;
# 5. counts what moves between devices, and so says which mesh suits tuning and which suits decoding.
#
# On a CPU with two cores and the tiny model it takes about four minutes.

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
# ## Eight devices
#
# The number of simulated devices has to be set before JAX starts its devices, and the cell above has started them. So
# they are cleared first. With an accelerator of fewer than eight devices this notebook leaves it alone and uses the
# CPU: a mesh of one device would have nothing to show.

# %%
MODEL = ""  # @param {"type": "string", "placeholder": "a folder or a name of the hub; empty: the tiny model"}
OUT = "mesh"  # @param {"type": "string"}

import jax
from jax.extend.backend import clear_backends

if len(jax.devices()) != 8:
    print(f"{len(jax.devices())} x {jax.devices()[0].device_kind} is not eight devices: simulating eight on the CPU")
    clear_backends()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
devices = jax.devices()
SIMULATED = devices[0].platform == "cpu"
print(f"{len(devices)} x {devices[0].device_kind}{', simulated' if SIMULATED else ''}")

# %% [markdown]
# ## A mesh
#
# A mesh gives the devices coordinates. Three axes have names:
#
# | axis | rows of a batch | weights |
# |---|---|---|
# | `data` | split | whole on every device |
# | `fsdp` | split | split over features; gathered for each layer when it runs |
# | `tensor` | whole | split over heads and inner features; partial sums are added up |
#
# `data` saves no memory for weights and moves nothing in a layer. `fsdp` saves it and moves weights. `tensor` saves it
# and moves hidden states. `from_pretrained` reads each device's part straight to it.

# %%
from para_jax import Backbone, BackboneConfig, auto_mesh, load_tokenizer, make_mesh, tiny_backbone_path
from para_jax.memory import keep_freed_memory

keep_freed_memory()
MODEL = MODEL or tiny_backbone_path()
config, tokenizer = BackboneConfig.from_pretrained(MODEL), load_tokenizer(MODEL)
MESHES = ["fsdp=8", "data=2,fsdp=2,tensor=2", "data=4,tensor=2"]
held = {}
for text in MESHES:
    split = Backbone.from_pretrained(MODEL, stacked=True, mesh=make_mesh(text))
    held[text] = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(split))
    print(f"{text:24} {held[text] / 1e6:6.2f} MB of weights on each device")
alone = Backbone.from_pretrained(MODEL, stacked=True)
whole = sum(x.nbytes for x in jax.tree.leaves(alone))
print(f"{'one device':24} {whole / 1e6:6.2f} MB")

# %% [markdown]
# ## Tuning on one device
#
# The rows are made by the package: one-sentence stories, and for each tenant its own answer.

# %%
from para_jax import AdapterBank, LoraConfig, ParaConfig, Settings, encode_rows, end_tokens, finetune
from para_jax.data.quickstart import quickstart_rows

rows, held_out = quickstart_rows(seed=0, train=600, held_out=16)
eos = end_tokens(config, tokenizer)
methods = {"place": ParaConfig(r=12), "question": LoraConfig(r=8)}
examples = {
    name: encode_rows([(f"{name} row {i}", row) for i, row in enumerate(rows[name], 1)], tokenizer, eos)
    for name in methods
}
STEPS = 40
settings = dict.fromkeys(methods, Settings.checked(steps=STEPS, lr=1e-2 if config.size < 1e8 else 5e-4))
given = {"rows": 8, "resume": True}

expected = finetune(alone, AdapterBank.create(methods, config, seed=0), examples, settings, f"{OUT}/alone", **given)

# %% [markdown]
# ## The same on a mesh, stopped, and resumed on another
#
# The first half runs on `data=2,fsdp=2,tensor=2`. Then the run gets Ctrl-C, as if somebody pressed the stop button; it
# saves the step that is on its way and ends. The second half runs on `fsdp=8`, from the checkpoint of the first: each
# array goes from the devices that had it to those that now want it, and the rows come in the same order.

# %%
import signal


def press_stop(line):
    """Called with each step's metrics."""
    if line["step"] == STEPS // 2:
        signal.raise_signal(signal.SIGINT)


split = Backbone.from_pretrained(MODEL, stacked=True, mesh=make_mesh("data=2,fsdp=2,tensor=2"))
fresh, half = AdapterBank.create(methods, config, seed=0), STEPS // 2 + 1
try:
    finetune(split, fresh, examples, settings, f"{OUT}/split", loggers=[press_stop], **given)
except KeyboardInterrupt as stopped:
    print(stopped)
    half = stopped.step

# %%
split = Backbone.from_pretrained(MODEL, stacked=True, mesh=make_mesh("fsdp=8"))
bank = finetune(split, fresh, examples, settings, f"{OUT}/split", **given)

# %% [markdown]
# Both runs wrote a line for each step to `metrics.jsonl`. Sums are taken in another order on a mesh, so the losses
# differ by rounding, which grows a little from step to step.

# %%
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

losses = {}
for run in ("alone", "split"):
    lines = [json.loads(line) for line in Path(OUT, run, "metrics.jsonl").read_text().splitlines()]
    losses[run] = {name: np.array([line["loss"][name] for line in lines]) for name in methods}
steps = np.arange(1, STEPS + 1)
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.4), layout="constrained")
worst = 0.0
for i, name in enumerate(methods):
    one, several = losses["alone"][name], losses["split"][name]
    left.plot(steps, one, color=f"C{i}", alpha=0.35, linewidth=6, label=f"{name}, one device")
    left.plot(steps, several, color=f"C{i}", linewidth=1.5, label=f"{name}, eight devices")
    right.semilogy(steps, np.maximum(abs(several - one) / one, 1e-9), color=f"C{i}", label=name)
    worst = max(worst, float(np.max(abs(several - one) / one)))
left.set(title="loss", xlabel="step", ylabel="nats a response token", ylim=(0, None))
right.set(title=f"relative difference, at most {worst:.0e}", xlabel="step", ylim=(1e-9, 1))
for axes in (left, right):
    axes.axvline(half + 0.5, color="0.6", linestyle=":")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
right.text(half, 0.2, "data=2,fsdp=2,tensor=2 ", ha="right", fontsize=9)
right.text(half + 1, 0.2, " fsdp=8", fontsize=9)
plt.show()
print(f"largest relative difference of a loss: {worst:.1e}")

# %% [markdown]
# ## Decoding on a mesh
#
# A decode step has one token for each row. Gathering all weights for so few tokens does not pay, so decoding wants
# `tensor`, as far as there are key/value heads to split, and `data` for the rest: `auto_mesh` says the same. Rows of
# both tenants and of none share the batch; each device has rows of its own.

# %%
from para_jax import complete
from para_jax.backbones.options import default_stacked

sizes = auto_mesh(config, 8, tuning=False)
decoder = Backbone.from_pretrained(MODEL, mesh=make_mesh(sizes))
askers = [None, *methods]
batch = [(row["prompt"], asker) for row in held_out["place"][:8] for asker in askers]
prompts, tenants = [prompt for prompt, _ in batch], [asker for _, asker in batch]
answers = complete(decoder, tokenizer, prompts, bank=bank, tenants=tenants, max_new_tokens=12)
print(f"{len(batch)} rows on {', '.join(f'{axis}={size}' for axis, size in sizes.items())}")
for (prompt, asker), answer in list(zip(batch, answers, strict=True))[:6]:
    if asker is None:
        print(f"\n{prompt}")
    print(f"    {asker or '(bare model)':14} {answer.text.strip()}")

single = alone if default_stacked() else Backbone.from_pretrained(MODEL)
same = complete(single, tokenizer, prompts, bank=bank, tenants=tenants, max_new_tokens=12)
equal = sum(a.text == b.text for a, b in zip(answers, same, strict=True))
print(f"\n{equal} of {len(batch)} answers are those of one device")

# %% [markdown]
# ## Plan and measured
#
# `para-jax plan` compiles the programs for chips that need not be there and reads what the compiler says. It runs
# beside this notebook, with `JAX_PLATFORMS=cpu`, and does not touch the devices that the notebook holds. With libtpu
# (it comes with `para-jax[tpu]`) the plan is for eight v5e chips. Without, it is for eight H100s, for which the
# programs are compiled for a CPU: what goes in is exact then, the rest an estimate.

# %%
import importlib.util
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

TOPOLOGY = "v5e:2x4" if importlib.util.find_spec("libtpu") else "gpu:h100x8"
Path(OUT, "plans").mkdir(exist_ok=True)
common = ["--model", MODEL, "--topology", TOPOLOGY, "--dtype", str(decoder.dtype), "--tenants", "2", "--overwrite"]
ways = {"train": ["--rows", "8", "--length", "32"], "decode": ["--rows", "24", "--length", "32", "--new-tokens", "16"]}
jobs = [(mode, mesh, f"{OUT}/plans/{mode}-{i}.json") for mode in ways for i, mesh in enumerate(MESHES)]


def plan(mode, mesh, file):
    command = [sys.executable, "-m", "para_jax", "plan", *common, "--mode", mode, "--mesh", mesh, *ways[mode]]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([*command, "--json", file], env=environment, capture_output=True, text=True)
    return json.loads(Path(file).read_text()) if done.returncode in (0, 1) and Path(file).exists() else done.stderr


with ThreadPoolExecutor(2) as pool:
    plans = dict(zip(((mode, mesh) for mode, mesh, _ in jobs), pool.map(lambda job: plan(*job), jobs), strict=True))
print(f"MB of a device, planned for {TOPOLOGY}, and weights as the devices here hold them:")
print(f"{'':24} {'weights: plan':>14} {'held':>8} {'peak of tuning':>16} {'of decoding':>12}")
for mesh in MESHES:
    tuning, decoding = plans["train", mesh]["plan"], plans["decode", mesh]["plan"]
    figures = tuning["weights"], held[mesh], tuning["peak"], decoding["peak"]
    print(
        f"{mesh:24} {figures[0] / 1e6:14.2f} {figures[1] / 1e6:8.2f} {figures[2] / 1e6:16.2f} {figures[3] / 1e6:12.2f}"
    )
if (said := devices[0].memory_stats()) and "peak_bytes_in_use" in said:
    print(
        f"the first device had at most {said['peak_bytes_in_use'] / 1e6:.2f} MB in use, of all that this notebook did"
    )
else:
    print("simulated devices do not say what their peak was; TPUs and GPUs do")

# %% [markdown]
# ## Which mesh for what
#
# A plan lists each program's collectives with the bytes that a device sends. Of tuning that is a micro-batch and the
# update, of decoding one step, a token for each of 24 rows.

# %%
moved = {
    key: sum(
        of["bytes"] for p in made["plan"]["programs"] if p["name"] != "prefill" for of in p["collectives"].values()
    )
    for key, made in plans.items()
}
figure, panels = plt.subplots(1, 2, figsize=(11, 2.6), sharey=True, layout="constrained")
for axes, (mode, title) in zip(panels, (("train", "a tuning step"), ("decode", "a decode step")), strict=True):
    sent = [moved[mode, mesh] / 1e3 for mesh in MESHES]
    least = min(sent)
    bars = axes.barh(MESHES, sent, color=["C2" if x == least else "0.75" for x in sent])
    axes.bar_label(bars, fmt="{:,.0f} kB", padding=4)
    axes.set(title=f"{title}: sent by a device", xticks=[])
    axes.margins(x=0.2)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.tick_params(length=0)
panels[0].invert_yaxis()
plt.show()

# %% [markdown]
# **Decoding** wants `tensor` and `data`: a step has one token a row, so that partial sums of hidden states are small,
# while `fsdp` gathers every weight for these few tokens (with the tiny model 7 MB instead of 55 kB).
#
# **Tuning** is a trade. What `fsdp` sends does not depend on the rows: it is the weights, a layer at a time. What
# `tensor` sends grows with the tokens of a step. The step planned here has only 512 tokens, so `tensor` sends least in
# tuning too; but a device of `data=4,tensor=2` holds four times the weights of one of `fsdp=8`, and key/value heads
# limit how far `tensor` goes (two here). A large model with thousands of tokens a device is tuned with `fsdp`, which is
# what `auto_mesh` chooses.
#
# These are bytes that the compiler's programs send. No time was measured on a TPU, and simulated devices share two
# cores: their speed says nothing.
