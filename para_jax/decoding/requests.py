"""Validates the arguments of a call: prompts as token ids, and one value per row for every setting."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from para_jax.adapters.bank import AdapterBank
from para_jax.adapters.rows import Tenant, adapter_weights
from para_jax.checks import Whole, check_text
from para_jax.config import BackboneConfig
from para_jax.decoding.sampling import Draws, Filters, Sampler
from para_jax.errors import ParaJaxError, check_known


def per_row(tokenizer: Any, rows: int) -> list[Any]:
    """The tokenizer of each row, from one for all rows or a list. Raises ParaJaxError for a list of another length."""
    if not isinstance(tokenizer, list | tuple):
        return [tokenizer] * rows
    if len(tokenizer) != rows:
        raise ParaJaxError(f"{len(tokenizer)} tokenizers for {rows} rows; give one for each, or one for all")
    return list(tokenizer)


def eos_per_row(eos: Any, rows: int, vocab_size: int) -> list[tuple[int, ...]]:
    """The eos tokens of each row, from tokens for all rows or a tuple for each.

    Raises ParaJaxError for an invalid token id.
    """
    separate = isinstance(eos, list | tuple) and any(isinstance(ids, list | tuple) for ids in eos)
    if separate and len(eos) != rows:
        raise ParaJaxError(f"eos_token_id has tuples for {len(eos)} of {rows} rows; give one for each, or ids for all")
    # As objects: NumPy would convert True to 1 among numbers.
    each = [tuple(np.ravel(np.asarray(ids, object)).tolist()) for ids in (eos if separate else [eos])]
    token = Whole(0, vocab_size - 1)
    each = [tuple(token.check("eos_token_id", x) for x in ids) for ids in each]
    return each if separate else each * rows


def encode(tokenizers: Any, prompts: Sequence[str | Sequence[int]], vocab_size: int) -> list[np.ndarray]:
    """The token ids of every prompt, int32. `tokenizers` is one for all rows or a list.

    Raises ParaJaxError for a prompt that is empty or not valid UTF-8, and for an id outside the vocabulary.
    """
    if isinstance(prompts, str):
        raise ParaJaxError("prompts is one string; give a list of prompts, [prompt] for a single one")
    if not isinstance(prompts, Iterable):
        raise ParaJaxError(f"prompts is {prompts!r}; give a list of strings or of lists of token ids")
    prompts, encoded = list(prompts), []
    for row, (tokenizer, prompt) in enumerate(zip(per_row(tokenizers, len(prompts)), prompts, strict=True)):
        if isinstance(prompt, str):
            check_text(f"the prompt of row {row}", prompt)
            tokens = tokenizer(prompt)["input_ids"]
        else:
            tokens = prompt if isinstance(prompt, Sized) else ()
        if len(tokens) == 0 and isinstance(prompt, Sized):
            raise ParaJaxError(f"the prompt of row {row} is empty; give it some text or leave the row out")
        try:
            ids = np.asarray(tokens)
        except ValueError:  # lists of several lengths
            ids = np.zeros(())
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise ParaJaxError(f"the prompt of row {row} is neither a string nor a list of token ids")
        if ids.min() < 0 or ids.max() >= vocab_size:
            wrong = ids[(ids < 0) | (ids >= vocab_size)][0]
            added = getattr(tokenizer, "added_tokens_decoder", {}).get(int(wrong))
            out = "is the tokenizer another model's?" if added is None else f"remove {added} from the prompt"
            raise ParaJaxError(
                f"the prompt of row {row} has token {wrong}, and the backbone's vocabulary has {vocab_size}; {out}"
            )
        encoded.append(ids.astype(np.int32))
    return encoded


@dataclass(frozen=True)
class Setting:
    """A setting of rows: its dtype and its range, as a function and in words."""

    name: str
    dtype: type[np.generic]
    valid: Callable[[np.ndarray], np.ndarray]
    rule: str

    def per_row(self, value: Any, rows: int) -> np.ndarray:
        """One value for all rows or one for each, as an array of `rows` values. Raises ParaJaxError if invalid.

        >>> TOP_K.per_row(5, rows=2).tolist()
        [5, 5]
        """
        is_integer = np.issubdtype(self.dtype, np.integer)
        try:
            values = np.asarray(value)
        except ValueError:  # nested lists
            values = np.zeros((0, 0))
        if values.ndim > 1 or values.dtype.kind not in ("iu" if is_integer else "iuf"):
            kind = "whole number" if is_integer else "number"
            raise ParaJaxError(f"{self.name} is {value!r}; give a {kind} for all rows, or one for every row")
        if values.ndim == 1 and len(values) != rows:
            raise ParaJaxError(
                f"{self.name} has {len(values)} values for {rows} rows; give one for each, or one for all"
            )
        values = np.broadcast_to(values, (rows,))
        with np.errstate(over="ignore"):  # values that overflow float32 become infinite
            converted = values.astype(self.dtype)
        invalid = np.flatnonzero(~(self.valid(values) & self.valid(converted)))
        if len(invalid):
            row = invalid[0]
            raise ParaJaxError(f"{self.name} of row {row} is {values[row]}; it must be {self.rule}")
        return converted


LIMIT = Setting("max_new_tokens", np.int32, lambda x: (x >= 1) & (x < 2**31), "between 1 and 2**31 - 1")
TOP_K = Setting("top_k", np.int32, lambda x: (x >= 0) & (x < 2**31), "between 0 and 2**31 - 1 (0 is off)")
SAMPLING = (
    Setting("temperature", np.float32, lambda x: np.isfinite(x) & (x >= 0), "finite and at least 0"),
    Setting("seed", np.uint32, lambda x: (x >= 0) & (x < 2**32), "between 0 and 2**32 - 1"),
    TOP_K,
    Setting("top_p", np.float32, lambda x: (x >= 0) & (x <= 1), "between 0 and 1 (1 is off)"),
    Setting("min_p", np.float32, lambda x: (x >= 0) & (x <= 1), "between 0 and 1 (0 is off)"),
    Setting("repetition_penalty", np.float32, lambda x: np.isfinite(x) & (x > 0), "finite and above 0 (1 is off)"),
)


class Sampling:
    """The sampling settings of all rows, as arrays with one value per row.

    A feature that no row of the call uses is off in all batches, so that all batches share their programs.
    """

    def __init__(self, prompts: Sequence[np.ndarray], **settings: Any):
        """With a value for each setting in `SAMPLING`."""
        by_row = {setting.name: setting.per_row(settings[setting.name], len(prompts)) for setting in SAMPLING}
        # With one seed for all rows, different prompts still sample differently: the prompt is hashed into the seed.
        seeds = zip(prompts, by_row["seed"], strict=True)
        by_row["seed"] = np.array([zlib.crc32(ids.tobytes(), int(x)) for ids, x in seeds], np.uint32)
        self.by_row = by_row
        self.penalised = bool((by_row["repetition_penalty"] != 1).any())
        self.drawn = bool((by_row["temperature"] > 0).any())
        self.filtered = bool(((by_row["top_k"] > 0) | (by_row["top_p"] < 1) | (by_row["min_p"] > 0)).any())

    def sampler(self, rows: np.ndarray) -> Sampler:
        def put(name: str) -> jax.Array:
            return jax.device_put(self.by_row[name][rows])

        filters = Filters(put("top_k"), put("top_p"), put("min_p")) if self.filtered else None
        draws = Draws(put("temperature"), put("seed"), filters) if self.drawn else None
        return Sampler(put("repetition_penalty") if self.penalised else None, draws)


def limits(max_new_tokens: Any, prompts: Sequence[np.ndarray], config: BackboneConfig) -> np.ndarray:
    """The maximum number of new tokens of each row. Raises ParaJaxError if prompt and new tokens exceed the context."""
    limit_b = LIMIT.per_row(max_new_tokens, len(prompts))
    context = config.max_position_embeddings
    over = [row for row, ids in enumerate(prompts) if len(ids) + int(limit_b[row]) > context]
    if over:
        row, length, new = over[0], len(prompts[over[0]]), int(limit_b[over[0]])
        others = f" ({len(over) - 1} more rows exceed it)" if len(over) > 1 else ""
        fewer = f", or set max_new_tokens to {context - length}" if length < context else ""
        raise ParaJaxError(
            f"row {row} has {length} prompt tokens and up to {new} new ones, {length + new} in total, and the "
            f"backbone's context is {context}{others}; shorten the prompt by {length + new - context} tokens" + fewer
        )
    return limit_b


def tenant_rows(bank: AdapterBank | None, tenants: Sequence[Tenant] | None, rows: int) -> Sequence[Tenant]:
    """The tenant, None, or names with adapter weights of each row. Raises ParaJaxError for an unknown tenant."""
    if tenants is None:
        if bank is not None:
            raise ParaJaxError("a bank was given but no tenants; give a tenant's name or None for every row")
        return [None] * rows
    if isinstance(tenants, str | Mapping):
        kind = "string" if isinstance(tenants, str) else "dict"
        raise ParaJaxError(f"tenants is one {kind}, {tenants!r}; give a list of a name or None for every row")
    if len(tenants) != rows:
        raise ParaJaxError(f"{rows} rows but {len(tenants)} tenants; give one (or None) for every row")
    names = dict.fromkeys(name for tenant in tenants for name in adapter_weights(tenant))
    if names and bank is None:
        raise ParaJaxError("tenants were given but no bank; pass bank=AdapterBank.load({name: folder, ...}, config)")
    check_known("tenant", names, () if bank is None else bank.names)
    return tenants
