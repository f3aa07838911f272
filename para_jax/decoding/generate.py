"""Prompts in, texts out: any prompts, a tenant or none for every row, and every row its own settings."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.stages import Traced

from para_jax.adapters.bank import AdapterBank, batch_rows
from para_jax.adapters.rows import Tenant
from para_jax.backbones.decoder import Backbone
from para_jax.backbones.loading import Loading
from para_jax.checks import COUNT, Number, Whole
from para_jax.compiling import Compiling
from para_jax.config import BackboneConfig
from para_jax.convert.tokenizer import end_tokens
from para_jax.decoding import beams, loop, requests
from para_jax.decoding.sampling import Sampler
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
      finish_reason: "stop" at an eos token or a stop string, "length" at max_new_tokens, "error" where the logits are
        NaN or infinite: there the text ends.
    """

    text: str
    tokens: list[int]
    finish_reason: Literal["stop", "length", "error"]


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
    backbone: Backbone | Loading,
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
    eos_token_id: int | Sequence[int] | Sequence[tuple[int, ...]] | None = None,
    seed: Sequence[int] | int = 0,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    window: int | None = None,
    skip: int = 0,
    on_window: Callable[[list[Completion]], None] | None = None,
) -> list[Completion]:
    """Continues every prompt. Rows that share nothing but a batch do not change each other's texts.

    `max_new_tokens`, `temperature`, `top_k`, `top_p`, `min_p`, `repetition_penalty` and `seed` are one value
    for all rows or one for every row. The settings mean what they mean in transformers.

    Args:
      backbone: the model; programs take it as it is and do not copy it. While it is still being read (`Loading`), they
        are compiled already.
      tokenizer: of transformers; stop strings need a fast one. A list has one for every row (`adapter_tokenizer`).
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
      eos_token_id: the tokens that end a text, () for none, or a list of tuples, one for every row; by default the
        backbone's (`end_tokens`).
      seed: of the draws, between 0 and 2**32 - 1. They depend on it and the row's own prompt only, so that
        one prompt twice with one seed gives one text twice.
      batch_size: the most rows run at once, by default all of them. Rows are sorted into batches by how many new tokens
        they may have and by length, and come back in order. On a mesh it is rounded up to what its data and fsdp axes
        divide.
      progress: called after each batch with how many rows are done, those that are skipped included, and how many
        there are.
      window: batches are made of so many rows that follow each other, instead of all rows.
      skip: so many rows are left out, a number of whole windows. The others' batches, and so their texts, are the same
        as without it.
      on_window: called with the completions of each window, in order, as soon as they are there.

    Returns the completions of the rows that are not skipped. Raises ParaJaxError for a prompt that is empty or no text
    in UTF-8, a prompt and new tokens that exceed the context, a setting out of its range or without a value for every
    row, an unknown tenant, and beams that are to draw. A warning of `logging` names, for each tenant, the first
    prompt whose logits are NaN or infinite.

    >>> from para_jax import Backbone, complete, tiny_backbone_path
    >>> from transformers import AutoTokenizer
    >>> backbone = Backbone.from_pretrained(tiny_backbone_path())
    >>> tokenizer = AutoTokenizer.from_pretrained(tiny_backbone_path())
    >>> completions = complete(backbone, tokenizer, ["Call me"], max_new_tokens=16, eos_token_id=())
    >>> completions[0].finish_reason, len(completions[0].tokens)
    ('length', 16)
    """
    shapes = backbone.shapes if isinstance(backbone, Loading) else backbone
    config = shapes.config
    ids = requests.encode(tokenizer, prompts, config.vocab_size)
    if not ids:
        return []
    n = len(ids)
    tokenizers = requests.per_row(tokenizer, n)
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
    if eos_token_id is None:
        eos_token_id = [end_tokens(config, own) for own in tokenizers]
    ends = zip(tokenizers, requests.eos_per_row(eos_token_id, n, config.vocab_size), strict=True)
    kind_b, kinds = _kinds([_Kind(own, eos) for own, eos in ends], stop, config.vocab_size)
    scoring = _scoring(num_beams, length_penalty, early_stopping, draws=sampling.drawn)
    shards = row_shards(shapes.mesh)
    size = -(-min(n if batch_size is None else COUNT.check("batch_size", batch_size), n) // shards) * shards
    window = n if window is None else COUNT.check("window", window)
    skip = Whole(0, n).check("skip", skip)
    if skip % window and skip < n:
        raise ParaJaxError(f"skip must be a number of whole windows, each of {window} rows, not {skip}")
    order = _order([len(x) for x in ids], limit_b, kind_b, window, size)
    batches = [
        _Batch.of(kinds[kind_b[rows[0]]], rows, size, ids, limit_b, tenants, config)
        for rows in order
        if rows.min() >= skip
    ]
    completions: dict[int, Completion] = {}
    broken: set[str] = set()
    with Compiling() as ahead:
        keys: list[Hashable] = [None] * len(batches)
        if isinstance(backbone, Loading) and scoring is None and shapes.mesh is None:
            keys = [_compile(ahead, shapes, bank, b, sampling.sampler(b.full), b.ending()) for b in batches]
        weights = backbone.backbone() if isinstance(backbone, Loading) else backbone
        for batch, key in zip(batches, keys, strict=True):
            adapters, sampler = batch_rows(bank, batch.tenants, size, weights.mesh), sampling.sampler(batch.full)
            ending = batch.ending()
            ahead.wait((key, "prefill"))
            logits, state = loop.prefill(weights, batch.prompts, adapters, batch.length)
            if scoring is None:
                ahead.wait((key, "run"))
                generated, _ = loop.run(weights, logits, state, sampler, ending, batch.prompts, batch.room)
            else:
                keep = max(2, 1 + len(batch.kind.eos)) * num_beams
                given = sampler, ending, scoring, batch.prompts, batch.room, num_beams, keep
                generated = beams.search(weights, logits, state, *given)
            tokens_bt, count_b, stopped_b, finite_b = whole(generated, weights.mesh)
            broken = _warn_of_broken(batch, finite_b, tenants, weights.dtype, broken)
            for i, tokens, count, *end in zip(batch.rows, tokens_bt, count_b, stopped_b, finite_b, strict=False):
                completions[int(i)] = _completion(batch.kind, tokens[:count].tolist(), *map(bool, end))
            done = skip + len(completions)
            if on_window is not None and (done % window == 0 or done == n):
                on_window([completions[i] for i in range((done - 1) // window * window, done)])
            if progress is not None:
                progress(done, n)
    return [completions[i] for i in range(skip, n)]


def _order(lengths: Sequence[int], limit_b: np.ndarray, kind_b: np.ndarray, window: int, size: int) -> list[np.ndarray]:
    """The rows of each batch: windows come one after the other. In each, rows of a kind stand together, sorted."""
    window_b = np.arange(len(lengths)) // window
    order = np.lexsort((np.array(lengths), limit_b, kind_b, window_b))
    borders = np.flatnonzero(np.diff(kind_b[order]) | np.diff(window_b[order])) + 1
    parts = np.split(order, borders)
    return [rows[start : start + size] for rows in parts for start in range(0, len(rows), size)]


class _Kind(NamedTuple):
    """What some rows have in common: their tokenizer, the tokens that end them, and their stop strings."""

    tokenizer: Any
    eos: tuple[int, ...]
    stops: StopStrings | None = None


def _kinds(of_rows: list[_Kind], stop: str | Sequence[str], vocab_size: int) -> tuple[np.ndarray, list[_Kind]]:
    """The number of each row's kind, and the kinds with their stop strings."""
    numbers: dict[tuple[int, tuple[int, ...]], int] = {}
    kinds: list[_Kind] = []
    kind_b = []
    for kind in of_rows:
        # Chat templates play no part: copies with other ones share the backend.
        backend = getattr(kind.tokenizer, "backend_tokenizer", kind.tokenizer)
        number = numbers.setdefault((id(backend), kind.eos), len(kinds))
        if number == len(kinds):
            kinds.append(kind._replace(stops=stop_strings(kind.tokenizer, stop, vocab_size)))
        kind_b.append(number)
    return np.array(kind_b, np.int32), kinds


class _Batch(NamedTuple):
    """Rows that run together: which they are, filled up to the size of a batch, and the sizes of their program."""

    kind: _Kind
    rows: np.ndarray
    full: np.ndarray
    limit: np.ndarray
    room: int
    prompts: loop.Prompts
    tenants: list[Tenant]

    @classmethod
    def of(
        cls,
        kind: _Kind,
        rows: np.ndarray,
        size: int,
        ids: Sequence[np.ndarray],
        limit_b: np.ndarray,
        tenants: Sequence[Tenant],
        config: BackboneConfig,
    ) -> _Batch:
        # The last batch is filled up with rows that are done at once, so that it runs the others' program.
        full = np.pad(rows, (0, size - len(rows)), mode="edge")
        limit = np.where(np.arange(size) < len(rows), limit_b[full], np.int32(0))
        room = loop.bucket(int(limit.max()), config.max_position_embeddings)
        prompts = _flush_right([ids[i] for i in full], config.max_position_embeddings)
        return cls(kind, rows, full, limit, room, prompts, [tenants[i] for i in full])

    @property
    def length(self) -> int:
        return self.prompts.tokens_bt.shape[1] + self.room

    def ending(self) -> loop.Ending:
        table = None if self.kind.stops is None else self.kind.stops.table_sv
        return loop.Ending(jax.device_put(self.limit), _filled(self.kind.eos), table)


def _compile(
    ahead: Compiling,
    shapes: Backbone,
    bank: AdapterBank | None,
    batch: _Batch,
    sampler: Sampler,
    ending: loop.Ending,
) -> Hashable:
    """Begins to compile the programs of a batch, side by side, while weights are read; returns what names them."""
    rows = jax.eval_shape(lambda: batch_rows(bank, batch.tenants, len(batch.full)))
    key = (jax.tree.structure(rows), batch.prompts.tokens_bt.shape, batch.room)

    def trace_run() -> Traced:
        logits, state = jax.eval_shape(partial(loop.prefill, length=batch.length), shapes, batch.prompts, rows)
        return loop.run.trace(shapes, logits, state, sampler, ending, batch.prompts, batch.room)

    ahead.begin((key, "prefill"), lambda: loop.prefill.trace(shapes, batch.prompts, rows, batch.length))
    ahead.begin((key, "run"), trace_run)
    return key


def _warn_of_broken(
    batch: _Batch, finite_b: np.ndarray, tenants: Sequence[Tenant], dtype: jnp.dtype, known: set[str]
) -> set[str]:
    """A line for the first row of each tenant, of those not `known`, whose logits are NaN or infinite; and all of them.

    Rows that only fill the batch do not count.
    """
    found = set(known)
    for row in sorted(batch.rows[~finite_b[: len(batch.rows)]]):
        whose = "without an adapter" if tenants[row] is None else f"of {tenants[row]}"
        if whose in found:
            continue
        found.add(whose)
        if dtype == jnp.float16:
            why = "float16 ends at 65504, which this model may exceed: choose dtype float32 or bfloat16"
        elif tenants[row] is not None:
            why = "see whether the prompt without an adapter has them too; if not, the adapter's weights are too large"
        else:
            why = "the backbone's weights may be damaged: para-jax convert --check looks for NaN and infinite ones"
        line = "the logits of prompt %d (%s) are NaN or infinite, and its text ends there; %s"
        logging.getLogger(__name__).warning(line, row + 1, whose, why)
    return found


def _completion(kind: _Kind, ids: list[int], stopped: bool, finite: bool) -> Completion:
    tokens = ids[:-1] if stopped and ids and ids[-1] in kind.eos else ids
    text = kind.tokenizer.decode(tokens, skip_special_tokens=True)
    if kind.stops is not None:
        text = kind.stops.cut(text, tokens)
    return Completion(text, tokens, "error" if not finite else "stop" if stopped else "length")


def _flush_right(ids: list[np.ndarray], most: int) -> loop.Prompts:
    """A batch of prompts, padded in front to a bucket's length."""
    length = loop.bucket(max(len(x) for x in ids), most)
    tokens_bt = np.stack([np.pad(x, (length - len(x), 0)) for x in ids])
    lengths = np.array([len(x) for x in ids])
    mask_bt = np.arange(length) >= length - lengths[:, None]
    return loop.Prompts(jax.device_put(tokens_bt), jax.device_put(mask_bt))


def _filled(eos: tuple[int, ...]) -> jax.Array:
    slots = EOS_SLOTS * max(1, -(-len(eos) // EOS_SLOTS))
    return jax.device_put(np.array([*eos, *[-1] * (slots - len(eos))], np.int32))


def _scoring(num_beams: int, length_penalty: float, early_stopping: Any, draws: bool) -> beams.Scoring | None:
    """How a beam search ranks; None if there is one beam, which is no search."""
    num_beams, penalty = COUNT.check("num_beams", num_beams), Number().check("length_penalty", length_penalty)
    if not (isinstance(early_stopping, bool) or (isinstance(early_stopping, str) and early_stopping == "never")):
        raise unknown("early_stopping", early_stopping, ("True", "False", "never"))
    if num_beams == 1:
        return None
    if draws:
        raise ParaJaxError(
            f"num_beams={num_beams} searches for the likeliest text and a temperature above 0 draws one; "
            "set num_beams=1 to draw, or temperature=0 to search"
        )
    return beams.Scoring(
        length_penalty=jax.device_put(np.float32(penalty)),
        when_full=jax.device_put(np.bool_(early_stopping is True)),
        never=jax.device_put(np.bool_(early_stopping == "never")),
    )
