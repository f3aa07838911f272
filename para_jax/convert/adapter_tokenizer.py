"""The tokenizer of an adapter's rows: the backbone's, or the one in the adapter's folder."""

from __future__ import annotations

import hashlib
import json
import logging
from functools import lru_cache
from pathlib import Path
from typing import Any

from para_jax.adapters.files import TOKENIZER, load_chat_template
from para_jax.config import BackboneConfig
from para_jax.convert.tokenizer import end_tokens, with_chat_template
from para_jax.errors import ParaJaxError

# The files that a tokenizer can be read from, and the other files that it depends on.
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
OTHER_FILES = (TOKENIZER, "special_tokens_map.json", "added_tokens.json", "merges.txt", "chat_template.jinja",
          "additional_chat_templates/*.jinja")  # fmt: skip


def adapter_tokenizer(tokenizer: Any, folder: str | Path, vocab_size: int) -> Any:
    """The tokenizer of an adapter's rows: the backbone's, or the one in the adapter's folder.

    PEFT users often save the tokenizer with the adapter. If it gives the same tokens as the backbone's, the result is
    the backbone's with the folder's chat template. Otherwise it is the folder's, with its added tokens. A `logging`
    warning lists those beyond `vocab_size`, for which the backbone has no embeddings. Folders with equal files share
    one tokenizer.

    Raises ParaJaxError for files that cannot be read, or a tokenizer with another vocabulary.

    >>> from para_jax import tiny_backbone_path
    >>> from para_jax.convert.tokenizer import load_tokenizer
    >>> tokenizer = load_tokenizer(tiny_backbone_path())
    >>> adapter_tokenizer(tokenizer, tiny_backbone_path(), 4096) is tokenizer  # the same files
    True
    """
    folder = Path(folder)
    if has_tokenizer(folder):
        return _read(tokenizer, _Files(folder), vocab_size)
    _check_added(tokenizer, folder)
    return _with_template(tokenizer, load_chat_template(folder))


def has_tokenizer(folder: str | Path) -> bool:
    return any((Path(folder) / name).is_file() for name in VOCABULARIES)


class _Files:
    """The tokenizer files of a folder. Equal if their names and contents are equal."""

    def __init__(self, folder: Path):
        self.folder = folder
        paths = sorted(path for name in (*VOCABULARIES, *OTHER_FILES) for path in folder.glob(name))
        lines = [f"{path.relative_to(folder)} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in paths]
        self.digest = "\n".join(lines)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Files) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)


@lru_cache(maxsize=256)
def _read(tokenizer: Any, files: _Files, vocab_size: int) -> Any:
    folder = files.folder
    template = load_chat_template(folder)
    if _same_files(tokenizer, folder):
        return _with_template(tokenizer, template)
    try:
        # With the backbone's class, no code of the folder is run. Another class would mean another vocabulary.
        tuned = type(tokenizer).from_pretrained(folder)
    except Exception as error:  # tokenizers raises Exception itself
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ParaJaxError(
            f"the tokenizer in {folder} cannot be read with the backbone's tokenizer class: {reason}. Save it again "
            "from the run, or remove its files to use the backbone's"
        ) from error
    _check_vocabularies(tokenizer, tuned, folder, vocab_size)
    _no_eos_after_prompts(tokenizer, tuned, folder)
    if _tokenization(tokenizer) == _tokenization(tuned):
        return _with_template(tokenizer, tuned.chat_template)
    tuned.chat_template = tuned.chat_template or tokenizer.chat_template
    return tuned


