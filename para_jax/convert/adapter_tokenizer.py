"""The tokenizer of an adapter's rows: the backbone's, or the one that is kept in the adapter's folder."""

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

# What a tokenizer can be read from, and what else says how it works.
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
BESIDE = (TOKENIZER, "special_tokens_map.json", "added_tokens.json", "merges.txt", "chat_template.jinja",
          "additional_chat_templates/*.jinja")  # fmt: skip


def adapter_tokenizer(tokenizer: Any, folder: str | Path, vocab_size: int) -> Any:
    """The tokenizer of an adapter's rows: the backbone's, or the one that is kept in the adapter's folder.

    PEFT's users save the tokenizer beside the adapter. If it does what the backbone's does it is the backbone's, with
    the folder's chat template; else it is the folder's, with its added tokens, for which the backbone, of `vocab_size`
    tokens, needs embeddings: a warning of `logging` lists those that it lacks. Folders with the same files have one
    tokenizer.

    Raises ParaJaxError for files that cannot be read, or a tokenizer of another vocabulary.

    >>> from para_jax import tiny_backbone_path
    >>> from para_jax.convert.tokenizer import load_tokenizer
    >>> tokenizer = load_tokenizer(tiny_backbone_path())
    >>> adapter_tokenizer(tokenizer, tiny_backbone_path(), 4096) is tokenizer  # the same files
    True
    """
    folder = Path(folder)
    if has_tokenizer(folder):
        return _of_files(tokenizer, _Files(folder), vocab_size)
    _check_added(tokenizer, folder)
    return _with(tokenizer, load_chat_template(folder))


def has_tokenizer(folder: str | Path) -> bool:
    """Whether there is a tokenizer in an adapter's folder."""
    return any((Path(folder) / name).is_file() for name in VOCABULARIES)


class _Files:
    """The tokenizer files of a folder, equal to those of another with the same contents."""

    def __init__(self, folder: Path):
        self.folder = folder
        paths = sorted(path for name in (*VOCABULARIES, *BESIDE) for path in folder.glob(name))
        named = [f"{path.relative_to(folder)} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in paths]
        self.digest = "\n".join(named)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Files) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)


@lru_cache(maxsize=256)
def _of_files(tokenizer: Any, files: _Files, vocab_size: int) -> Any:
    folder = files.folder
    template = load_chat_template(folder)
    if _same_files(tokenizer, folder):
        return _with(tokenizer, template)
    try:
        # The backbone's class: what is of another one is of another vocabulary, and no code of the folder is run.
        own = type(tokenizer).from_pretrained(folder)
    except Exception as error:  # of the tokenizers library, which raises Exception itself
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ParaJaxError(
            f"the tokenizer in {folder} cannot be read as one of the backbone's kind: {reason}. Save it again from the "
            "run, or remove its files to use the backbone's"
        ) from error
    _check_vocabularies(tokenizer, own, folder, vocab_size)
    _end_no_prompt(tokenizer, own, folder)
    if _works_as(tokenizer) == _works_as(own):
        return _with(tokenizer, own.chat_template)
    own.chat_template = own.chat_template or tokenizer.chat_template
    return own


def _same_files(tokenizer: Any, folder: Path) -> bool:
    """Whether the folder has what the backbone's tokenizer saves: to read a large one takes seconds."""
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


def _with(tokenizer: Any, template: Any) -> Any:
    if template is None or template == tokenizer.chat_template:
        return tokenizer
    return _speaking(tokenizer, json.dumps(template))


@lru_cache(maxsize=256)
def _speaking(tokenizer: Any, template: str) -> Any:
    """With a chat template (in JSON, for there may be several by name), the same one each time."""
    return with_chat_template(tokenizer, json.loads(template))


