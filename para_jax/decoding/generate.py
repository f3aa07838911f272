"""`generate` and `complete`: continue prompts, with a tenant and sampling settings for each row."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.stages import Traced

from para_jax.adapters.bank import AdapterBank, batch_rows
from para_jax.adapters.rows import Tenant
from para_jax.backbones.decoder import Backbone
from para_jax.backbones.loading import Loading
from para_jax.checks import COUNT, Number
from para_jax.compiling import Compiling
from para_jax.convert.tokenizer import end_tokens
from para_jax.decoding import beams, loop, requests
from para_jax.decoding.batches import Batch, Kind, Request, Windows, group_kinds, make_batches
from para_jax.distributed import gather
from para_jax.errors import ParaJaxError, unknown
from para_jax.sharding import row_shards

PerRow = Sequence[float] | float  # one value for all rows, or one for each row


@dataclass(frozen=True)
class Completion:
    """The continuation of one prompt.

    Attributes:
      text: the decoded tokens without special tokens, up to the stop string if there is one.
      tokens: all generated ids, including those of a stop string, without the eos token.
      finish_reason: "stop" at an eos token or a stop string, "length" at max_new_tokens, "error" if the text ends
        because the next logits are NaN or infinite.
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
    """Continues every prompt. The text of a row does not depend on the other rows of its batch.

    `max_new_tokens`, `temperature`, `top_k`, `top_p`, `min_p`, `repetition_penalty` and `seed` are one value for all
    rows or one for each row. All settings have the same meaning as in transformers.

    Args:
      backbone: the model. With a backbone that is still being read (`Loading`), compilation overlaps with reading.
      tokenizer: a transformers tokenizer, or a list with one for each row (`adapter_tokenizer`). Stop strings need a
        fast one.
      prompts: strings, or token ids, which are used unchanged.
      bank, tenants: the adapters, and for each row its tenant's name, None for no adapter, or names with adapter
        weights: {"acme": 0.5} takes half of acme's adapter, and several adapters are added.
      max_new_tokens: the maximum number of tokens to generate.
      temperature: zero takes the likeliest token; above zero, tokens are sampled.
      top_k, top_p, min_p: restrict the tokens to sample from; 0, 1 and 0 disable them.
      repetition_penalty: above one makes tokens of the prompt and of the generated text less likely.
      num_beams: above one, beam search with this many beams, which cannot be combined with sampling.
      length_penalty, early_stopping: how beam search ranks texts, and when it stops.
      stop: strings that end a text and are removed from it. They are found however they are split into tokens.
      eos_token_id: the tokens that end a text, () for none, or a list of tuples, one for each row; by default the
        backbone's (`end_tokens`).
      seed: the seed of sampling, between 0 and 2**32 - 1. Samples depend only on the seed and the row's prompt, so
        equal prompts with equal seeds give equal texts.
      batch_size: the maximum number of rows in a batch, by default all. Rows are sorted into batches by their number of
        new tokens and by length, and are returned in order. On a mesh it is rounded up to a multiple of data x fsdp.
      progress: is called after each batch with the numbers of rows done (skipped rows included) and in total.
      window: batch only rows of the same window of this many consecutive rows, instead of all rows.
      skip: skip this many rows, a multiple of `window`. The batches of the other rows, and so their texts, do not
        change.
      on_window: is called with the completions of each window, in order, as soon as they are done.

    Returns the completions of the rows that are not skipped. Raises ParaJaxError for a prompt that is empty or not
    valid UTF-8, a prompt and new tokens that exceed the context, a setting out of range or without a value for every
    row, an unknown tenant, and beam search with sampling. A `logging` warning names, for each tenant, the first prompt
    whose logits are NaN or infinite.

    >>> from para_jax import Backbone, complete, tiny_backbone_path
    >>> from transformers import AutoTokenizer
    >>> backbone = Backbone.from_pretrained(tiny_backbone_path())
    >>> tokenizer = AutoTokenizer.from_pretrained(tiny_backbone_path())
    >>> completions = complete(backbone, tokenizer, ["Call me"], max_new_tokens=16, eos_token_id=())
    >>> completions[0].finish_reason, len(completions[0].tokens)
    ('length', 16)
    """
    loading = Loading.of(backbone)
    config, mesh = loading.shapes.config, loading.shapes.mesh
    ids = requests.encode(tokenizer, prompts, config.vocab_size)
    if not ids:
        return []
    n = len(ids)
    limit_b = requests.limits(max_new_tokens, ids, config)
    tenants = requests.tenant_rows(bank, tenants, n)
    sampling = requests.Sampling(
        ids, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty,
        seed=seed,
    )  # fmt: skip
    tokenizers = requests.per_row(tokenizer, n)
    if eos_token_id is None:
        eos_token_id = [end_tokens(config, each) for each in tokenizers]
    pairs = zip(tokenizers, requests.eos_per_row(eos_token_id, n, config.vocab_size), strict=True)
    kinds = group_kinds([Kind(each, eos) for each, eos in pairs], stop, config.vocab_size)
    scoring = _scoring(num_beams, length_penalty, early_stopping, sampled=sampling.drawn)
    shards, windows = row_shards(mesh), Windows.of(n, window, skip)
    size = -(-min(n if batch_size is None else COUNT.check("batch_size", batch_size), n) // shards) * shards
    batches = make_batches(Request(ids, limit_b, tenants, *kinds), size, windows, config.max_position_embeddings)

    completions: dict[int, Completion] = {}
    with Compiling() as ahead:
        decode = _Decoder(ahead, bank, sampling, scoring, num_beams)
        if isinstance(backbone, Loading) and scoring is None and mesh is None:
            decode.compile(loading.shapes, batches)
        weights = loading.backbone()
        for batch in batches:
            generated = decode(weights, batch)
            _warn_of_broken(batch, np.asarray(generated.finite_b), tenants, weights.dtype, decode.broken)
            completions |= _completions(batch, generated)
            done = windows.skip + len(completions)
            if on_window is not None and (rows := windows.just_done(done)) is not None:
                on_window([completions[i] for i in rows])
            if progress is not None:
                progress(done, n)
    return [completions[i] for i in range(windows.skip, n)]


@dataclass
class _Decoder:
    """Runs batches: prefill, then the token loop or a beam search.

    Attributes:
      broken: tenants with a warning about NaN or infinite logits.
    """

    ahead: Compiling
    bank: AdapterBank | None
    sampling: requests.Sampling
    scoring: beams.Scoring | None
    num_beams: int
    broken: set[str] = field(default_factory=set)

    def compile(self, shapes: Backbone, batches: Sequence[Batch]) -> None:
        """Starts to compile the batches' programs in parallel, while the backbone is being read."""
        for batch in batches:
            rows = jax.eval_shape(lambda batch=batch: batch_rows(self.bank, batch.tenants, len(batch.full)))
            key = _program_key(batch, rows)
            args = self.sampling.sampler(batch.full), batch.ending(), batch.prompts, batch.room

            def trace_run(batch: Batch = batch, rows: Any = rows, args: Any = args) -> Traced:
                prefill = partial(loop.prefill, length=batch.length)
                logits, state = jax.eval_shape(prefill, shapes, batch.prompts, rows)
                return loop.run.trace(shapes, logits, state, *args)

            self.ahead.start((key, "prefill"), partial(loop.prefill.trace, shapes, batch.prompts, rows, batch.length))
            self.ahead.start((key, "run"), trace_run)

    def __call__(self, backbone: Backbone, batch: Batch) -> loop.Generated:
        adapters = batch_rows(self.bank, batch.tenants, len(batch.full), backbone.mesh)
        key, prompts = _program_key(batch, adapters), jax.device_put(batch.prompts)
        sampler, ending = self.sampling.sampler(batch.full), batch.ending()
        self.ahead.wait((key, "prefill"))
        logits, state = loop.prefill(backbone, prompts, adapters, batch.length)
        if self.scoring is None:
            self.ahead.wait((key, "run"))
            generated, _ = loop.run(backbone, logits, state, sampler, ending, prompts, batch.room)
        else:
            keep = max(2, 1 + len(batch.kind.eos)) * self.num_beams
            args = sampler, ending, self.scoring, prompts, batch.room, self.num_beams, keep
            generated = beams.search(backbone, logits, state, *args)
        return gather(generated, backbone.mesh)


def _program_key(batch: Batch, adapters: Any) -> Hashable:
    """A key that is equal for batches of a call that share their programs."""
    return jax.tree.structure(adapters), batch.prompts.tokens_bt.shape, batch.room


def _warn_of_broken(
    batch: Batch, finite_b: np.ndarray, tenants: Sequence[Tenant], dtype: jnp.dtype, warned: set[str]
) -> None:
    """Warns once per tenant about the first row with NaN or infinite logits, and adds the tenant to `warned`."""
    for row in sorted(batch.rows[~finite_b[: len(batch.rows)]]):
        whose = "without an adapter" if tenants[row] is None else f"of {tenants[row]}"
        if whose in warned:
            continue
        warned.add(whose)
        if dtype == jnp.float16:
            why = "float16 ends at 65504, which this model may exceed: choose dtype float32 or bfloat16"
        elif tenants[row] is not None:
            why = "run the prompt without an adapter; if its logits are finite, the adapter's weights are too large"
        else:
            why = "the backbone's weights may be damaged: para-jax convert --check finds NaN and infinite weights"
        line = "the logits of prompt %d (%s) are NaN or infinite, and its text ends there; %s"
        logging.getLogger(__name__).warning(line, row + 1, whose, why)


def _completions(batch: Batch, generated: loop.Generated) -> dict[int, Completion]:
    found, kind = {}, batch.kind
    for i, all_tokens, count, stopped, finite in zip(batch.rows, *generated, strict=False):
        tokens = all_tokens[:count].tolist()
        tokens = tokens[:-1] if stopped and tokens and tokens[-1] in kind.eos else tokens
        text = kind.tokenizer.decode(tokens, skip_special_tokens=True)
        text = text if kind.stops is None else kind.stops.cut(text, tokens)
        found[int(i)] = Completion(text, tokens, "error" if not finite else "stop" if stopped else "length")
    return found


def _scoring(num_beams: int, length_penalty: float, early_stopping: Any, sampled: bool) -> beams.Scoring | None:
    """The `Scoring` of beam search; None for one beam."""
    num_beams, penalty = COUNT.check("num_beams", num_beams), Number().check("length_penalty", length_penalty)
    if not (isinstance(early_stopping, bool) or (isinstance(early_stopping, str) and early_stopping == "never")):
        raise unknown("early_stopping", early_stopping, ("True", "False", "never"))
    if num_beams == 1:
        return None
    if sampled:
        raise ParaJaxError(
            f"num_beams={num_beams} is a beam search, and a temperature above 0 samples; set num_beams=1 to sample, or "
            "temperature=0 to search"
        )
    return beams.Scoring(
        length_penalty=jax.device_put(np.float32(penalty)),
        when_full=jax.device_put(np.bool_(early_stopping is True)),
        never=jax.device_put(np.bool_(early_stopping == "never")),
    )
