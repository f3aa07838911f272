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
# # Three tenants on one frozen model
#
# [![Open-in-Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/para-jax/para_jax/blob/main/colab/para_finetune.ipynb)
#
# **PARA, Prompt-Aware Representation Adjustment**, tunes a language model without touching its weights: in every layer
# a small generator reads the prompt once and makes vectors that scale Q, V and the feed-forward up projection. A
# tenant is its generators, some hundred kilobytes here. This notebook
#
# 1. looks for a TPU, a GPU or only a CPU, and picks sizes;
# 2. reads a checkpoint of the Hugging Face hub, or a tiny one that comes with the package and needs no network;
# 3. plans: says whether tuning fits a TPU's memory;
# 4. tunes three tenants in the same steps, one of them a second time with LoRA, on all devices there are;
# 5. lets all of them answer in one batch;
# 6. draws the losses and the vectors;
# 7. saves the adapters, LoRA's as Hugging Face's PEFT reads it.
#
# On a CPU with two cores and the tiny model it takes about two minutes.

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
# ## Devices and sizes

# %%
import jax

from para_jax import AdapterBank, Backbone, BackboneConfig, LoraConfig, ParaConfig, complete, tiny_backbone_path
from para_jax.convert.tokenizer import end_tokens, load_tokenizer
from para_jax.memory import keep_freed_memory
from para_jax.sharding import auto_mesh, make_mesh

# The tiny model, pre-trained on novels. On an accelerator try a model of the hub, such as "Qwen/Qwen2.5-0.5B", or with
# a token "google/gemma-2b" or "meta-llama/Llama-3.2-1B".
MODEL = tiny_backbone_path()
OUT = "para-finetune"

keep_freed_memory()
platform, devices = jax.default_backend(), jax.devices()
config = BackboneConfig.from_pretrained(MODEL)
small = config.size < 1e8
STEPS = 120 if small else 300
ROWS = {"cpu": 8, "gpu": 16, "tpu": 16}[platform]  # of each tenant in a step
LR = 1e-2 if small else 5e-4  # a starting point: what suits a model is found by trying
print(f"{len(devices)} x {devices[0].device_kind} ({platform}); {STEPS} steps of {ROWS} rows of each tenant")

# %% [markdown]
# ## The model
#
# `from_pretrained` converts while it reads: every tensor of the checkpoint goes to its place in our decoder, and with
# several devices to its part of the mesh. A tensor that is missing, or that nobody asks for, is an error. The layers
# are stacked for tuning, so that one of them is compiled instead of all.

# %%
mesh = make_mesh(auto_mesh(config, len(devices)), devices) if len(devices) > 1 else None
backbone, tokenizer = Backbone.from_pretrained(MODEL, stacked=True, mesh=mesh), load_tokenizer(MODEL)
where = "one device" if mesh is None else ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
print(f"{config.size / 1e6:.1f}M parameters in {config.num_hidden_layers} layers, {backbone.dtype}, on {where}")

# %% [markdown]
# ## The tenants' rows
#
# All three read the same one-sentence stories, and each has its own job. With your own data, a tenant is a JSONL file
# of `{"prompt": ..., "response": ...}` rows and `read_examples(file, tokenizer, ...)`.

# %%
from para_jax.data.examples import encode_rows
from para_jax.data.quickstart import quickstart_rows


def encoded(rows):
    places = {name: [(f"{name} row {i}", row) for i, row in enumerate(of, 1)] for name, of in rows.items()}
    eos = end_tokens(config, tokenizer)
    return {name: encode_rows(of, tokenizer, eos, keep_texts=True) for name, of in places.items()}


train, held_out = (encoded(rows) for rows in quickstart_rows(seed=0, train=1500, held_out=200))
TENANTS = tuple(train)
LORA = f"{TENANTS[-1]}-lora"  # the last tenant's rows once more, for LoRA
train[LORA], held_out[LORA] = train[TENANTS[-1]], held_out[TENANTS[-1]]
for name in TENANTS:
    print(f"{name:9} {train[name][0].prompt!r} -> {train[name][0].response!r}")

# %% [markdown]
# ## Will it fit?
#
# `para-jax plan` compiles the tuning step for TPU chips that need not be there, and says what it takes of their memory,
# and estimates how fast it is. Its compiler is libtpu, which comes with `para-jax[tpu]`. Without a TPU it plans for
# Colab's, a single v5e chip.

# %%
import importlib.util
import subprocess
import sys

CHIPS = {"TPU v5 lite": "v5e", "TPU v6 lite": "v6e"}  # what Colab has
SLICES = {1: "1x1", 4: "2x2", 8: "2x4"}
longest = max(len(example) for rows in train.values() for example in rows)

if importlib.util.find_spec("libtpu") is None:
    print("no plan: libtpu, the compiler for TPUs, is not installed (pip install 'para-jax[tpu]', on Linux)")
