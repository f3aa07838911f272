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
# # What serving one more adapter costs
#
# [![Open-in-Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/para-jax/para_jax/blob/main/colab/many_tenants.ipynb)
#
# Many customers share one frozen language model. Each customer is a **tenant**: it has an *adapter*, a small set of
# weights that were tuned for it. One batch answers requests of many tenants, one in each row. What do the adapters
# cost, compared with the bare model?
#
# - **PARA**, [Prompt-Aware Representation Adjustment](https://arxiv.org/abs/2502.01033): in each layer, a small network
#   reads the prompt once and makes three vectors. They scale the outputs of the query, value and feed-forward up
#   projections. Later tokens need these vectors only, not the adapter.
# - **LoRA**, [low-rank adaptation](https://arxiv.org/abs/2106.09685): beside each chosen weight matrix of the model
#   stand two thin matrices, and what they compute is added. They are read again for every token. Here they are not
#   merged into the model, because each row has its own.
#
# The *rank* `r` is the thin side of these matrices, and the inner width of PARA's network: an adapter's size grows with
# it.
#
# The notebook measures the time of a decode step on the device that it runs on, and calculates the memory, for 1 to 256
# tenants (1 to 64 on a CPU). It does not compare how well the methods learn:
# [docs/study.md](https://github.com/para-jax/para_jax/blob/main/docs/study.md) does.
#
# It takes about two minutes on two CPU cores, with the tiny model that comes with the package. That model shows how to
# measure. Its figures say little about a large model on your accelerator: choose a GPU or TPU runtime and set `MODEL`.

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
# `MODEL` is a folder or a name on the Hugging Face hub, of [one of these
# architectures](https://github.com/para-jax/para_jax/blob/main/docs/families.md); empty is the tiny model. For a gated
# model, accept the terms on its page and put a token into a Colab secret or an environment variable named `HF_TOKEN`.
# The device chooses the dtype: float32 on a CPU, float16 on a T4, bfloat16 on newer GPUs and on TPUs.
#
# `TENANTS` lists how many tenants share a batch. Each new number compiles its own programs, so more numbers take
# longer.

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
    adapter_cost,
    complete,
    compute_dtype,
    host_memory,
    load_tokenizer,
    tiny_backbone_path,
)

MODEL = ""  # @param ["", "Qwen/Qwen2.5-0.5B", "HuggingFaceTB/SmolLM2-135M"] {"allow-input": true}
TENANTS = ""  # @param {"type": "string", "placeholder": "1, 8, 64, 256"}

MODEL = MODEL or tiny_backbone_path()
config, device = BackboneConfig.from_pretrained(MODEL), jax.devices()[0]
dtype = compute_dtype("auto")
TENANTS = TENANTS or ("1, 8, 64" if device.platform == "cpu" else "1, 8, 64, 256")
TENANTS = sorted({int(n) for n in TENANTS.split(",")})
print(f"{config.size / 1e6:.0f}M parameters, {config.num_hidden_layers} layers, {dtype}, on {device.device_kind}")

# %% [markdown]
# ## The adapters
#
# | name | what it is |
# |---|---|
# | PARA | rank 12, which gives LLaMA-2 7B the 8.9M parameters that PARA's paper reports |
# | LoRA, all modules | rank 16 on all seven weight matrices of a layer, a common choice |
# | LoRA, PARA's size | only on the query and value projections, with about as many parameters as PARA |
#
# *Stored* is the adapter itself, in float32. *In use* is what one request keeps while it is answered, and what a decode
# step reads for its row: PARA's vectors, or LoRA's matrices in the dtype of computation.

