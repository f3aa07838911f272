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
# Every row gets an answer of 48 tokens. The answer's time over its tokens is what is drawn; the prompt, 17 tokens, is
# in it, and compiling is not. The best of five is taken, and the kinds take turns, so that other work on the machine
# falls on all of them.

# %%
NEW = 48
PROMPT = "It was a dark night, and the captain of the ship had not slept for"


def token_ms(asked_by, rows):
    """Milliseconds of a new token of all rows together."""
    bank, tenants = asked_by
    began = time.perf_counter()
    found = complete(
        backbone, tokenizer, [PROMPT] * rows, bank=bank, tenants=tenants, max_new_tokens=NEW, eos_token_id=()
    )
    assert all(len(one.tokens) == NEW for one in found)
    return 1e3 * (time.perf_counter() - began) / NEW


KINDS = ("bare", *METHODS, "mixed")
best = {}
for rows in TENANTS:
    askers = {kind: asked(kind, rows) for kind in KINDS}
    for turn in range(6):  # the first compiles
        for kind, asker in askers.items():
            seconds = token_ms(asker, rows)
            if turn:
                best[kind, rows] = min(seconds, best.get((kind, rows), seconds))
    print(f"{rows:4} rows: " + ", ".join(f"{kind} {best[kind, rows]:.2f} ms" for kind in KINDS))

# %%
COLOURS = dict(zip(KINDS, ("black", "C0", "C1", "C2"), strict=True))
figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
for kind in KINDS:
    times = np.array([best[kind, rows] for rows in TENANTS])
    bare = np.array([best["bare", rows] for rows in TENANTS])
    for axes, values in ((left, times), (right, times / bare)):
        axes.plot(TENANTS, values, color=COLOURS[kind], marker="o", label=kind)
left.set(title="A new token of all rows", ylabel="milliseconds", yscale="log")
right.set(title="... over the bare model's", ylabel="ratio")
right.set_ylim(bottom=0)
for axes in (left, right):
    axes.set_xscale("log", base=2)
    axes.set(xlabel="tenants in the batch, one row each", xticks=TENANTS, xticklabels=TENANTS)
    axes.spines[["top", "right"]].set_visible(False)
left.legend(frameon=False)
plt.show()

# %% [markdown]
# PARA's line lies on the bare model's: a step reads a few vectors a row, beside all of the model's weights. LoRA's
# rises, because each row reads matrices of its own. A mixed batch computes both kinds, each for its own rows, and costs
# no less than LoRA alone. The larger the model, the more its own weights hide what a few rows of LoRA cost; the more
# rows, the less they do.
#
# ## Tokens a second
#
# The same figures as the papers show them: what a device answers in a second.

# %%
figure, axes = plt.subplots(figsize=(9, 3.8), layout="constrained")
for i, kind in enumerate(KINDS):
    rates = [1e3 * rows / best[kind, rows] for rows in TENANTS]
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
    complete(backbone, tokenizer, [PROMPT] * rows, bank=some, tenants=list(some.names), max_new_tokens=NEW)
    print(f"{rows} new tenants, turn {turn + 1}: {len(compiled)} programs compiled")

# %% [markdown]
# The first turn may compile what takes rows out of a bank of this size; the second compiles nothing.