elif platform == "tpu" and (devices[0].device_kind not in CHIPS or len(devices) not in SLICES):
    print(f"no plan: {len(devices)} x {devices[0].device_kind} is no slice that is planned here; see docs/plan.md")
else:
    topology = f"{CHIPS[devices[0].device_kind]}:{SLICES[len(devices)]}" if platform == "tpu" else "v5e:1x1"
    job = ["--model", MODEL, "--topology", topology, "--tenants", len(train), "--rows", ROWS, "--length", longest]
    command = [sys.executable, "-m", "para_jax", "plan", *map(str, job)]
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stdout or done.stderr)

# %% [markdown]
# ## Tuning
#
# A step takes rows of every tenant through the frozen model once. Each tenant has its own loss, its own clipping and
# its own learning rate, and learns what it would have learnt alone. The run plans its programs from the lengths of the
# rows and compiles all of them when it begins. If this cell is interrupted, running it again goes on where it stopped.

# %%
from IPython.display import Image

from para_jax.training.loop import finetune
from para_jax.training.optimizer import Settings

configs = {**dict.fromkeys(TENANTS, ParaConfig(r=12)), LORA: LoraConfig(r=8)}
for name, method in configs.items():
    print(f"{name:14} {method.method:5} {method.size(config):,} parameters")
bank = finetune(
    backbone,
    AdapterBank.create(configs, config, seed=0),
    train,
    {name: Settings.checked(steps=STEPS, lr=LR) for name in configs},
    OUT,
    rows=ROWS,
    resume=True,
)

# %%
Image(f"{OUT}/loss.png")

# %% [markdown]
# `report.html` in the same folder has this picture, a table of the tenants, throughput and memory.
#
# ## All of them in one batch
#
# Every row of a batch has its own tenant, or none. While it decodes, the program sees scale vectors and low-rank pairs
# only: no tenant, and nothing is compiled again when others come. A CPU decodes faster with the layers apart, so there
# the model is read once more.

# %%
from para_jax.backbones.options import default_stacked

decoder = backbone if default_stacked() else Backbone.from_pretrained(MODEL, mesh=mesh)
prompts = [held_out[TENANTS[0]][i].prompt for i in range(4)]
askers = [None, *configs]
batch = [(prompt, asker) for prompt in prompts for asker in askers]
answers = complete(
    decoder, tokenizer, [p for p, _ in batch], bank=bank, tenants=[a for _, a in batch], max_new_tokens=12
)
for (prompt, asker), answer in zip(batch, answers, strict=True):
    if asker is None:
        print(f"\n{prompt}")
    print(f"    {asker or '(bare model)':14} {answer.text.strip()}")

# %% [markdown]
# How many of the held-out rows, whose combinations of words were never trained on, get exactly the right answer? This
# compares no methods: one seed, one learning rate. A study that does is in
# [docs/study.md](https://github.com/para-jax/para_jax/blob/main/docs/study.md).

# %%
from para_jax.evaluation.evaluate import evaluate

some = {name: rows[:40] for name, rows in held_out.items()}
scores = evaluate(decoder, tokenizer, some, bank, max_new_tokens=12, batch_size=160)
for name, of in scores.items():
    print(f"{name:14} {of['exact_match']:.0%}")

# %% [markdown]
# ## The vectors
#
# What the generators made of 200 held-out stories: for every layer and site the vector $\ell$ of
# $y' = (1 + \ell)\,y$. The model's forward pass hands them out; a decoding request keeps nothing else of its
# tenant.

# %%
import matplotlib.pyplot as plt
import numpy as np


@jax.jit
def prepared(backbone, tokens, mask, rows):
    return backbone.forward(tokens, mask, mask, rows)[1]


def vectors(tenant, examples):
    """By site: (layers, prompts, features)."""
    width = max(len(e.prompt_ids) for e in examples)
    tokens, mask = np.zeros((len(examples), width), np.int32), np.zeros((len(examples), width), bool)
    for i, e in enumerate(examples):
        tokens[i, : len(e.prompt_ids)], mask[i, : len(e.prompt_ids)] = e.prompt_ids, True
    adjustments = prepared(backbone, tokens, mask, bank.rows([tenant], repeats=len(examples)))
    return {site: np.asarray(adjustments.offsets[site], np.float32) for site in ParaConfig().target_modules}


made = {name: vectors(name, held_out[name]) for name in TENANTS}
layers = range(config.num_hidden_layers)
sites = list(made[TENANTS[0]])

# %% [markdown]
# **How large they are.** Solid is what a tenant's vectors have in common over all prompts, pale is what depends on the
# prompt (both root mean square). In the first layer nothing can depend on it: the generator reads the last token of the
# prompt, here always a full stop, which has not yet looked at the others. `ParaConfig(pooling="mean")` would.