# %%
one = LoraConfig(r=1, target_modules=("q_proj", "v_proj"))
METHODS = {
    "PARA": ParaConfig(r=12),
    "LoRA, all modules": LoraConfig(r=16, target_modules="all-linear"),
    "LoRA, PARA's size": LoraConfig(
        r=round(ParaConfig(r=12).size(config) / one.size(config)), target_modules=("q_proj", "v_proj")
    ),
}
costs = {name: adapter_cost(method, config, str(dtype)) for name, method in METHODS.items()}
print(f"{'':18} rank  parameters  of the model's     stored     in use")
for name, c in costs.items():
    print(
        f"{name:18} {METHODS[name].r:4} {c.parameters:11,} {c.parameters / config.size:15.2%} "
        f"{c.stored / 1e6:7.2f} MB {c.in_flight / 1e6:7.2f} MB"
    )

# %% [markdown]
# What does not fit into memory is left out. While the adapters are made there are two copies of each. Later there is
# one, and a second for the rows that are being answered, next to the keys and values of all tokens.

# %%
PROMPT = "It was a dark night, and the captain of the ship had not slept for"
NEW = 48  # tokens of an answer

weights = dtype.itemsize * config.size
keys_and_values = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize
a_tenant = sum(2 * c.stored + c.in_flight for c in costs.values()) + 96 * keys_and_values
memory = (device.memory_stats() or {}).get("bytes_limit") or host_memory()["memory_available"] or float("inf")
fit = [n for n in TENANTS if weights + n * a_tenant < 0.8 * memory]
for n in TENANTS:
    if n not in fit:
        need = (weights + n * a_tenant) / 1e9
        print(f"TENANTS={n} is left out: it needs about {need:.1f} GB, and there are {memory / 1e9:.1f} GB")
if not fit:
    raise SystemExit("Nothing fits. Choose a smaller model, fewer tenants, or a device with more memory.")
TENANTS, most = fit, max(fit)

# %% [markdown]
# One *bank* holds the adapters of all tenants. They are untrained: speed does not depend on their values, and untrained
# adapters all give the bare model's answer, which makes the answers equally long.
#
# In a `mixed` batch a third of the rows use PARA, a third LoRA on all modules, and a third no adapter. It needs two
# rows at least.

# %%
backbone, tokenizer = Backbone.from_pretrained(MODEL), load_tokenizer(MODEL)
names = {kind: [f"{kind} {i}" for i in range(most)] for kind in METHODS}
bank = AdapterBank.create({name: METHODS[kind] for kind in METHODS for name in names[kind]}, config)
KINDS = ("bare model", "PARA", "LoRA, PARA's size", "LoRA, all modules", "mixed")
MIXED = ("PARA", "LoRA, all modules", "bare model")


def tenants_of(kind, rows):
    """The tenant of each row; None is the bare model."""
    kinds = [MIXED[i % 3] if kind == "mixed" else kind for i in range(rows)]
    return [None if k == "bare model" else names[k][i] for i, k in enumerate(kinds)]


# %% [markdown]
# ## Time of a decode step
#
# A decode step makes one new token for every row. To time it, the batch is answered twice: once with 48 tokens for each
# row, and once only up to the first token. The difference is 47 decode steps, without the prompt. Compiling is not in
# it, because the first round is not counted. The kinds take turns for several rounds, so that other work on the machine
# disturbs all of them alike.

# %%
ROUNDS, SECONDS = 8, 10  # so many rounds, and more until so many seconds are over: small batches are quick
first = complete(backbone, tokenizer, [PROMPT], max_new_tokens=1, eos_token_id=())[0].tokens[0]


def seconds(kind, rows, eos):
    """Time of answering a batch; `eos` are the tokens that end an answer, () for none."""
    given = {"bank": bank, "tenants": tenants_of(kind, rows), "max_new_tokens": NEW, "eos_token_id": eos}
    began = time.perf_counter()
    complete(backbone, tokenizer, [PROMPT] * rows, **given)
    return time.perf_counter() - began


