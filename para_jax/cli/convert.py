"""Write a checkpoint as a Hugging Face folder: cast, merged with an adapter, as safetensors, in files of a given size.

  para-jax convert --model DIR --out DIR --dtype bfloat16
  para-jax convert --model DIR --adapter runs/first/acme --out DIR      (LoRA or (IA)3 merged into the weights)
  para-jax convert --model DIR --check                                  (reads everything and writes nothing)

  para-jax convert --model DIR --text-only --out DIR                    (the text part of a model with a vision tower)

transformers and this library can load the result. The tokenizer and the generation config are copied. A model with a
vision tower is written as a whole; everything but its text part is unchanged.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from para_jax.cli import common
from para_jax.cli.options import flag, refuse
from para_jax.cli.outputs import check_folder
from para_jax.compile_cache import set_up
from para_jax.errors import ParaJaxError

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_checkpoint(parser)
    common.add_compile_cache(parser)
    dtypes = ("auto", "float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=dtypes, help="dtype to write (default: the checkpoint's)")
    parser.add_argument("--out", metavar="DIR", help="folder to write")
    parser.add_argument("--adapter", metavar="DIR", help="an adapter's folder, to merge into the weights")
    flag(parser, "--text-only", "write the text part of a larger model as a model of its own")
    parser.add_argument("--shard-size", metavar="SIZE", help="maximum size of a file (default: 5GB)")
    flag(parser, "--check", "refuse NaN and infinite weights")
    flag(parser, "--overwrite", "replace --out if it is a checkpoint")


def run(args: argparse.Namespace) -> int:
    if args.out is None and not args.check:
        raise ParaJaxError("give --out DIR, or --check alone to check the weights")
    if args.out is None:
        refuse(args, ("dtype", "text_only", "shard_size", "overwrite"), "without --out DIR: nothing is written")
    else:
        check_folder(args, "config.json")
    args.dtype = args.dtype or "auto"
    size = shard_bytes(args.shard_size or "5GB")

    from para_jax import Backbone, load_adapter, merge_adapter, tiny_backbone_path
    from para_jax.config import CONFIG, read_json
    from para_jax.convert.adapter_tokenizer import adapter_tokenizer, has_tokenizer
    from para_jax.convert.checkpoint import fetched, save_backbone
    from para_jax.convert.tensors import open_tensors
    from para_jax.convert.tokenizer import load_tokenizer, processor_template
    from para_jax.convert.wrapped import parts_of
    from para_jax.families.reading import architecture_from_hf
    from para_jax.families.wrappers import wrapper_of

    set_up(args.compile_cache)
    model = args.model or tiny_backbone_path()
    folder = fetched(model)
    # Raises for unsupported models, before weights are read.
    wrapper = wrapper_of(architecture_from_hf(read_json(folder / CONFIG), model))
    if args.text_only and wrapper is None:
        raise ParaJaxError(f"--text-only: {model} is a text model, and nothing else is in it; leave the option out")
    dtype_of = open_tensors(folder).dtype
    dtypes = sorted({dtype_of[name] for name in parts_of(folder, dtype_of, wrapper).names})
    if len(dtypes) > 1 and args.dtype == "auto" and args.out is not None:
        raise ParaJaxError(f"{model} has tensors of {' and '.join(dtypes)}; choose one with --dtype")
    written = dtypes[0] if args.dtype == "auto" else args.dtype
    # Merged in float32, so that small updates are not lost in rounding, and cast when written.
    unchanged = args.adapter is None and dtypes == [written] == ["bfloat16"]
    backbone = Backbone.from_pretrained(
        model, dtype="bfloat16" if unchanged else "float32", stacked=False, check_finite=args.check
    )
    part = f", the text part of {wrapper.architecture}" if wrapper else ""
    print(f"{model}: {backbone.config.size:,} parameters, family {backbone.config.family}{part}")
    new_tokenizer = template = None
    if args.adapter is not None:
        adapter = load_adapter(args.adapter, backbone.config)
        if has_tokenizer(args.adapter):
            tokenizer = load_tokenizer(folder)
            merged_tokenizer = adapter_tokenizer(tokenizer, args.adapter, backbone.config.vocab_size)
            new_tokenizer = None if merged_tokenizer is tokenizer else merged_tokenizer
        backbone, template = merge_adapter(backbone, adapter), adapter.chat_template
    if args.text_only and template is None:
        template = processor_template(folder)
    if args.out is not None:
        save_backbone(
            backbone, args.out, dtype=written, like=folder, text_only=args.text_only, tokenizer=new_tokenizer,
            chat_template=template, shard_size=size, overwrite=args.overwrite,
        )  # fmt: skip
        files = sorted(path.name for path in Path(args.out).glob("*.safetensors"))
        more = f" to {files[-1]}" if len(files) > 1 else ""
        print(f"wrote {args.out}: {files[0]}{more}, {written}")
    return 0


def shard_bytes(text: str) -> int:
    """Parses a size in transformers' format.

    >>> shard_bytes("5GB"), shard_bytes("200mb"), shard_bytes("1000")
    (5000000000, 200000000, 1000)
    """
    match = re.fullmatch(r"(\d+)\s*([KMG]?B?)", text.strip().upper())
    if match is None or match[2] not in UNITS or not int(match[1]):
        raise ParaJaxError(f"--shard-size takes a size such as 5GB or 200MB, not {text!r}")
    return int(match[1]) * UNITS[match[2]]