# %%
figure, panels = plt.subplots(1, len(TENANTS), figsize=(12, 3.4), sharey=True, layout="constrained")
for axes, name in zip(panels, TENANTS, strict=True):
    for i, site in enumerate(sites):
        common = np.sqrt(np.mean(made[name][site].mean(axis=1) ** 2, axis=1))
        own = np.sqrt(np.mean(made[name][site].var(axis=1), axis=1))
        at = np.arange(len(layers)) + (i - 1) * 0.27
        axes.bar(at, common, 0.25, color=f"C{i}", label=site)
        axes.bar(at, own, 0.25, bottom=common, color=f"C{i}", alpha=0.35)
    axes.set(title=name, xlabel="layer", xticks=layers)
    axes.spines[["top", "right"]].set_visible(False)
panels[0].set_ylabel(r"size of $\ell$")
panels[-1].legend(frameon=False, loc="upper left")
plt.show()

# %% [markdown]
# **The same eight stories, three tenants.** The 80 features of each site that differ most, in the last layer. Every
# tenant has bands of its own; within a band the rows differ a little from prompt to prompt.

# %%
figure, panels = plt.subplots(1, len(sites), figsize=(12, 3.6), layout="constrained")
for axes, site in zip(panels, sites, strict=True):
    rows = np.concatenate([made[name][site][-1, :8] for name in TENANTS])
    most = np.sort(np.argsort(-rows.var(axis=0))[:80])
    limit = np.quantile(abs(rows[:, most]), 0.95)
    image = axes.imshow(rows[:, most], cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    for edge in (8, 16):
        axes.axhline(edge - 0.5, color="black", linewidth=1)
    axes.set(title=site, xlabel="feature", xticks=[], yticks=[3.5, 11.5, 19.5])
    axes.set_yticklabels(TENANTS if site == sites[0] else [""] * 3)
    axes.tick_params(length=0)
    figure.colorbar(image, ax=axes, location="bottom", label=r"$\ell$", shrink=0.7)
plt.show()

# %% [markdown]
# **What they know of the prompt.** Every dot is a story; the last layer's vectors, in the two directions in which they
# differ most. On the left the three tenants lie far apart. Within a tenant, colours are the answers that it should
# give: the tenant that asks questions tells the tenses apart, the one that names feelings tells some apart. The one
# that copies a word has no need to: nearly all of its difference is in one direction (compare its axes), in which
# words mix.


# %%
def answer(example):
    """The last word of an answer, or the tense of a question."""
    words = example.response.split()
    return " ".join(words[:2]) if words[0] == "Where" else words[-1]


def plane(x):
    """Rows of x in the two directions in which they differ most."""
    u, s, _ = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)
    return u[:, :2] * s[:2]


last = {name: np.concatenate([made[name][site][-1] for site in sites], axis=1) for name in TENANTS}
figure, (left, *panels) = plt.subplots(1, 1 + len(TENANTS), figsize=(15, 4), layout="constrained")
together = plane(np.concatenate(list(last.values())))
for name, dots in zip(TENANTS, np.split(together, len(TENANTS)), strict=True):
    left.scatter(*dots.T, s=10, label=name, color=f"C{5 + TENANTS.index(name)}")
left.set_title("all tenants")
for axes, name in zip(panels, TENANTS, strict=True):
    answers_of = np.array([answer(e) for e in held_out[name]])
    kinds, counts = np.unique(answers_of, return_counts=True)
    dots = plane(last[name])
    for kind in sorted(kinds[np.argsort(-counts)[:4]]):
        axes.scatter(*dots[answers_of == kind].T, s=14, alpha=0.75, label=kind)
    axes.set_title(name)
for axes in (left, *panels):
    axes.legend(frameon=False, fontsize=9, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.08))
    axes.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# ## The adapters
#
# `OUT` has a folder for each tenant already. LoRA's is what PEFT writes, so
# `PeftModel.from_pretrained(model, "para-finetune/question-lora")` opens it; PARA's has the same two files, of which
# PEFT knows no more than the names. Read back, they answer as before.

# %%
import json
import shutil
from pathlib import Path

for name in configs:
    folder = Path(OUT, name)
    kind = json.loads((folder / "adapter_config.json").read_text())["peft_type"]
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{folder}: {kind}, {size / 1e3:.0f} kB in {', '.join(sorted(file.name for file in folder.iterdir()))}")

reloaded = AdapterBank.load({name: Path(OUT, name) for name in configs}, config)
again = complete(
    decoder, tokenizer, [p for p, _ in batch], bank=reloaded, tenants=[a for _, a in batch], max_new_tokens=12
)
assert [a.text for a in again] == [a.text for a in answers]

# %%
export = Path(f"{OUT}-adapters")
for name in configs:
    shutil.copytree(Path(OUT, name), export / name, dirs_exist_ok=True)
print(shutil.make_archive(str(export), "zip", export), "has all four; unpack it next to a server, or give a folder to:")
print(f"  para-jax generate --adapters {export} --tenant {TENANTS[0]} --prompt {prompts[0]!r}")
