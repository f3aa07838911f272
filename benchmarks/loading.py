"""Time and peak host memory of loading checkpoints, against a plain read of their files.

    python benchmarks/loading.py
    python benchmarks/loading.py --gigabytes 2
    python benchmarks/loading.py --layers 2 --rounds 1 --json small.json      (a smoke test)

A random Llama (hidden size 1024, vocabulary 32,000) in float32 and in bfloat16 and a random Gemma 3 (1152, vocabulary
65,536) in bfloat16 are written to a temporary folder, as one file and as an index of four, and each is loaded in fresh
processes. Memory is what the
process holds at its peak beyond what it held when JAX had started and config.json was read, which imports transformers:
resident pages as the kernel counts them (VmHWM, mapped pages of the file included), their anonymous part
sampled every 2 ms, and ru_maxrss. The files are in the page cache, so that the disk does not decide. Goal on
CPU: a peak of at most 1.3 times the file, in the file's own dtype. `dtype="auto"` on CPU widens a bfloat16
file to float32, which takes twice the file for the model alone.
"""

from __future__ import annotations

import json
import resource
import threading
import time
from pathlib import Path
from typing import Any

import common

# What is written: a family and its dtype, and how many layers make 1 GB.
LLAMA = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 2816,
    "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 64,
}  # fmt: skip
GEMMA3 = {
    "model_type": "gemma3_text", "vocab_size": 65536, "hidden_size": 1152, "intermediate_size": 6912,
    "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "tie_word_embeddings": True,
}  # fmt: skip
FULL = {("llama", "float32"): 16, ("llama", "bfloat16"): 36, ("gemma3_text", "bfloat16"): 16}
FIELDS = {"llama": LLAMA, "gemma3_text": GEMMA3}