def _same_files(tokenizer: Any, folder: Path) -> bool:
    """Whether the folder has the files that the backbone's tokenizer would save. Reading a large one takes seconds."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    path = folder / "tokenizer.json"
    if backend is None or not path.is_file() or path.read_bytes() != backend.to_str(pretty=True).encode():
        return False
    try:
        fields = json.loads((folder / TOKENIZER).read_text(encoding="utf-8"))
        end, template = fields.get("eos_token"), fields.get("chat_template")
    except (OSError, ValueError, AttributeError):
        return False
    end = end.get("content") if isinstance(end, dict) else end
    several = isinstance(template, list) or (folder / "additional_chat_templates").exists()
    return end == tokenizer.eos_token and not several


def _with_template(tokenizer: Any, template: Any) -> Any:
    if template is None or template == tokenizer.chat_template:
        return tokenizer
    return _with_json_template(tokenizer, json.dumps(template))


@lru_cache(maxsize=256)
def _with_json_template(tokenizer: Any, template: str) -> Any:
    """Equal arguments give the same tokenizer. The template is JSON, because several by name are not hashable."""
    return with_chat_template(tokenizer, json.loads(template))


def _check_vocabularies(tokenizer: Any, tuned: Any, folder: Path, vocab_size: int) -> None:
    """Raises ParaJaxError if the folder's tokenizer is another model's. Warns about tokens without embeddings."""
    ours, theirs = tokenizer.get_vocab(), tuned.get_vocab()
    added = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    # Added tokens may differ; the vocabulary without them must be the same.
    moved = [token for token in ours if token not in added and theirs.get(token) != ours[token]]
    if moved:
        first = min(moved, key=lambda token: ours[token])
        raise ParaJaxError(
            f"the tokenizer in {folder} has another vocabulary than the backbone's: {len(moved)} tokens differ, such "
            f"as {first!r}, which is {theirs.get(first, 'not')} there and {ours[first]} here. The adapter was tuned on "
            "another model: load it as the backbone. If not, remove the tokenizer's files"
        )
    beyond = {t: i for t, i in sorted(theirs.items(), key=lambda item: item[1]) if i >= vocab_size and t not in ours}
    if beyond:
        some = ", ".join(f"{t} ({i})" for t, i in list(beyond.items())[:5]) + (", ..." if len(beyond) > 5 else "")
        logging.getLogger(__name__).warning(
            "%s: its tokenizer has %d tokens for which the backbone, of %d tokens, has no embeddings: %s. Rows with "
            "these tokens are refused. If the model was resized for them (resize_token_embeddings), merge the adapter "
            "in peft and load the merged model as the backbone",
            folder, len(beyond), vocab_size, some,
        )  # fmt: skip


def ends(tokenizer: Any, tuned: Any, config: BackboneConfig) -> tuple[int, ...]:
    """The end tokens for the rows of an adapter with tokenizer `tuned`: its end token, and the backbone's.

    >>> from para_jax import BackboneConfig, tiny_backbone_path
    >>> from para_jax.convert.tokenizer import load_tokenizer
    >>> tokenizer = load_tokenizer(tiny_backbone_path())
    >>> ends(tokenizer, tokenizer, BackboneConfig.from_pretrained(tiny_backbone_path()))
    (0,)
    """
    eos = end_tokens(config, tokenizer)
    if tuned is tokenizer or tuned.eos_token_id in (None, tokenizer.eos_token_id, *eos):
        return eos
    return (tuned.eos_token_id, *eos) if tuned.eos_token_id < config.vocab_size else eos


def _check_added(tokenizer: Any, folder: Path) -> None:
    """Raises ParaJaxError if a folder without a vocabulary adds tokens that the backbone's tokenizer lacks."""
    added: dict[str, int] = {}
    for name in (TOKENIZER, "added_tokens.json"):
        path = folder / name
        try:
            fields = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
            decoder = fields.get("added_tokens_decoder", {}) if name == TOKENIZER else {}
            added |= {token["content"]: int(i) for i, token in decoder.items()} if name == TOKENIZER else fields
        except (ValueError, AttributeError, TypeError, KeyError) as error:
            raise ParaJaxError(f"{path} is damaged: {error!r}; save the tokenizer again, or remove it") from error
    here = tokenizer.get_vocab()
    if lacking := {token: i for token, i in added.items() if here.get(token) != i}:
        some = ", ".join(f"{token!r} ({i})" for token, i in list(lacking.items())[:5])
        raise ParaJaxError(
            f"{folder} adds tokens that the backbone's tokenizer does not have, {some}, but has no tokenizer.json; "
            "save the whole tokenizer there: tokenizer.save_pretrained(folder)"
        )


def _no_eos_after_prompts(tokenizer: Any, tuned: Any, folder: Path) -> None:
    """Stops a tokenizer that was saved with `add_eos_token` from ending every prompt, unless the backbone's does too.

    Raises ParaJaxError if that is not possible.
    """

    def appends_eos(tokenizer: Any) -> bool:
        return tokenizer.eos_token_id is not None and tokenizer("a")["input_ids"][-1:] == [tokenizer.eos_token_id]

    if not appends_eos(tuned) or appends_eos(tokenizer):
        return
    here, there = (getattr(each, "backend_tokenizer", None) for each in (tokenizer, tuned))
    if here is not None and there is not None:
        there.post_processor = here.post_processor
    if appends_eos(tuned):
        raise ParaJaxError(
            f"the tokenizer in {folder} appends its end token to every text, and so to every prompt; save it again "
            "with add_eos_token=False"
        )


def _tokenization(tokenizer: Any) -> tuple[Any, ...]:
    """Everything that a tokenizer's output depends on, and its end token."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return type(tokenizer), tuple(sorted(tokenizer.get_vocab().items())), tokenizer.eos_token
    spec = json.loads(backend.to_str())
    # Saved truncation and padding do not matter: every call sets them.
    return {**spec, "truncation": None, "padding": None}, tokenizer.eos_token
