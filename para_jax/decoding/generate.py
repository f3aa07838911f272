"""Prompts in, texts out: any prompts, a tenant or none for every row, and every row its own settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np

from para_jax.adapters.bank import AdapterBank, batch_rows
from para_jax.adapters.rows import Tenant
from para_jax.backbones.decoder import Backbone
from para_jax.decoding import beams, loop, requests
from para_jax.decoding.stops import StopStrings, stop_strings
from para_jax.distributed import whole
from para_jax.errors import ParaJaxError, unknown
from para_jax.sharding import row_shards

PerRow = Sequence[float] | float  # One value for all rows, or one for every row.
# Lists of eos tokens are filled up to a multiple of this, so that most of them fit the same program.
EOS_SLOTS = 4


@dataclass(frozen=True)
class Completion:
    """What one prompt was continued with.

    Attributes:
      text: the tokens as text, special tokens left out, up to the stop string if there is one.
      tokens: all ids that were generated, those of a stop string included, without the eos token.
      finish_reason: "stop" at an eos token or a stop string, "length" at max_new_tokens.
    """

    text: str
    tokens: list[int]
    finish_reason: Literal["stop", "length"]


def generate(backbone: Backbone, tokenizer: Any, prompts: Sequence[str | Sequence[int]], **options: Any) -> list[str]:
    """The texts of `complete`, which lists the options.

    >>> from para_jax import Backbone, generate, tiny_backbone_path
    >>> from transformers import AutoTokenizer
    >>> backbone = Backbone.from_pretrained(tiny_backbone_path())
    >>> tokenizer = AutoTokenizer.from_pretrained(tiny_backbone_path())
    >>> texts = generate(backbone, tokenizer, ["It was the best of times", "Call me"], max_new_tokens=16)
    >>> len(texts)
    2
    """
    return [completion.text for completion in complete(backbone, tokenizer, prompts, **options)]


def complete(
    backbone: Backbone,
    tokenizer: Any,
    prompts: Sequence[str | Sequence[int]],
    *,
    bank: AdapterBank | None = None,
    tenants: Sequence[Tenant] | None = None,
    max_new_tokens: Sequence[int] | int = 64,
    temperature: PerRow = 0.0,
    top_k: Sequence[int] | int = 0,
    top_p: PerRow = 1.0,
    min_p: PerRow = 0.0,
    repetition_penalty: PerRow = 1.0,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    early_stopping: beams.EarlyStopping = False,
    stop: str | Sequence[str] = (),
    eos_token_id: int | Sequence[int] | None = None,
    seed: Sequence[int] | int = 0,
    batch_size: int | None = None,
) -> list[Completion]:
    """Continues every prompt. Rows that share nothing but a batch do not change each other's texts.

    `max_new_tokens`, `temperature`, `top_k`, `top_p`, `min_p`, `repetition_penalty` and `seed` are one value
    for all rows or one for every row. The settings mean what they mean in transformers.

    Args:
      backbone: the model; programs take it as it is and do not copy it.
      tokenizer: of transformers; stop strings need a fast one.
      prompts: strings, or token ids, which are taken as they are.
      bank, tenants: the adapters, and for every row its tenant's name, None for no adapter, or names with strengths:
        {"acme": 0.5} is half of what acme's adapter changes, and the changes of several are added.
      max_new_tokens: the most tokens to generate.
      temperature: zero takes the likeliest token, anything above draws.
      top_k, top_p, min_p: which tokens a draw may choose among; 0, 1 and 0 are all of them.
      repetition_penalty: above one makes the tokens of the prompt and of the text so far less likely.
      num_beams: above one searches for a likely text with this many beams; then nothing may be drawn.
      length_penalty, early_stopping: how beam search ranks texts, and when it stops to look for better ones.
      stop: strings that end a text, and are no part of it, however they are cut into tokens.
      eos_token_id: the tokens that end a text, () for none; by default the backbone's.
      seed: of the draws, between 0 and 2**32 - 1. They depend on it and the row's own prompt only, so that
        one prompt twice with one seed gives one text twice.
      batch_size: the most rows run at once, by default all of them. Rows are sorted by length into batches,
        and come back in order. On a mesh it is rounded up to what its data and fsdp axes divide.

    Raises ParaJaxError for an empty prompt, a prompt and new tokens that exceed the context, a setting out of
    its range or without a value for every row, an unknown tenant, and beams that are to draw.

    >>> from para_jax import Backbone, complete, tiny_backbone_path
    >>> from transformers import AutoTokenizer
    >>> backbone = Backbone.from_pretrained(tiny_backbone_path())
    >>> tokenizer = AutoTokenizer.from_pretrained(tiny_backbone_path())
    >>> completions = complete(backbone, tokenizer, ["Call me"], max_new_tokens=16, eos_token_id=())
    >>> completions[0].finish_reason, len(completions[0].tokens)
    ('length', 16)
    """
    config = backbone.config
    ids = requests.encode(tokenizer, prompts, config.vocab_size)
    if not ids:
        return []
    n = len(ids)
    limit_b = requests.limits(max_new_tokens, ids, config)
    tenants = requests.tenant_rows(bank, tenants, n)
    sampling = requests.Sampling(
        ids,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    eos = _eos(config.eos_token_ids if eos_token_id is None else eos_token_id, config.vocab_size)
    stops = stop_strings(tokenizer, stop, config.vocab_size)
    scoring = _scoring(num_beams, length_penalty, early_stopping, draws=sampling.drawn)
    if batch_size is not None and batch_size < 1:
        raise ParaJaxError(f"batch_size is {batch_size}; it must be at least 1")

    completions: dict[int, Completion] = {}
    shards = row_shards(backbone.mesh)
    size = -(-min(batch_size or n, n) // shards) * shards
    order = np.argsort([len(x) for x in ids], kind="stable")
    for start in range(0, n, size):
        rows = order[start : start + size]
        # The last batch is filled up with rows that are done at once, so that it runs the others' program.
        full = np.pad(rows, (0, size - len(rows)), mode="edge")
        limit = np.where(np.arange(size) < len(rows), limit_b[full], np.int32(0))
        room = loop.bucket(int(limit.max()), config.max_position_embeddings)
        prompt = _flush_right([ids[i] for i in full], config.max_position_embeddings)
        adapters = batch_rows(bank, [tenants[i] for i in full], size, backbone.mesh)
        logits, state = loop.prefill(backbone, prompt, adapters, prompt.tokens_bt.shape[1] + room)

        table = None if stops is None else stops.table_sv
        ending = loop.Ending(jax.device_put(limit), _filled(eos), table)
        if scoring is None:
            generated, _ = loop.run(backbone, logits, state, sampling.sampler(full), ending, prompt, room)
        else:
            keep = max(2, 1 + len(eos)) * num_beams
            generated = beams.search(
                backbone,
                logits,
                state,
                sampling.sampler(full),
                ending,
                scoring,
                prompt,
                room,
                num_beams,
                keep,
            )
        tokens_bt, count_b, stopped_b = whole(generated, backbone.mesh)
        for i, tokens, count, stopped in zip(rows, tokens_bt, count_b, stopped_b, strict=False):
            completions[int(i)] = _completion(tokenizer, stops, eos, tokens[:count].tolist(), bool(stopped))
    return [completions[i] for i in range(n)]


def _completion(
    tokenizer: Any, stops: StopStrings | None, eos: tuple[int, ...], ids: list[int], stopped: bool
) -> Completion:
    tokens = ids[:-1] if stopped and ids[-1] in eos else ids
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    if stops is not None:
        text = stops.cut(text, tokens)
    return Completion(text, tokens, "stop" if stopped else "length")


def _flush_right(ids: list[np.ndarray], most: int) -> loop.Prompts:
    """A batch of prompts, padded in front to a bucket's length."""
    length = loop.bucket(max(len(x) for x in ids), most)
    tokens_bt = np.stack([np.pad(x, (length - len(x), 0)) for x in ids])
    lengths = np.array([len(x) for x in ids])
    mask_bt = np.arange(length) >= length - lengths[:, None]
    return loop.Prompts(jax.device_put(tokens_bt), jax.device_put(mask_bt))


