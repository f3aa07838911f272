"""The adapters on the command line: their folders, their bank, and their tokenizers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from para_jax.errors import ParaJaxError, check_known

if TYPE_CHECKING:
    from para_jax.adapters.bank import AdapterBank
    from para_jax.config import BackboneConfig


def adapter_folders(folder: str | Path, names: Sequence[str] | None = None) -> dict[str, Path]:
    """The folders of the adapters in a folder, by name; all, or those in `names`.

    Raises ParaJaxError for an unknown name, or a folder without adapters, and suggests the right folder.
    """
    from para_jax.adapters.weights import CONFIG, adapters_below

    folder = Path(folder)
    found = {name: folder / name for name in adapters_below(folder)}
    if not found:
        raise ParaJaxError(_no_adapters(folder, CONFIG))
    check_known(f"tenant in {folder}", names or (), found)
    return found if names is None else {name: found[name] for name in names}


def _no_adapters(folder: Path, config: str) -> str:
    """An error message for a folder without adapters, with the folder to give instead."""
    if not folder.is_dir():
        what = f"is a file; give the folder that {folder.name} is in" if folder.exists() else "is not a folder"
        return (
            f"--adapters {folder} {what}; give the --out folder of para-jax finetune, or one with NAME/ for each tenant"
        )
    if (folder / config).is_file():
        path = folder.resolve()
        return (
            f"{folder} is an adapter itself; --adapters takes the folder that contains adapters: --adapters "
            f"{path.parent}, with {path.name} as the tenant"
        )
    if inner := sorted({path.parent.parent for path in folder.glob(f"*/*/{config}")}):
        others = f" (or {', '.join(map(str, inner[1:5]))})" if len(inner) > 1 else ""
        return f"{folder} holds no adapters, but the folders in it do; give --adapters {inner[0]}{others}"
    return f"{folder} holds no adapters; give the --out folder of para-jax finetune, or one with NAME/ for each tenant"


def load_bank(
    folder: str | Path | None, names: Sequence[str], config: BackboneConfig, check_finite: bool = True
) -> AdapterBank | None:
    """The bank of the named tenants; None without a folder or names."""
    from para_jax import AdapterBank

    if folder is None or not names:
        return None
    return AdapterBank.load(adapter_folders(folder, names), config, check_finite=check_finite)


class RowTokenizers:
    """The tokenizers of rows: the backbone's, unless an adapter was saved with its own. Each folder is read once."""

    def __init__(self, tokenizer: Any, folder: str | Path | None, vocab_size: int):
        self.tokenizer, self.folder, self.vocab_size = tokenizer, folder, vocab_size
        self._cache: dict[str, Any] = {}

    def get(self, tenants: Sequence[str], chat: bool = True) -> Any:
        """The tokenizer of a row with these tenants.

        Raises ParaJaxError if their tokenizers differ, or for a chat, if their chat templates differ.
        """
        if self.folder is None or not tenants:
            return self.tokenizer
        tokenizers = [self._load(name) for name in tenants]
        if len({id(getattr(x, "backend_tokenizer", x)) for x in tokenizers}) > 1:
            raise ParaJaxError(f"{' and '.join(tenants)} have different tokenizers; use a separate row for each")
        if chat and len({json.dumps(x.chat_template) for x in tokenizers}) > 1:
            raise ParaJaxError(
                f"{' and '.join(tenants)} have different chat templates; give prompts instead of messages"
            )
        return tokenizers[0]

    def _load(self, name: str) -> Any:
        from para_jax.convert.adapter_tokenizer import adapter_tokenizer

        if name not in self._cache:
            folder = Path(self.folder or "") / name
            self._cache[name] = adapter_tokenizer(self.tokenizer, folder, self.vocab_size)
        return self._cache[name]