def _check_vocabularies(tokenizer: Any, own: Any, folder: Path, vocab_size: int) -> None:
    """Raises ParaJaxError if the folder's tokenizer is another model's. Says which tokens have no embeddings here."""
    ours, theirs = tokenizer.get_vocab(), own.get_vocab()
    added = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    # Tokens that were added may be others, or elsewhere; the vocabulary proper has to be the same.
    own_words = [token for token in ours if token not in added]
    moved = [token for token in own_words if theirs.get(token) != ours[token]]
    if moved:
        first = min(moved, key=lambda token: ours[token])
        raise ParaJaxError(
            f"the tokenizer in {folder} has another vocabulary than the backbone's: {len(moved)} tokens differ, such "
            f"as {first!r}, which is {theirs.get(first, 'not')} there and {ours[first]} here. The "
            "adapter was tuned on another model: load that as the backbone. If it was not, remove the tokenizer's files"
        )
    beyond = {t: i for t, i in sorted(theirs.items(), key=lambda item: item[1]) if i >= vocab_size and t not in ours}
    if beyond:
        some = ", ".join(f"{t} ({i})" for t, i in list(beyond.items())[:5]) + (", ..." if len(beyond) > 5 else "")
        logging.getLogger(__name__).warning(
            "%s: its tokenizer has %d tokens for which the backbone, of %d tokens, has no embeddings: %s. Rows with "
            "one of them are refused. If the model was resized for them (resize_token_embeddings), merge the adapter "
            "in peft and load the merged model as the backbone",
            folder, len(beyond), vocab_size, some,
        )  # fmt: skip


def ends(tokenizer: Any, own: Any, config: BackboneConfig) -> tuple[int, ...]:
    """The tokens that end the rows of an adapter whose tokenizer is `own`: its end token, and the backbone's.

    >>> from para_jax import BackboneConfig, tiny_backbone_path
    >>> from para_jax.convert.tokenizer import load_tokenizer
    >>> tokenizer = load_tokenizer(tiny_backbone_path())
    >>> ends(tokenizer, tokenizer, BackboneConfig.from_pretrained(tiny_backbone_path()))
    (0,)
    """
    eos = end_tokens(config, tokenizer)
    if own is tokenizer or own.eos_token_id in (None, tokenizer.eos_token_id, *eos):
        return eos
    return (own.eos_token_id, *eos) if own.eos_token_id < config.vocab_size else eos


def _check_added(tokenizer: Any, folder: Path) -> None:
    """Raises ParaJaxError for tokens that a folder adds to a vocabulary that it does not have."""
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
            f"{folder} adds tokens that the backbone's tokenizer does not have, {some}, and has no tokenizer.json to "
            "use them with; save the whole tokenizer there: tokenizer.save_pretrained(folder)"
        )


def _end_no_prompt(tokenizer: Any, own: Any, folder: Path) -> None:
    """Some train with a tokenizer that ends every text (`add_eos_token`); prompts begin and end as the backbone's.

    Raises ParaJaxError if it cannot be had without.
    """

    def ends_texts(spoken: Any) -> bool:
        return spoken.eos_token_id is not None and spoken("a")["input_ids"][-1:] == [spoken.eos_token_id]

    if not ends_texts(own) or ends_texts(tokenizer):
        return
    here, there = (getattr(spoken, "backend_tokenizer", None) for spoken in (tokenizer, own))
    if here is not None and there is not None:
        there.post_processor = here.post_processor
    if ends_texts(own):
        raise ParaJaxError(
            f"the tokenizer in {folder} puts its end token behind every text, and so behind every prompt; save it "
            "again with add_eos_token=False"
        )


def _works_as(tokenizer: Any) -> tuple[Any, ...]:
    """All that a tokenizer's tokens depend on, and how texts end."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return type(tokenizer), tuple(sorted(tokenizer.get_vocab().items())), tokenizer.eos_token
    spec = json.loads(backend.to_str())
    # How a run cut and padded its batches is kept with it; calls say that anew.
    return {**spec, "truncation": None, "padding": None}, tokenizer.eos_token