def _eos(eos_token_id: int | Sequence[int], vocab_size: int) -> tuple[int, ...]:
    eos = tuple(int(token) for token in np.ravel(eos_token_id))
    for token in eos:
        if not 0 <= token < vocab_size:
            raise ParaJaxError(f"eos_token_id {token} is no token of the backbone's vocabulary of {vocab_size}")
    return eos


def _filled(eos: tuple[int, ...]) -> jax.Array:
    slots = EOS_SLOTS * max(1, -(-len(eos) // EOS_SLOTS))
    return jax.device_put(np.array([*eos, *[-1] * (slots - len(eos))], np.int32))


def _scoring(num_beams: int, length_penalty: float, early_stopping: Any, draws: bool) -> beams.Scoring | None:
    """How a beam search ranks; None if there is one beam, which is no search."""
    if num_beams < 1:
        raise ParaJaxError(f"num_beams is {num_beams}; it must be at least 1")
    if not (isinstance(early_stopping, bool) or early_stopping == "never"):
        raise unknown("early_stopping", str(early_stopping), ("True", "False", "never"))
    if num_beams == 1:
        return None
    if draws:
        raise ParaJaxError(
            f"num_beams={num_beams} searches for the likeliest text and a temperature above 0 draws one; "
            "set num_beams=1 to draw, or temperature=0 to search"
        )
    return beams.Scoring(
        length_penalty=jax.device_put(np.float32(length_penalty)),
        when_full=jax.device_put(np.bool_(early_stopping is True)),
        never=jax.device_put(np.bool_(early_stopping == "never")),
    )
