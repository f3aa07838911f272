"""The adapters that verbs are given: their folders, their bank, and the tokenizers that are kept with them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from para_jax.errors import ParaJaxError, unknown

if TYPE_CHECKING:
    from para_jax.adapters.bank import AdapterBank
    from para_jax.config import BackboneConfig


def adapter_folders(folder: str | Path, names: Sequence[str] | None = None) -> dict[str, Path]:
    """The adapters below a folder by name, all or those named.

    Raises ParaJaxError for a name that is not there, or a folder without adapters, and says which folder is meant.
    """
    from para_jax.adapters.weights import CONFIG, adapters_below

    folder = Path(folder)
    there = {name: folder / name for name in adapters_below(folder)}
    if not there:
        raise ParaJaxError(_no_adapters(folder, CONFIG))
    for name in names or ():
        if name not in there:
            raise unknown(f"tenant in {folder}", name, there)
    return there if names is None else {name: there[name] for name in names}


def _no_adapters(folder: Path, config: str) -> str:
    """What a folder without adapters is instead, and what to give."""
    if not folder.is_dir():
        what = f"is a file; give the folder that {folder.name} is in" if folder.exists() else "is no folder"
        return (
            f"--adapters {folder} {what}; give the --out folder of para-jax finetune, or one with NAME/ for each tenant"
        )
    if (folder / config).is_file():
        whole = folder.resolve()
        return (
            f"{folder} is an adapter itself; --adapters takes the folder that adapters are in: --adapters "
            f"{whole.parent}, with {whole.name} as the tenant"
        )
    if inner := sorted({path.parent.parent for path in folder.glob(f"*/*/{config}")}):
        others = f" (or {', '.join(map(str, inner[1:5]))})" if len(inner) > 1 else ""
        return f"{folder} holds no adapters, but the folders in it do; give --adapters {inner[0]}{others}"
    return f"{folder} holds no adapters; give the --out folder of para-jax finetune, or one with NAME/ for each tenant"


def load_bank(
    folder: str | Path | None, names: Sequence[str], config: BackboneConfig, check_finite: bool = True
) -> AdapterBank | None:
    """The bank of the tenants that are named, or None without a folder or a name."""
    from para_jax import AdapterBank

    if folder is None or not names:
        return None
    return AdapterBank.load(adapter_folders(folder, names), config, check_finite=check_finite)


class RowTokenizers:
    """The tokenizers of rows: the backbone's, unless one is kept with a row's adapters. Each folder is read once."""

    def __init__(self, tokenizer: Any, folder: str | Path | None, vocab_size: int):
        self.tokenizer, self.folder, self.vocab_size = tokenizer, folder, vocab_size
        self._kept: dict[str, Any] = {}

    def of(self, tenants: Sequence[str], chat: bool = True) -> Any:
        """Of a row of these tenants.

        Raises ParaJaxError if they do not have the same: for a chat the same template, for a prompt the same tokens.
        """
        if self.folder is None or not tenants:
            return self.tokenizer
        own = [self._of(name) for name in tenants]
        if len({id(getattr(x, "backend_tokenizer", x)) for x in own}) > 1:
            raise ParaJaxError(f"{' and '.join(tenants)} have different tokenizers; give each a row of its own")
        if chat and len({json.dumps(x.chat_template) for x in own}) > 1:
            raise ParaJaxError(
                f"{' and '.join(tenants)} have different chat templates; give prompts instead of messages"
            )
        return own[0]

    def _of(self, name: str) -> Any:
        from para_jax.convert.adapter_tokenizer import adapter_tokenizer

        if name not in self._kept:
            folder = Path(self.folder or "") / name
            self._kept[name] = adapter_tokenizer(self.tokenizer, folder, self.vocab_size)
        return self._kept[name]