measured = {}  # kind, rows -> milliseconds of a step: of the fastest round, and the median of the rounds
for rows in TENANTS:
    kinds = [kind for kind in KINDS if rows > 1 or kind != "mixed"]
    rounds, began = [], time.perf_counter()
    while len(rounds) <= ROUNDS or time.perf_counter() - began < SECONDS:
        rounds.append([(seconds(k, rows, ()), seconds(k, rows, (first,))) for k in kinds])
    for kind, (whole, short) in zip(kinds, np.array(rounds[1:]).transpose(1, 2, 0), strict=True):
        steps = 1e3 * (whole - short.min()) / (NEW - 1)
        measured[kind, rows] = np.array([steps.min(), np.median(steps)])
    print(f"{rows:4} rows, ms a step: " + ", ".join(f"{kind} {measured[kind, rows][0]:.2f}" for kind in kinds))

# %% [markdown]
# A point is the fastest round, which other work on the machine disturbed least. The bar at the point ends at the median
# of the rounds: a long bar means a disturbed measurement, and differences within the bars may be noise. Left: look at
# how far the lines are apart. Right: the same times divided by the bare model's, so that 1 is "costs nothing".

# %%
COLOURS = dict(zip(KINDS, ("black", "C0", "C2", "C1", "C4"), strict=True))


def drawn(axes, kind, values_of):
    """A line with the spread over the rounds; the kinds stand side by side so that no point hides another."""
    counts = [rows for rows in TENANTS if (kind, rows) in measured]
    fastest, median = np.array([values_of(kind, rows) for rows in counts]).T
    at = [TENANTS.index(rows) + 0.05 * (KINDS.index(kind) - 2) for rows in counts]
    axes.plot(at, fastest, color=COLOURS[kind], marker="o", markersize=5, label=kind)
    axes.vlines(at, fastest, median, color=COLOURS[kind], linewidth=3, alpha=0.5)


figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
for kind in KINDS:
    drawn(left, kind, lambda kind, rows: measured[kind, rows])
    drawn(right, kind, lambda kind, rows: measured[kind, rows] / measured["bare model", rows])
left.set(title="one decode step of the whole batch", ylabel="milliseconds")
right.set(title="the same, divided by the bare model's", ylabel="times the bare model's")
right.axhline(1, color="0.8", linewidth=1, zorder=0)
for axes in (left, right):
    axes.set(xlabel="tenants in the batch, one row each", xticks=range(len(TENANTS)), xticklabels=TENANTS)
    axes.set_ylim(bottom=0)
    axes.margins(y=0.08)
    axes.spines[["top", "right"]].set_visible(False)
left.legend(frameon=False)
plt.show()

# %% [markdown]
# What to expect:
#
# - **PARA** adds a multiplication by a few vectors. Its line should lie on the bare model's, within the noise.
# - **LoRA** multiplies every row by matrices of its own, which have to be read from memory. With few rows this hides
#   behind reading the model's own weights. The more rows, the larger its share; the larger the model, the later this
#   happens.
# - **mixed** runs one program for all rows. Rows without LoRA go through the same low-rank matmuls, with zeros for
#   matrices, and all rows are scaled. So a mixed batch costs at least what a batch of LoRA costs; the scaling comes on
#   top. If speed matters, keep LoRA's requests in batches of their own.
#
# Larger models: [docs/study.md](https://github.com/para-jax/para_jax/blob/main/docs/study.md#decoding) has these
# methods with 97.5M parameters on a CPU; [the README](https://github.com/para-jax/para_jax/blob/main/README.md#speed)
# has the bare model and PARA in LLaMA-2 7B's shape on an H100.
#
# ## Tokens per second
#
# The same points as a rate, the way that papers show it: new tokens of all rows in a second. Longer is better. Each
# panel has its own scale.