def write_checkpoint(folder: Path, family: str, dtype: str, layers: int, shards: int) -> int:
    """A random checkpoint in Hugging Face's form; returns the bytes of its weights."""
    import ml_dtypes  # noqa: F401  (teaches NumPy the name bfloat16)
    import numpy as np
    from safetensors.numpy import save_file

    from para_jax import BackboneConfig
    from para_jax.parameters import table

    fields = {**FIELDS[family], "num_hidden_layers": layers, "dtype": dtype}
    config = BackboneConfig.from_hf(fields)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(fields))
    parts = [p for layer in (None, *range(layers)) for e in table(config, layer) for p in e.parts]
    rng = np.random.default_rng(0)
    where = {}
    for shard in range(shards):
        name = "model.safetensors" if shards == 1 else f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        mine = parts[len(parts) * shard // shards : len(parts) * (shard + 1) // shards]
        tensors = {p.name: rng.standard_normal(p.shape, np.float32).astype(dtype) for p in mine}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, name)
    if shards > 1:
        index = {"metadata": {}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def writing() -> dict[str, Any]:
    return {"write": write_checkpoint}


def kilobytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise SystemExit(f"/proc/self/status has no {field}; this benchmark needs Linux")


def plain_read() -> dict[str, Any]:
    """The files' bytes into memory, and nothing else."""

    def read(folder: str) -> float:
        paths = sorted(Path(folder).glob("*.safetensors"))
        buffers = [bytearray(path.stat().st_size) for path in paths]
        start = time.perf_counter()
        for path, buffer in zip(paths, buffers, strict=True):
            with open(path, "rb", buffering=0) as file:
                view, at = memoryview(buffer), 0
                while at < len(view):
                    at += file.readinto(view[at:])
        return time.perf_counter() - start

    return {"read": read}


def loading() -> dict[str, Any]:
    import jax

    from para_jax import Backbone, BackboneConfig

    jax.block_until_ready(jax.numpy.zeros(()))

    def load(folder: str, dtype: str, stacked: bool) -> dict[str, Any]:
        BackboneConfig.from_pretrained(folder)  # imports transformers, which imports torch if it is there
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
        before, anonymous, maximum = kilobytes("VmRSS"), kilobytes("RssAnon"), _maximum()
        highest, done = [anonymous], threading.Event()

        def sample() -> None:
            while not done.wait(0.002):
                highest[0] = max(highest[0], kilobytes("RssAnon"))

        sampler = threading.Thread(target=sample)
        sampler.start()
        start = time.perf_counter()
        backbone = Backbone.from_pretrained(folder, dtype, stacked)
        jax.block_until_ready(backbone)
        seconds = time.perf_counter() - start
        done.set()
        sampler.join()
        memory = jax.local_devices()[0].memory_stats() or {}
        return {
            "seconds": seconds,
            "peak": 1024 * (kilobytes("VmHWM") - before),
            "anonymous_peak": 1024 * (max(highest[0], kilobytes("RssAnon")) - anonymous),
            "ru_maxrss": 1024 * (_maximum() - maximum),
            "model": sum(x.nbytes for x in jax.tree.leaves(backbone)),
            "device_peak": memory.get("peak_bytes_in_use"),
        }

    def backend() -> tuple[str, list[str]]:
        return jax.default_backend(), [device.device_kind for device in jax.local_devices()]

    return {"load": load, "backend": backend}


def _maximum() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def fresh(make: Any, name: str, *args: Any) -> Any:
    """Asks one thing of a process that did nothing before."""
    worker = common.Worker(0, make)
    answer = worker.ask(name, *args)
    worker.close()
    return answer


def main() -> None:
    parser = common.parser(__doc__, rounds=3)
    parser.add_argument("--gigabytes", type=int, default=1, help="of each checkpoint, about (default: 1)")
    parser.add_argument("--layers", type=int, help="so many layers instead")
    parser.add_argument("--shards", type=int, default=4, help="files of the sharded checkpoint")
    parser.add_argument("--stacked", action="store_true", help="load for scanned layers, as on TPU and GPU")
    args = parser.parse_args()
    environment = common.environment(*fresh(loading, "backend"))

    results = []
    with common.temporary_folder() as root:
        folders = {(*kind, n): root / "-".join((*kind, str(n))) for kind in FULL for n in (1, args.shards)}
        cases = [(*key, key[1]) for key in folders] + [("llama", "bfloat16", 1, "float32")]
        size = {
            (family, dtype, n): fresh(
                writing, "write", folder, family, dtype, args.layers or args.gigabytes * FULL[family, dtype], n
            )
            for (family, dtype, n), folder in folders.items()
        }
        runs: dict[Any, list[dict[str, Any]]] = {case: [] for case in cases}
        for _ in range(args.rounds):
            for *key, as_dtype in cases:
                folder = str(folders[tuple(key)])
                read = fresh(plain_read, "read", folder)
                runs[*key, as_dtype].append({"read": read, **fresh(loading, "load", folder, as_dtype, args.stacked)})
        for (*key, as_dtype), rounds in runs.items():
            size_of_file = size[tuple(key)]
            figures = {what: common.spread(r[what] for r in rounds) for what in ("read", "seconds")}
            for what in ("peak", "anonymous_peak", "ru_maxrss"):
                figures[what] = common.spread(r[what] / size_of_file for r in rounds)
            results.append(
                {"family": key[0], "file": key[1], "shards": key[2], "as": as_dtype, "bytes": size_of_file,
                 "model": rounds[0]["model"], "device_peak": rounds[0]["device_peak"], **figures}
            )  # fmt: skip

    common.print_table(
        f"loading, {'stacked' if args.stacked else 'unrolled'} layers; memory in multiples of the file",
        ("family", "file", "as", "files", "GB", "read s", "load s", "peak", "anonymous", "ru_maxrss"),
        [
            (r["family"], r["file"], r["as"], r["shards"], f"{r['bytes'] / 1e9:.2f}",
             *(common.shown(r[key]) for key in ("read", "seconds", "peak", "anonymous_peak", "ru_maxrss")))
            for r in results
        ],
    )  # fmt: skip
    goals = [
        common.goal(f"peak / file, {r['family']} {r['file']}, {r['shards']} file(s)", r["peak"], at_most=1.3)
        for r in results
        if r["file"] == r["as"]
    ]
    common.print_goals(goals)
    report = {"environment": environment, "stacked": args.stacked, "results": results, "goals": goals}
    common.write_json(args.json, "loading", report)


if __name__ == "__main__":
    main()
