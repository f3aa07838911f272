"""Loads a checkpoint's tokenizer with transformers, and finds its end tokens."""

from __future__ import annotations

import copy
import logging
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from para_jax.config import CONFIG, GENERATION, BackboneConfig, checkpoint_folder, read_json
from para_jax.errors import ParaJaxError, one_line
from para_jax.families.reading import architecture_from_hf

FILES = ["*.json", "tokenizer*", "*.jinja"]
FAST, SENTENCEPIECE = "tokenizer.json", "tokenizer.model"
SETTINGS, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
PROCESSORS = "chat_template.json"  # written by processors of transformers 4; tokenizers do not read it
OTHER_FILES = (FAST, "vocab.json", "tekken.json", "*.tiktoken", "tiktoken.model", "spiece.model", "spm.model")
# The packages that read tokenizer.model, with their modules.
READERS = {
    "sentencepiece": {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"},
    "tiktoken": {"tiktoken": "tiktoken"},
}
MIN_TOKENS = 10  # a tokenizer class without files has fewer
JSON_FILES = ("tokenizer_config.json", FAST, "special_tokens_map.json", "added_tokens.json", "vocab.json")


def load_tokenizer(path_or_hub_id: str | Path) -> Any:
    """Loads a transformers tokenizer. Python code in the checkpoint is not run.

    Raises ParaJaxError if config.json is not supported, or the tokenizer is missing or damaged.

    >>> from para_jax import tiny_backbone_path
    >>> load_tokenizer(tiny_backbone_path()).decode([0])
    '<|endoftext|>'
    """
    from transformers import CONFIG_MAPPING, AutoTokenizer

    folder = checkpoint_folder(path_or_hub_id, FILES)
    fields = read_json(folder / CONFIG)
    # config.json is checked here, and transformers gets a config with only the tokenizer's fields.
    architecture_from_hf(fields, str(path_or_hub_id))
    config_class: Any = CONFIG_MAPPING[fields["model_type"]]
    config = config_class(tokenizer_class=fields.get("tokenizer_class"), name_or_path=str(folder))
    problem = _missing(folder)
    if problem:
        raise ParaJaxError(f"{path_or_hub_id}: {problem}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=False)
    except Exception as error:  # damaged files raise many kinds of exceptions
        raise ParaJaxError(f"{path_or_hub_id}: {_damage(folder, error)}") from error
    if tokenizer.vocab_size < MIN_TOKENS and not _vocabulary(folder):
        raise ParaJaxError(f"{path_or_hub_id}: its tokenizer cannot be read: {FAST} has no vocabulary")
    if tokenizer.chat_template is None:
        return with_chat_template(tokenizer, processor_template(folder))
    return tokenizer


def processor_template(folder: Path) -> str | None:
    """The processor's chat template, if the tokenizer of the checkpoint has none."""
    if (folder / TEMPLATE).is_file() or not (folder / PROCESSORS).is_file():
        return None
    settings = read_json(folder / SETTINGS) if (folder / SETTINGS).is_file() else {}
    template = read_json(folder / PROCESSORS).get("chat_template")
    return template if isinstance(template, str) and not settings.get("chat_template") else None


def _missing(folder: Path) -> str:
    """What is missing to read the tokenizer; "" if nothing is."""
    if any(True for pattern in OTHER_FILES for _ in folder.glob(pattern)):
        return ""
    if not (folder / SENTENCEPIECE).is_file():
        return f"it has no tokenizer, neither {FAST} nor {SENTENCEPIECE}; copy the tokenizer's files into its folder"
    reader = "sentencepiece" if _is_sentencepiece(folder) else "tiktoken"
    missing = [package for package, module in READERS[reader].items() if not _installed(module)]
    if missing:
        return f"its tokenizer is only {SENTENCEPIECE}, which {reader} reads; pip install {' '.join(missing)}"
    return ""


def _is_sentencepiece(folder: Path) -> bool:
    """Whether tokenizer.model is a sentencepiece protobuf, and not tiktoken's text."""
    with (folder / SENTENCEPIECE).open("rb") as file:
        return file.read(1) == b"\n"


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package is missing
        return False


def _vocabulary(folder: Path) -> Any:
    """The vocabulary in tokenizer.json. Without it, classes of transformers have a few default tokens."""
    model = read_json(folder / FAST).get("model") if (folder / FAST).is_file() else {"vocab": "of another file"}
    return model.get("vocab") if isinstance(model, dict) else None


def _damage(folder: Path, error: Exception) -> str:
    """The reason that a tokenizer could not be read: its first damaged file, or transformers' error."""
    from tokenizers import Tokenizer

    if "trust_remote_code" in str(error):
        fix = f"take auto_map out to use {FAST}" if (folder / FAST).is_file() else f"save the tokenizer as {FAST}"
        return f"its tokenizer is custom Python code (auto_map in tokenizer_config.json), which is never run; {fix}"
    for name in JSON_FILES:
        if (folder / name).is_file():
            try:
                read_json(folder / name)
            except ParaJaxError as damage:
                return f"its tokenizer cannot be read: {damage}"
    if not _vocabulary(folder):
        return f"its tokenizer cannot be read: {FAST} has no vocabulary"
    if (folder / FAST).is_file():
        try:
            Tokenizer.from_file(str(folder / FAST))
        except Exception as damage:  # tokenizers raises Exception itself
            return f"its tokenizer cannot be read: {FAST} is damaged: {one_line(damage)}"
    # transformers tries tiktoken if sentencepiece fails.
    if "tiktoken" in str(error) and (folder / SENTENCEPIECE).is_file() and _is_sentencepiece(folder):
        return f"its tokenizer cannot be read: {SENTENCEPIECE} is damaged"
    return f"its tokenizer cannot be read: transformers raised {type(error).__name__}: {one_line(error)}"


def end_tokens(config: BackboneConfig, tokenizer: Any) -> tuple[int, ...]:
    """The ids that end a text. The first is appended to responses that do not end with one.

    They are those of generation_config.json, or else of config.json, or else the tokenizer's. One `logging` warning per
    backbone reports that the files have none, or that the tokenizer's is different.

    >>> from para_jax import tiny_backbone_path
    >>> end_tokens(BackboneConfig.from_pretrained(tiny_backbone_path()), load_tokenizer(tiny_backbone_path()))
    (0,)
    """

    def shown(token: int) -> str:
        return f"{token} ({tokenizer.convert_ids_to_tokens(token)!r})" if tokenizer is not None else str(token)

    ids = tuple(token for token in config.eos_token_ids if 0 <= token < config.vocab_size)
    beyond = [str(token) for token in config.eos_token_ids if token not in ids]
    eos = getattr(tokenizer, "eos_token_id", None)
    if eos is not None and eos >= config.vocab_size:
        beyond.append(shown(eos))
        eos = None
    line = f"end token {', '.join(beyond)} is not in the vocabulary of {config.vocab_size} and is not used; "
    line = line if beyond else ""
    if ids and eos is not None and eos not in ids:
        line += f"its files end texts with {', '.join(map(shown, ids))}, its tokenizer with {shown(eos)}; "
    elif not ids and eos is not None:
        line += f"neither {GENERATION} nor {CONFIG} names an end token; "
    elif not ids:
        line += (
            f"neither {GENERATION}, {CONFIG} nor the tokenizer names an end token, so responses get none and generated "
            "texts end at max_new_tokens only"
        )
    used = ids or (() if eos is None else (eos,))
    if line:
        last = f"{', '.join(map(shown, used))} {'is' if len(used) == 1 else 'are'} used" if used else ""
        _warn_once(f"{config.name or 'the backbone'}: {line}{last}")
    return used


@cache
def _warn_once(line: str) -> None:
    logging.getLogger(__name__).warning("%s", line)


def check_vocabulary(tokenizer: Any, vocab_size: int) -> None:
    """Raises ParaJaxError if the tokenizer's vocabulary without added tokens is larger than the backbone's.

    Added tokens may be beyond the backbone's vocabulary (Gemma 3 has one for images). Rows with one are refused.
    """
    if tokenizer.vocab_size > vocab_size:
        raise ParaJaxError(
            f"the tokenizer's vocabulary has {tokenizer.vocab_size} tokens, and the backbone's {vocab_size}; they are "
            "not of the same model"
        )


def with_chat_template(tokenizer: Any, template: str | None) -> Any:
    """The tokenizer with another chat template; the same tokenizer if `template` is None.

    >>> from para_jax import tiny_backbone_path
    >>> tokenizer = load_tokenizer(tiny_backbone_path())
    >>> shouting = with_chat_template(tokenizer, "{{ messages[0].content | upper }}")
    >>> shouting.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    'HELLO'
    >>> with_chat_template(tokenizer, None) is tokenizer
    True
    """
    if template is None:
        return tokenizer
    other = copy.copy(tokenizer)
    other.chat_template = template
    return other
