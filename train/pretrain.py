"""Pre-trains the tiny backbone that ships with para_jax, and its tokenizer, on a folder of plain-text books.

    python train/pretrain.py --books FOLDER --out tiny-books        (under an hour on two CPU cores with AMX)

The result is a Hugging Face folder: transformers opens it. A 50th of every book is held out; the model card gives
the perplexity on it.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from para_jax import Backbone, BackboneConfig, load_tokenizer, save_backbone
from para_jax.adapters.rows import Rows
from para_jax.files import write_json

END, PAD = "<|endoftext|>", "<|pad|>"
CHAT = (
    "{% for message in messages %}{{ message['role'].capitalize() }}: {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


def read_books(folder: Path) -> tuple[list[list[str]], list[list[str]]]:
    """The books as lists of paragraphs: what is trained on, and the last 50th of each, which is not."""
    train, held_out = [], []
    for path in sorted(folder.glob("*.txt")):
        paragraphs = [p.strip() for p in path.read_text(encoding="utf-8").split("\n\n") if p.strip()]
        cut = len(paragraphs) * 49 // 50
        train.append(paragraphs[:cut])
        held_out.append(paragraphs[cut:])
    return train, held_out


def train_tokenizer(books: list[list[str]], vocab_size: int):
    """Byte-level BPE in transformers' form."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((p for book in books for p in book), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END, eos_token=END, pad_token=PAD, chat_template=CHAT,
        model_max_length=512, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def encode(tokenizer, books: list[list[str]], seed: int) -> np.ndarray:
    """All books as one stream of tokens, an end-of-text after every one to eight paragraphs.

    So the model knows how texts of all lengths end, and a fine-tuned one can learn to stop.
    """
    rng = np.random.default_rng(seed)
    texts = []
    for book in books:
        at = 0
        while at < len(book):
            size = int(rng.integers(1, 9))
            texts.append("\n\n".join(book[at : at + size]))
            at += size
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return np.concatenate([np.array([*x, tokenizer.eos_token_id], np.int32) for x in ids])


def token_loss(backbone: Backbone, tokens_bt: jax.Array) -> jax.Array:
    """Mean negative log-likelihood of each token after the first."""
    everything = jnp.ones(tokens_bt[:, :-1].shape, bool)
    hidden, _, _ = backbone.forward(tokens_bt[:, :-1], everything, everything, Rows())
    logits = backbone.logits(hidden)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens_bt[:, 1:]).mean()


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=(2, 3))
def train_step(tx: optax.GradientTransformation, dtype: str, backbone: Backbone, opt_state, tokens_bt: jax.Array):
    """Weights and moments stay in float32; the forward and backward pass run in `dtype`."""

    def loss_of(backbone: Backbone) -> jax.Array:
        return token_loss(jax.tree.map(lambda x: x.astype(dtype), backbone), tokens_bt)

    loss, grads = jax.value_and_grad(loss_of)(backbone)
    updates, opt_state = tx.update(grads, opt_state, backbone)
    return optax.apply_updates(backbone, updates), opt_state, loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--books", type=Path, required=True, help="folder of .txt files")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=4500)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--dtype", default="bfloat16", help="of computation; weights are trained in float32")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--init", type=Path, help="go on from the weights and tokenizer of an earlier run's folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --out")
    args = parser.parse_args()
    if args.out.exists() and not args.overwrite:
        parser.error(f"{args.out} exists; choose another --out or pass --overwrite")

    books, held_out = read_books(args.books)
    tokenizer = load_tokenizer(args.init) if args.init else train_tokenizer(books, args.vocab)
    stream, unseen = encode(tokenizer, books, args.seed), encode(tokenizer, held_out, args.seed)
    held_out_bytes = sum(len("\n\n".join(b).encode()) for b in held_out)
    print(f"{stream.size / 1e6:.2f}M tokens to train on, {unseen.size / 1e3:.0f}k held out", flush=True)

    config = BackboneConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 11 // 4,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=max(1, args.hidden // 128),
        head_dim=64,
        tie_word_embeddings=True,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_ids=(tokenizer.eos_token_id,),
    )
    if args.init:
        backbone = Backbone.from_pretrained(args.init, dtype="float32")
    else:
        backbone = Backbone(config, jax.random.key(args.seed), dtype="float32")
    schedule = optax.warmup_cosine_decay_schedule(0.0, args.lr, args.steps // 50, args.steps, args.lr / 50)
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=0.1, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
    )
    opt_state = tx.init(backbone)
    print(f"{config.size / 1e6:.2f}M parameters", flush=True)

    start, losses, history = time.monotonic(), [], []
    for step in range(args.steps):
        offsets = np.random.default_rng((args.seed, step)).integers(0, stream.size - args.length - 1, args.batch)
        tokens = np.stack([stream[o : o + args.length + 1] for o in offsets])
        backbone, opt_state, loss = train_step(tx, args.dtype, backbone, opt_state, tokens)
        losses.append(float(loss))
        if (step + 1) % 50 == 0:
            rate = (step + 1) / (time.monotonic() - start)
            history.append({"step": step + 1, "loss": float(np.mean(losses[-50:]))})
            print(
                f"step {step + 1}/{args.steps}  loss {history[-1]['loss']:.3f}  "
                f"{rate * args.batch * args.length:,.0f} tokens/s  {(args.steps - step - 1) / rate / 60:.0f} min left",
                flush=True,
            )
        if (step + 1) % 500 == 0 or step + 1 == args.steps:
            save_backbone(backbone, args.out, dtype="bfloat16", overwrite=True)
            tokenizer.save_pretrained(args.out)

    # What ships is the bfloat16 file, so that is what is measured.
    shipped = Backbone.from_pretrained(args.out, dtype="float32")
    evaluate = jax.jit(token_loss)
    windows = [unseen[i : i + args.length + 1] for i in range(0, unseen.size - args.length - 1, args.length)]
    loss = float(np.mean([float(evaluate(shipped, w[None])) for w in windows]))
    bits_per_byte = loss * unseen.size / held_out_bytes / math.log(2)
    report = {
        "parameters": config.size,
        "training_tokens": args.steps * args.batch * args.length,
        "distinct_tokens": int(stream.size),
        "minutes": round((time.monotonic() - start) / 60, 1),
        "held_out_loss": round(loss, 4),
        "held_out_perplexity": round(math.exp(loss), 2),
        "held_out_bits_per_byte": round(bits_per_byte, 4),
        "arguments": {k: v for k, v in vars(args).items() if k not in ("books", "out", "init", "overwrite")},
        "history": history,
    }
    write_json(args.out / "pretraining.json", report)
    print(json.dumps({k: v for k, v in report.items() if k != "history"}, indent=1))


if __name__ == "__main__":
    main()
