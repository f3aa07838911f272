"""What weights in few bits cost in quality, and what they save in memory.

    python benchmarks/quantized.py --books FOLDER
    python benchmarks/quantized.py --books FOLDER --windows 4 --json small.json      (a smoke test)
    python benchmarks/quantized.py --books FOLDER --model DIR                        (another backbone)

FOLDER holds .txt files. Of the last 50th of the paragraphs of each, which the backbone that ships was not trained on,
windows of 256 tokens are read by the backbone in float32, in bfloat16, and with the projections of its layers in int8
(a scale for each output) and int4 (a scale for each 64 inputs), computed in float32 and in bfloat16. Perplexity is of a
token; the error of logits is root mean square over root mean square, against float32. Bytes are of the arrays on the
device. The second table has, from shapes alone, what an 8B model (Llama 3's) and a 7B one (Llama 2's) come to, and how
many positions of cache the rest of the 16 GiB of a small accelerator holds.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import common

FORMS: dict[str, tuple[str, str | None]] = {
    "float32": ("float32", None),
    "bfloat16": ("bfloat16", None),
    "int8": ("float32", "int8"),
    "int4": ("float32", "int4"),
    "int8, bfloat16": ("bfloat16", "int8"),
    "int4, bfloat16": ("bfloat16", "int4"),
}
LARGE = {
    "Llama 3 8B": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    },
    "Llama 2 7B": {
        "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
    },
}  # fmt: skip
CHIP = 16 * 2**30


def held_out(books: Path) -> str:
    """The last 50th of the paragraphs of each book, as train/pretrain.py leaves them out."""
    texts = []
    for path in sorted(books.glob("*.txt")):
        paragraphs = [p.strip() for p in path.read_text(encoding="utf-8").split("\n\n") if p.strip()]
        texts += paragraphs[len(paragraphs) * 49 // 50 :]
    return "\n\n".join(texts)


def measure(model: str, books: Path, windows: int, length: int) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from para_jax import Backbone, load_tokenizer

    ids = load_tokenizer(model)(held_out(books), verbose=False)["input_ids"]
    rows = np.array(ids[: len(ids) // length * length], np.int32).reshape(-1, length)
    rows = rows[np.linspace(0, len(rows) - 1, min(windows, len(rows))).astype(int)]
    found: dict[str, Any] = {}
    exact: list[np.ndarray] = []
    for name, (dtype, quantize) in FORMS.items():
        backbone = Backbone.from_pretrained(model, dtype=dtype, quantize=quantize)
        nll = error = size = 0.0
        for i, row in enumerate(rows):
            logits = np.asarray(backbone(jnp.asarray(row)[None]))[0, :-1].astype(np.float64)
            exact += [logits] if name == "float32" else []
            nll += float(np.sum(np.log(np.sum(np.exp(logits), axis=1)) - logits[np.arange(length - 1), row[1:]]))
            error, size = error + float(np.sum((logits - exact[i]) ** 2)), size + float(np.sum(exact[i] ** 2))
        layers = sum(x.nbytes for x in jax.tree.leaves(backbone.blocks))
        found[name] = {
            "perplexity": math.exp(nll / (len(rows) * (length - 1))),
            "logit_error": math.sqrt(error / size),
            "bytes": sum(x.nbytes for x in jax.tree.leaves(backbone)),
            "bytes_of_layers": layers,
        }
    return {"forms": found, "tokens": len(rows) * (length - 1), "parameters": backbone.config.size}


def sizes() -> list[dict[str, Any]]:
    """Of large models in bfloat16 and in few bits, from shapes alone."""
    from functools import partial

    import jax

    from para_jax import Backbone, BackboneConfig

    found = []
    for name, fields in LARGE.items():
        config = BackboneConfig.from_hf(fields)
        for quantize in (None, "int8", "int4"):
            make = partial(Backbone, config, dtype="bfloat16", stacked=True, quantize=quantize, attention="plain")
            leaves = jax.tree.leaves(jax.eval_shape(make, jax.random.key(0)))
            # int4 takes half a byte where the device packs it, as TPUs and GPUs do.
            total = sum(math.prod(x.shape) * (0.5 if x.dtype == "int4" else x.dtype.itemsize) for x in leaves)
            position = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
            room = max(0, int((CHIP - total) // position))
            found.append({"model": name, "weights": quantize or "bfloat16", "bytes": total, "positions_of_cache": room})
    return found


def main() -> None:
    parser = common.parser(__doc__, rounds=1)
    parser.add_argument("--books", type=Path, required=True, help="folder of .txt files")
    parser.add_argument("--model", help="backbone (default: the tiny one that ships)")
    parser.add_argument("--windows", type=int, default=200)
    parser.add_argument("--length", type=int, default=256)
    args = parser.parse_args()

    from para_jax import tiny_backbone_path

    environment = common.environment()
    model = args.model or tiny_backbone_path()
    measured = measure(model, args.books, args.windows, args.length)
    common.print_table(
        f"{measured['parameters']:,} parameters, {measured['tokens']:,} tokens",
        ("", "perplexity", "error of logits", "MB", "MB of layers"),
        [
            (name, f"{f['perplexity']:.2f}", f"{f['logit_error']:.4f}", f"{f['bytes'] / 1e6:.2f}",
             f"{f['bytes_of_layers'] / 1e6:.2f}")
            for name, f in measured["forms"].items()
        ],
    )  # fmt: skip
    large = sizes()
    common.print_table(
        "on a chip of 16 GiB, bfloat16 but for the layers' projections",
        ("model", "weights", "GB", "positions of cache in the rest"),
        [(s["model"], s["weights"], f"{s['bytes'] / 1e9:.2f}", f"{s['positions_of_cache']:,}") for s in large],
    )
    report = {"environment": environment, "model": Path(model).name, **measured, "sizes": large}
    common.write_json(args.json, "quantized", report)


if __name__ == "__main__":
    main()