# %%
figure, panels = plt.subplots(1, len(TENANTS), figsize=(12, 2.8), sharey=True, squeeze=False, layout="constrained")
for axes, rows in zip(panels[0], TENANTS, strict=True):
    rates = [1e3 * rows / measured.get((kind, rows), [np.nan])[0] for kind in KINDS]
    bars = axes.barh(KINDS, np.nan_to_num(rates), color=COLOURS.values())
    axes.bar_label(
        bars, ["needs 2 rows" if np.isnan(rate) else f"{rate:,.0f}" for rate in rates], padding=3, fontsize=9
    )
    axes.set(title=f"{rows} tenants" if rows > 1 else "1 tenant", xticks=[], xlabel="tokens per second")
    axes.margins(x=0.22)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.tick_params(length=0)
panels[0][0].invert_yaxis()
plt.show()

# %% [markdown]
# ## Memory
#
# These figures are calculated from the shapes of the arrays, not measured. A bar is what the device holds while each
# tenant is answered in one row: the model's weights, the stored adapters, and what the requests have in use. The cache
# of keys and values is left out; it is the same for all kinds.

# %%
figure, axes = plt.subplots(figsize=(9, 3.8), layout="constrained")
unit, size = ("GB", 1e9) if weights > 1e9 else ("MB", 1e6)
shown = [kind for kind in KINDS if kind != "mixed"]
for i, kind in enumerate(shown):
    stored, in_use = (
        np.array(TENANTS) * getattr(costs[kind], part) / size if kind in costs else np.zeros(len(TENANTS))
        for part in ("stored", "in_flight")
    )
    at = np.arange(len(TENANTS)) + 0.2 * (i - 1.5)
    axes.bar(at, weights / size, 0.18, color="0.85", label=None if i else "the model's weights")
    axes.bar(at, stored, 0.18, weights / size, color=COLOURS[kind], label=f"{kind}: stored" if kind in costs else None)
    axes.bar(
        at,
        in_use,
        0.18,
        weights / size + stored,
        color=COLOURS[kind],
        alpha=0.5,
        label=f"{kind}: in use" if kind in costs else None,
    )
    axes.bar_label(axes.containers[-1], [f"{x:,.3g}" for x in weights / size + stored + in_use], fontsize=8, padding=2)
axes.set(xlabel="tenants, one row each", xticks=range(len(TENANTS)), xticklabels=TENANTS, ylabel=unit)
axes.set_title("memory, from left to right: " + ", ".join(shown), fontsize=10)
axes.margins(y=0.1)
axes.spines[["top", "right"]].set_visible(False)
axes.legend(frameon=False, fontsize=9)
plt.show()

# %% [markdown]
# LoRA has its matrices twice, stored and in use; PARA's vectors are too small to see. Two adapters of the same size
# differ in use: compare PARA with *LoRA, PARA's size*.
#
# ## New tenants compile nothing
#
# Programs depend on how many rows a batch has, on how long prompts and answers may be, and on how many places the bank
# has. They do not depend on who asks. Here all tenants are replaced by others.

# %%
compiled = []
jax.monitoring.register_event_duration_secs_listener(
    lambda name, seconds, **_: compiled.append(name) if name == "/jax/core/compile/backend_compile_duration" else None
)
for turn in (1, 2):
    newcomers = {f"newcomer {turn}.{i}": METHODS["PARA"] for i in range(most)}
    others = AdapterBank.create(newcomers, config, seed=turn)
    compiled.clear()
    complete(backbone, tokenizer, [PROMPT] * most, bank=others, tenants=list(newcomers), max_new_tokens=NEW)
    print(f"{most} new tenants, turn {turn}: {len(compiled)} programs compiled")

# %% [markdown]
# A bank that is full doubles its places when a tenant is added with `bank.add`; then one small program, which takes the
# batch's rows out of the bank, is compiled once more. `AdapterBank.create(..., capacity=256)` reserves places from the
# start.
#
# [your_model](https://github.com/para-jax/para_jax/blob/main/colab/your_model.ipynb) tunes adapters on your own rows;
# `AdapterBank.load` reads adapters from folders, those of Hugging Face's PEFT included.
